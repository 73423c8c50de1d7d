"""GBBN: two classification branches and the schedule that moves from the one to the other.

    η = 1 - min(1, progress / horizon)^γ
    L_cls = η CE(logits_u, y_u) + (1 - η) L_reb(logits_r, y_r)

Legend: N images, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from allnc._checks import check_choice, check_interval
from allnc.losses.base import LossOutput, checked_counts
from allnc.losses.longtail import LONG_TAIL, CrossEntropy, LongTail, long_tail_loss
from allnc.ops._common import accumulation_dtype

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class GBBN(nn.Module):
    """Gradually balanced two-branch classification: representation first, balance later.

    The uniform branch is plain cross-entropy on instance-balanced batches; the re-balancing branch takes
    over as η falls from 1 to 0.

    Args:
        class_counts: [C] training images of each class, >= 0.
        rebalance: loss of the re-balancing branch, by name (default settings) or as a module called with
            (logits, labels).
        gamma: γ > 0, shape of the schedule: 1 linear, 2 BBN's parabola, larger switches late.
        horizon: share of training in [0, 1] after which the re-balancing branch alone remains; 0: from the
            start.
        group: ranks over whose rows the means are taken; a module for `rebalance` has its own.

    Raises:
        TypeError, ValueError: an argument out of its range.

    Example:
        >>> import torch
        >>> loss = GBBN([100, 10, 1])
        >>> loss.eta(0.0), loss.eta(0.5), loss.eta(1.0)
        (1.0, 0.75, 0.0)
        >>> logits, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
        >>> output = loss(logits, labels, logits, labels, progress=0.5)
        >>> sorted(output.parts)
        ['cls', 'eta', 'rebalance', 'uniform']

    Source: AllNC (arXiv 2408.07253), after Zhou et al., BBN, CVPR 2020.
    """

    def __init__(
        self,
        class_counts: Tensor | Sequence[int],
        *,
        rebalance: LongTail | nn.Module = "logit_adjusted",
        gamma: float = 2.0,
        horizon: float = 1.0,
        group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        num_classes = len(checked_counts(class_counts))
        check_interval("gamma", gamma, 0, open_low=True)
        check_interval("horizon", horizon, 0, 1)
        if not isinstance(rebalance, nn.Module):
            check_choice("rebalance", rebalance, LONG_TAIL)
            rebalance = long_tail_loss(rebalance, class_counts, group=group)
        self.gamma, self.horizon = gamma, horizon
        self.uniform_loss = CrossEntropy(num_classes, group=group)
        self.rebalance_loss = rebalance

    def eta(self, progress: float) -> float:
        """Weight η in [0, 1] of the uniform branch.

        Args:
            progress: share of training done, in [0, 1].

        Raises:
            ValueError: progress outside [0, 1].
        """
        check_interval("progress", progress, 0, 1)
        return 0.0 if progress >= self.horizon else 1.0 - (progress / self.horizon) ** self.gamma

    def forward(
        self,
        logits_uniform: Tensor,
        labels_uniform: Tensor,
        logits_rebalance: Tensor,
        labels_rebalance: Tensor,
        progress: float,
    ) -> LossOutput:
        """Return the mixed classification loss.

        Args:
            logits_uniform: [N, C] floating, of the uniform branch.
            labels_uniform: [N] int64 in [0, C) or -100.
            logits_rebalance: [N', C] floating, of the re-balancing branch.
            labels_rebalance: [N'] int64 in [0, C) or -100.
            progress: share of training done, in [0, 1].

        Returns:
            `LossOutput` with parts "cls" (the total), "uniform", "rebalance" and "eta".
        """
        eta = self.eta(progress)
        if logits_uniform is logits_rebalance and logits_uniform.is_floating_point():  # one copy in float32, not two
            logits_uniform = logits_rebalance = logits_uniform.to(accumulation_dtype(logits_uniform.dtype))
        with torch.set_grad_enabled(eta > 0 and torch.is_grad_enabled()):  # only logged: keep no [N, C] matrix for it
            uniform = self.uniform_loss(logits_uniform, labels_uniform)
        rebalance = self.rebalance_loss(logits_rebalance, labels_rebalance)
        # A branch of weight 0 is logged but left out of the graph: 0 x inf would be NaN.
        terms = [share * loss for share, loss in ((eta, uniform), (1 - eta, rebalance)) if share > 0]
        total = torch.stack(terms).sum()
        parts = {
            "cls": total.detach(),
            "uniform": uniform.detach(),
            "rebalance": rebalance.detach(),
            "eta": total.new_full((), eta),
        }
        return LossOutput(total, parts)

    def extra_repr(self) -> str:
        return f"gamma={self.gamma}, horizon={self.horizon}"
