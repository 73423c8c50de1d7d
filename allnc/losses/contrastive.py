"""The contrastive baselines: a classification loss beside a contrast of the projections.

    supcon    CE             + w SupCon: each activation against all others
    bcl       CE, log prior  + w BCL: against all others and a learned prototype of each class, classes averaged
    proco     CE, log prior  + w ProCo: against the distribution of each class, estimated from running means

`log prior` is logit adjustment of strength τ (loss.tau), w loss.hycon_weight. The classification loss itself weighs
loss.classification_weight, which is 1.

Legend: N activations, F features, D columns of the projection, C classes; n_c activations of class c in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from allnc._checks import check_integer
from allnc.config import CONTRASTIVE, LossConfig
from allnc.losses.base import (
    IGNORE_INDEX,
    ClassMeans,
    LossOutput,
    backend_for,
    check_branch,
    check_config,
    checked_counts,
    checked_logits,
    cross_entropy,
)
from allnc.losses.longtail import CrossEntropy, LogitAdjusted
from allnc.losses.vmf import concentration, log_expected_exponential
from allnc.ops._common import (
    Backend,
    accumulation_dtype,
    check_floating,
    check_labels,
    check_same_device,
    check_shape,
    resolve_backend,
    unit_rows,
    validated_labels,
)
from allnc.ops.hycon.hycon import contrast
from allnc.ops.hycon.options import Batch, Options, check_hycon
from allnc.ops.ranks import Ranks, scale_gradient

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Contrastive(nn.Module):
    """SupCon, BCL or ProCo beside a classification loss on the uniform branch, called as `AllNC` is.

    Args:
        class_counts: [C] training images of each class, >= 0.
        projection_dim: D, width of the projections z; needed unless `config.hycon_weight` is 0.
        config: `name` is supcon, bcl or proco; hycon_weight, classification_weight, temperature, tau, and ema_momentum
            (proco) and backend (supcon, proco) are read.
        group: the batch is that of all ranks of this process group, as in `AllNC`.

    Raises:
        TypeError, ValueError: an argument out of its range.

    Example:
        >>> import torch
        >>> import torch.nn.functional as F
        >>> loss = Contrastive([100, 10, 5], 8, LossConfig(name="proco"))
        >>> features, labels = torch.randn(4, 16), torch.tensor([0, 1, 2, 0])
        >>> branch = (torch.randn(4, 3), labels)
        >>> z = F.normalize(torch.randn(4, 8), dim=1)
        >>> output = loss(features, labels, torch.randn(3, 16), branch, branch, 0.0, z=z)
        >>> sorted(output.parts)
        ['cls', 'contrast', 'uniform']

    Source: SupCon: Khosla et al., NeurIPS 2020; BCL: Zhu et al., Balanced Contrastive Learning for Long-Tailed Visual
        Recognition, CVPR 2022; ProCo: Du et al., Probabilistic Contrastive Learning for Long-Tailed Visual
        Recognition, TPAMI 2024.
    """

    def __init__(
        self,
        class_counts: Tensor | Sequence[int],
        projection_dim: int | None,
        config: LossConfig,
        *,
        group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        check_config(config, CONTRASTIVE)
        self.config, self.group, self.num_classes = config, group, len(checked_counts(class_counts))
        if config.name == "supcon":
            self.classification: nn.Module = CrossEntropy(self.num_classes, group=group)
        else:
            self.classification = LogitAdjusted(class_counts, tau=config.tau, group=group)
        self.contrast = None
        if config.hycon_weight > 0:
            if projection_dim is None:
                raise ValueError(f"projection_dim must be given with loss.name {config.name}; got None")
            check_integer("projection_dim", projection_dim, minimum=2)
            self.contrast = {"supcon": SupCon, "bcl": BalancedContrast, "proco": ProbabilisticContrast}[config.name](
                class_counts, projection_dim, config
            )

    def trains_uniform(self, progress: float) -> bool:
        """Whether the uniform branch has a part in the loss at this share of training: always."""
        return True

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
        prototypes: Tensor | None = None,
        num_views: int = 2,
    ) -> LossOutput:
        """Return the whole loss, with parts "cls", "uniform" and, unless its weight is 0, "contrast".

        Args:
            features, weight, rebalance, progress, h, num_views: not read.
            labels: [N] int64 in [0, C), -100 for rows that take no part.
            uniform: logits [N, C] and labels [N].
            z: [N, D] unit rows.
            prototypes: [C, D] unit rows, for bcl.

        Raises:
            TypeError, ValueError: z or prototypes missing, or an argument of the wrong kind, shape, type or range.
            RuntimeError: another rank's arguments are wrong.
        """
        contrast = self.contrast
        ranks = None
        if self.group is None:
            check_branch("uniform", uniform)
        else:

            def check() -> None:
                check_branch("uniform", uniform)
                checked_logits(*uniform, self.num_classes)
                if contrast is not None:
                    contrast.check(z, labels, prototypes, least_rows=0)
                    validated_labels(labels, self.num_classes, IGNORE_INDEX)

            width = None if z is None else z.shape[1]
            ranks = Ranks(self.group, check, lambda: len(uniform[0]), lambda: {"D": width})
        value = self.classification(*uniform)
        parts = {"cls": value.detach(), "uniform": value.detach()}
        # Of weight 0 too: under DistributedDataParallel every parameter must have a gradient.
        total = self.config.classification_weight * value
        if contrast is not None:
            if ranks is None:
                contrast.check(z, labels, prototypes, least_rows=1)
            value = contrast(z, labels, prototypes, ranks)
            parts["contrast"] = value.detach()
            total = total + self.config.hycon_weight * value
        return LossOutput(total if ranks is None else scale_gradient(total, ranks.size), parts)


class SupCon(nn.Module):
    """Supervised contrastive loss: `allnc.hycon` without class means and without class balance.

    Args:
        class_counts: [C], for the number of classes.
        projection_dim: D.
        config: temperature and backend are read.
    """

    def __init__(self, class_counts: Tensor | Sequence[int], projection_dim: int, config: LossConfig) -> None:
        super().__init__()
        self.num_classes, self.dim = len(class_counts), projection_dim
        self.backend: Backend = config.backend
        self.options = Options(config.temperature, 0.0, "none", "mean", IGNORE_INDEX)

    def check(self, z: Tensor | None, labels: Tensor, prototypes: Tensor | None, *, least_rows: int) -> None:
        """Raise TypeError or ValueError for what `forward` cannot take."""
        z = _checked_rows("z", z, ("N", self.dim))
        check_hycon(Batch(z, labels), self.options, least_rows=least_rows)

    def forward(self, z: Tensor, labels: Tensor, prototypes: Tensor | None, ranks: Ranks | None) -> Tensor:
        """Return the contrast of z [N, D], whose gradient is this rank's share."""
        wanted = backend_for(self.backend, "cpp", "triton")
        used = resolve_backend(wanted, op="hycon", device=z.device, dtype=z.dtype, supported=("cpp", "triton"))
        return contrast(Batch(z, labels), self.options, used, ranks)


class BalancedContrast(nn.Module):
    """Balanced contrastive loss: every class weighs alike in the denominator and is always there, by its prototype.

    Of anchor i, the other activations of its class and its prototype are the positives P(i), n_{y_i} in all:

        L = mean_i [ log Σ_c avg_{k in c} exp(z_i·z_k/τ) - Σ_{p in P(i)} z_i·z_p / (τ n_{y_i}) ]

    where avg_{k in c} is the mean over the activations and the prototype of class c without anchor i. `allnc.hycon`
    has the same form up to the own class, which it divides by n + 1 in place of n; so this is N x (N + C) in torch.

    Args:
        class_counts: [C], for the number of classes.
        projection_dim: D.
        config: temperature is read.
    """

    def __init__(self, class_counts: Tensor | Sequence[int], projection_dim: int, config: LossConfig) -> None:
        super().__init__()
        self.num_classes, self.dim, self.temperature = len(class_counts), projection_dim, config.temperature

    def check(self, z: Tensor | None, labels: Tensor, prototypes: Tensor | None, *, least_rows: int) -> None:
        """Raise TypeError or ValueError for what `forward` cannot take."""
        z = _checked_rows("z", z, ("N", self.dim))
        prototypes = _checked_rows("prototypes", prototypes, (self.num_classes, self.dim))
        check_labels(labels, len(z))
        check_same_device(z=z, labels=labels, prototypes=prototypes)

    def forward(self, z: Tensor, labels: Tensor, prototypes: Tensor, ranks: Ranks | None) -> Tensor:
        """Return the contrast of unit rows z [N, D] and prototypes [C, D], whose gradient is this rank's share."""
        dtype = accumulation_dtype(z.dtype)
        labels = validated_labels(labels, self.num_classes, IGNORE_INDEX)
        if ranks is not None:
            z, labels, prototypes = ranks.gather(z), ranks.gather(labels), ranks.replicated(prototypes)
        with torch.autocast(z.device.type, enabled=False):
            use = labels != IGNORE_INDEX  # [N]
            z, labels = z.to(dtype).where(use[:, None], 0), labels.where(use, 0)
            logits = z @ torch.cat([z, prototypes.to(dtype)]).T / self.temperature  # [N, N + C]
            every = torch.arange(self.num_classes, device=labels.device)  # [C]
            classes, shown = torch.cat([labels, every]), torch.cat([use, every >= 0])  # [N + C] each
            count = z.new_ones(self.num_classes).index_add(0, labels, use.to(dtype))  # [C], n_c + 1
            other = shown & ~torch.eye(*logits.shape, dtype=torch.bool, device=z.device)  # [N, N + C]
            own = labels[:, None] == classes  # [N, N + C]
            members = (count[classes] - own.to(dtype)).clamp(min=1)  # [N, N + C], of a column's class for the anchor
            lse = torch.logsumexp((logits - members.log()).where(other, -torch.inf), 1)  # [N]
            positive = logits.where(own & other, 0).sum(1) / (count[labels] - 1).clamp(min=1)  # [N]
            return (lse - positive).where(use, 0).sum() / use.sum().clamp(min=1)


class ProbabilisticContrast(ClassMeans):
    """Probabilistic contrastive loss: logit-adjusted CE of log E[exp(z·z'/τ)] over each class's von Mises-Fisher.

    Mean direction and concentration of a class come from the running mean of its projections, without a gradient.
    The source averages over the epoch before and the present one; here it is the moving average of `ClassMeans`.
    Classes not seen yet take no part.

    Args:
        class_counts: [C] training images of each class, >= 0.
        projection_dim: D >= 2.
        config: temperature, ema_momentum and backend (of the running means) are read.
    """

    log_prior: Tensor

    def __init__(self, class_counts: Tensor | Sequence[int], projection_dim: int, config: LossConfig) -> None:
        counts = checked_counts(class_counts)
        settings: dict[str, Any] = {"momentum": config.ema_momentum, "backend": config.backend}
        super().__init__(len(counts), projection_dim, gradient="exact", **settings)
        self.temperature = config.temperature
        self.register_buffer("log_prior", (counts / counts.sum()).log().float())  # [C]

    def check(self, z: Tensor | None, labels: Tensor, prototypes: Tensor | None, *, least_rows: int) -> None:
        """Raise TypeError or ValueError for what `forward` cannot take."""
        z = _checked_rows("z", z, ("N", self.dim))
        check_labels(labels, len(z))
        check_same_device(z=z, labels=labels, means=self.means)

    def forward(self, z: Tensor, labels: Tensor, prototypes: Tensor | None, ranks: Ranks | None) -> Tensor:
        """Update the running means (in training mode) and return the contrast of unit rows z [N, D].

        The gradient is this rank's share.
        """
        means, seen = self.update(z.detach(), labels, ranks)
        labels = validated_labels(labels, self.num_classes, IGNORE_INDEX)
        dtype = accumulation_dtype(z.dtype)
        with torch.autocast(z.device.type, enabled=False):
            use = labels != IGNORE_INDEX  # [N]
            means, z = means.to(dtype), z.to(dtype).where(use[:, None], 0)
            kappa = concentration(means.norm(dim=1).clamp(max=1), self.dim)  # [C]
            cosine = z @ unit_rows(means).T  # [N, C]
            logits = log_expected_exponential(cosine, kappa, temperature=self.temperature, dim=self.dim)
            logits = (logits + self.log_prior).where(seen, -torch.inf)
            labels = labels.where(use & seen[labels.where(use, 0)], IGNORE_INDEX)  # in evaluation a class may be new
            return cross_entropy(logits, labels, group=None if ranks is None else ranks.group)


def _checked_rows(name: str, rows: Tensor | None, shape: tuple[Any, ...]) -> Tensor:
    if rows is None:
        raise ValueError(f"{name} must be given; got None. Give the model a projection head")
    check_floating(name, rows)
    check_shape(name, rows, shape)
    return rows
