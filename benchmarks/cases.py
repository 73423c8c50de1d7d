"""What is compared: for each op, the same mathematics by every provider, on the same inputs.

Providers
    eager     the formula as it is usually written, autograd, N x N (or C x C) matrices in memory
    compiled  torch.compile of eager
    dense     ours with backend="eager": one dense matrix product, hand-written backward (hycon, all_around)
    fused     ours with backend="auto": C++ on the CPU, CUDA C++ or Triton on a GPU, closed forms where they are faster

Legend: N activations, D columns of the projection, C classes, F features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import allnc
from allnc.ops.all_around import all_around_reference
from allnc.ops.class_mean import class_mean_ema_reference
from allnc.ops.hycon import hycon_reference
from allnc.ops.p2p import p2p_reference

OPS = ("hycon", "p2p", "class_mean_ema", "all_around")
PROVIDERS = ("eager", "compiled", "dense", "fused")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of one case."""

    N: int
    D: int
    C: int
    F: int
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True, kw_only=True)
class Case:
    """One op at one shape: its inputs and the providers that compute it.

    `leaves` get gradients; each provider maps the inputs to a scalar. `effective_flops` is what the eager matrix
    products take for forward and backward, the same number for every provider, so that rates compare.
    """

    op: str
    shape: Shape
    leaves: dict[str, Tensor]
    others: dict[str, Tensor]
    providers: dict[str, Callable[..., Tensor]]
    effective_flops: float

    def step(self, provider: str, *, backward: bool) -> Callable[[], Tensor]:
        """A call without arguments that runs forward, and backward if asked, on its own copy of the leaves."""
        function = self.providers[provider]
        leaves = {name: leaf.clone().requires_grad_(backward) for name, leaf in self.leaves.items()}

        def forward() -> Tensor:
            with torch.no_grad():
                return function(**leaves, **self.others)

        def forward_backward() -> Tensor:
            for leaf in leaves.values():
                leaf.grad = None
            loss = function(**leaves, **self.others)
            loss.backward()
            return loss.detach()

        return forward_backward if backward else forward

    def value_and_gradients(self, provider: str, dtype: torch.dtype | None = None) -> list[Tensor]:
        """The loss and the gradient of every leaf, computed once, with the inputs in `dtype` if given."""
        leaves = {name: leaf.to(dtype or leaf.dtype, copy=True).requires_grad_() for name, leaf in self.leaves.items()}
        loss = self.providers[provider](**leaves, **self.others)
        loss.backward()
        return [loss.detach(), *(leaf.grad for leaf in leaves.values() if leaf.grad is not None)]


def unit_rows(generator: torch.Generator, *size: int) -> Tensor:
    return F.normalize(torch.randn(*size, generator=generator), dim=1)


def long_tailed_labels(generator: torch.Generator, n: int, c: int) -> Tensor:
    """Labels drawn from an exponential profile of imbalance ratio 100, as batches of long-tailed data have them."""
    frequency = 100.0 ** -(torch.arange(c) / max(1, c - 1))
    return torch.multinomial(frequency, n, replacement=True, generator=generator)


def make_case(op: str, shape: Shape, device: torch.device, *, seed: int = 0) -> Case:
    """The case of one op at one shape with random inputs on `device`."""
    generator = torch.Generator().manual_seed(seed)
    n, d, c, f = shape.N, shape.D, shape.C, shape.F

    def put(x: Tensor) -> Tensor:
        return x.to(device, shape.dtype if x.is_floating_point() else x.dtype)

    labels = put(long_tailed_labels(generator, n, c))
    z, proj_means = put(unit_rows(generator, n, d)), put(torch.randn(c, d, generator=generator))
    means, weights = (put(torch.randn(c, f, generator=generator)) for _ in range(2))
    hycon_flops, p2p_flops = 6.0 * n * d * (n + c), 6.0 * c * c * f
    others = {"labels": labels}
    if op == "hycon":
        leaves = {"z": z, "means": proj_means}
        ours = {"dense": partial(allnc.hycon, backend="eager"), "fused": allnc.hycon}
        return _case(op, shape, leaves, others, hycon_reference, ours, hycon_flops)
    if op == "p2p":
        leaves = {"x": means, "y": weights}
        return _case(op, shape, leaves, {}, p2p_reference, {"fused": allnc.p2p}, p2p_flops)
    if op == "all_around":
        leaves = {"z": z, "proj_means": proj_means, "means": means, "weights": weights}
        ours = {
            "dense": _summed(partial(allnc.all_around, backend="eager")),
            "fused": _summed(allnc.all_around),
        }
        return _case(op, shape, leaves, others, _summed(all_around_reference), ours, hycon_flops + 3 * p2p_flops)
    if op == "class_mean_ema":
        leaves = {"features": put(torch.randn(n, f, generator=generator))}
        probe = torch.randn(c, f, generator=generator).to(device)
        ours = {"fused": _from_fresh_state(allnc.class_mean_ema, probe)}
        reference = _from_fresh_state(lambda *arguments: class_mean_ema_reference(*arguments)[0], probe)
        return _case(op, shape, leaves, others, reference, ours, 2.0 * n * f)
    raise ValueError(f"op must be one of {', '.join(OPS)}; got {op!r}")


def _summed(function: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Tensor]:
    return lambda **inputs: torch.stack(tuple(function(**inputs))).sum()


def _from_fresh_state(function: Callable[..., Tensor], probe: Tensor) -> Callable[..., Tensor]:
    """A linear loss of the class means, from the same state at each call, so that every run does the same work."""

    def loss(features: Tensor, labels: Tensor) -> Tensor:
        seen = torch.zeros(len(probe), dtype=torch.bool, device=probe.device)
        return (function(features, labels, torch.zeros_like(probe), seen) * probe).sum()

    return loss


def _case(op, shape, leaves, others, reference, ours, flops) -> Case:
    providers = {"eager": reference, "compiled": torch.compile(reference), **ours}
    return Case(op=op, shape=shape, leaves=leaves, others=others, providers=providers, effective_flops=flops)
