"""AllNC: HyCon for the activations, P2P for means and classifier, GBBN for the classification, in one module.

    L = η CE + (1 - η) ( L_reb + w_ww P2P(B, B) ) + α ( w_h HyCon + w_mm P2P(A, A) + w_mw P2P(A, B) )

A are the centred unit class means in feature space, B the centred unit classifier vectors.

Legend: V views, N = V·B activations, F features, D columns of the projection, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from allnc.losses.base import (
    IGNORE_INDEX,
    LossOutput,
    MeanGradient,
    check_integer,
    check_interval,
    checked_counts,
)
from allnc.losses.gbbn import GBBN
from allnc.losses.hycon import HyCon
from allnc.losses.longtail import LongTail
from allnc.losses.p2p import P2P
from allnc.ops._common import Backend, check_choice
from allnc.ops.contrast import Balance
from allnc.ops.hycon_cosine import hycon_cosine
from allnc.ops.p2p import Target


class AllNC(nn.Module):
    """All-around neural collapse: activations, class means and classifier vectors in one loss.

    The class means of feature space serve P2P and cosine HyCon; softmax HyCon has its own in projection
    space.

    Args:
        class_counts: [C] training images of each class, >= 0.
        feature_dim: F, width of the features.
        projection_dim: D, width of the projections z (softmax HyCon).
        hycon: "softmax" (forward needs z), "cosine" (forward needs h) or "none".
        hycon_weight: w_h >= 0, weight of HyCon beside P2P on the means.
        alpha: α >= 0, weight of HyCon and P2P on the means against classification.
        temperature: τ > 0 of softmax HyCon.
        mean_weight: κ >= 0, weight of the own class mean among softmax HyCon's positives.
        balance: column weights of softmax HyCon, "class" or "none".
        ema_momentum: share of the old class mean kept at each step, in [0, 1).
        mean_gradient: gradient through the class means, "exact" or "straight_through".
        p2p_means, p2p_weights, p2p_duality: w_mm, w_ww, w_mw >= 0.
        p2p_target: "etf", "softmax" or "auto".
        p2p_temperature: τ > 0 of P2P's softmax target.
        rebalance: loss of the re-balancing branch, by name or as a module.
        gamma: γ > 0, shape of the schedule.
        horizon: share of training after which the re-balancing branch alone remains, in [0, 1].
        backend: "auto", "eager", "cpp", "triton" or "cuda", for those ops that have it; the others use
            "auto".

    Raises:
        TypeError, ValueError: an argument out of its range.

    Example:
        >>> import torch
        >>> loss = AllNC([100, 10, 5], feature_dim=16, projection_dim=8, hycon="cosine")
        >>> classifier, predictor = torch.nn.Linear(16, 3), torch.nn.Linear(16, 16)
        >>> features = torch.randn(8, 16, requires_grad=True)  # four images, two views: rows 0-3 and 4-7
        >>> labels = torch.tensor([0, 0, 1, 2, 0, 0, 1, 2])
        >>> branch = (classifier(features), labels)
        >>> output = loss(
        ...     features, labels, classifier.weight, branch, branch, progress=0.1, h=predictor(features)
        ... )
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
        projection_dim: int,
        *,
        hycon: Literal["softmax", "cosine", "none"] = "cosine",
        hycon_weight: float = 1.0,
        alpha: float = 1.0,
        temperature: float = 0.1,
        mean_weight: float = 1.0,
        balance: Balance = "class",
        ema_momentum: float = 0.9,
        mean_gradient: MeanGradient = "straight_through",
        p2p_means: float = 1.0,
        p2p_weights: float = 1.0,
        p2p_duality: float = 1.0,
        p2p_target: Target = "auto",
        p2p_temperature: float = 0.1,
        rebalance: LongTail | nn.Module = "logit_adjusted",
        gamma: float = 2.0,
        horizon: float = 0.3,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        num_classes = len(checked_counts(class_counts))
        check_choice("hycon", hycon, ("softmax", "cosine", "none"))
        check_interval("hycon_weight", hycon_weight, 0)
        check_interval("alpha", alpha, 0)
        check_interval("ema_momentum", ema_momentum, 0, 1, open_high=True)
        check_integer("feature_dim", feature_dim, minimum=1)
        check_integer("projection_dim", projection_dim, minimum=1)
        check_choice("mean_gradient", mean_gradient, ("exact", "straight_through"))
        self.form, self.hycon_weight, self.alpha = hycon, hycon_weight, alpha
        self.gbbn = GBBN(class_counts, rebalance=rebalance, gamma=gamma, horizon=horizon)
        self.p2p = P2P(
            num_classes,
            feature_dim,
            means_weight=p2p_means,
            classifier_weight=p2p_weights,
            duality_weight=p2p_duality,
            target=p2p_target,
            temperature=p2p_temperature,
            momentum=ema_momentum,
            gradient=mean_gradient,
            backend=backend,
        )
        self.hycon = None
        if hycon == "softmax":
            self.hycon = HyCon(
                num_classes,
                projection_dim,
                temperature=temperature,
                mean_weight=mean_weight,
                balance=balance,
                momentum=ema_momentum,
                gradient=mean_gradient,
                backend=backend,
            )

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
            z: [N, D] unit rows, for softmax HyCon.
            h: [N, F] predictor output, for cosine HyCon.
            num_views: V, a divisor of N (cosine HyCon).

        Returns:
            `LossOutput` with parts "cls", "uniform", "rebalance", "eta", "p2p_means", "p2p_weights",
            "p2p_duality" and, unless hycon is "none", "hycon"; all before their weights.

        Raises:
            TypeError, ValueError: z or h missing, or an argument an op cannot take.
        """
        output = self.gbbn(*uniform, *rebalance, progress)
        eta = self.gbbn.eta(progress)
        means, seen = self.p2p.update(features, labels)
        terms = self.p2p.terms(means, seen, weight)
        on_means = self.p2p.means_weight * terms.means + self.p2p.duality_weight * terms.duality
        contrast = self._contrast(features, labels, means, seen, z, h, num_views)
        if contrast is not None:
            on_means = on_means + self.hycon_weight * contrast
        total = output.total + (1 - eta) * self.p2p.classifier_weight * terms.weights + self.alpha * on_means
        parts = {
            **output.parts,
            "p2p_means": terms.means.detach(),
            "p2p_weights": terms.weights.detach(),
            "p2p_duality": terms.duality.detach(),
        }
        if contrast is not None:
            parts["hycon"] = contrast.detach()
        return LossOutput(total, parts)

    def _contrast(
        self,
        features: Tensor,
        labels: Tensor,
        means: Tensor,
        seen: Tensor,
        z: Tensor | None,
        h: Tensor | None,
        num_views: int,
    ) -> Tensor | None:
        if self.form == "none":
            return None
        if self.hycon is not None:
            if z is None:
                raise ValueError("z must be given with hycon='softmax'; got None. Give the model a projection head")
            return self.hycon(z, labels)
        if h is None:
            raise ValueError("h must be given with hycon='cosine'; got None. Give the model a predictor head")
        return hycon_cosine(h, features, labels, means, num_views=num_views, seen=seen, ignore_index=IGNORE_INDEX)

    def extra_repr(self) -> str:
        return f"hycon={self.form!r}, hycon_weight={self.hycon_weight}, alpha={self.alpha}"
