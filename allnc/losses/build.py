"""From a configuration to a loss: AllNC, or one classification loss behind the same call."""

from __future__ import annotations

from torch import Tensor, nn

from allnc.config import LossConfig
from allnc.losses.allnc import AllNC
from allnc.losses.base import LossOutput
from allnc.losses.longtail import CrossEntropy, long_tail_loss


class Classification(nn.Module):
    """One classification loss on the uniform branch, called as `AllNC` is; it reads nothing else.

    Args:
        loss: module called with (logits, labels).

    Example:
        >>> import torch
        >>> loss = Classification(CrossEntropy(num_classes=3))
        >>> logits, labels = torch.zeros(2, 3), torch.tensor([0, 1])
        >>> branch = (logits, labels)
        >>> output = loss(torch.randn(2, 8), labels, torch.randn(3, 8), branch, branch, 0.0)
        >>> list(output.parts)
        ['cls', 'uniform']
    """

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

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
        total = self.loss(*uniform)
        return LossOutput(total, {"cls": total.detach(), "uniform": total.detach()})


def build_loss(
    config: LossConfig, *, class_counts: Tensor, feature_dim: int, projection_dim: int
) -> AllNC | Classification:
    """Build the loss that a configuration names.

    Args:
        config: the loss section of a run's configuration.
        class_counts: [C] int64, training images of each class.
        feature_dim: F, width of the features.
        projection_dim: D, width of the projections z.

    Returns:
        A module with `AllNC.forward`'s signature and output.

    Raises:
        TypeError, ValueError: class counts or a width that the loss cannot take.

    Example:
        >>> import torch
        >>> counts = torch.tensor([50, 5])
        >>> build_loss(LossConfig(name="ce"), class_counts=counts, feature_dim=8, projection_dim=4).loss
        CrossEntropy()
    """
    if config.name == "ce":
        return Classification(CrossEntropy(len(class_counts)))
    if config.name != "allnc":
        return Classification(long_tail_loss(config.name, class_counts, gamma=config.focal_gamma))
    return AllNC(
        class_counts,
        feature_dim,
        projection_dim,
        hycon=config.hycon,
        hycon_weight=config.hycon_weight,
        alpha=config.alpha,
        temperature=config.temperature,
        mean_weight=config.mean_weight,
        balance=config.balance,
        ema_momentum=config.ema_momentum,
        mean_gradient=config.mean_gradient,
        p2p_means=config.p2p_means,
        p2p_weights=config.p2p_weights,
        p2p_duality=config.p2p_duality,
        p2p_target=config.p2p_target,
        p2p_temperature=config.p2p_temperature,
        rebalance=long_tail_loss(config.rebalance, class_counts, gamma=config.focal_gamma),
        gamma=config.gamma,
        horizon=config.horizon,
        backend=config.backend,
    )
