"""The processes of a launcher such as torchrun, or this one alone: who they are, and that they stop together.

Each process has a part of every batch; loss, class means and BatchNorm are those of the whole (allnc.ops.ranks,
allnc.models.synced_batchnorm), so that the weights stay alike. The first process alone writes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from allnc._command import SaidElsewhereError
from allnc.models.synced_batchnorm import synchronise
from allnc.trainer import launcher

T = TypeVar("T")
_BUCKET = 8 * 2**20  # numbers in one exchange: a copy of some of the gradients, never of all
_TIMEOUT = timedelta(minutes=10)  # of a process that is alive and silent; one that dies ends the others at once


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

    def share(self, number: int, rank: int | None = None) -> slice:
        """Which of a number of things are this or another process's: contiguous, as many as others' or one more."""
        rank = self.rank if rank is None else rank
        return slice(number * rank // self.size, number * (rank + 1) // self.size)

    def together(self, body: Callable[[], T]) -> T:
        """Run in every process; what one of them raises ends all of them.

        Raises:
            what `body` raised, in the first process in which it did; SaidElsewhereError in the others.
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
            raise SaidElsewhereError(f"rank {failed[0]} has stopped; its own error says why")
        return result  # pyright: ignore[reportReturnType]

    def gather(self, value: Any) -> list[Any]:
        """What every process passes, by rank; it is pickled."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def check_alike(self, facts: Mapping[str, str]) -> None:
        """Raise ValueError, in the first process, unless all have passed the same facts; all must call it."""
        for rank, theirs in enumerate(self.gather(facts)):
            other = next((name for name in facts if theirs[name] != facts[name]), None)
            if other is not None and self.is_first:
                raise ValueError(
                    f"every process must have the same {other}; rank {rank} has {theirs[other]}, and rank 0 has "
                    f"{facts[other]}: compare the command, the lists and the folders of their machines"
                )

    def rows_of_all(self, own: torch.Tensor, number: int) -> torch.Tensor:
        """Return the rows of all processes, [number, ...], of which this one's `share` are its own."""
        if self.group is None:
            return own
        sizes = [len(range(number)[self.share(number, rank)]) for rank in range(self.size)]
        padded = own.new_zeros(max(sizes), *own.shape[1:])  # what is gathered must have one shape
        padded[: len(own)] = own
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=self.group)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    def seed_others(self, seed: int, epoch: int) -> None:
        """Give every process but the first its own random numbers (dropout), which depend on nothing before."""
        if not self.is_first:
            torch.manual_seed(int(np.random.SeedSequence([seed, self.rank, epoch]).generate_state(1)[0]))

    def connect(self, model: nn.Module) -> None:
        """Let every BatchNorm of a model see the rows of all processes, in place.

        Raises:
            ValueError: on a CPU, a BatchNorm that does more than torch's.
        """
        if self.group is None:
            return
        if next(model.parameters()).is_cuda:
            # torch's would drop the activation of timm's BatchNormAct2d.
            from timm.layers.norm_act import convert_sync_batchnorm

            convert_sync_batchnorm(model, self.group)
        else:
            synchronise(model, self.group)

    def averaging(self, model: nn.Module, *, may_rest: bool) -> nn.Module:
        """The model whose backward averages the gradients over the processes; its parameters are the model's own.

        Args:
            model: the model, on its device.
            may_rest: whether a part of it can be without a gradient in a step.
        """
        if self.group is None:
            return model
        return DistributedDataParallel(
            model,
            device_ids=[launcher.local_rank()] if next(model.parameters()).is_cuda else None,
            process_group=self.group,
            find_unused_parameters=may_rest,
        )

    def average(self, gradients: list[torch.Tensor]) -> None:
        """Average gradients over the processes, in place; every process must have those of the same parameters."""
        if self.group is None:
            return
        buckets: list[list[torch.Tensor]] = []
        room = 0
        for gradient in gradients:
            if room < gradient.numel() or buckets[-1][0].dtype != gradient.dtype:
                buckets.append([])
                room = _BUCKET
            buckets[-1].append(gradient)
            room -= gradient.numel()
        for bucket in buckets:
            flat = torch.cat([gradient.flatten() for gradient in bucket])
            dist.all_reduce(flat, group=self.group)
            for gradient, mean in zip(bucket, flat.div_(self.size).split([g.numel() for g in bucket]), strict=True):
                gradient.copy_(mean.view_as(gradient))


@contextmanager
def launched(device: torch.device) -> Iterator[Processes]:
    """Join the processes that the launcher has started, as its environment says (RANK, WORLD_SIZE, MASTER_ADDR ...).

    Without a launcher, or with one process, there is no group.

    Raises:
        ValueError: another process cannot be reached any more.
    """
    size = launcher.world_size()
    if size == 1:
        yield Processes()
        return
    if device.type == "cuda":
        torch.cuda.set_device(launcher.local_rank())
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_TIMEOUT)
    try:
        yield Processes(dist.get_rank(), size, dist.group.WORLD)
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):  # gloo has no exception of its own
            raise
        line = str(error).strip().splitlines()[0][:200]
        raise ValueError(
            f"another process of the run has gone; its own error, or the launcher, says why: {line}"
        ) from error
    finally:
        dist.destroy_process_group()
