"""Classification losses for long-tailed data: plain, logit-adjusted, focal, class-balanced and LDAM cross-entropy.

Each takes logits [N, C] and labels [N] (-100: row takes no part) and returns the mean over the rows that
do, 0 when there are none. With a process group the mean is over the rows of all ranks, with this rank's share of the
gradient. Classes without a training image count as having one, which keeps every term finite.

The losses that deferred re-weighting (`Classification`) serves also take class weights; the mean is then over these.

Legend: N images, C classes; n_c training images of class c.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor, nn

from allnc._checks import check_choice, check_integer, check_interval
from allnc.losses.base import (
    IGNORE_INDEX,
    checked_counts,
    checked_logits,
    cross_entropy,
    effective_number_weights,
    mean_of_losses,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

LongTail = Literal["ce", "logit_adjusted", "focal", "class_balanced", "ldam"]
LONG_TAIL: tuple[LongTail, ...] = get_args(LongTail)


class CrossEntropy(nn.Module):
    """Plain cross-entropy, the baseline.

    Args:
        num_classes: C >= 2.
        label_smoothing: share ε in [0, 1) of the target that is spread over all C classes.
        group: ranks over whose rows the mean is taken.

    Raises:
        TypeError, ValueError: an argument out of its range.

    Example:
        >>> import math, torch
        >>> value = CrossEntropy(num_classes=4)(torch.zeros(2, 4), torch.tensor([0, 3]))
        >>> math.isclose(value.item(), math.log(4), rel_tol=1e-6)
        True

    Source: textbook; label smoothing: Szegedy et al., Rethinking the Inception Architecture, CVPR 2016.
    """

    def __init__(self, num_classes: int, *, label_smoothing: float = 0.0, group: ProcessGroup | None = None) -> None:
        super().__init__()
        self.group = group
        check_integer("num_classes", num_classes, minimum=2)
        check_interval("label_smoothing", label_smoothing, 0, 1, open_high=True)
        self.num_classes, self.label_smoothing = num_classes, label_smoothing

    def forward(self, logits: Tensor, labels: Tensor, class_weight: Tensor | None = None) -> Tensor:
        """Return the mean loss of logits [N, C] at labels [N], weighed by class_weight [C] if given."""
        logits, labels = checked_logits(logits, labels, self.num_classes, class_weight)
        options = {"class_weight": class_weight, "label_smoothing": self.label_smoothing}
        return cross_entropy(logits, labels, **options, group=self.group)


class LogitAdjusted(nn.Module):
    """Logit-adjusted cross-entropy: CE(logits + τ log π), π the class frequencies (τ = 1: balanced softmax).

    Args:
        class_counts: [C] training images of each class, >= 0.
        tau: τ >= 0, strength of the adjustment; 0 is plain cross-entropy.
        label_smoothing: share in [0, 1) of the target that is spread over all C classes.
        group: ranks over whose rows the mean is taken.

    Raises:
        TypeError, ValueError: an argument out of its range.

    Example:
        >>> import torch
        >>> loss = LogitAdjusted([3, 1])
        >>> value = loss(torch.zeros(1, 2), torch.tensor([1]))  # -log(1/4)
        >>> round(value.item(), 4)
        1.3863

    Source: Menon et al., Long-tail learning via logit adjustment, ICLR 2021; Ren et al., Balanced
        Meta-Softmax, NeurIPS 2020.
    """

    log_prior: Tensor

    def __init__(
        self,
        class_counts: Tensor | Sequence[int],
        *,
        tau: float = 1.0,
        label_smoothing: float = 0.0,
        group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.group, self.label_smoothing = group, label_smoothing
        check_interval("tau", tau, 0)
        check_interval("label_smoothing", label_smoothing, 0, 1, open_high=True)
        counts = checked_counts(class_counts)
        self.register_buffer("log_prior", (tau * (counts / counts.sum()).log()).float())  # [C]

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the mean loss of logits [N, C] at labels [N]."""
        logits, labels = checked_logits(logits, labels, len(self.log_prior))
        smoothing = self.label_smoothing
        return cross_entropy(logits + self.log_prior, labels, label_smoothing=smoothing, group=self.group)


class Focal(nn.Module):
    """Focal loss: cross-entropy times (1 - p)^γ, p the probability of the label.

    Args:
        num_classes: C >= 2.
        gamma: γ >= 0; 0 is plain cross-entropy.
        group: ranks over whose rows the mean is taken.

    Raises:
        TypeError, ValueError: an argument out of its range.

    Example:
        >>> import torch
        >>> value = Focal(num_classes=2, gamma=2.0)(torch.zeros(1, 2), torch.tensor([0]))  # log(2) / 4
        >>> round(value.item(), 4)
        0.1733

    Source: Lin et al., Focal Loss for Dense Object Detection, ICCV 2017 (softmax form, no class weight).
    """

    def __init__(self, num_classes: int, *, gamma: float = 2.0, group: ProcessGroup | None = None) -> None:
        super().__init__()
        self.group = group
        check_integer("num_classes", num_classes, minimum=2)
        check_interval("gamma", gamma, 0)
        self.num_classes, self.gamma = num_classes, gamma

    def forward(self, logits: Tensor, labels: Tensor, class_weight: Tensor | None = None) -> Tensor:
        """Return the mean loss of logits [N, C] at labels [N], weighed by class_weight [C] if given."""
        logits, labels = checked_logits(logits, labels, self.num_classes, class_weight)
        use = labels != IGNORE_INDEX  # [N]
        log_p = logits.log_softmax(1).gather(1, labels.where(use, 0)[:, None]).squeeze(1)  # [N]
        # The slope of (1 - p)^γ is infinite at p = 1 for γ < 1: stop one rounding step before.
        miss = (-torch.expm1(log_p)).clamp(min=torch.finfo(logits.dtype).eps)
        losses = -miss.pow(self.gamma) * log_p  # [N]
        return mean_of_losses(losses, labels, class_weight=class_weight, group=self.group)


class ClassBalanced(nn.Module):
    """Cross-entropy weighted by the inverse effective number of images, (1 - β) / (1 - β^n_c).

    The mean is over the weights of the rows, so only their ratios matter.

    Args:
        class_counts: [C] training images of each class, >= 0.
        beta: β in [0, 1); 0 weighs all classes alike, β -> 1 by 1/n_c.
        group: ranks over whose rows the mean is taken.

    Raises:
        TypeError, ValueError: an argument out of its range.

    Example:
        >>> import torch
        >>> loss = ClassBalanced([2, 1], beta=0.5)
        >>> [round(w, 4) for w in loss.weight.tolist()]  # effective numbers 1.5 and 1
        [0.6667, 1.0]

    Source: Cui et al., Class-Balanced Loss Based on Effective Number of Samples, CVPR 2019.
    """

    weight: Tensor

    def __init__(
        self, class_counts: Tensor | Sequence[int], *, beta: float = 0.9999, group: ProcessGroup | None = None
    ) -> None:
        super().__init__()
        self.group = group
        self.register_buffer("weight", effective_number_weights(class_counts, beta))  # [C]

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the mean loss of logits [N, C] at labels [N]."""
        logits, labels = checked_logits(logits, labels, len(self.weight))
        return cross_entropy(logits, labels, class_weight=self.weight, group=self.group)


class LDAM(nn.Module):
    """Label-distribution-aware margins: CE(s (logits - m_y at the label)), m_c ∝ n_c^(-1/4).

    Args:
        class_counts: [C] training images of each class, >= 0.
        max_margin: largest margin, that of the smallest class that has an image, in units of the logits, > 0. The
            paper's 0.5 is for cosines: logits that are s times a cosine have margins of 0.5 s.
        scale: s > 0, for logits that are bare cosines (30 in the paper); 1 for those that already have a scale, as
            those of a linear or a scaled cosine classifier.
        group: ranks over whose rows the mean is taken.

    Raises:
        TypeError, ValueError: an argument out of its range.

    Example:
        >>> import torch
        >>> loss = LDAM([16, 1], max_margin=0.5)
        >>> loss.margin.tolist()
        [0.25, 0.5]

    Source: Cao et al., Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss, NeurIPS 2019.
    """

    margin: Tensor

    def __init__(
        self,
        class_counts: Tensor | Sequence[int],
        *,
        max_margin: float = 0.5,
        scale: float = 1.0,
        group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.group = group
        check_interval("max_margin", max_margin, 0, open_low=True)
        check_interval("scale", scale, 0, open_low=True)
        relative = checked_counts(class_counts).pow(-0.25)
        present = torch.as_tensor(class_counts).cpu() > 0
        self.scale = scale
        self.register_buffer("margin", (max_margin * relative / relative[present].max()).clamp(max=max_margin).float())

    def forward(self, logits: Tensor, labels: Tensor, class_weight: Tensor | None = None) -> Tensor:
        """Return the mean loss of logits [N, C] at labels [N], weighed by class_weight [C] if given."""
        logits, labels = checked_logits(logits, labels, len(self.margin), class_weight)
        own = labels.where(labels != IGNORE_INDEX, 0)[:, None]  # [N, 1]
        margins = torch.zeros_like(logits).scatter(1, own, self.margin.to(logits.dtype)[own])  # [N, C]
        return cross_entropy(self.scale * (logits - margins), labels, class_weight=class_weight, group=self.group)


def long_tail_loss(
    name: LongTail,
    class_counts: Tensor | Sequence[int],
    *,
    gamma: float = 2.0,
    tau: float = 1.0,
    label_smoothing: float = 0.0,
    classifier_scale: float | None = None,
    group: ProcessGroup | None = None,
) -> nn.Module:
    """The classification loss of that name; each reads the settings that it has.

    Args:
        name: "ce", "logit_adjusted", "focal", "class_balanced" or "ldam".
        class_counts: [C] training images of each class.
        gamma: exponent of the focal loss.
        tau: strength of the logit adjustment.
        label_smoothing: share of the target spread over all classes, for cross-entropy and logit adjustment.
        classifier_scale: factor of the cosines that are the logits, None for a linear classifier. LDAM's largest
            margin is half of it, as in its paper, whose scale is 30.
        group: ranks over whose rows the mean is taken.

    Raises:
        TypeError, ValueError: an unknown name, or an argument out of its range.
    """
    check_choice("name", name, LONG_TAIL)
    if classifier_scale is not None:
        check_interval("classifier_scale", classifier_scale, 0, open_low=True)
    if name == "ce":
        return CrossEntropy(len(class_counts), label_smoothing=label_smoothing, group=group)
    if name == "focal":
        return Focal(len(class_counts), gamma=gamma, group=group)
    if name == "logit_adjusted":
        return LogitAdjusted(class_counts, tau=tau, label_smoothing=label_smoothing, group=group)
    if name == "class_balanced":
        return ClassBalanced(class_counts, group=group)
    return LDAM(class_counts, max_margin=0.5 * (classifier_scale or 1.0), group=group)
