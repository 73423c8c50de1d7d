"""The registry of losses: from a configuration to a module, and which outputs of the model it reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, NamedTuple

from torch import Tensor, nn

from allnc.config import LossConfig
from allnc.losses.allnc import AllNC
from allnc.losses.base import LossOutput, checked_logits
from allnc.losses.longtail import LONG_TAIL, CrossEntropy, long_tail_loss
from allnc.ops.ranks import Ranks, scale_gradient

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Head = Literal["projection", "predictor"]


class Classification(nn.Module):
    """One classification loss on the uniform branch, called as `AllNC` is; it reads nothing else.

    Args:
        loss: module called with (logits, labels).
        group: ranks over whose rows `loss` takes its mean; gradients are then such that the *average* over ranks, as
            DistributedDataParallel forms it, is that of one process with all rows.

    Example:
        >>> import torch
        >>> loss = Classification(CrossEntropy(num_classes=3))
        >>> logits, labels = torch.zeros(2, 3), torch.tensor([0, 1])
        >>> branch = (logits, labels)
        >>> output = loss(torch.randn(2, 8), labels, torch.randn(3, 8), branch, branch, 0.0)
        >>> list(output.parts)
        ['cls', 'uniform']
    """

    def __init__(self, loss: nn.Module, *, group: ProcessGroup | None = None) -> None:
        super().__init__()
        self.loss, self.group = loss, group

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
        num_views: int = 2,
    ) -> LossOutput:
        """Return the loss of the uniform branch, with parts "cls" and "uniform"."""
        logits, targets = uniform
        if self.group is not None:  # a wrong argument on one rank is an error on all, instead of a wait
            Ranks(self.group, lambda: checked_logits(logits, targets, len(weight)), lambda: len(logits), dict)
        total = self.loss(logits, targets)
        parts = {"cls": total.detach(), "uniform": total.detach()}
        return LossOutput(total if self.group is None else scale_gradient(total, self.group.size()), parts)


class Entry(NamedTuple):
    """What the registry knows of a loss."""

    build: Callable[..., AllNC | Classification]  # (config, class_counts, feature_dim, projection_dim, group)
    head: Callable[[LossConfig], Head | None] = lambda config: None  # what it reads beside features and logits
    two_branches: bool = False  # whether it reads the re-balancing branch beside the uniform one


def _allnc(config, class_counts, feature_dim, projection_dim, group) -> AllNC:
    return AllNC(class_counts, feature_dim, projection_dim, config, group=group)


def _cross_entropy(config, class_counts, feature_dim, projection_dim, group) -> Classification:
    return Classification(CrossEntropy(len(class_counts), group=group), group=group)


def _long_tail(config, class_counts, feature_dim, projection_dim, group) -> Classification:
    loss = long_tail_loss(config.name, class_counts, gamma=config.focal_gamma, group=group)
    return Classification(loss, group=group)


def _allnc_head(config: LossConfig) -> Head | None:
    return {"softmax": "projection", "cosine": "predictor", "none": None}[config.contrast]


# By the name that `LossConfig.name` takes. A new loss is an entry here and a name there.
LOSSES: dict[str, Entry] = {
    "allnc": Entry(_allnc, head=_allnc_head, two_branches=True),
    "ce": Entry(_cross_entropy),
    **{name: Entry(_long_tail) for name in LONG_TAIL},
}


def build_loss(
    config: LossConfig,
    *,
    class_counts: Tensor,
    feature_dim: int,
    projection_dim: int | None = None,
    group: ProcessGroup | None = None,
) -> AllNC | Classification:
    """Build the loss that a configuration names.

    Args:
        config: the loss section of a run's configuration.
        class_counts: [C] int64, training images of each class.
        feature_dim: F, width of the features.
        projection_dim: D, width of the projections z, for a loss that reads them.
        group: the batch is that of all ranks of this process group, see `AllNC`.

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
    return LOSSES[config.name].build(config, class_counts, feature_dim, projection_dim, group)
