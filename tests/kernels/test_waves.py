"""HyCon's row waves against dense float64 formulas: interpreted on the CPU, compiled on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.poison import poisoned_memory
from tests.tolerances import assert_as_exact

pytest.importorskip("triton")

from allnc.kernels.hycon import waves
from allnc.kernels.hycon.lse import hycon_lse_forward
from allnc.kernels.hycon.waves import hycon_wave_backward
from tests.kernels.test_hycon_kernels import DEVICE, DTYPES, Case, dense_gradients, dense_lse, make_case

__all__ = ["poisoned_memory"]  # a fixture: pytest finds it by name

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning:triton"),  # log2(0) is meant
]

SHIFTED, UNSHIFTED = 0.1, 0.02  # temperatures of the two modes


@pytest.fixture(autouse=True)
def _short_waves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several waves of few rows."""
    monkeypatch.setattr(waves, "WAVE", 64)


def own_gradients(case: Case, temperature: float, own: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """dz of the first `own` rows; and dmu where only they have a gradient, which is their share of it."""
    of_own = case.grad.clone()
    of_own[own:] = 0
    dz, _ = dense_gradients(case, temperature, dtype)
    return dz[:own], dense_gradients(case._replace(grad=of_own), temperature, dtype)[1]


def run(case: Case, temperature: float, own: int | None = None) -> tuple[Tensor, Tensor | None]:
    lse = dense_lse(case, temperature, torch.float64).float()
    tau = torch.tensor(temperature, device=DEVICE)
    return hycon_wave_backward(case.grad, lse, *case[:4], tau, shifted=temperature == SHIFTED, own=own)


def check(case: Case, temperature: float, own: int | None = None) -> None:
    rows = len(case.z) if own is None else own
    dz, dmu = run(case, temperature, own)
    assert dz.shape == (rows, case.z.shape[1]) and dz.dtype == case.z.dtype
    assert (dmu is None) == (case.mu is None)
    wants = own_gradients(case, temperature, rows, torch.float64)
    eagers = own_gradients(case, temperature, rows, torch.float32)
    # A logit of size 1/τ is rounded by 6e-8/τ, and so is, relatively, its exponential.
    growth = max(1.0, 0.02 / temperature)
    for got, eager, want in zip((dz, dmu), eagers, wants, strict=True):
        if got is not None:
            assert_as_exact(got, eager, want, growth=growth)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [SHIFTED, UNSHIFTED])
@pytest.mark.parametrize(
    ("n", "d", "c", "own"),
    [
        (150, 300, 9, None),  # three waves, the last ragged; rows and columns padded
        (100, 520, 0, 70),  # no means, a second wave of six rows
        (70, 1030, 130, 1),  # more means than rows, one row of its own
    ],
)
def test_gradients_are_those_of_the_formula(
    n: int, d: int, c: int, own: int | None, temperature: float, dtype: torch.dtype
) -> None:
    check(make_case(n, d, c, dtype), temperature, own)


@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_and_gradients_of_thousands_of_columns(dtype: torch.dtype) -> None:
    case = make_case(20, 4096, 3, dtype)
    tau = torch.tensor(SHIFTED, device=DEVICE)
    lse = hycon_lse_forward(*case[:4], tau, shifted=True, deterministic=False)
    want, eager = (dense_lse(case, SHIFTED, of) for of in (torch.float64, torch.float32))
    assert_as_exact(lse, eager, want, floor=1 / SHIFTED)
    check(case, SHIFTED)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_need_no_padding_are_not_copied(dtype: torch.dtype) -> None:
    case = make_case(128, 320, 0, dtype)
    assert waves._padded_rows(case.z, None) is case.z
    check(case, SHIFTED)


@pytest.mark.parametrize("temperature", [SHIFTED, UNSHIFTED])
def test_two_ranks_have_the_whole_gradient_between_them(temperature: float) -> None:
    case, half = make_case(130, 40, 5), 65
    order = torch.arange(130, device=DEVICE).roll(-half)  # the second rank has its own rows first
    turned = case._replace(z=case.z[order], a=case.a[order], grad=case.grad[order])
    first, second = run(case, temperature, half), run(turned, temperature, half)
    wants, eagers = (dense_gradients(case, temperature, dtype) for dtype in (torch.float64, torch.float32))
    growth = max(1.0, 0.02 / temperature)
    assert first[1] is not None and second[1] is not None
    for got, eager, want in zip((torch.cat([first[0], second[0]]), first[1] + second[1]), eagers, wants, strict=True):
        assert_as_exact(got, eager, want, growth=growth)


@pytest.mark.parametrize("temperature", [SHIFTED, UNSHIFTED])
def test_empty_contrast_sets_have_no_gradient(temperature: float) -> None:
    dz, _ = run(make_case(1, 300, 0), temperature)
    assert not dz.any()
    case = make_case(80, 300, 0)
    case.a.zero_()
    case.a[7] = 1  # only anchor 7 has an empty set
    assert case.grad[7] != 0
    check(case, temperature)


def test_small_gradients_keep_their_precision_in_float16() -> None:
    case = make_case(100, 300, 5, torch.float16)
    case = case._replace(grad=torch.rand(100, device=DEVICE) * 1e-5)  # K ends near 1e-8, float16 at 6e-8
    for got, want in zip(run(case, SHIFTED), dense_gradients(case, SHIFTED, torch.float64), strict=True):
        assert got is not None
        # A result below 6e-5 is itself rounded to a multiple of 6e-8.
        assert float((got.double() - want).abs().max()) < 2e-3 * float(want.abs().max()) + 3.1e-8
    assert not run(case._replace(grad=torch.zeros_like(case.grad)), SHIFTED)[0].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_calls_are_equal_bit_for_bit(dtype: torch.dtype) -> None:
    case = make_case(140, 300, 5, dtype)
    for first, second in zip(run(case, SHIFTED), run(case, SHIFTED), strict=True):
        assert first is not None and second is not None and torch.equal(first, second)


def test_autocast_does_not_change_the_products() -> None:
    case = make_case(40, 300, 5)
    want = run(case, SHIFTED)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        got = run(case, SHIFTED)
    assert all(x is not None and y is not None and torch.equal(x, y) for x, y in zip(got, want, strict=True))
