"""The three launches of HyCon at the level of their launchers: against float64 autograd, and how many there are."""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from allnc.ops.hycon import fused, hycon_reference
from tests.cases import generator_of, unit_rows
from tests.launches import Dispatches
from tests.poison import poisoned_memory
from tests.tolerances import assert_as_exact

pytest.importorskip("triton")

from allnc.kernels.hycon import classes, loss, lse
from allnc.kernels.hycon.loss import MAX_DIM, Prepared, empty_results, hycon_loss_backward, hycon_loss_forward

__all__ = ["poisoned_memory"]  # a fixture: pytest finds it by name

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning:triton"),  # log2(0) is meant
]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPTIONS = {"temperature": 0.1, "mean_weight": 1.0, "balance": "class", "ignore_index": -100}


class Case(NamedTuple):
    z: Tensor  # [N, D]
    labels: Tensor  # [N]
    means: Tensor | None  # [C, D]
    seen: Tensor | None  # [C]


def make_case(n: int, d: int, c: int, dtype: torch.dtype = torch.float32, *, all_seen: bool = False) -> Case:
    """Every fifth row ignored, some classes without a mean unless all_seen. c = 0: no means, and any labels."""
    generator = generator_of(n + d + c)
    labels = torch.randint(0, c or 3, (n,), generator=generator)
    labels = labels if c else (labels - 1) * 2**40
    labels[::5] = -100
    means = torch.randn(c, d, generator=generator).to(DEVICE, dtype) if c else None
    seen = (torch.rand(c, generator=generator) < 0.7).to(DEVICE) if c and not all_seen else None
    return Case(unit_rows(n, d, generator, dtype).to(DEVICE), labels.to(DEVICE), means, seen)


def results(case: Case, **changes: Any) -> list[Tensor]:
    """Loss and gradients with respect to z and means (where there are), for a gradient of the loss of -1.7."""
    value, prepared = hycon_loss_forward(*case, **(OPTIONS | changes))
    assert value.dtype == torch.float32 and value.shape == ()
    dz, dmeans = hycon_loss_backward(torch.full_like(value, -1.7), case.z, case.means, prepared)
    assert dz.dtype == case.z.dtype and (dmeans is None) == (case.means is None)
    return [value, dz, *([] if dmeans is None else [dmeans])]


def wanted(case: Case, dtype: torch.dtype, **changes: Any) -> list[Tensor]:
    """The same by autograd of the formula as written, on leaves of `dtype`."""
    leaves = [x.to(dtype, copy=True).requires_grad_() for x in (case.z, case.means) if x is not None]
    means = leaves[1] if len(leaves) > 1 else None
    value = hycon_reference(leaves[0], case.labels, means, seen=case.seen, **(OPTIONS | changes))
    return [value.detach(), *torch.autograd.grad(-1.7 * value, leaves)]


def check(case: Case, **changes: Any) -> None:
    tau = changes.get("temperature", 0.1)
    want, eager = (wanted(case, dtype, **changes) for dtype in (torch.float64, case.z.dtype))
    # The loss is a difference of logits of size 1/τ, a gradient one of N anchors' shares of it.
    floors = [1 / tau, *(1 / (tau * len(case.z)) for _ in want[1:])]
    for got, same, exact, floor in zip(results(case, **changes), eager, want, floors, strict=True):
        assert_as_exact(got, same, exact, dtype=case.z.dtype, floor=floor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "d", "c"), [(37, 19, 5), (37, 19, 0), (150, 40, 70), (130, 8, 3)])
def test_value_and_gradients(n: int, d: int, c: int, dtype: torch.dtype) -> None:
    check(make_case(n, d, c, dtype))


@pytest.mark.parametrize(
    "changes",
    [
        {"balance": "none"},
        {"mean_weight": 0.0},
        {"mean_weight": 3.5, "balance": "none"},
        {"temperature": 1 / 32},
        {"temperature": 2.0},
        {"ignore_index": 2},
    ],
)
@pytest.mark.parametrize("all_seen", [False, True])
def test_options(all_seen: bool, changes: dict[str, Any]) -> None:
    case = make_case(37, 19, 5, all_seen=all_seen)
    if changes.get("ignore_index") == 2:
        case.labels[::5] = 2
    check(case, **changes)


@pytest.mark.parametrize("scan_limit", [0, 2**25], ids=["sorted", "scanned"])
@pytest.mark.parametrize("rows", [1, 5, 70])
def test_classes_are_found_by_sorting_or_by_comparing(
    rows: int, scan_limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "_SCAN_LIMIT", scan_limit)
    for module in (classes, loss):
        monkeypatch.setattr(module, "VECTOR_BLOCK", 16)  # several steps of every loop over rows or labels
    monkeypatch.setattr(classes, "_CLASS_TILE", 128)  # 8 rows of a class at once
    check(make_case(rows, 16, 3))
    check(make_case(rows, 16, 0))


@pytest.mark.parametrize("programs", [1, 5, 10_000])
def test_programs_that_share_a_panel(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lse, "PROGRAMS", programs)
    check(make_case(130, 8, 70))


def test_hand_computed_case() -> None:
    # Two activations of class 0 at e1 and e2, one of class 1 at -e1; means e1 and e2; τ = 1; a = 1/3, 1/3, 1/2 and
    # b = 1/3, 1/2.
    z = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]], device=DEVICE)
    labels = torch.tensor([0, 0, 1], device=DEVICE)
    means = torch.tensor([[2.0, 0.0], [0.0, 5.0]], device=DEVICE)
    e = math.exp
    lses = [
        math.log(e(0) / 3 + e(-1) / 2 + e(1) / 3 + e(0) / 2),
        math.log(e(0) / 3 + e(0) / 2 + e(0) / 3 + e(1) / 2),
        math.log(e(-1) / 3 + e(0) / 3 + e(-1) / 3 + e(0) / 2),
    ]
    case = Case(z, labels, means, None)
    assert float(results(case, temperature=1.0)[0]) == pytest.approx((sum(lses) - 0.5) / 3, abs=1e-6)
    # κ = 0: the single activation of class 1 has no positive and is left out.
    assert float(results(case, temperature=1.0, mean_weight=0.0)[0]) == pytest.approx(sum(lses[:2]) / 2, abs=1e-6)


@pytest.mark.parametrize("labels", [[-100, -100, -100], [0, 1, 2]], ids=["ignored", "singletons"])
def test_without_positives_the_loss_is_zero(labels: list[int]) -> None:
    case = make_case(3, 8, 4)._replace(labels=torch.tensor(labels, device=DEVICE))
    for got in results(case, mean_weight=0.0):
        assert not got.any()


def test_raw_means_of_any_length() -> None:
    case = make_case(40, 16, 6)
    assert case.means is not None
    case.means[0] *= 1e6
    case.means[1] *= 1e-6
    case.means[2] = 0
    want, got = wanted(case, torch.float64), results(case)
    torch.testing.assert_close(got[0].double(), want[0], rtol=1e-6, atol=1e-6)
    for c in range(6):
        error = (got[2][c].double() - want[2][c]).abs().max()
        assert error <= 1e-5 * want[2][c].abs().max().clamp(min=want[2][3:].abs().max() / 1e6), c


def test_float16_coefficients_are_scaled() -> None:
    """Those of a batch of 10^4 would be near 1e-4, where float16 has lost half of its digits."""
    case = make_case(40, 16, 3)
    us = []
    for dtype in (torch.float16, torch.float32):
        z = case.z.half().to(dtype)
        state = hycon_loss_forward(z, case.labels, None, None, **OPTIONS)[1].state
        us.append(state[classes.SCALARS.value :][: len(z)])
    assert us[1].any()
    torch.testing.assert_close(us[0], 2**14 * us[1], rtol=1e-5, atol=0)


def test_nan_is_not_hidden() -> None:
    case = make_case(11, 8, 2)
    case.z[4, 0] = math.nan
    value, dz, _ = results(case)
    assert value.isnan() and dz[4].isnan().any()


def test_one_program_forms_whole_rows_of_the_widest_gradient() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        for dtype, precision in itertools.product([torch.float32, torch.bfloat16, torch.float16], ["highest", "high"]):
            torch.set_float32_matmul_precision(precision)
            for arch in (80, 90, 100):
                choice = {"has_mu": True, "arch": arch, "num_rows": 4096, "num_means": 100}
                constants, _ = loss.loss_backward_constants(MAX_DIM, dtype, **choice)
                assert constants["blocks"].block_g >= MAX_DIM
    finally:
        torch.set_float32_matmul_precision(before)
    assert MAX_DIM == fused.MAX_DIM  # which the op asks without importing Triton
    check(make_case(20, MAX_DIM, 3, torch.bfloat16))


@pytest.mark.skipif(DEVICE == "cuda", reason="counts the interpreter's launches")
@pytest.mark.parametrize("c", [0, 5])
def test_a_step_is_three_launches_and_nothing_else(c: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime import interpreter

    launched = []
    monkeypatch.undo()  # poison is filled in by torch ops
    # Nothing is run: the interpreter dispatches torch ops of its own.
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", lambda self, *_, **__: launched.append(self.fn.__name__))
    case, grad = make_case(40, 8, c), torch.ones(())
    with Dispatches() as ops:
        _, prepared = hycon_loss_forward(*case, **OPTIONS)
        hycon_loss_backward(grad, case.z, case.means, prepared)
    assert launched == ["hycon_prepare_kernel", "hycon_loss_fwd_kernel", "hycon_loss_bwd_kernel"]
    assert set(ops.names) <= {"aten.empty", "aten.empty_like", "aten.slice"}, ops.names


@pytest.mark.parametrize("c", [None, 5])
def test_results_have_the_shapes_of_empty_results(c: int | None) -> None:
    case = make_case(12, 8, c or 0)
    got, want = hycon_loss_forward(*case, **OPTIONS), empty_results(case.z, c)
    for mine, expected in zip((got[0], *got[1]), (want[0], *want[1]), strict=True):
        assert mine.shape == expected.shape and mine.dtype == expected.dtype
    assert isinstance(got[1], Prepared)
