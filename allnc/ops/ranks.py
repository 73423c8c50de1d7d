"""One loss over the batches of several processes (torch.distributed).

Every rank ends with the value of one process that has all rows. Its gradient is a *share*: the sum over ranks is the
gradient of that process. What is computed alike on all ranks has a W-th of its gradient on each (`replicated`).

What the ranks exchange: the sizes of their batches and facts that must agree, their rows (N D numbers), and sums of
the whole batch.

Legend: N activations of all ranks together, W ranks.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_MOST_FACTS = 16  # numbers of one exchange, whose length every rank must know before


class Ranks:
    """The ranks of a process group and how many rows each of them brought to this call.

    Making one is collective: all ranks must do it. A rank whose arguments are wrong still takes part, so that the
    others get an error too instead of waiting for it.

    Args:
        group: a process group this process belongs to.
        check: checks this rank's arguments; what it raises is raised again here, and as RuntimeError on other ranks.
        rows: how many rows this rank brings; called after `check`.
        facts: name -> number or None that must be the same on every rank; called after `check`.

    Raises:
        TypeError, ValueError: not a process group of this process; what `check` raised; facts that differ.
        RuntimeError: another rank's arguments are wrong.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        check: Callable[[], object],
        rows: Callable[[], int],
        facts: Callable[[], Mapping[str, float | None]],
    ) -> None:
        if not isinstance(group, dist.ProcessGroup):
            got = "the group of another process" if group == dist.GroupMember.NON_GROUP_MEMBER else type(group).__name__
            raise TypeError(
                f"group must be a torch.distributed process group this process belongs to; got {got}. "
                "After init_process_group, torch.distributed.group.WORLD holds all processes"
            )
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        problem: Exception | None = None
        own_facts: Mapping[str, float | None] = {}
        own_rows = 0
        try:
            check()
            own_rows, own_facts = rows(), facts()
        except Exception as error:  # whatever it is: the other ranks are waiting for this one's answer
            problem = error
        self.sizes = self._agree(own_rows, own_facts, problem)
        self.num_rows = sum(self.sizes)  # N
        self.start = sum(self.sizes[: self.rank])
        self.stop = self.start + own_rows

    def _agree(self, rows: int, facts: Mapping[str, float | None], problem: Exception | None) -> list[int]:
        """Exchange problems, sizes and facts; returns every rank's rows. The one synchronisation of a call."""
        assert len(facts) <= _MOST_FACTS
        bits = [_bits(value) for value in facts.values()]
        everyone = self._exchange([int(problem is not None), rows, *bits] + [0] * (_MOST_FACTS - len(bits)))
        if problem is not None:
            raise problem
        for rank, (failed, *_) in enumerate(everyone):
            if failed:
                raise RuntimeError(f"rank {rank} was given arguments it cannot take; its own error says which")
        for index, (name, value) in enumerate(facts.items(), start=2):
            for rank, theirs in enumerate(everyone):
                if theirs[index] != everyone[self.rank][index]:
                    got = _value(theirs[index])
                    raise ValueError(
                        f"{name} must be the same on every rank; got {value} here and {got} on rank {rank}"
                    )
        return [rows for _, rows, *_ in everyone]

    def _exchange(self, numbers: list[int]) -> list[list[int]]:
        device = torch.device("cuda" if dist.get_backend(self.group) == "nccl" else "cpu")
        mine = torch.tensor(numbers, dtype=torch.int64, device=device)
        theirs = mine.new_empty(self.size, len(numbers))
        dist.all_gather(list(theirs.unbind()), mine, group=self.group)
        return theirs.tolist()

    def gather(self, own: Tensor) -> Tensor:
        """The rows of all ranks in rank order, [N, ...]; a gradient reaches this rank's rows only."""
        longest = max(self.sizes)
        padded = own.new_zeros(longest, *own.shape[1:])
        padded[: len(own)] = own.detach()
        everyone = own.new_empty(self.size, *padded.shape)
        # As bytes, because not every backend carries every type.
        dist.all_gather([_bytes(rows) for rows in everyone.unbind()], _bytes(padded), group=self.group)
        parts = [rows[:size] for rows, size in zip(everyone.unbind(), self.sizes, strict=True)]
        parts[self.rank] = own
        return torch.cat(parts)

    def check_same(self, name: str, x: Tensor) -> None:
        """Raise ValueError on every rank unless x [...] is the same on all of them, to 1e-3 of its largest entry."""
        low, high = x.detach().clone(), x.detach().clone()
        dist.all_reduce(low, dist.ReduceOp.MIN, group=self.group)
        dist.all_reduce(high, dist.ReduceOp.MAX, group=self.group)
        difference = float((high - low).max())
        if difference > 1e-3 * float(high.abs().max()):
            raise ValueError(
                f"{name} must be the same on every rank; got entries that differ by {difference:.3g}. "
                "Update the class means from the batches of all ranks"
            )

    def share(self, x: Tensor) -> Tensor:
        """x [N, ...] with a gradient through this rank's rows only: shares of the ranks add up to the whole."""
        return torch.cat([x[: self.start].detach(), x[self.start : self.stop], x[self.stop :].detach()])

    def own_first(self, x: Tensor) -> Tensor:
        """x [N, ...] with this rank's rows moved to the front."""
        return x.roll(-self.start, 0)

    def replicated(self, x: Tensor) -> Tensor:
        """x, computed alike on every rank, with this rank's share of its gradient."""
        return scale_gradient(x, 1 / self.size)

    def logsumexp(self, x: Tensor) -> Tensor:
        """log Σ_r exp(x_r) over the ranks' x [N]; -inf where all are."""
        largest = x.clone()
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)
        origin = largest.where(largest != -torch.inf, 0)  # nowhere anything: subtract a number
        total = (x - origin).exp_()
        dist.all_reduce(total, group=self.group)
        return total.log_().add_(origin)


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        return grads[0] * ctx.factor, None


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """x, with its gradient times a factor."""
    return _ScaledGradient.apply(x, factor)  # pyright: ignore[reportReturnType]


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, *grads: Tensor):
        return grads[0], None


def sum_over_ranks(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Σ of the ranks' x, of one shape on all; the gradient reaches this rank's x. x itself without a group."""
    return x if group is None else _SumOverRanks.apply(x, group)  # pyright: ignore[reportReturnType]


def _bytes(x: Tensor) -> Tensor:
    return x.reshape(-1).view(torch.uint8)


def _bits(value: float | None) -> int:
    return struct.unpack("q", struct.pack("d", float("nan") if value is None else value))[0]


def _value(bits: int) -> Any:
    value = struct.unpack("d", struct.pack("q", bits))[0]
    return None if value != value else value
