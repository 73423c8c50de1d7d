"""BatchNorm where a batch passes a network in parts: statistics that move once a step, and GroupNorm in its place."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def resting_statistics(model: nn.Module) -> Iterator[None]:
    """Let no running statistic of a model in training mode move; what BatchNorm computes stays the same."""
    norms = _tracking(model)
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


@contextmanager
def averaged_statistics(model: nn.Module) -> Iterator[None]:
    """Move the running statistics once, towards the mean of those of all the forwards inside.

    Every forward must have been done when the context ends; one alone moves them as without the context.
    """
    kept = [_Average(norm) for norm in _tracking(model)]
    hooks = [average.norm.register_forward_pre_hook(average.next) for average in kept]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for average in kept:
            average.finish()


def group_normalised(model: nn.Module) -> nn.Module:
    """Put a GroupNorm in the place of every BatchNorm2d, with its weights; no image then sees another.

    A group has eight channels or more, and there are 32 of them at most.

    Raises:
        ValueError: there is none.

    Source: Wu & He, Group Normalization (ECCV 2018).
    """
    if not any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        raise ValueError("model.norm must be batch with a model that has no BatchNorm2d; got group: remove it")
    for parent in list(model.modules()):
        for name, norm in list(parent.named_children()):
            if not isinstance(norm, nn.BatchNorm2d):
                continue
            groups = math.gcd(norm.num_features, min(32, max(1, norm.num_features // 8)))
            instead = nn.GroupNorm(groups, norm.num_features, eps=norm.eps, affine=norm.affine)
            instead.load_state_dict(norm.state_dict(), strict=False)  # without the running statistics
            # timm's BatchNormAct2d goes on with dropout and activation.
            rest = [module for module in (getattr(norm, "drop", None), getattr(norm, "act", None)) if module]
            setattr(parent, name, nn.Sequential(instead, *rest) if rest else instead)
    return model


def _tracking(model: nn.Module) -> list[_BatchNorm]:
    """The BatchNorms whose running statistics a forward moves."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    return [norm for norm in norms if norm.training and norm.track_running_stats and norm.running_mean is not None]


class _Average:
    """Lets a BatchNorm's running statistics be the mean over its forwards, then folds that into what they were."""

    def __init__(self, norm: _BatchNorm) -> None:
        self.norm, self.momentum, self.forwards = norm, norm.momentum, 0
        self.before = [buffer.clone() for buffer in self._buffers()]
        self.batches = None if norm.num_batches_tracked is None else norm.num_batches_tracked.clone()

    def _buffers(self) -> tuple[Tensor, Tensor]:
        assert self.norm.running_mean is not None and self.norm.running_var is not None
        return self.norm.running_mean, self.norm.running_var

    def next(self, *_: object) -> None:
        self.forwards += 1
        self.norm.momentum = 1 / self.forwards

    @torch.no_grad()
    def finish(self) -> None:
        self.norm.momentum = self.momentum
        if not self.forwards:
            return
        if self.batches is not None and self.norm.num_batches_tracked is not None:
            self.norm.num_batches_tracked.copy_(self.batches + 1)
        rate = self.momentum if self.momentum is not None else 1 / (1 + float(self.batches or 0))
        for buffer, before in zip(self._buffers(), self.before, strict=True):
            buffer.copy_(before.lerp(buffer, rate))
