"""The C++ ops hycon_lse_forward and hycon_lse_backward against dense float64 autograd.

lse_i = log( sum_{j != i} a_j exp(z_i.z_j / t) + sum_c b_c exp(z_i.mu_c / t) )
N rows of z, C rows of mu, D columns. z is float32, float64, or bfloat16 with everything else in float32.
"""

from __future__ import annotations

import hashlib
import math
import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from allnc import _extension
from allnc.ops._common import accumulation_dtype
from tests.forks import called
from tests.poison import poisoned_allocations  # noqa: F401 (a fixture, found by name)
from tests.tolerances import assert_as_exact

pytestmark = pytest.mark.skipif(not _extension.has_cpp(), reason="extension not built")

SHIFT_LIMIT = 64.0  # the constant shift may be asked for while 2 / t is at most this
NEG_INF = -torch.inf
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


class Case(NamedTuple):
    z: Tensor  # [N, D]
    mu: Tensor | None  # [C, D]
    a: Tensor  # [N]
    b: Tensor | None  # [C]
    t: Tensor  # []
    grad: Tensor  # [N]


def make_case(
    n: int,
    d: int,
    c: int,
    t: float = 0.1,
    *,
    dtype: torch.dtype = torch.float32,
    zeros: float = 0.1,
    seed: int = 0,
) -> Case:
    """Random unit rows, z in `dtype`; `zeros` is the share of weights and upstream gradients that are exactly 0."""
    generator = torch.Generator().manual_seed(seed)
    others = accumulation_dtype(dtype)

    def uniform(size: int) -> Tensor:
        kept = torch.rand(size, generator=generator) >= zeros
        return (torch.rand(size, generator=generator, dtype=torch.float64) * kept).to(others)

    def rows(size: int) -> Tensor:
        return F.normalize(torch.randn(size, d, generator=generator, dtype=torch.float64), dim=1).to(dtype)

    mu, b = (rows(c).to(others), uniform(c)) if c else (None, None)
    return Case(rows(n), mu, uniform(n), b, torch.tensor(t, dtype=others), uniform(n) - uniform(n) / 2)


def fused(case: Case, shifted: bool) -> tuple[Tensor, Tensor, Tensor]:
    ops = torch.ops.allnc_C
    lse = ops.hycon_lse_forward(*case[:5], shifted)
    return (lse, *ops.hycon_lse_backward(case.grad, lse, *case[:5], shifted))


def dense(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The same with N x N matrices and autograd; anchors with an empty contrast set get no gradient."""
    z, mu, a, b, t, grad = (None if x is None else x.detach().to(dtype) for x in case)
    assert z is not None and a is not None and t is not None and grad is not None
    z.requires_grad_()
    terms = (z @ z.T / t + a.log()).masked_fill(torch.eye(len(z), dtype=torch.bool), NEG_INF)  # [N, N]
    if mu is not None and b is not None:
        mu.requires_grad_()
        terms = torch.cat([terms, z @ mu.T / t + b.log()], 1)  # [N, N + C]
    lse = terms.logsumexp(1)
    used = (grad != 0) & lse.isfinite()
    empty = z.new_zeros(0, z.shape[1])
    if not used.any():
        return lse.detach(), torch.zeros_like(z), empty if mu is None else torch.zeros_like(mu)
    (terms[used].logsumexp(1) * grad[used]).sum().backward()
    dmu = empty if mu is None else mu.grad
    assert z.grad is not None and dmu is not None
    return lse.detach(), z.grad, dmu


def size_of_terms(case: Case, lse: Tensor) -> list[float]:
    """What the largest entries of lse, dz and dmu would be if nothing cancelled: from bfloat16 z terms are rounded."""
    z, mu, a, b, t, grad = (None if x is None else x.double() for x in case)
    assert z is not None and a is not None and t is not None and grad is not None
    shares = (z @ z.T / t + a.log() - lse[:, None]).exp().fill_diagonal_(0)  # [N, N]
    shares = (grad[:, None] * shares).where(lse.isfinite()[:, None], 0).abs()
    dz, dmu = (shares + shares.T) @ z.abs(), z.new_zeros(1)
    if mu is not None and b is not None:
        shares = (z @ mu.T / t + b.log() - lse[:, None]).exp()  # [N, C]
        shares = (grad[:, None] * shares).where(lse.isfinite()[:, None], 0).abs()
        dz, dmu = dz + shares @ mu.abs(), shares.T @ z.abs()
    return [0.0, *(float(x.max() / t) for x in (dz, dmu))]


def check(case: Case, shifted: bool, *, cancelling: bool = False) -> None:
    """Value and gradients against float64; `cancelling`: entries may be differences of larger terms."""
    dtype, others = case.z.dtype, case.a.dtype
    got, eager, reference = fused(case, shifted), dense(case, others), dense(case, torch.float64)
    floors = size_of_terms(case, reference[0]) if cancelling and dtype == torch.bfloat16 else [0.0] * 3
    for name, x, y, want, floor in zip(("lse", "dz", "dmu"), got, eager, reference, floors, strict=True):
        assert x.dtype == (dtype if name == "dz" else others), name
        assert_as_exact(x, y, want, dtype=dtype, floor=floor)  # from bfloat16 z, mu and K are rounded to it


def test_hand_computed() -> None:
    # Anchor 0 sees row 1 (orthogonal, weight 2) and the mean (itself, weight 3) at t = 1/2: 2 e^0 + 3 e^2.
    z, mu = torch.eye(2, dtype=torch.float64), torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    a, b, t, grad = (torch.tensor(x, dtype=torch.float64) for x in ([5.0, 2.0], [3.0], 0.5, [1.0, 0.0]))
    total = 2 + 3 * math.exp(2)
    for shifted in (True, False):
        lse, dz, dmu = fused(Case(z, mu, a, b, t, grad), shifted)
        torch.testing.assert_close(lse, torch.tensor([total, 5 + 3.0], dtype=torch.float64).log())
        share, mean_share = 2 / total, 3 * math.exp(2) / total
        torch.testing.assert_close(dz, 2 * torch.tensor([[mean_share, share], [share, 0]], dtype=torch.float64))
        torch.testing.assert_close(dmu, 2 * torch.tensor([[mean_share, 0]], dtype=torch.float64))


def check_exponential(shifted: bool, dtype: torch.dtype) -> None:
    # One anchor, given lse = 1 / t = 16: the gradient of mean c is 16 exp(16 (z.mu_c - 1)) z.
    cosine = torch.linspace(15 / 16, 1, 4001, dtype=dtype)  # [C]
    mu = torch.stack([cosine, (1 - cosine**2).sqrt()], 1)  # [C, 2]
    z, t, one = (
        torch.tensor([[1, 0]], dtype=dtype),
        torch.tensor(1 / 16, dtype=dtype),
        torch.ones(1, dtype=dtype),
    )
    dmu = torch.ops.allnc_C.hycon_lse_backward(one, 16 * one, z, mu, one, one.expand(4001), t, shifted)[1]
    want = 16 * torch.expm1(16 * (cosine.double() - 1)) + 16  # [C]
    assert ((dmu[:, 0].double() - want).abs() / want).max() < 3 * torch.finfo(dtype).eps
    assert not dmu[:, 1].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shifted", [True, False])
def test_exponential_is_accurate(shifted: bool, dtype: torch.dtype) -> None:
    check_exponential(shifted, dtype)


def check_exponentials() -> None:
    for shifted in (True, False):
        for dtype in (torch.float32, torch.float64):
            check_exponential(shifted, dtype)


@pytest.mark.parametrize("isa", ["avx2", "baseline"])
def test_exponential_is_accurate_on_lesser_processors(isa: str) -> None:
    """The least has no fused multiply-add."""
    called(check_exponentials, ALLNC_CPU_ISA=isa)


# Around panels of 48 rows, blocks of up to 192 rows and tiles of 4 to 48 columns; one to many blocks.
SHAPES = [
    *[(1, 1, 0), (1, 3, 1), (2, 5, 1), (3, 1, 2), (47, 16, 3), (48, 17, 48), (49, 128, 100), (97, 4096, 5)],
    *[(192, 32, 0), (777, 64, 10), (1000, 130, 300), (30, 100, 1000), (2000, 33, 7)],
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_float64(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    for t, shifted in ((0.1, True), (0.1, False), (0.005, False)):
        check(make_case(*shape, t, dtype=dtype), shifted)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 300),
    d=st.integers(1, 140),
    c=st.integers(0, 120),
    thousandths=st.integers(5, 1000),
    zeros=st.sampled_from([0.0, 0.3, 0.95]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_any_shape(n: int, d: int, c: int, thousandths: int, zeros: float, dtype: torch.dtype, seed: int) -> None:
    t = thousandths / 1000
    check(make_case(n, d, c, t, dtype=dtype, zeros=zeros, seed=seed), 2 / t <= SHIFT_LIMIT, cancelling=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("parts", [1, 2, 3, 4, 7])
def test_parts_make_the_whole(parts: int, dtype: torch.dtype) -> None:
    # From fewer pairs of blocks than parts (a part meets nothing: -inf) to many.
    for n, d, c in ((1, 3, 2), (49, 5, 0), (130, 20, 50), (777, 16, 0), (1000, 7, 300)):
        for t, shifted in ((0.1, True), (0.1, False), (0.005, False)):
            case = make_case(n, d, c, t, dtype=dtype)
            lse = [torch.ops.allnc_C.hycon_lse_forward(*case[:5], shifted, part, parts) for part in range(parts)]
            assert_as_exact(
                torch.stack(lse).logsumexp(0),
                dense(case, dtype)[0],
                dense(case, torch.float64)[0],
            )


@pytest.mark.parametrize("c", [0, 3])
@pytest.mark.parametrize("parts", [1, 2, 3, 4, 7, 200])
def test_parts_are_even(parts: int, c: int) -> None:
    # With z = 0 and weights of 1 the sum of a row is the number of columns that it met, in blocks of 192 rows; each
    # mean counts a million.
    n = 192 * 16
    one = torch.ones(n, dtype=torch.float64)
    means = (torch.zeros(192 * c, 1, dtype=torch.float64), 1e6 * one[: 192 * c]) if c else (None, None)
    inputs = (torch.zeros(n, 1, dtype=torch.float64), means[0], one, means[1], one[0], True)
    lse = torch.stack([torch.ops.allnc_C.hycon_lse_forward(*inputs, part, parts) for part in range(parts)])
    met = lse.exp().round()  # [parts, N]
    assert torch.equal(met.sum(0), (n - 1 + 1e6 * 192 * c) * one)
    anchors, with_means = met.remainder(1e6), met.div(1e6, rounding_mode="floor")
    with_itself = (anchors.remainder(192) == 191).double()
    visits = (anchors + with_itself) / 2 + with_itself * 192 / 2 + with_means  # a pair of anchors counts for both
    pairs = visits.sum(1) / 192**2
    total = 16 * 17 // 2 + 16 * c
    assert pairs.tolist() == [total * (part + 1) // parts - total * part // parts for part in range(parts)]


@pytest.mark.parametrize("shifted", [True, False])
@pytest.mark.parametrize("sizes", [(1,), (1, 1), (60, 1, 130), (193, 47), (1000, 30, 1), (96, 96, 96, 96)])
def test_shares_of_the_rows_make_the_whole_gradient(sizes: tuple[int, ...], shifted: bool) -> None:
    for d, c in ((5, 0), (33, 70)):
        case = make_case(sum(sizes), d, c)
        lse, *eager = dense(case, torch.float32)
        reference = dense(case, torch.float64)[1:]
        all_dz, all_dmu = [], torch.zeros(c, d)
        for rank, own in enumerate(sizes):
            order = torch.arange(sum(sizes)).roll(-sum(sizes[:rank]))  # every rank has all rows, its own first
            z, a, grad, level = (x[order] for x in (case.z, case.a, case.grad, lse))
            dz, dmu = torch.ops.allnc_C.hycon_lse_backward(grad, level, z, case.mu, a, case.b, case.t, shifted, own)
            assert dz.shape == (own, d)
            all_dz.append(dz)
            all_dmu += dmu
        assert_as_exact(torch.cat(all_dz), eager[0], reference[0])
        assert_as_exact(all_dmu, eager[1], reference[1])


@pytest.mark.parametrize("shifted", [True, False])
def test_close_rows_at_small_temperature(shifted: bool) -> None:
    # Exponents reach 1 / t = 200 beside others near -200: only a running maximum covers both. Asking for the
    # shift must not lose them either.
    case = make_case(100, 16, 5, 0.005)
    z = torch.cat([case.z[:50], case.z[:50]])
    check(case._replace(z=z), shifted)


@pytest.mark.parametrize("shifted", [True, False])
def test_empty_contrast_sets(shifted: bool) -> None:
    alone = make_case(1, 4, 0, zeros=0)
    weightless = make_case(60, 4, 3, zeros=0)
    assert weightless.b is not None
    weightless = weightless._replace(a=torch.zeros(60), b=torch.zeros(3))
    one_column = weightless._replace(a=torch.eye(60)[7])  # only row 7 itself sees nothing
    for case, empty in ((alone, [0]), (weightless, range(60)), (one_column, [7])):
        lse, dz, dmu = fused(case, shifted)
        assert (lse == NEG_INF).nonzero().flatten().tolist() == list(empty)
        assert not lse.isnan().any() and dz.isfinite().all() and dmu.isfinite().all()
        check(case, shifted)
    assert not fused(weightless, shifted)[1].any()


@pytest.mark.parametrize("shifted", [True, False])
def test_no_upstream_gradient(shifted: bool) -> None:
    case = make_case(60, 8, 3)
    for x in fused(case._replace(grad=torch.zeros(60)), shifted)[1:]:
        assert not x.any()


def test_shift_is_not_used_where_it_would_fail() -> None:
    for n, d, c in ((70, 12, 0), (70, 12, 4)):
        case = make_case(n, d, c)
        tiny = case._replace(a=case.a * 1e-30, b=None if case.b is None else case.b * 1e-30)
        check(tiny, True)  # sums would underflow
        check(case._replace(z=4 * case.z), True)  # exponents beyond the shift
        check(case._replace(t=torch.tensor(0.004)), True)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["z", "mu", "a", "b"])
def test_nan_in_nan_out(name: str, value: float) -> None:
    case = make_case(60, 8, 3)
    bad = getattr(case, name).clone()
    bad.view(-1)[-1] = value
    for shifted in (True, False):
        for x in fused(case._replace(**{name: bad}), shifted):
            assert x.isnan().all()


def test_non_contiguous_inputs() -> None:
    case = make_case(60, 8, 3)
    assert case.mu is not None and case.b is not None
    a, b, grad = (torch.stack([x, x], 1)[:, 0] for x in (case.a, case.b, case.grad))
    strided = Case(case.z.T.contiguous().T, case.mu.T.contiguous().T, a, b, case.t, grad)
    assert not any(x is not None and x.dim() and x.is_contiguous() for x in strided)
    for x, y in zip(fused(strided, True), fused(case, True), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"b": None}, "mu and b must be given together"),
        ({"a": torch.ones(59)}, "a must have size 60"),
        ({"mu": torch.ones(3, 7)}, "mu must have size 8 in dimension 1; got 7"),
        ({"z": torch.ones(60, 8, dtype=torch.float64)}, "z must be float32"),
        ({"t": torch.ones(2)}, "temperature must be one element"),
    ],
)
def test_wrong_arguments(change: dict[str, Tensor | None], message: str) -> None:
    case = make_case(60, 8, 3)._replace(**change)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.allnc_C.hycon_lse_forward(*case[:5], True)


@pytest.mark.parametrize("share", [(-1, 2), (2, 2), (0, 0)])
def test_wrong_part(share: tuple[int, int]) -> None:
    with pytest.raises(RuntimeError, match=rf"part must be in \[0, parts\); got {share[0]} of {share[1]}"):
        torch.ops.allnc_C.hycon_lse_forward(*make_case(60, 8, 3)[:5], True, *share)


@pytest.mark.parametrize("own", [-2, 0, 61])
def test_wrong_own(own: int) -> None:
    case = make_case(60, 8, 3)
    with pytest.raises(RuntimeError, match=rf"own must be in \[1, 60\], or -1 for all; got {own}"):
        torch.ops.allnc_C.hycon_lse_backward(case.grad, case.a, *case[:5], True, own)


@pytest.fixture
def restore_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("shifted", [True, False])
@pytest.mark.usefixtures("restore_threads")
def test_bit_equal_for_any_number_of_threads(shifted: bool) -> None:
    case = make_case(1500, 64, 30)

    def compute() -> tuple[Tensor, ...]:
        lse, dz, dmu = fused(case, shifted)
        parts = [torch.ops.allnc_C.hycon_lse_forward(*case[:5], shifted, part, 3) for part in range(3)]
        share = torch.ops.allnc_C.hycon_lse_backward(case.grad, lse, *case[:5], shifted, 700)
        return (lse, dz, dmu, *parts, *share)

    torch.set_num_threads(1)
    want = compute()
    for threads in (2, 3, 4, 4, 4, 8):
        torch.set_num_threads(threads)
        for x, y in zip(compute(), want, strict=True):
            assert torch.equal(x, y)


@pytest.mark.usefixtures("poisoned_allocations")
def test_reads_no_uninitialised_memory() -> None:
    for shifted in (True, False):
        case = make_case(250, 21, 13)
        check(case, shifted)
        lse, dz, dmu = fused(case, shifted)
        share = torch.ops.allnc_C.hycon_lse_backward(case.grad, lse, *case[:5], shifted, 100)
        torch.testing.assert_close(share[0], dz[:100])
        assert share[1].isfinite().all() and dmu.isfinite().all()


def cpu_flags() -> list[str]:
    return Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []


def check_small_cases() -> None:
    """Checks that reach every branch of the tile code; prints a digest of the bits."""
    assert _extension.has_cpp()
    digest = hashlib.sha256()
    for dtype in DTYPES:
        for t, shifted in ((0.1, True), (0.02, False)):
            for shape in ((300, 100, 9), (50, 3, 60)):
                case = make_case(*shape, t, dtype=dtype)
                check(case, shifted)
                digest.update(b"".join(x.double().numpy().tobytes() for x in fused(case, shifted)))
    print(digest.hexdigest())


def test_every_instruction_set() -> None:
    # Beyond what the processor has, the variable changes nothing.
    sets = ("avx512", "avx2", "baseline")  # what the processor has beyond them, the other tests reach
    digests = {isa: called(check_small_cases, ALLNC_CPU_ISA=isa) for isa in sets}
    flags = cpu_flags()
    for higher, lower in (("avx512", "avx2"), ("avx2", "baseline")):
        if f"{higher}f" in flags or higher in flags:
            assert digests[higher] != digests[lower]  # or the variable chose nothing


def check_bfloat16_products() -> None:
    for shifted in (True, False):
        bfloat16_products(shifted)


def test_bfloat16_products_where_they_are_asked_for() -> None:
    """Processors on which they are the slower way take them only by this variable."""
    called(check_bfloat16_products, ALLNC_CPU_ISA="avx512bf16")


@pytest.mark.parametrize("shifted", [True, False])
def test_bfloat16_products(shifted: bool) -> None:
    bfloat16_products(shifted)


def bfloat16_products(shifted: bool) -> None:
    # The same rows in float32: results differ by the rounding of mu, of K and of dz, each at most 2^-9.
    case = make_case(700, 101, 60, dtype=torch.bfloat16)
    got, exact = fused(case, shifted), fused(case._replace(z=case.z.float()), shifted)
    assert (got[0] - exact[0]).abs().max() < 2**-9
    for x, want in zip(got[1:], exact[1:], strict=True):
        assert (x.float() - want).norm() < 2**-8 * want.norm()
    if "avx512_bf16" in cpu_flags() and os.environ.get("ALLNC_CPU_ISA") == "avx512bf16":
        assert not torch.equal(got[1], exact[1].bfloat16())  # or float32 products were made


def check_cold_bfloat16() -> None:
    """Means that bfloat16 does not hold are not rounded to it where their logits would be off by 2^-9 / t >= 0.06."""
    case = make_case(200, 24, 30, dtype=torch.bfloat16, zeros=0)
    assert case.mu is not None
    mu = F.normalize(case.mu + 1e-3, dim=1)
    for t in (0.03, 0.008):
        cold = case._replace(mu=mu, t=torch.tensor(t))
        got, exact = fused(cold, False), dense(cold, torch.float64)
        assert (got[0] - exact[0]).abs().max() < 1e-5 / t
        assert (got[2] - exact[2]).norm() < 1e-4 * exact[2].norm()


@pytest.mark.parametrize("isa", ["avx512bf16", "avx512", "baseline"])
def test_a_cold_contrast_of_bfloat16_rows_keeps_its_means(isa: str) -> None:
    called(check_cold_bfloat16, ALLNC_CPU_ISA=isa)


def print_peak_memory_growth() -> None:
    """Prints the growth of peak memory, in MiB, by a forward and backward pass at N = 4096, then at 8192."""
    assert _extension.has_cpp()

    def peak() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    cases = [make_case(n, 32, 10) for n in (64, 4096, 8192)]
    fused(cases[0], True)
    for case in cases[1:]:
        before = peak()
        fused(case, True)
        fused(case, False)
        print(peak() - before)


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
def test_memory_is_linear_in_n() -> None:
    # N x N: 64, then 256 MiB. Needed: 4 buffers of N x D, 1 MiB each at N = 8192, and a block per thread.
    first, second = map(float, called(print_peak_memory_growth).split())
    assert first <= 16
    assert second <= 24
