"""What is compared: for each op, the same mathematics by every provider, on the same inputs.

Ops
    hycon           activations against activations and class means, classes balanced
    supcon          hycon without means and without balance: the supervised contrastive loss
    pairs           supcon where every label occurs twice, at rows i and i + N/2: two views, one positive an anchor
    p2p             class means against classifier vectors
    class_mean_ema  class means of the batch into the running ones
    all_around      hycon and three p2p terms in one call

Providers
    eager        the formula as it is usually written, autograd, N x N (or C x C) matrices in memory
    autocast     eager under torch.autocast, for 16-bit inputs: products in 16 bits, as in mixed-precision training;
                 eager itself multiplies in float32
    compiled     torch.compile of eager
    dense        ours with backend="eager": one dense matrix product, hand-written backward
    fused        ours with backend="auto": C++ on a CPU, CUDA C++ or Triton on a GPU, closed forms where they are faster
    fused-graph  fused, captured in a CUDA graph and replayed
    and the packages of rivals.py

Legend: N activations, D columns of the projection, C classes, F features.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import rivals
import torch
import torch.nn.functional as F
from torch import Tensor
from work import (
    AUTOGRAD,
    BEST,
    DENSE,
    INF_CL,
    SIGLIP,
    TRIANGLE,
    TRIANGLE_AND_SQUARE,
    Contrast,
    Work,
    class_mean_work,
    pair_work,
)

import allnc
from allnc.info import BACKENDS
from allnc.ops._common import accumulation_dtype, resolve_backend
from allnc.ops.all_around import all_around_reference
from allnc.ops.hycon import hycon_reference
from allnc.ops.p2p import p2p_reference

OPS = ("hycon", "supcon", "pairs", "p2p", "class_mean_ema", "all_around")
PROVIDERS = ("eager", "autocast", "compiled", "dense", "fused", "fused-graph", *rivals.MODULES)
GRAPH_ROWS = 8192  # a step that is not bound by its launches gains nothing from a graph

Loss = Callable[..., Tensor]
WorkOf = Callable[[bool], Work]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of one case; 0 for those the op does not have."""

    N: int = 0
    D: int = 0
    C: int = 0
    F: int = 0
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True, kw_only=True)
class Provider:
    """One way to compute a case."""

    compute: Loss
    reference: Loss  # what it is checked against in float64
    work: WorkOf | None = None  # backward -> its algorithm's work; None where that is not known
    matrices: tuple[float, float] = (
        0.0,
        0.0,
    )  # N x (N + C) matrices of its accumulation type it holds, forward and with backward
    unusable: str = ""  # the status it has in place of figures, "" if it can run
    note: str = ""
    graph: bool = False
    check_as: torch.dtype | None = None  # type whose tolerance applies, if it rounds more than its inputs are


@dataclass(frozen=True, kw_only=True)
class Case:
    """One op at one shape: its inputs and the providers that compute it.

    `leaves` get gradients; each provider maps the inputs to a scalar, or to a tensor that `cotangent` goes back from.
    `effective_flops` is what the eager matrix products take for forward and backward, the same number for every
    provider, so that rates compare. `best` is the least work known.
    """

    op: str
    shape: Shape
    leaves: dict[str, Tensor]
    others: dict[str, Tensor] = field(default_factory=dict)
    providers: dict[str, Provider]
    effective_flops: float
    best: WorkOf
    cotangent: Tensor | None = None

    def step(self, provider: str, *, backward: bool) -> Callable[[], Tensor]:
        """A call without arguments that runs forward, and backward if asked, on its own copy of the leaves."""
        function = self.providers[provider].compute
        leaves = {name: leaf.clone().requires_grad_(backward) for name, leaf in self.leaves.items()}

        def forward() -> Tensor:
            with torch.no_grad():
                return function(**leaves, **self.others)

        def forward_backward() -> Tensor:
            value = function(**leaves, **self.others)
            torch.autograd.grad(value, list(leaves.values()), self.cotangent)
            return value.detach()

        run = forward_backward if backward else forward
        return _captured(run) if self.providers[provider].graph else run

    def value_and_gradients(
        self, provider: str, dtype: torch.dtype | None = None, *, reference: bool = False
    ) -> list[Tensor]:
        """The value and the gradient of every leaf, computed once, with the inputs in `dtype` if given.

        With reference=True, of what the provider is checked against.
        """
        leaves = {name: leaf.to(dtype or leaf.dtype, copy=True).requires_grad_() for name, leaf in self.leaves.items()}
        chosen = self.providers[provider]
        value = (chosen.reference if reference else chosen.compute)(**leaves, **self.others)
        cotangent = None if self.cotangent is None else self.cotangent.to(value.dtype)
        return [value.detach(), *torch.autograd.grad(value, list(leaves.values()), cotangent)]

    def predicted_bytes(self, provider: str, *, backward: bool) -> float:
        """Memory a provider's matrices take at their peak; 0 where it holds none."""
        shape, itemsize = self.shape, accumulation_dtype(self.shape.dtype).itemsize
        matrix = float(shape.N) * (shape.N + (0 if self.op in ("supcon", "pairs") else shape.C))
        if self.op == "p2p":
            matrix = float(shape.C) ** 2
        return self.providers[provider].matrices[backward] * itemsize * matrix


def _captured(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """`step` captured in a CUDA graph: a call replays it and returns the tensor it writes its value to."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = step()

    def replay() -> Tensor:
        graph.replay()
        return value

    return replay


def unit_rows(generator: torch.Generator, *size: int) -> Tensor:
    return F.normalize(torch.randn(*size, generator=generator, device=generator.device), dim=1)


def long_tailed_labels(generator: torch.Generator, n: int, c: int) -> Tensor:
    """Labels drawn from an exponential profile of imbalance ratio 100, as batches of long-tailed data have them."""
    frequency = 100.0 ** -(torch.arange(c, device=generator.device) / max(1, c - 1))
    return torch.multinomial(frequency, n, replacement=True, generator=generator)


def make_case(op: str, shape: Shape, device: torch.device, *, seed: int = 0) -> Case:
    """The case of one op at one shape with random inputs on `device`."""
    if op not in OPS:
        raise ValueError(f"op must be one of {', '.join(OPS)}; got {op!r}")
    generator = torch.Generator(device).manual_seed(seed)
    return _BUILDERS[op](op, shape, device, generator)


def _contrast_case(op: str, shape: Shape, device: torch.device, generator: torch.Generator) -> Case:
    """hycon, supcon or pairs."""
    n, d, c = shape.N, shape.D, shape.C if op == "hycon" else 0
    if op == "pairs" and n % 2:
        raise ValueError(f"N must be even for pairs, two views of each image; got {n}")
    leaves = {"z": unit_rows(generator, n, d).to(shape.dtype)}
    options: dict[str, float | str] = {"temperature": rivals.TEMPERATURE}
    if op == "hycon":
        leaves["means"] = torch.randn(c, d, generator=generator, device=device).to(shape.dtype)
    else:
        options["balance"] = "none"
    labels = torch.arange(n, device=device) % (n // 2) if op == "pairs" else long_tailed_labels(generator, n, shape.C)
    reference, ours = partial(hycon_reference, **options), partial(allnc.hycon, **options)
    works = {name: _contrast_work(algorithm, n, c, d) for name, algorithm in _algorithms(device, shape.dtype).items()}
    providers = _our_providers("hycon", shape, device, reference, ours, works)
    if op in ("supcon", "pairs"):
        providers |= _rival_providers(op, shape, device, reference)
    return Case(
        op=op,
        shape=shape,
        leaves=leaves,
        others={"labels": labels},
        providers=providers,
        effective_flops=6.0 * n * d * (n + c),
        best=_contrast_work(BEST[device.type], n, c, d),
    )


def _contrast_work(algorithm: Contrast, n: int, c: int, d: int) -> WorkOf:
    return lambda backward: algorithm.work(n, c, d, backward=backward)


def _algorithms(device: torch.device, dtype: torch.dtype) -> dict[str, Contrast]:
    """HyCon's algorithm by provider; that of fused is the one of the backend it resolves to."""
    fused = {"cpp": TRIANGLE, "triton": TRIANGLE_AND_SQUARE}.get(_backend("hycon", device, dtype), DENSE)
    return {"eager": AUTOGRAD, "compiled": AUTOGRAD, "dense": DENSE, "fused": fused}


def _backend(op: str, device: torch.device, dtype: torch.dtype) -> str:
    return resolve_backend("auto", op=op, device=device, dtype=dtype, supported=BACKENDS[op])


# Matrices held at the peak, forward and with backward, as measured on a CPU in float32 at N = 4096.
_EAGER_MATRICES, _COMPILED_MATRICES, _DENSE_MATRICES = (5.0, 6.0), (2.0, 2.5), (2.0, 2.1)


def _our_providers(
    op: str, shape: Shape, device: torch.device, reference: Loss, ours: Loss, works: dict[str, WorkOf]
) -> dict[str, Provider]:
    """Eager, compiled and what is ours. `works` holds what is known of eager, compiled, dense and fused."""

    def provider(name: str, compute: Loss, matrices: tuple[float, float] = (0.0, 0.0), **others: Any) -> Provider:
        return Provider(compute=compute, reference=reference, work=works.get(name), matrices=matrices, **others)

    note = f"backend {_backend(op, device, shape.dtype)}"
    providers = {
        "eager": provider("eager", reference, _EAGER_MATRICES),
        "compiled": provider("compiled", _compiled(reference), _COMPILED_MATRICES),
        "fused": provider("fused", ours, note=note),
    }
    if shape.dtype.itemsize == 2 and op != "class_mean_ema":
        providers["autocast"] = provider("eager", _autocast(reference, device, shape.dtype), _EAGER_MATRICES)
    if op in ("hycon", "all_around"):
        unusable = "" if device.type == "cuda" else "unsupported: CUDA graphs need a CUDA device"
        if not unusable and shape.N > GRAPH_ROWS:
            unusable = f"skipped: graphs are timed up to N = {GRAPH_ROWS}, beyond which launches do not matter"
        providers["dense"] = provider("dense", partial(ours, backend="eager"), _DENSE_MATRICES)
        providers["fused-graph"] = provider("fused", ours, note=note, graph=True, unusable=unusable)
    return providers


def _autocast(reference: Loss, device: torch.device, dtype: torch.dtype) -> Loss:
    def compute(**inputs: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype):
            return reference(**inputs)

    return compute


def _compiled(reference: Loss) -> Loss:
    """torch.compile of `reference`, anew for each case: after some shapes of one function it falls back to eager."""

    @functools.cache
    def compiled() -> Loss:
        torch._dynamo.reset()
        return torch.compile(lambda **inputs: reference(**inputs), dynamic=False)

    return lambda **inputs: compiled()(**inputs)


def _rival_providers(op: str, shape: Shape, device: torch.device, reference: Loss) -> dict[str, Provider]:
    """The packages of rivals.py that have a loss for this op."""
    n, d = shape.N, shape.D
    unusable = {name: rivals.unusable(name, n=n, d=d, device=device) for name in rivals.MODULES}
    providers = {
        "pytorch-metric-learning": Provider(
            compute=rivals.metric_learning,
            reference=reference,
            work=_contrast_work(AUTOGRAD, n, 0, d),
            matrices=(10.8, 12.0),
            unusable=unusable["pytorch-metric-learning"],
            note=rivals.version("pytorch-metric-learning"),
        )
    }
    if op == "pairs":
        providers["inf-cl"] = Provider(
            compute=rivals.inf_cl,
            reference=rivals.inf_cl_reference,
            work=_contrast_work(INF_CL, n, 0, d),
            unusable=unusable["inf-cl"],
            note=f"{rivals.version('inf-cl')}; its sum holds the anchor itself; TF32",
            check_as=torch.float16,  # TF32 has float16's mantissa
        )
        providers["siglip-kernel"] = Provider(
            compute=rivals.siglip,
            reference=rivals.siglip_reference,
            work=_contrast_work(SIGLIP, n, 0, d),
            unusable=unusable["siglip-kernel"],
            note=f"{rivals.version('siglip-kernel')}; sigmoid loss; its forward also forms the gradients",
        )
    return providers


def _pair_case(op: str, shape: Shape, device: torch.device, generator: torch.Generator) -> Case:
    c, f = shape.C, shape.F
    leaves = {name: torch.randn(c, f, generator=generator, device=device).to(shape.dtype) for name in ("x", "y")}

    def eager(backward: bool) -> Work:
        return pair_work(c, f, backward=backward)

    return Case(
        op=op,
        shape=shape,
        leaves=leaves,
        providers=_our_providers(op, shape, device, p2p_reference, allnc.p2p, {"eager": eager, "compiled": eager}),
        effective_flops=6.0 * c * c * f,
        best=eager,
    )


def _all_around_case(op: str, shape: Shape, device: torch.device, generator: torch.Generator) -> Case:
    n, d, c, f = shape.N, shape.D, shape.C, shape.F

    def noise(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device).to(shape.dtype)

    leaves = {"z": unit_rows(generator, n, d).to(shape.dtype), "proj_means": noise(c, d)}
    leaves |= {"means": noise(c, f), "weights": noise(c, f)}

    def with_pairs(contrast: Contrast) -> WorkOf:
        """HyCon and P2P of the means, of the classifier, and of one with the other."""

        def work(backward: bool) -> Work:
            pairs = pair_work(c, f, backward=backward)
            return contrast.work(n, c, d, backward=backward) + pairs + pairs + pairs

        return work

    works = {"eager": with_pairs(AUTOGRAD), "compiled": with_pairs(AUTOGRAD)}
    reference, ours = partial(_summed, all_around_reference), partial(_summed, allnc.all_around)
    return Case(
        op=op,
        shape=shape,
        leaves=leaves,
        others={"labels": long_tailed_labels(generator, n, c)},
        providers=_our_providers(op, shape, device, reference, ours, works),
        effective_flops=6.0 * n * d * (n + c) + 18.0 * c * c * f,
        best=with_pairs(BEST[device.type]),
    )


def _summed(function: Callable[..., tuple[Tensor, ...]], **inputs: Tensor) -> Tensor:
    return torch.stack(tuple(function(**inputs))).sum()


def _class_mean_case(op: str, shape: Shape, device: torch.device, generator: torch.Generator) -> Case:
    n, c, f = shape.N, shape.C, shape.F
    features = torch.randn(n, f, generator=generator, device=device).to(shape.dtype)
    means, cotangent = (torch.randn(c, f, generator=generator, device=device) for _ in range(2))
    means, cotangent = (x.to(accumulation_dtype(shape.dtype)) for x in (means, cotangent))

    def work(backward: bool) -> Work:
        return class_mean_work(n, c, f, features.element_size(), backward=backward)

    def reference(features: Tensor, labels: Tensor) -> Tensor:
        """One index_add: ours in plain torch also sums long classes in segments, which costs time."""
        x = features.to(accumulation_dtype(features.dtype))
        counts = labels.new_zeros(c).index_add(0, labels, torch.ones_like(labels))
        batch = x.new_zeros(c, f).index_add(0, labels, x) / counts.clamp(min=1)[:, None]
        old = means.to(x.dtype)
        return torch.where(counts[:, None] > 0, 0.9 * old + 0.1 * batch, old)

    seen = torch.ones(c, dtype=torch.bool, device=device)
    # The state is moved at every call: the value changes from run to run, the work does not.
    state = {"means": means.clone(), "seen": seen.clone()}
    ours = partial(allnc.class_mean_ema, **state)
    works = {"eager": work, "compiled": work, "fused": work}
    return Case(
        op=op,
        shape=shape,
        leaves={"features": features},
        others={"labels": long_tailed_labels(generator, n, c)},
        providers=_our_providers(op, shape, device, reference, ours, works),
        effective_flops=2.0 * n * f,
        best=work,
        cotangent=cotangent,
    )


_BUILDERS: dict[str, Callable[[str, Shape, torch.device, torch.Generator], Case]] = {
    "hycon": _contrast_case,
    "supcon": _contrast_case,
    "pairs": _contrast_case,
    "p2p": _pair_case,
    "class_mean_ema": _class_mean_case,
    "all_around": _all_around_case,
}
