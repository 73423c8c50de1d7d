"""The registry of losses: from a configuration to a module, and which outputs of the model it reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from torch import Tensor, nn

from allnc._checks import check_interval
from allnc.config import CONTRASTIVE, REWEIGHTED, LossConfig
from allnc.losses.allnc import AllNC
from allnc.losses.base import LossOutput, check_branch, checked_logits, class_weights, effective_number_weights
from allnc.losses.contrastive import Contrastive
from allnc.losses.longtail import LONG_TAIL, long_tail_loss
from allnc.losses.prototype_contrast import PrototypeContrast
from allnc.losses.regression import DotRegression, MeanSquaredError
from allnc.ops.ranks import Ranks, scale_gradient

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Head = Literal["projection", "predictor", "prototypes"]


class Classification(nn.Module):
    """One classification loss on the uniform branch, called as `AllNC` is; it reads nothing else.

    Args:
        loss: module called with (logits, labels).
        class_weight: [C] floating, weights of the classes that `loss` is given from the start; None: none.
        drw: share of training, in [0, 1), after which `loss` is also given class weights by the inverse of the
            effective number of images (β = 0.9999); None: never. The source begins at 0.8.
        class_counts: [C] training images of each class; needed with `drw` only.
        group: ranks over whose rows `loss` takes its mean; gradients are then such that the *average* over ranks, as
            DistributedDataParallel forms it, is that of one process with all rows.

    Raises:
        TypeError, ValueError: drw out of its range, without class counts, or beside class weights.

    Source: deferred re-weighting: Cao et al. (LDAM-DRW), NeurIPS 2019.

    Example:
        >>> import torch
        >>> from allnc.losses import CrossEntropy
        >>> loss = Classification(CrossEntropy(num_classes=3))
        >>> logits, labels = torch.zeros(2, 3), torch.tensor([0, 1])
        >>> branch = (logits, labels)
        >>> output = loss(torch.randn(2, 8), labels, torch.randn(3, 8), branch, branch, 0.0)
        >>> list(output.parts)
        ['cls', 'uniform']
    """

    class_weight: Tensor | None

    def __init__(
        self,
        loss: nn.Module,
        *,
        class_weight: Tensor | None = None,
        drw: float | None = None,
        class_counts: Tensor | Sequence[int] | None = None,
        group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(loss, nn.Module):
            raise TypeError(f"loss must be a module called with (logits, labels); got {type(loss).__name__}")
        if drw is not None:
            check_interval("drw", drw, 0, 1, open_high=True)
            if class_counts is None:
                raise ValueError("class_counts must be given with drw; got None")
            if class_weight is not None:
                raise ValueError(f"class_weight and drw exclude each other: both weigh the classes; got drw {drw}")
            class_weight = effective_number_weights(class_counts)
        self.loss, self.drw, self.group = loss, drw, group
        self.register_buffer("class_weight", class_weight)  # [C]

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
        """Return the loss of the uniform branch, with parts "cls" and "uniform"."""

        def check() -> None:
            check_branch("uniform", uniform)
            checked_logits(*uniform, len(weight))

        if self.group is None:
            check_branch("uniform", uniform)
        else:  # a wrong argument on one rank is an error on all, instead of a wait
            Ranks(self.group, check, lambda: len(uniform[0]), dict)
        logits, targets = uniform
        if self.class_weight is not None and progress >= (self.drw or 0.0):
            total = self.loss(logits, targets, self.class_weight)
        else:
            total = self.loss(logits, targets)
        parts = {"cls": total.detach(), "uniform": total.detach()}
        return LossOutput(total if self.group is None else scale_gradient(total, self.group.size()), parts)


class Setting(NamedTuple):
    """What a loss is built for, beside its configuration."""

    class_counts: Tensor  # [C] int64, training images of each class
    feature_dim: int  # F
    projection_dim: int | None  # D
    classifier_scale: float | None  # factor of the cosines that are the logits, None for a linear classifier
    group: ProcessGroup | None
    classes: Sequence[str] | None = None  # C names

    @property
    def num_classes(self) -> int:
        """C."""
        return len(self.class_counts)


class Entry(NamedTuple):
    """What the registry knows of a loss."""

    build: Callable[[LossConfig, Setting], AllNC | Classification | Contrastive]
    head: Callable[[LossConfig], Head | None] = lambda config: None  # what it reads beside features and logits
    two_branches: bool = False  # whether it reads the re-balancing branch beside the uniform one


def _allnc(config: LossConfig, setting: Setting) -> AllNC:
    counts, features, projections, scale, group, _ = setting
    return AllNC(counts, features, projections, config, classifier_scale=scale, group=group)


def _long_tail(config: LossConfig, setting: Setting) -> Classification:
    assert config.name in LONG_TAIL
    loss = long_tail_loss(
        config.name,
        setting.class_counts,
        gamma=config.focal_gamma,
        tau=config.tau,
        label_smoothing=config.label_smoothing,
        classifier_scale=setting.classifier_scale,
        group=setting.group,
    )
    return _classification(loss, config, setting)


def _mean_squared_error(config: LossConfig, setting: Setting) -> Classification:
    scale, group = setting.classifier_scale, setting.group
    return _classification(MeanSquaredError(setting.num_classes, classifier_scale=scale, group=group), config, setting)


def _prototype_contrast(config: LossConfig, setting: Setting) -> Classification:
    only_negatives = config.name == "nonl"
    loss = PrototypeContrast(setting.num_classes, only_negatives=only_negatives, group=setting.group)
    return Classification(loss, group=setting.group)


def _dot_regression(config: LossConfig, setting: Setting) -> Classification:
    if setting.classifier_scale is None:
        raise ValueError(
            "classifier_scale must be given with loss.name etf_dr; got None. Give the model an ETF classifier"
        )
    loss = DotRegression(setting.num_classes, classifier_scale=setting.classifier_scale, group=setting.group)
    return Classification(loss, group=setting.group)


def _classification(loss: nn.Module, config: LossConfig, setting: Setting) -> Classification:
    if config.name not in REWEIGHTED:
        return Classification(loss, group=setting.group)
    weight = None
    if config.class_weights is not None:
        names = setting.classes or tuple(map(str, range(setting.num_classes)))
        weight = class_weights(config.class_weights, setting.class_counts, names)
    counts, group = setting.class_counts, setting.group
    return Classification(loss, class_weight=weight, drw=config.drw, class_counts=counts, group=group)


def _contrastive(config: LossConfig, setting: Setting) -> Contrastive:
    return Contrastive(setting.class_counts, setting.projection_dim, config, group=setting.group)


def _contrastive_head(config: LossConfig) -> Head | None:
    if config.hycon_weight == 0:
        return None
    return "prototypes" if config.name == "bcl" else "projection"


def _allnc_head(config: LossConfig) -> Head | None:
    return {"softmax": "projection", "cosine": "predictor", "none": None}[config.contrast]


# By the name that `LossConfig.name` takes. A new loss is an entry here and a name there.
LOSSES: dict[str, Entry] = {
    "allnc": Entry(_allnc, head=_allnc_head, two_branches=True),
    **{name: Entry(_long_tail) for name in LONG_TAIL},
    "mse": Entry(_mean_squared_error),
    "ntce": Entry(_prototype_contrast),
    "nonl": Entry(_prototype_contrast),
    "etf_dr": Entry(_dot_regression),
    **{name: Entry(_contrastive, head=_contrastive_head) for name in CONTRASTIVE},
}


def build_loss(
    config: LossConfig,
    *,
    class_counts: Tensor,
    feature_dim: int,
    projection_dim: int | None = None,
    classifier_scale: float | None = None,
    group: ProcessGroup | None = None,
    classes: Sequence[str] | None = None,
) -> AllNC | Classification | Contrastive:
    """Build the loss that a configuration names.

    Args:
        config: the loss section of a run's configuration.
        class_counts: [C] int64, training images of each class.
        feature_dim: F, width of the features.
        projection_dim: D, width of the projections z, for a loss that reads them.
        classifier_scale: factor of the cosines that are the logits; None for a linear classifier.
        group: the batch is that of all ranks of this process group, see `AllNC`.
        classes: C names, by which `config.class_weights` may name classes; None: "0", "1", ...

    Returns:
        A module with `AllNC.forward`'s signature and output.

    Raises:
        TypeError, ValueError: class counts or a width that the loss cannot take.

    Example:
        >>> import torch
        >>> counts = torch.tensor([50, 5])
        >>> build_loss(LossConfig(name="ce"), class_counts=counts, feature_dim=8).loss
        CrossEntropy()
    """
    if not isinstance(config, LossConfig):
        raise TypeError(f"config must be an allnc.config.LossConfig; got {type(config).__name__}")
    setting = Setting(class_counts, feature_dim, projection_dim, classifier_scale, group, classes)
    return LOSSES[config.name].build(config, setting)
