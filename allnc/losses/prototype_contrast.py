"""NTCE and NONL: class vectors as anchors that contrast the images of the batch.

With logits S_ic, a scale (the inverse of the temperature) times the cosine of image i and class vector c:

    L = mean_i [ log Σ_{j in J(i)} exp S_{j y_i} - S_{i y_i} ]

where J(i) is every image of the batch for NTCE, and every image of another class than y_i for NONL. Cross-entropy
normalises each image over the classes; these normalise each class over the images.

Legend: N images, C classes; n_c images of class c in the batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from allnc._checks import check_integer
from allnc.losses.base import IGNORE_INDEX, checked_logits
from allnc.ops.ranks import sum_over_ranks

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class PrototypeContrast(nn.Module):
    """NTCE, or with `only_negatives` NONL, of scaled cosines as logits.

    Rows of label -100 take no part, nor do classes without an image in the batch, or with `only_negatives` a class
    that is the only one in it. NONL of a classifier that is not normalised has no minimum.

    Args:
        num_classes: C >= 2.
        only_negatives: leave the images of a class out of its denominator (NONL).
        group: the batch is that of all ranks of this process group.

    Raises:
        TypeError, ValueError: num_classes not an integer >= 2.

    Example:
        >>> import math, torch
        >>> logits = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
        >>> labels = torch.tensor([0, 0, 1])
        >>> value = PrototypeContrast(num_classes=2, only_negatives=True)(logits, labels)
        >>> want = (0 - 1) + (0 - 2) + (math.log(2) - 1)  # class 0 contrasts image 2, class 1 images 0 and 1
        >>> math.isclose(value.item(), want / 3, rel_tol=1e-6)
        True

    Source: Koromilas et al., Neural Collapse by Design, ICML 2026 (arXiv 2605.20302); NONL in its symmetric form.
    """

    def __init__(self, num_classes: int, *, only_negatives: bool, group: ProcessGroup | None = None) -> None:
        super().__init__()
        check_integer("num_classes", num_classes, minimum=2)
        self.num_classes, self.only_negatives, self.group = num_classes, only_negatives, group

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the mean loss of logits [N, C] at labels [N]."""
        logits, labels = checked_logits(logits, labels, self.num_classes)
        use = (labels != IGNORE_INDEX)[:, None]  # [N, 1]
        own = use & (labels[:, None] == torch.arange(self.num_classes, device=labels.device))  # [N, C]
        contrasts = use & ~own if self.only_negatives else use.expand_as(own)  # [N, C]

        shown = logits.where(contrasts, -torch.inf)
        largest = (
            logits.new_full((self.num_classes,), -torch.inf) if len(logits) == 0 else shown.detach().amax(0)
        )  # [C]
        if self.group is not None:
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)
        largest = largest.where(largest.isfinite(), 0)
        # By class, so that what the ranks add up are C numbers and a row's gradient holds the losses of all ranks.
        sums = torch.stack([(shown - largest).exp().sum(0), own.to(logits.dtype).sum(0), logits.where(own, 0).sum(0)])
        total, count, positive = sum_over_ranks(sums, self.group)  # [C] each
        valid = (count > 0) & (total > 0)
        lse = largest + total.where(valid, 1).log()  # [C]
        rows = count.where(valid, 0).sum()
        return (count * lse - positive).where(valid, 0).sum() / rows.where(rows > 0, 1)
