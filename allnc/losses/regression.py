"""Classification by regression of the logits: mean squared error, and dot regression for a fixed simplex ETF.

As in longtail.py, each takes logits [N, C] and labels [N] (-100: row takes no part) and returns the mean over the rows
that do, 0 when there are none; with a process group over the rows of all ranks.

Legend: N images, C classes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from allnc._checks import check_integer, check_interval
from allnc.losses.base import IGNORE_INDEX, checked_logits, mean_of_losses

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class MeanSquaredError(nn.Module):
    """Mean over rows and classes of (logit - target)², with one target for the own class and one for the others.

    A linear classifier has the targets 15 and 0, as in the source. Logits that are s times a cosine, without a bias,
    have the values that they take at neural collapse, s and -s/(C - 1): then the loss is 0 exactly where features and
    class vectors are one simplex ETF, as a free bias allows the linear one. (With s and 0: an orthogonal frame.)

    Args:
        num_classes: C >= 2.
        classifier_scale: s > 0, factor of the cosines that are the logits; None for a linear classifier.
        group: ranks over whose rows the mean is taken.

    Raises:
        TypeError, ValueError: an argument out of its range.

    Example:
        >>> import torch
        >>> loss = MeanSquaredError(num_classes=3)
        >>> loss(torch.tensor([[12.0, 1.0, 2.0]]), torch.tensor([0])).item()  # (9 + 1 + 4) / 3
        4.666666507720947
        >>> scaled = MeanSquaredError(num_classes=3, classifier_scale=16.0)
        >>> scaled(torch.tensor([[16.0, -8.0, -8.0]]), torch.tensor([0])).item()
        0.0

    Source: Zhou et al., Are All Losses Created Equal, NeurIPS 2022; the target for cosines is ours.
    """

    def __init__(
        self, num_classes: int, *, classifier_scale: float | None = None, group: ProcessGroup | None = None
    ) -> None:
        super().__init__()
        check_integer("num_classes", num_classes, minimum=2)
        self.num_classes, self.group = num_classes, group
        self.own, self.other = 15.0, 0.0
        if classifier_scale is not None:
            check_interval("classifier_scale", classifier_scale, 0, open_low=True)
            self.own, self.other = classifier_scale, -classifier_scale / (num_classes - 1)

    def forward(self, logits: Tensor, labels: Tensor, class_weight: Tensor | None = None) -> Tensor:
        """Return the mean loss of logits [N, C] at labels [N], weighed by class_weight [C] if given."""
        logits, labels = checked_logits(logits, labels, self.num_classes, class_weight)
        own = labels.where(labels != IGNORE_INDEX, 0)[:, None]  # [N, 1]
        target = torch.full_like(logits, self.other).scatter(1, own, self.own)  # [N, C]
        losses = (logits - target).square().mean(1)  # [N]
        return mean_of_losses(losses, labels, class_weight=class_weight, group=self.group)


class DotRegression(nn.Module):
    """(logit of the own class - s)² / 2s for a fixed simplex ETF classifier, whose logits are s times a cosine.

    It pulls each feature to its class vector and has no term that pushes: in cross-entropy, the pushes of the large
    classes are what squeezes the small ones. Only a classifier that does not learn can be trained with it.

    Args:
        num_classes: C >= 2.
        classifier_scale: s > 0, product of the lengths of features and class vectors.
        group: ranks over whose rows the mean is taken.

    Raises:
        TypeError, ValueError: an argument out of its range.

    Example:
        >>> import torch
        >>> loss = DotRegression(num_classes=2, classifier_scale=16.0)
        >>> loss(torch.tensor([[8.0, -8.0]]), torch.tensor([0])).item()  # 8² / 32
        2.0

    Source: Yang et al., Inducing Neural Collapse in Imbalanced Learning, NeurIPS 2022.
    """

    def __init__(self, num_classes: int, *, classifier_scale: float, group: ProcessGroup | None = None) -> None:
        super().__init__()
        check_integer("num_classes", num_classes, minimum=2)
        check_interval("classifier_scale", classifier_scale, 0, open_low=True)
        self.num_classes, self.scale, self.group = num_classes, classifier_scale, group

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the mean loss of logits [N, C] at labels [N]."""
        logits, labels = checked_logits(logits, labels, self.num_classes)
        own = labels.where(labels != IGNORE_INDEX, 0)[:, None]  # [N, 1]
        losses = (logits.gather(1, own).squeeze(1) - self.scale).square() / (2 * self.scale)  # [N]
        return mean_of_losses(losses, labels, group=self.group)
