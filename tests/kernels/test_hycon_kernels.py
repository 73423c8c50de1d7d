"""HyCon's Triton kernels against dense float64 formulas: interpreted on the CPU, compiled on a GPU."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.poison import poisoned_memory
from tests.tolerances import RELATIVE, assert_as_exact

pytest.importorskip("triton")

from allnc.kernels import _common
from allnc.kernels.hycon import lse as launchers
from allnc.kernels.hycon import panels as panel_functions
from allnc.kernels.hycon.lse import hycon_lse_forward
from allnc.kernels.hycon.waves import hycon_lse_backward

__all__ = ["poisoned_memory"]  # a fixture: pytest finds it by name

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning:triton"),  # log2(0) is meant
]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Mode(NamedTuple):
    temperature: float
    shifted: bool
    deterministic: bool


TRIANGLE = Mode(0.1, True, False)
SQUARE = Mode(0.1, True, True)
MODES = [TRIANGLE, SQUARE, Mode(1.0, True, False), Mode(0.02, False, False), Mode(0.005, False, True)]


class Case(NamedTuple):
    z: Tensor  # [N, D]
    mu: Tensor | None  # [C, D]
    a: Tensor  # [N]
    b: Tensor | None  # [C]
    grad: Tensor  # [N]


def make_case(n: int, d: int, c: int, dtype: torch.dtype = torch.float32) -> Case:
    """Random unit rows, a few weights and gradients zero; c = 0 is a case without class means."""
    z = F.normalize(torch.randn(n, d, dtype=torch.float64), dim=1).to(DEVICE, dtype)
    mu = F.normalize(torch.randn(c, d, dtype=torch.float64), dim=1).to(DEVICE, dtype) if c else None
    a, b, grad = torch.rand(n), torch.rand(c), torch.randn(n) / n
    a[2::7], b[1::5], grad[3::6] = 0, 0, 0
    return Case(z, mu, a.to(DEVICE), b.to(DEVICE) if c else None, grad.to(DEVICE))


def dense_lse(case: Case, temperature: float, dtype: torch.dtype) -> Tensor:
    """The formula as written, on matrices of `dtype`."""
    logits = case.z.to(dtype) @ case.z.to(dtype).T / temperature + case.a.to(dtype).log()
    logits = logits.masked_fill(torch.eye(len(case.z), dtype=torch.bool, device=DEVICE), -torch.inf)
    if case.mu is not None and case.b is not None:
        of_means = case.z.to(dtype) @ case.mu.to(dtype).T / temperature + case.b.to(dtype).log()
        logits = torch.cat([logits, of_means], 1)  # [N, N + C]
    return torch.logsumexp(logits, 1)


def dense_gradients(case: Case, temperature: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """dz and dmu by the softmax's gradient; in float32 with coefficients rounded as in tensor cores."""
    z, mu, a, b, grad = case
    lse = dense_lse(case, temperature, dtype)[:, None]
    used = (grad != 0) & lse.isfinite().squeeze(1)
    rows = torch.cat([z, z[:0] if mu is None else mu]).to(dtype)  # [N + C, D]
    weights = torch.cat([a, a[:0] if b is None else b]).to(dtype)  # [N + C]
    share = torch.exp(z.to(dtype) @ rows.T / temperature + weights.log() - lse)  # [N, N + C]
    share[:, : len(z)].fill_diagonal_(0)
    k = torch.where(used[:, None], grad.to(dtype)[:, None] * share, 0.0)
    of_z, of_mean = k[:, : len(z)], k[:, len(z) :]
    pairs = torch.cat([of_z + of_z.T, of_mean], 1)  # [N, N + C]
    if dtype != torch.float64 and z.dtype == torch.bfloat16:
        pairs, of_mean = pairs.bfloat16().to(dtype), of_mean.bfloat16().to(dtype)
    dz, dmu = pairs @ rows / temperature, of_mean.T @ z.to(dtype) / temperature
    return (dz, dmu) if dtype == torch.float64 else (dz.to(z.dtype), dmu.to(z.dtype))


def run(case: Case, mode: Mode) -> tuple[Tensor, Tensor, Tensor | None]:
    tau = torch.tensor(mode.temperature, device=DEVICE)
    inputs = (case.z, case.mu, case.a, case.b, tau)
    lse = hycon_lse_forward(*inputs, shifted=mode.shifted, deterministic=mode.deterministic)
    dz, dmu = hycon_lse_backward(case.grad, lse, *inputs, shifted=mode.shifted)
    return lse, dz, dmu


def check(case: Case, mode: Mode) -> None:
    lse, dz, dmu = run(case, mode)
    assert lse.dtype == torch.float32 and dz.dtype == case.z.dtype
    want = dense_lse(case, mode.temperature, torch.float64)
    eager = dense_lse(case, mode.temperature, torch.float32)
    assert_as_exact(lse, eager, want, floor=1 / mode.temperature)
    wants = dense_gradients(case, mode.temperature, torch.float64)
    eagers = dense_gradients(case, mode.temperature, torch.float32)
    gradients = zip((dz, dmu), eagers, wants, strict=True)
    # In float32 a logit of size 1/τ is rounded by 6e-8/τ, and so is, relatively, its exponential.
    growth = max(1.0, 0.02 / mode.temperature) if case.z.dtype == torch.float32 else 1.0
    for got, eager, want in list(gradients)[: 1 if case.mu is None else 2]:
        assert got is not None
        assert_as_exact(got, eager, want, growth=growth)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_every_mode(mode: Mode, dtype: torch.dtype) -> None:
    check(make_case(37, 19, 5, dtype), mode)


@pytest.mark.parametrize("mode", [TRIANGLE, SQUARE, Mode(0.01, False, False)])
@pytest.mark.parametrize(
    ("n", "d", "c", "dtype"),
    [
        (130, 33, 70, torch.float32),  # three panels of 64 rows, more means than one panel
        (200, 64, 0, torch.float32),  # four panels, no means
        (300, 48, 3, torch.bfloat16),  # three panels of 128 rows
        (256, 16, 129, torch.float16),  # two panels, none ragged
        (2, 1, 1, torch.float32),
        (5, 2, 300, torch.bfloat16),  # more means than activations
    ],
)
def test_ragged_shapes_and_several_panels(n: int, d: int, c: int, dtype: torch.dtype, mode: Mode) -> None:
    check(make_case(n, d, c, dtype), mode)


@pytest.mark.parametrize(("d", "dtype"), [(300, torch.bfloat16), (520, torch.bfloat16), (300, torch.float32)])
@pytest.mark.parametrize("mode", [TRIANGLE, Mode(0.01, False, False)])
def test_more_columns_than_stay_on_chip(d: int, dtype: torch.dtype, mode: Mode) -> None:
    check(make_case(40, d, 4, dtype), mode)


@pytest.mark.parametrize("programs", [1, 5, 10_000])
@pytest.mark.parametrize("panels", [1, 2, 3, 4])
def test_triangle_meets_every_pair_once_for_any_split(
    panels: int, programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launchers, "PROGRAMS", programs)
    case = make_case(64 * panels - 9, 8, 70)
    lse = hycon_lse_forward(*case[:4], torch.tensor(0.1, device=DEVICE), shifted=True, deterministic=False)
    assert_as_exact(lse, dense_lse(case, 0.1, torch.float32), dense_lse(case, 0.1, torch.float64))


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("mode", [TRIANGLE, SQUARE, Mode(0.01, False, False)])
@pytest.mark.parametrize(("n", "c"), [(2, 1), (130, 0), (200, 70), (37, 130)])
def test_parts_add_up_to_the_whole(n: int, c: int, mode: Mode, parts: int) -> None:
    case = make_case(n, 8, c)
    inputs = (*case[:4], torch.tensor(mode.temperature, device=DEVICE))
    options = {"shifted": mode.shifted, "deterministic": mode.deterministic, "parts": parts}
    shares = torch.stack([hycon_lse_forward(*inputs, **options, part=part) for part in range(parts)])
    want = dense_lse(case, mode.temperature, torch.float64)
    eager = dense_lse(case, mode.temperature, torch.float32)
    assert_as_exact(shares.double().logsumexp(0).float(), eager, want, floor=1 / mode.temperature)


@pytest.mark.skipif(DEVICE == "cuda", reason="counts the interpreter's calls")
@pytest.mark.parametrize("mode", [TRIANGLE, SQUARE])
@pytest.mark.parametrize("n", [60, 200, 300])
def test_parts_have_equally_many_tiles(n: int, mode: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = [0] * 4
    add_tile = panel_functions.add_tile

    def counting(*args: Any) -> Any:
        counts[part] += 1
        return add_tile(*args)

    monkeypatch.setattr(panel_functions, "add_tile", counting)
    case = make_case(n, 8, 70)
    for part in range(4):
        tau = torch.tensor(0.1)
        hycon_lse_forward(*case[:4], tau, shifted=True, deterministic=mode.deterministic, part=part, parts=4)
    panels = -(-n // 64)  # float32 has panels and tiles of 64; the means are two tiles
    pairs = panels * (panels + 1) // 2 if mode == TRIANGLE else panels**2
    assert sum(counts) == pairs + 2 * panels and max(counts) - min(counts) <= 1


@pytest.mark.parametrize("mode", [TRIANGLE, SQUARE, Mode(0.01, False, False)])
@pytest.mark.parametrize(
    ("n", "d", "c", "dtype"),
    [(2, 5, 1, torch.float32), (130, 19, 70, torch.float32), (130, 40, 0, torch.bfloat16), (50, 300, 5, torch.float16)],
)
def test_gradient_of_the_own_rows(n: int, d: int, c: int, dtype: torch.dtype, mode: Mode) -> None:
    case = make_case(n, d, c, dtype)
    case.grad[0] = 1  # the largest, by which float16 is scaled, is among the own rows
    lse, whole, _ = run(case, mode)
    inputs = (case.z, case.mu, case.a, case.b, torch.tensor(mode.temperature, device=DEVICE))
    for own in {1, max(n // 3, 1), n}:
        dz, dmu = hycon_lse_backward(case.grad, lse, *inputs, shifted=mode.shifted, own=own)
        assert torch.equal(dz, whole[:own])
        if dmu is not None:  # the share of dmu is that of a batch in which the other anchors count nothing
            share = torch.cat([case.grad[:own], torch.zeros_like(case.grad[own:])])
            want = hycon_lse_backward(share, lse, *inputs, shifted=mode.shifted)[1]
            assert want is not None and torch.equal(dmu, want)


def test_hand_computed_value() -> None:
    # Three activations e1, e2, -e1 and one mean e1, τ = 1, weights 1, 2, 3 and 4.
    z = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]], device=DEVICE)
    a, b = torch.tensor([1.0, 2, 3], device=DEVICE), torch.tensor([4.0], device=DEVICE)
    e = math.e
    want = [math.log(2 + 3 / e + 4 * e), math.log(1 + 3 + 4), math.log(1 / e + 2 + 4 / e)]
    case = Case(z, z[:1], a, b, z[:, 0])
    for mode in (Mode(1.0, True, False), Mode(1.0, True, True), Mode(1.0, False, False)):
        assert run(case, mode)[0].tolist() == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("mode", [TRIANGLE, SQUARE, Mode(0.005, False, False)])
def test_empty_contrast_sets(mode: Mode) -> None:
    lse, dz, _ = run(make_case(1, 8, 0), mode)
    assert lse.tolist() == [-math.inf] and not dz.any()
    lse, dz, dmu = run(make_case(1, 8, 3), mode)
    assert lse.isfinite().all() and dz.isfinite().all() and dmu is not None
    case = make_case(40, 8, 3)
    case.a.zero_()
    case.a[7] = 1  # only anchor 7 has an empty set
    case = case._replace(mu=None, b=None)
    lse, dz, _ = run(case, mode)
    assert lse[7] == -math.inf and lse.isfinite().sum() == 39
    check(case._replace(grad=case.grad.index_fill(0, torch.tensor([7], device=DEVICE), 0)), mode)
    assert dz.isfinite().all()  # nor does a gradient at the empty set make a NaN


def test_columns_of_weight_zero_can_neither_overflow_nor_hide_the_others() -> None:
    # At τ = 0.005 the copy's logit is 200 and the others' are near 0: e^200 passes float32, and so does
    # e^-200.
    case = make_case(30, 64, 4)
    case.z[1] = case.z[0]
    case.a[1] = 0
    case.a[2:] = 1
    check(case, Mode(0.005, False, False))


def test_small_gradients_keep_their_precision_in_float16() -> None:
    case = make_case(300, 24, 5, torch.float16)
    case = case._replace(grad=torch.rand(300, device=DEVICE) * 1e-4)  # K is near 3e-7, float16 ends at 6e-8
    _, dz, dmu = run(case, TRIANGLE)
    for got, want in zip((dz, dmu), dense_gradients(case, 0.1, torch.float64), strict=True):
        assert got is not None
        error = float((got.double() - want).abs().max() / want.abs().max())
        assert error < 2e-3
    zero = run(case._replace(grad=torch.zeros_like(case.grad)), TRIANGLE)
    assert not zero[1].any()


def test_expanded_and_strided_arguments() -> None:
    case = make_case(20, 12, 3)
    want = run(case._replace(grad=torch.full((20,), 0.5, device=DEVICE)), TRIANGLE)
    strided = case._replace(z=case.z.T.contiguous().T, grad=torch.tensor(0.5, device=DEVICE).expand(20))
    for got, expected in zip(run(strided, TRIANGLE), want, strict=True):
        assert got is not None and expected is not None
        torch.testing.assert_close(got, expected, rtol=0, atol=RELATIVE[torch.float32])


def test_nan_is_not_hidden() -> None:
    case = make_case(10, 8, 2)
    case.z[4, 0] = math.nan
    lse, dz, _ = run(case, TRIANGLE)
    assert lse[0].isnan() and dz[4].isnan().any()


@pytest.mark.parametrize("mode", [SQUARE, Mode(0.01, False, True)])
def test_deterministic_repeats_bit_for_bit(mode: Mode) -> None:
    case = make_case(150, 16, 5)
    for first, second in zip(run(case, mode), run(case, mode), strict=True):
        assert first is not None and second is not None and torch.equal(first, second)


def test_float32_follows_torchs_matmul_precision() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        assert _common.matmul_precision(torch.float32) == "ieee"
        torch.set_float32_matmul_precision("high")
        assert _common.matmul_precision(torch.float32) == "tf32"
        assert _common.matmul_precision(torch.bfloat16) == "ieee"
        if DEVICE == "cpu":  # TF32's sizes are others; the interpreter multiplies exactly all the same
            check(make_case(40, 150, 5), TRIANGLE)
    finally:
        torch.set_float32_matmul_precision(before)
