"""The three launches of HyCon at the level of their launchers: against float64 autograd, and how many there are."""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from allnc.ops.hycon_triton import MAX_DIM
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from allnc.ops.hycon import hycon_reference
from tests.tolerances import assert_as_exact

pytest.importorskip("triton")

from allnc.kernels import hycon, hycon_classes, hycon_loss
from allnc.kernels.hycon_loss import Prepared, hycon_loss_backward, hycon_loss_forward

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning:triton")  # log2(0) is meant

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Case(NamedTuple):
    z: Tensor  # [N, D]
    labels: Tensor  # [N]
    means: Tensor | None  # [C, D]
    seen: Tensor | None  # [C]
    anchor_weight: Tensor | None  # [N]


def make_case(n: int, d: int, c: int, dtype: torch.dtype = torch.float32, *, rich: bool = True) -> Case:
    """Every fifth row ignored; rich: some classes without a mean, unequal anchor weights. c = 0: no means."""
    z = F.normalize(torch.randn(n, d, dtype=torch.float64), dim=1).to(DEVICE, dtype)
    labels = torch.randint(0, c, (n,)) if c else torch.randint(-3, 3, (n,)) * 2**40
    labels[::5] = -100
    means = torch.randn(c, d).to(DEVICE, dtype) if c else None
    seen = (torch.rand(c) < 0.7).to(DEVICE) if rich and c else None
    weight = torch.rand(n, device=DEVICE) if rich else None
    return Case(z, labels.to(DEVICE), means, seen, weight)


def results(case: Case, temperature: float, *, learned: bool = False, **options: Any) -> list[Tensor]:
    """Loss and gradients with respect to z, means (where there are) and τ, for a fixed gradient of the loss."""
    chosen = {"mean_weight": 1.0, "balance": "class", "reduction": "mean", "deterministic": False} | options
    tau = torch.tensor(temperature, device=DEVICE) if learned else temperature
    shifted = not learned and 2 / temperature <= 64
    loss, prepared = hycon_loss_forward(*case, tau, ignore_index=-100, shifted=shifted, **chosen)
    z, means, reduction = case.z, case.means, chosen["reduction"]
    assert loss.dtype == torch.float32 and loss.shape == (z.shape[:1] if reduction == "none" else ())
    grad = grad_of(loss)
    dz, dmeans, terms = hycon_loss_backward(
        grad, z, means, prepared, reduction=reduction, shifted=shifted, tau_gradient=True
    )
    assert dz.dtype == z.dtype and terms is not None and (dmeans is None) == (means is None)
    return [loss, dz, *([] if dmeans is None else [dmeans]), terms.sum()]


def wanted(case: Case, temperature: float, dtype: torch.dtype, **options: Any) -> list[Tensor]:
    """The same by autograd of the formula as written, on leaves of `dtype`."""
    options = {name: value for name, value in options.items() if name not in ("learned", "deterministic")}
    leaves = [x.to(dtype, copy=True).requires_grad_() for x in (case.z, case.means) if x is not None]
    tau = torch.tensor(temperature, dtype=torch.float64 if dtype == torch.float64 else torch.float32, device=DEVICE)
    tau.requires_grad_()
    loss = hycon_reference(
        leaves[0],
        case.labels,
        leaves[1] if len(leaves) > 1 else None,
        seen=case.seen,
        anchor_weight=case.anchor_weight,
        temperature=tau,
        **options,
    )
    return [loss.detach(), *torch.autograd.grad(loss, [*leaves, tau], grad_of(loss))]


def grad_of(loss: Tensor) -> Tensor:
    return torch.linspace(-1, 2, loss.numel(), device=loss.device, dtype=loss.dtype).reshape(loss.shape) - 0.7


def check(case: Case, temperature: float = 0.1, **options: Any) -> None:
    want = wanted(case, temperature, torch.float64, **options)
    eager = wanted(case, temperature, case.z.dtype, **options)
    for got, same, exact in zip(results(case, temperature, **options), eager, want, strict=True):
        # Logits of size 1/τ are rounded: values by 6e-8/τ, exponentials relatively by as much.
        scale = max(1.0, 0.1 / temperature) * max(1.0, float(exact.abs().max()))
        assert_as_exact(got, same, exact, scale=scale, dtype=case.z.dtype)


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory is NaN (1000 in integers): an element not written, or read before it is written, shows."""

    def poisoned(make):
        def empty(*args, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor.fill_(math.nan if tensor.is_floating_point() else 1000)

        return empty

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))


MODES = [
    {},
    {"deterministic": True},
    {"learned": True},
    {"temperature": 0.01},
]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("mode", MODES, ids=["triangle", "square", "learned", "unshifted"])
def test_modes_and_reductions(mode: dict[str, Any], reduction: str) -> None:
    check(make_case(37, 19, 5), reduction=reduction, **mode)
    check(make_case(37, 19, 0), reduction=reduction, **mode)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_16_bit_types(dtype: torch.dtype, reduction: str) -> None:
    check(make_case(150, 40, 70, dtype), reduction=reduction)
    check(make_case(150, 40, 3, dtype), reduction=reduction, learned=True)


@pytest.mark.parametrize(
    "options", [{"balance": "none"}, {"mean_weight": 0.0}, {"mean_weight": 3.5, "balance": "none"}]
)
def test_equal_anchor_weights_and_options(options: dict[str, Any]) -> None:
    check(make_case(37, 19, 5, rich=False), **options)


@pytest.mark.parametrize("scan_limit", [0, 2**25], ids=["sorted", "scanned"])
@pytest.mark.parametrize("rows", [1, 5, 70])
def test_classes_are_found_by_sorting_or_by_comparing(
    rows: int, scan_limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hycon_loss, "_SCAN_LIMIT", scan_limit)
    for module in (hycon_classes, hycon_loss):
        monkeypatch.setattr(module, "VECTOR_BLOCK", 16)  # several steps of every loop over rows or labels
    monkeypatch.setattr(hycon_classes, "_CLASS_TILE", 128)  # 8 rows of a class at once
    check(make_case(rows, 16, 3))
    check(make_case(rows, 16, 0))


@pytest.mark.parametrize("programs", [1, 5, 10_000])
@pytest.mark.parametrize("mode", [{"deterministic": True}, {"learned": True}], ids=["square", "learned"])
def test_programs_that_share_a_panel(mode: dict[str, Any], programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hycon, "PROGRAMS", programs)
    check(make_case(130, 8, 70), **mode)


def test_raw_means_of_any_length() -> None:
    case = make_case(40, 16, 6)
    assert case.means is not None
    case.means[0] *= 1e6
    case.means[1] *= 1e-6
    case.means[2] = 0
    want, got = wanted(case, 0.1, torch.float64), results(case, 0.1)
    torch.testing.assert_close(got[0].double(), want[0], rtol=1e-6, atol=1e-6)
    for c in range(6):
        error = (got[2][c].double() - want[2][c]).abs().max()
        assert error <= 1e-5 * want[2][c].abs().max().clamp(min=want[2][3:].abs().max() / 1e6), c


def test_deterministic_repeats_bit_for_bit() -> None:
    case = make_case(150, 16, 5)
    for mode in ({"deterministic": True}, {"deterministic": True, "learned": True}):
        for first, second in zip(results(case, 0.1, **mode), results(case, 0.1, **mode), strict=True):
            assert torch.equal(first, second)


def test_small_gradients_keep_their_precision_in_float16() -> None:
    case = make_case(300, 24, 5, torch.float16)
    assert case.anchor_weight is not None
    case.anchor_weight.mul_(1e-4)  # coefficients near 3e-7: float16 ends at 6e-8
    want, got = wanted(case, 0.1, torch.float64, reduction="sum"), results(case, 0.1, reduction="sum")
    assert float((got[1].double() - want[1]).abs().max() / want[1].abs().max()) < 2e-3
    case.anchor_weight.zero_()
    for got in results(case, 0.1):
        assert not got.any()


def test_nan_is_not_hidden() -> None:
    case = make_case(11, 8, 2)
    case.z[4, 0] = math.nan
    loss, dz, _, _ = results(case, 0.1)
    assert loss.isnan() and dz[4].isnan().any()


def test_widest_rows_are_those_the_op_promises() -> None:
    for dtype, precision in itertools.product([torch.float32, torch.bfloat16, torch.float16], ["highest", "high"]):
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(precision)
        try:
            assert hycon_loss.fits(MAX_DIM, dtype, 90)
            assert not hycon_loss.fits(MAX_DIM + 1, dtype, 90)
        finally:
            torch.set_float32_matmul_precision(before)
    check(make_case(20, MAX_DIM, 3, torch.bfloat16))


class Recorded(TorchDispatchMode):
    """The names of the torch ops that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func.overloadpacket))
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(DEVICE == "cuda", reason="counts the interpreter's launches")
@pytest.mark.parametrize("c", [0, 5])
@pytest.mark.parametrize("mode", MODES, ids=["triangle", "square", "learned", "unshifted"])
def test_a_step_is_three_launches_and_nothing_else(c: int, mode: dict[str, Any], monkeypatch) -> None:
    from triton.runtime import interpreter

    launched = []
    monkeypatch.undo()  # poisoned memory is filled by torch ops
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", lambda self, *_, **__: launched.append(self.fn.__name__))
    case = make_case(40, 8, c)
    temperature = mode.get("temperature", 0.1)
    tau = torch.tensor(temperature) if mode.get("learned") else temperature
    shifted = temperature == 0.1 and not mode.get("learned")
    with Recorded() as recorded:
        loss, prepared = hycon_loss_forward(
            *case, tau, mean_weight=1.0, balance="class", reduction="mean", ignore_index=-100, shifted=shifted,
            deterministic=mode.get("deterministic", False),
        )  # fmt: skip
        assert isinstance(prepared, Prepared)
        hycon_loss_backward(
            torch.empty_like(loss), case.z, case.means, prepared, reduction="mean", shifted=shifted, tau_gradient=False
        )
    assert launched == ["hycon_prepare_kernel", "hycon_loss_fwd_kernel", "hycon_loss_bwd_kernel"]
    assert set(recorded.names) <= {"aten.empty", "aten.empty_like", "aten.slice", "aten.select"}, recorded.names
