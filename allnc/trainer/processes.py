"""The processes of a launcher such as torchrun, or this one alone: who they are, and that they stop together.

Each process has a part of every batch; loss, class means and BatchNorm are those of the whole (allnc.ops.ranks,
`synchronised`), so that the weights stay alike. The first process alone writes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")
_TIMEOUT = timedelta(minutes=10)  # of a process that is alive and silent; one that dies ends the others at once


class AnotherProcessError(ValueError):
    """Another process has stopped for a reason that it says itself; this one has nothing to add."""

    said_elsewhere = True


class Processes:
    """What a process knows of the others.

    Args:
        rank: its number, 0 writes.
        size: how many there are.
        group: all of them; None when this process is alone.
    """

    def __init__(self, rank: int = 0, size: int = 1, group: dist.ProcessGroup | None = None) -> None:
        self.rank, self.size, self.group = rank, size, group

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share(self, number: int) -> slice:
        """Which of a number of things are this process's: contiguous, and as many as others' or one more."""
        return slice(number * self.rank // self.size, number * (self.rank + 1) // self.size)

    def together(self, body: Callable[[], T]) -> T:
        """Run in every process; what one of them raises ends all of them.

        Raises:
            what `body` raised, in the first process in which it did; AnotherProcessError in the others.
        """
        if self.group is None:
            return body()
        result, problem = None, None
        try:
            result = body()
        except Exception as error:  # whatever it is: the others are waiting
            problem = error
        failed = [rank for rank, wrong in enumerate(self.gather(problem is not None)) if wrong]
        if failed:
            with contextlib.suppress(RuntimeError):  # let all have read the answers before the first one leaves
                dist.barrier(self.group)
        if problem is not None and failed[0] == self.rank:
            raise problem
        if failed:
            raise AnotherProcessError(f"rank {failed[0]} has stopped; its own error says why")
        return result  # pyright: ignore[reportReturnType]

    def gather(self, value: Any) -> list[Any]:
        """What every process passes, by rank; small things, which are pickled."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def total(self, value: Tensor) -> Tensor:
        """The sum of the processes' tensors, of one shape on all."""
        if self.group is not None:
            dist.all_reduce(value, group=self.group)
        return value

    def seed_others(self, seed: int, epoch: int) -> None:
        """Give every process but the first its own random numbers (dropout), which depend on nothing before."""
        if not self.is_first:
            torch.manual_seed(int(np.random.SeedSequence([seed, self.rank, epoch]).generate_state(1)[0]))

    def averaging(self, model: nn.Module, *, may_rest: bool) -> nn.Module:
        """The model whose gradients are averaged over the processes and whose BatchNorm sees the rows of all.

        The model itself has the same parameters, and stays the one that is saved and measured.

        Args:
            model: the model, on its device.
            may_rest: whether a part of it can be without a gradient in a step.

        Raises:
            ValueError: on a CPU, a BatchNorm that does more than torch's.
        """
        if self.group is None:
            return model
        on_gpu = next(model.parameters()).is_cuda
        if on_gpu:
            # torch's would drop the activation of timm's BatchNormAct2d.
            from timm.layers.norm_act import convert_sync_batchnorm

            convert_sync_batchnorm(model, self.group)
        else:
            _synchronise(model, self.group)
        return DistributedDataParallel(
            model,
            device_ids=[local_rank()] if on_gpu else None,
            process_group=self.group,
            find_unused_parameters=may_rest,
        )


@contextmanager
def launched(device: torch.device) -> Iterator[Processes]:
    """Join the processes that the launcher has started, as its environment says (RANK, WORLD_SIZE, MASTER_ADDR ...).

    Without a launcher, or with one process, there is no group.
    """
    size = world_size()
    if size == 1:
        yield Processes()
        return
    if device.type == "cuda":
        torch.cuda.set_device(local_rank())
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_TIMEOUT)
    try:
        yield Processes(dist.get_rank(), size, dist.group.WORLD)
    finally:
        dist.destroy_process_group()


def _synchronise(model: nn.Module, group: dist.ProcessGroup) -> None:
    for name, module in model.named_modules():
        if not isinstance(module, nn.modules.batchnorm._BatchNorm):
            continue
        if type(module) not in (nn.BatchNorm1d, nn.BatchNorm2d):
            raise ValueError(
                f"model.name must have plain BatchNorm on several processes of a CPU; {name} is a "
                f"{type(module).__name__}: train on one process or on GPUs"
            )
        module.__class__ = _SyncedBatchNorm
        vars(module)["group"] = group


def world_size() -> int:
    """How many processes the launcher has started, 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """The number of this process on its machine, which is that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


class _SyncedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm over the rows of all processes; torch's own SyncBatchNorm runs on GPUs only."""

    group: dist.ProcessGroup

    def _check_input_dim(self, input: Tensor) -> None:
        pass

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        x = input if input.dtype == torch.float64 else input.float()  # [N, c, ...]
        others = [0, *range(2, x.ndim)]

        def by_channel(values: Tensor) -> Tensor:
            return values.view(-1, *[1] * (x.ndim - 2))

        count = x.new_full((1,), x.numel() / x.shape[1])
        sums = _SumBothWays.apply(torch.cat([x.sum(others), count]), self.group)
        mean, rows = sums[:-1] / sums[-1], sums[-1].detach()
        centred = x - by_channel(mean)
        variance = _SumBothWays.apply(centred.square().sum(others), self.group) / rows
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            with torch.no_grad():
                self.num_batches_tracked.add_(1)
                rate = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
                self.running_mean.lerp_(mean, rate)
                self.running_var.lerp_(variance * (rows / (rows - 1)), rate)
        scale = (variance + self.eps).rsqrt()
        y = centred * by_channel(scale * self.weight if self.affine else scale)
        return (y + by_channel(self.bias) if self.affine else y).to(input.dtype)


class _SumBothWays(torch.autograd.Function):
    """The sum over processes of values, and of gradients: a statistic of the whole batch serves all of them."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, *grads: Tensor):
        total = grads[0].clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None
