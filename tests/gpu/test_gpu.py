"""Every op on a CUDA device: against float64 on the same inputs, compiled, captured, without a synchronisation.

The CPU tests hold the formulas; these hold what only a GPU can show. They skip where there is none. Those of
class_mean_ema stand with its other tests, in tests/ops/test_class_mean.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from allnc import all_around, class_mean_ema, hycon, p2p
from allnc.ops.all_around import all_around_reference
from allnc.ops.hycon import hycon_reference
from allnc.ops.p2p import p2p_reference
from tests import cases
from tests.cases import check_against_float64, generator_of, value_and_gradients
from tests.tolerances import assert_near

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

make_case = functools.partial(cases.make_case, device="cuda")


def unit_rows(n: int, d: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return cases.unit_rows(n, d, generator_of(n + d), dtype).cuda()


def gradients(function: Callable[..., Any], case: dict[str, Any], **options: Any) -> list[Tensor]:
    return list(value_and_gradients(function, case, **options).values())


def check(
    function: Callable[..., Any],
    reference: Callable[..., Any],
    case: dict[str, Any],
    *,
    backend: str = "auto",
    dtype: torch.dtype | str | None = None,
    **options: Any,
) -> None:
    """Against float64, with the tensor cores' input type as the one whose rounding is allowed."""
    dtype = dtype or next(x.dtype for x in case.values() if x.is_floating_point())
    check_against_float64(functools.partial(function, backend=backend), reference, case, dtype=dtype, **options)


@pytest.mark.parametrize("backend", ["triton", "eager"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [16, 64, 128, 200, 256, 512, 2048])
@pytest.mark.parametrize("temperature", [0.1, 0.01])
def test_hycon(backend: str, dtype: torch.dtype, d: int, temperature: float) -> None:
    case = make_case(777, d, 33, dtype=dtype)
    case["labels"][::50] = -100
    check(hycon, hycon_reference, case, backend=backend, temperature=temperature)


@pytest.mark.parametrize("d", [64, 512])
def test_hycon_in_tf32(d: int) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        check(hycon, hycon_reference, make_case(777, d, 33), backend="triton", dtype="tf32")
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("n", [1, 2, 63, 64, 65, 127, 129, 1000, 4097])
def test_hycon_ragged_sizes(n: int) -> None:
    check(hycon, hycon_reference, make_case(n, 48, 5, means=False), backend="triton", floors=n <= 2)


@pytest.mark.parametrize("target", ["etf", "softmax"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("centre", [True, False])
def test_all_around(target: str, dtype: torch.dtype, centre: bool) -> None:
    case = make_case(500, 128, 70, 256, dtype=dtype)
    check(all_around, all_around_reference, case, target=target, centre_weights=centre, backend="triton")


@pytest.mark.parametrize("backend", ["triton", "eager"])
@pytest.mark.parametrize("target", ["etf", "softmax"])
@pytest.mark.parametrize("shape", [(100, 64), (1000, 512), (3000, 2048)])
def test_p2p(shape: tuple[int, int], target: str, backend: str) -> None:
    case = {"x": torch.randn(*shape, device="cuda"), "y": torch.randn(*shape, device="cuda")}
    check(p2p, p2p_reference, case, target=target, backend=backend)


@pytest.mark.parametrize("options", [{"reduction": "sum"}, {"reduction": "none"}, {"balance": "none"}, {"seen": True}])
@pytest.mark.parametrize(("n", "c"), [(500, 1000), (10_000, 4000)])  # labels are compared with every class, and sorted
def test_hycon_options(n: int, c: int, options: dict[str, Any]) -> None:
    if "seen" in options:
        options = {"seen": torch.arange(c, device="cuda") % 7 != 0, "anchor_weight": torch.rand(n, device="cuda")}
    check(hycon, hycon_reference, make_case(n, 64, c), **options)


@pytest.mark.parametrize("d", [64, 512])
def test_hycon_learned_temperature(d: int) -> None:
    case = make_case(300, d, 9)
    check(hycon, hycon_reference, case, backend="triton", temperature=torch.tensor(0.2, device="cuda"))


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
    case = make_case(131_072, 64, 100, dtype=torch.bfloat16, means=False)
    z, labels = case["z"], case["labels"]
    loss, dz = gradients(hycon, case, balance="none", backend="triton")
    some = torch.arange(0, 131_072, 8192, device="cuda")  # these anchors' losses by the formula
    logits = z[some].double() @ z.double().T / 0.1
    same = labels[some, None] == labels[None, :]
    logits[torch.arange(len(some)), some] = -torch.inf
    same[torch.arange(len(some)), some] = False
    positives = (logits.where(same, 0).sum(1) / same.sum(1)).cpu()
    want = torch.logsumexp(logits, 1).cpu() - positives
    got = hycon(z, labels, balance="none", reduction="none", backend="triton")[some].cpu()
    assert_near(got, want, dtype=torch.float16)  # without means nothing is rounded: closer than bfloat16
    assert loss.isfinite() and dz.isfinite().all() and dz.any(1).all()


def test_hycon_deterministic_mode_is_bit_equal() -> None:
    case = make_case(3000, 128, 50, dtype=torch.bfloat16)
    torch.use_deterministic_algorithms(True)
    try:
        runs = [gradients(hycon, case, backend="triton") for _ in range(3)]
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
    assert_near(torch.compile(step, fullgraph=True)(*arguments), want)


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
    want = gradients(hycon, {"z": z, "labels": labels}, backend="triton")
    assert z.grad is not None
    for got, wanted in zip((loss, z.grad), want, strict=True):
        assert_near(got, wanted)


def test_memory_grows_linearly() -> None:
    peaks = []
    for n in (8192, 32768):
        case = make_case(n, 128, 100, dtype=torch.bfloat16, means=False)
        gradients(hycon, case, backend="triton")
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        gradients(hycon, case, backend="triton")
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < 5 * peaks[0]
