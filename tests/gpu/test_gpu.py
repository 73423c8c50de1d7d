"""Every op on a CUDA device: against float64 on the same inputs, compiled, captured, without a synchronisation.

The CPU tests hold the formulas; these hold what only a GPU can show. They skip where there is none. Those of
class_mean_ema stand with its other tests, in tests/ops/test_class_mean.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from allnc import all_around, class_mean_ema, hycon, p2p
from allnc.ops.all_around import all_around_reference
from allnc.ops.hycon import hycon_reference
from allnc.ops.p2p import p2p_reference
from tests.tolerances import ATOL, FACTOR, error

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def unit_rows(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return F.normalize(torch.randn(*shape, device="cuda", dtype=torch.float64), dim=1).to(dtype)


def gradients(function, leaves: dict[str, Tensor], dtype: torch.dtype | None = None, **others: Any) -> list[Tensor]:
    """The value (summed when there are several) and the gradient of each leaf."""
    leaves = {name: x.detach().to(dtype or x.dtype, copy=True).requires_grad_() for name, x in leaves.items()}
    value = function(**leaves, **others)
    value = torch.stack(tuple(value)).sum() if isinstance(value, tuple) else value
    value.backward()
    return [value.detach(), *(x.grad for x in leaves.values() if x.grad is not None)]


def check(function, reference, leaves: dict[str, Tensor], dtype: torch.dtype, scale: float, **others: Any) -> None:
    """The rule of tests/tolerances.py with the tensor cores' input type as the type of the noise floor."""
    reference_others = {k: v for k, v in others.items() if k not in ("backend", "deterministic")}
    want = gradients(reference, leaves, torch.float64, **reference_others)
    eager = gradients(reference, leaves, **reference_others)
    for got, same, exact in zip(gradients(function, leaves, **others), eager, want, strict=True):
        size = max(1.0, float(exact.abs().max()))
        assert error(got, exact) <= FACTOR * error(same, exact) + ATOL[dtype] * size * scale


@pytest.mark.parametrize("backend", ["triton", "eager"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [16, 64, 128, 200, 256, 512, 2048])
@pytest.mark.parametrize("temperature", [0.1, 0.01])
def test_hycon(backend: str, dtype: torch.dtype, d: int, temperature: float) -> None:
    leaves = {"z": unit_rows(777, d, dtype=dtype), "means": torch.randn(33, d, device="cuda", dtype=dtype)}
    labels = torch.randint(0, 33, (777,), device="cuda")
    labels[::50] = -100
    options = {"labels": labels, "temperature": temperature, "backend": backend}
    check(hycon, hycon_reference, leaves, dtype, 0.1 / temperature, **options)


@pytest.mark.parametrize("n", [1, 2, 63, 64, 65, 127, 129, 1000, 4097])
def test_hycon_ragged_sizes(n: int) -> None:
    labels = torch.randint(0, 5, (n,), device="cuda")
    leaves = {"z": unit_rows(n, 48)}
    check(hycon, hycon_reference, leaves, torch.float32, 1.0, labels=labels, backend="triton")


@pytest.mark.parametrize("target", ["etf", "softmax"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_around(target: str, dtype: torch.dtype) -> None:
    leaves = {
        "z": unit_rows(500, 128, dtype=dtype),
        "proj_means": torch.randn(70, 128, device="cuda", dtype=dtype),
        "means": torch.randn(70, 256, device="cuda", dtype=dtype),
        "weights": torch.randn(70, 256, device="cuda", dtype=dtype),
    }
    labels = torch.randint(0, 70, (500,), device="cuda")
    check(all_around, all_around_reference, leaves, dtype, 1.0, labels=labels, target=target, backend="triton")


@pytest.mark.parametrize("backend", ["triton", "eager"])
@pytest.mark.parametrize("target", ["etf", "softmax"])
@pytest.mark.parametrize("shape", [(100, 64), (1000, 512), (3000, 2048)])
def test_p2p(shape: tuple[int, int], target: str, backend: str) -> None:
    leaves = {"x": torch.randn(*shape, device="cuda"), "y": torch.randn(*shape, device="cuda")}
    check(p2p, p2p_reference, leaves, torch.float32, 1.0, target=target, backend=backend)


@pytest.mark.parametrize("options", [{"reduction": "sum"}, {"reduction": "none"}, {"balance": "none"}, {"seen": True}])
@pytest.mark.parametrize("n", [500, 40_000])  # labels are compared with every class, and sorted
def test_hycon_options(n: int, options: dict[str, Any]) -> None:
    c = 1000
    if "seen" in options:
        options = {"seen": torch.arange(c, device="cuda") % 7 != 0, "anchor_weight": torch.rand(n, device="cuda")}
    labels = torch.randint(0, c, (n,), device="cuda")
    leaves = {"z": unit_rows(n, 64), "means": torch.randn(c, 64, device="cuda")}

    def summed(function):
        return lambda **inputs: function(**inputs).sum()

    check(summed(hycon), summed(hycon_reference), leaves, torch.float32, 1.0, labels=labels, **options)


@pytest.mark.parametrize("d", [64, 512])
def test_hycon_learned_temperature(d: int) -> None:
    leaves = {"z": unit_rows(300, d), "temperature": torch.tensor(0.2, device="cuda")}
    labels = torch.randint(0, 9, (300,), device="cuda")
    check(hycon, hycon_reference, leaves, torch.float32, 5.0, labels=labels, backend="triton")


def test_hycon_takes_three_launches() -> None:
    z, labels = unit_rows(600, 128).requires_grad_(), torch.randint(0, 20, (600,), device="cuda")
    means = torch.randn(20, 128, device="cuda").requires_grad_()

    def step() -> None:
        z.grad = means.grad = None
        hycon(z, labels, means, backend="triton").backward()

    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    launched = [e.name for e in profile.events() or () if e.device_type.name == "CUDA"]
    ours = [name for name in launched if name.startswith("hycon")]
    assert sorted(ours) == ["hycon_loss_bwd_kernel", "hycon_loss_fwd_kernel", "hycon_prepare_kernel"]
    assert len(launched) <= 4, launched  # autograd's first gradient, a one, is filled by torch


def test_hycon_of_131072_rows() -> None:
    z = unit_rows(131_072, 64, dtype=torch.bfloat16)
    labels = torch.randint(0, 100, (131_072,), device="cuda")
    loss, dz = gradients(hycon, {"z": z}, labels=labels, balance="none", backend="triton")
    some = torch.arange(0, 131_072, 8192, device="cuda")  # these anchors' losses by the formula
    logits = z[some].double() @ z.double().T / 0.1
    same = labels[some, None] == labels[None, :]
    logits[torch.arange(len(some)), some] = -torch.inf
    same[torch.arange(len(some)), some] = False
    positives = (logits.where(same, 0).sum(1) / same.sum(1)).cpu()
    want = torch.logsumexp(logits, 1).cpu() - positives
    got = hycon(z, labels, balance="none", reduction="none", backend="triton")[some].double().cpu()
    torch.testing.assert_close(got, want, rtol=1e-3, atol=4e-3)
    assert loss.isfinite() and dz.isfinite().all() and dz.any(1).all()


def test_hycon_deterministic_mode_is_bit_equal() -> None:
    z, labels = unit_rows(3000, 128, dtype=torch.bfloat16), torch.randint(0, 50, (3000,), device="cuda")
    torch.use_deterministic_algorithms(True)
    try:
        runs = [gradients(hycon, {"z": z}, labels=labels, backend="triton") for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


def step(z: Tensor, features: Tensor, labels: Tensor, means: Tensor, seen: Tensor) -> Tensor:
    """A training step's losses with everything that could synchronise."""
    value = class_mean_ema(features, labels, means, seen)
    return hycon(z, labels, backend="triton") + p2p(value, seen=seen)


def inputs() -> tuple[Tensor, ...]:
    return (
        unit_rows(1024, 128).requires_grad_(),
        torch.randn(1024, 64, device="cuda", requires_grad=True),
        torch.randint(0, 20, (1024,), device="cuda"),
        torch.zeros(20, 64, device="cuda"),
        torch.zeros(20, dtype=torch.bool, device="cuda"),
    )


def test_no_synchronisation() -> None:
    arguments = inputs()
    step(*arguments).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(*arguments).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_compiles_without_a_graph_break() -> None:
    arguments = inputs()
    want = step(*arguments)
    for state in arguments[3:]:
        state.zero_()
    torch.testing.assert_close(torch.compile(step, fullgraph=True)(*arguments), want, rtol=1e-4, atol=1e-4)


def test_captured_in_a_cuda_graph() -> None:
    z, labels = unit_rows(512, 64).requires_grad_(), torch.randint(0, 9, (512,), device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            hycon(z, labels, backend="triton").backward()
    torch.cuda.current_stream().wait_stream(stream)
    z.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = hycon(z, labels, backend="triton")
        loss.backward()
    with torch.no_grad():
        z.copy_(unit_rows(512, 64))
    graph.replay()
    want = gradients(hycon, {"z": z}, labels=labels, backend="triton")
    torch.testing.assert_close(loss.detach(), want[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(z.grad, want[1], rtol=1e-3, atol=1e-5)


def test_memory_grows_linearly() -> None:
    peaks = []
    for n in (8192, 32768):
        z, labels = unit_rows(n, 128, dtype=torch.bfloat16), torch.randint(0, 100, (n,), device="cuda")
        gradients(hycon, {"z": z}, labels=labels, backend="triton")
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        gradients(hycon, {"z": z}, labels=labels, backend="triton")
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < 5 * peaks[0]
