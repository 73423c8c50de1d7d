"""AllNC: HyCon for the activations, P2P for means and classifier, GBBN for the classification, in one module.

    L = η CE + (1 - η) ( L_reb + w_ww P2P(B, B) ) + α ( w_h HyCon + w_mm P2P(A, A) + w_mw P2P(A, B) )

A are the centred unit class means in feature space, B the unit classifier vectors, centred if p2p_centre says so.

Legend: V views, N = V·B activations, F features, D columns of the projection, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from allnc._checks import check_integer
from allnc.config import LossConfig
from allnc.losses.base import (
    IGNORE_INDEX,
    ClassMeans,
    LossOutput,
    backend_for,
    check_branch,
    check_config,
    checked_counts,
    checked_logits,
)
from allnc.losses.gbbn import GBBN
from allnc.losses.longtail import long_tail_loss
from allnc.ops._common import check_floating, check_labels, check_shape, validated_labels
from allnc.ops.all_around import all_around
from allnc.ops.hycon_cosine import check_views, hycon_cosine
from allnc.ops.p2p.pairings import PAIRINGS, p2p_pairings
from allnc.ops.ranks import Ranks, scale_gradient

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class AllNC(nn.Module):
    """All-around neural collapse: activations, class means and classifier vectors in one loss.

    The class means of feature space serve P2P and cosine HyCon; softmax HyCon has its own in projection
    space. HyCon and P2P are one call of `allnc.all_around`; terms of weight 0 are not computed. With more classes than
    F + 1 there is no simplex, and unless the configuration says otherwise P2P is of the class means alone.

    Args:
        class_counts: [C] training images of each class, >= 0.
        feature_dim: F, width of the features.
        projection_dim: D, width of the projections z; for softmax HyCon only.
        config: every setting of the loss; `LossConfig` explains them.
        classifier_scale: factor of the cosines that are the logits, None for a linear classifier; for LDAM's margins.
        group: the batch is that of all ranks of this process group, of which each brings some rows, or none. All
            ranks must call forward together. The output is that of one process with all rows, and so is the *average*
            of the ranks' gradients, which DistributedDataParallel forms. One synchronisation a step.

    Raises:
        TypeError, ValueError: an argument out of its range.

    Example:
        >>> import torch
        >>> import torch.nn.functional as F
        >>> loss = AllNC([100, 10, 5], feature_dim=16, projection_dim=8)
        >>> classifier, projection = torch.nn.Linear(16, 3), torch.nn.Linear(16, 8)
        >>> features = torch.randn(8, 16, requires_grad=True)  # four images, two views: rows 0-3 and 4-7
        >>> labels = torch.tensor([0, 0, 1, 2, 0, 0, 1, 2])
        >>> branch = (classifier(features), labels)
        >>> z = F.normalize(projection(features), dim=1)
        >>> output = loss(features, labels, classifier.weight, branch, branch, progress=0.1, z=z)
        >>> output.total.backward()
        >>> sorted(output.parts)
        ['cls', 'eta', 'hycon', 'p2p_duality', 'p2p_means', 'p2p_weights', 'rebalance', 'uniform']

    Source: ours, after AllNC: Zhang et al., All-around Neural Collapse for Imbalanced Classification, IEEE
        TKDE 2025 (arXiv 2408.07253).
    """

    def __init__(
        self,
        class_counts: Tensor | Sequence[int],
        feature_dim: int,
        projection_dim: int | None = None,
        config: LossConfig | None = None,
        *,
        classifier_scale: float | None = None,
        group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        config = LossConfig() if config is None else config
        check_config(config, ("allnc",))
        num_classes = len(checked_counts(class_counts))
        check_integer("feature_dim", feature_dim, minimum=1)
        self.config, self.group, self.num_classes = config, group, num_classes
        self.gbbn = GBBN(
            class_counts,
            rebalance=long_tail_loss(
                config.rebalance,
                class_counts,
                gamma=config.focal_gamma,
                tau=config.tau,
                label_smoothing=config.label_smoothing,
                classifier_scale=classifier_scale,
                group=group,
            ),
            gamma=config.gamma,
            horizon=config.horizon,
            group=group,
        )
        self.p2p_means, self.p2p_weights, self.p2p_duality = config.p2p(num_classes, feature_dim)
        scales = (self.p2p_means * config.alpha, self.p2p_weights, self.p2p_duality * config.alpha)
        self.pairings = [pairing for pairing, scale in zip(PAIRINGS, scales, strict=True) if scale > 0]

        def class_means(dim: int) -> ClassMeans:
            return ClassMeans(
                num_classes,
                dim,
                momentum=config.ema_momentum,
                gradient=config.mean_gradient,
                backend=config.backend,
            )

        self.feature_means = class_means(feature_dim) if self.pairings or config.contrast == "cosine" else None
        self.projection_means = None
        if config.contrast == "softmax":
            if projection_dim is None:
                raise ValueError(
                    "projection_dim must be given with hycon='softmax'; got None. It is the width of z; "
                    "LossConfig(hycon='none') has no contrast, and reads no z"
                )
            check_integer("projection_dim", projection_dim, minimum=1)
            self.projection_means = class_means(projection_dim)

    def trains_uniform(self, progress: float) -> bool:
        """Whether the uniform branch has a part in the loss at this share of training."""
        return self.gbbn.eta(progress) > 0

    def forward(
        self,
        features: Tensor,
        labels: Tensor,
        weight: Tensor,
        uniform: tuple[Tensor, Tensor],
        rebalance: tuple[Tensor, Tensor],
        progress: float,
        *,
        z: Tensor | None = None,
        h: Tensor | None = None,
        num_views: int = 2,
    ) -> LossOutput:
        """Update the class means (in training mode) and return the whole loss.

        Args:
            features: [N, F] floating, the classifier's input; view-major rows (v·B + b).
            labels: [N] int64 in [0, C), -100 for rows that take no part.
            weight: [C, F] floating, weight of the (re-balancing) classifier.
            uniform: logits [N, C] and labels [N] of the uniform branch.
            rebalance: logits [N', C] and labels [N'] of the re-balancing branch.
            progress: share of training done, in [0, 1].
            z: [N, D] unit rows, for softmax HyCon; float16 and bfloat16 are multiplied as they are.
            h: [N, F] predictor output, for cosine HyCon.
            num_views: V, a divisor of N (cosine HyCon).

        Returns:
            `LossOutput` with parts "cls", "uniform", "rebalance", "eta", "p2p_means", "p2p_weights",
            "p2p_duality" and, unless hycon is "none", "hycon"; all before their weights.

        Raises:
            TypeError, ValueError: z or h missing, or an argument an op cannot take.
            RuntimeError: another rank's arguments are wrong.
        """
        config = self.config

        def check() -> None:
            check_branch("uniform", uniform)
            check_branch("rebalance", rebalance)
            self._check(features, labels, weight, z, h)
            self.gbbn.eta(progress)
            if self.group is not None:  # found later, these would leave the other ranks waiting
                if config.contrast == "cosine":
                    check_views(labels, num_views)
                views = num_views if config.contrast == "cosine" else 1
                validated_labels(labels, self.num_classes, IGNORE_INDEX, views)
                checked_logits(*uniform, self.num_classes)
                checked_logits(*rebalance, self.num_classes)

        def facts() -> dict[str, float | None]:
            return {
                "F": features.shape[1],
                "D": None if z is None else z.shape[1],
                "bytes of a feature": features.element_size(),
                "bytes of an element of z": None if z is None else z.element_size(),
                "progress": progress,
            }

        ranks = None
        if self.group is None:
            check()
        else:
            ranks = Ranks(self.group, check, lambda: len(features), facts)
        output = self.gbbn(*uniform, *rebalance, progress)
        hycon, p2p = self._geometry(features, labels, weight, z, h, num_views, ranks)

        eta = self.gbbn.eta(progress)
        on_means = config.hycon_weight * hycon + self.p2p_means * p2p[0] + self.p2p_duality * p2p[2]
        total = output.total + (1 - eta) * self.p2p_weights * p2p[1] + config.alpha * on_means
        if ranks is not None:
            total = scale_gradient(total, ranks.size)  # gradients are averaged where shares have to be added
        p2p = p2p.detach()
        parts = {**output.parts, "p2p_means": p2p[0], "p2p_weights": p2p[1], "p2p_duality": p2p[2]}
        if config.contrast != "none":
            parts["hycon"] = hycon.detach()
        return LossOutput(total, parts)

    def _geometry(
        self,
        features: Tensor,
        labels: Tensor,
        weight: Tensor,
        z: Tensor | None,
        h: Tensor | None,
        num_views: int,
        ranks: Ranks | None,
    ) -> tuple[Tensor, Tensor]:
        """HyCon and P2P's pairings (means, weights, duality) [3]."""
        config = self.config
        means, seen = weight, None
        if self.feature_means is not None:
            means, seen = self.feature_means.update(features, labels, ranks)
        options = {"pairings": self.pairings, "target": config.p2p_target, "centre_weights": config.p2p_centre}
        if self.projection_means is not None:
            assert z is not None
            projected, seen = self.projection_means.update(z, labels, ranks)
            hycon, *p2p = all_around(
                z,
                labels,
                projected,
                means,
                weight,
                seen=seen,
                temperature=config.temperature,
                mean_weight=config.mean_weight,
                balance=config.balance,
                p2p_temperature=config.p2p_temperature,
                ignore_index=IGNORE_INDEX,
                group=ranks,
                backend=backend_for(config.backend, "cpp", "triton"),
                **options,
            )
            return hycon, torch.stack(p2p)
        p2p = weight.new_zeros(3)
        if self.pairings:
            backend = backend_for(config.backend, "cpp", "triton")
            p2p = p2p_pairings(means, weight, seen=seen, temperature=config.p2p_temperature, backend=backend, **options)
            p2p = p2p if ranks is None else ranks.replicated(p2p)
        if config.contrast == "none":
            return p2p.new_zeros(()), p2p
        assert h is not None
        settings = {"num_views": num_views, "seen": seen, "ignore_index": IGNORE_INDEX, "group": self.group}
        return hycon_cosine(h, features, labels, means, **settings), p2p

    def _check(self, features: Tensor, labels: Tensor, weight: Tensor, z: Tensor | None, h: Tensor | None) -> None:
        check_floating("features", features)
        dim = "F" if self.feature_means is None else self.feature_means.dim
        check_shape("features", features, ("N", dim))
        check_labels(labels, len(features))
        check_floating("weight", weight)
        check_shape("weight", weight, (self.num_classes, features.shape[1]))
        if self.projection_means is not None:
            if z is None:
                raise ValueError("z must be given with hycon='softmax'; got None. Give the model a projection head")
            check_floating("z", z)
            check_shape("z", z, (len(features), self.projection_means.dim))
        if self.config.contrast == "cosine":
            if h is None:
                raise ValueError("h must be given with hycon='cosine'; got None. Give the model a predictor head")
            check_floating("h", h)
            check_shape("h", h, (len(features), features.shape[1]))

    def extra_repr(self) -> str:
        config = self.config
        p2p = f"p2p=({self.p2p_means:g}, {self.p2p_weights:g}, {self.p2p_duality:g})"  # means, classifier, duality
        hycon = f"hycon={config.contrast!r}, hycon_weight={config.hycon_weight}"
        return f"{hycon}, {p2p}, p2p_centre={config.p2p_centre}, alpha={config.alpha}"
