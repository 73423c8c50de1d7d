"""BatchNorm over the rows of all processes, for CPUs; torch's own SyncBatchNorm runs on GPUs only."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn


def synchronise(model: nn.Module, group: dist.ProcessGroup) -> None:
    """Let every BatchNorm of a model take its statistics over the rows of all processes of a group.

    Raises:
        ValueError: a BatchNorm that does more than torch's.
    """
    for name, module in model.named_modules():
        if not isinstance(module, nn.modules.batchnorm._BatchNorm):
            continue
        if not module.training and all(not p.requires_grad for p in module.parameters()):
            continue  # frozen: it takes no statistics of a batch
        if type(module) not in (nn.BatchNorm1d, nn.BatchNorm2d):
            raise ValueError(
                f"model.name must have plain BatchNorm on several processes of a CPU; {name} is a "
                f"{type(module).__name__}: train on one process or on GPUs"
            )
        module.__class__ = _SyncedBatchNorm
        vars(module)["group"] = group


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
        means, variances, steps = self.running_mean, self.running_var, self.num_batches_tracked
        if self.track_running_stats and means is not None and variances is not None and steps is not None:
            with torch.no_grad():
                steps.add_(1)
                rate = self.momentum if self.momentum is not None else 1 / float(steps)
                means.lerp_(mean, rate)
                variances.lerp_(variance * (rows / (rows - 1)), rate)
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
