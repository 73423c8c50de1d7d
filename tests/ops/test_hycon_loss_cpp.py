"""The C++ ops hycon_loss_forward and hycon_loss_backward against `hycon_reference` in float64 with autograd.

N rows of z, D columns, C classes. z is float32, float64, or bfloat16 with everything else in float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from allnc import _extension
from allnc.ops._common import accumulation_dtype
from allnc.ops.hycon import hycon_reference
from tests.forks import called
from tests.poison import poisoned_allocations  # noqa: F401 (a fixture, found by name)

pytestmark = pytest.mark.skipif(not _extension.has_cpp(), reason="extension not built")

IGNORED = -100
# Largest error of a value and of a gradient, relative to the largest entry wanted. In bfloat16 products z, mu and the
# gradient are rounded to 2^-9.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2}


class Case(NamedTuple):
    z: Tensor  # [N, D]
    labels: Tensor  # [N]
    means: Tensor | None  # [C, D]
    seen: Tensor | None  # [C]
    temperature: float
    mean_weight: float
    balanced: bool


class Results(NamedTuple):
    loss: Tensor  # []
    dz: Tensor  # [N, D]
    dmeans: Tensor  # [C, D], or [0, D] without means


def make_case(
    n: int,
    d: int,
    c: int,
    temperature: float = 0.1,
    *,
    dtype: torch.dtype = torch.float32,
    mean_weight: float = 1.0,
    balanced: bool = True,
    means: bool = True,
    seen: float = 1.0,
    ignored: float = 0.0,
    seed: int = 0,
) -> Case:
    """Random unit rows and labels; `seen` and `ignored` are shares of the classes and of the rows."""
    generator = torch.Generator().manual_seed(seed)
    z = F.normalize(torch.randn(n, d, generator=generator, dtype=torch.float64), dim=1).to(dtype)
    labels = torch.randint(0, c, (n,), generator=generator)
    labels[torch.rand(n, generator=generator) < ignored] = IGNORED
    of_means = (3 * torch.randn(c, d, generator=generator)).to(accumulation_dtype(dtype))
    mask = torch.rand(c, generator=generator) < seen if seen < 1 else None
    rest = (temperature, mean_weight, balanced)
    return Case(z, labels, of_means, mask, *rest) if means else Case(z, labels, None, None, *rest)


def fused(case: Case, grad: float = 1.0, *, with_gradient: bool = True) -> Results:
    """Both ops; with_gradient says in which of them the pairs' part of the gradient is formed."""
    z, labels, means, seen, temperature, mean_weight, balanced = case
    arguments = (labels, means, seen, temperature, mean_weight, balanced, IGNORED, with_gradient)
    loss, *saved = torch.ops.allnc_C.hycon_loss_forward(z, *arguments)
    return Results(
        loss, *torch.ops.allnc_C.hycon_loss_backward(torch.full_like(loss, grad), z, means, *saved, temperature)
    )


def reference(case: Case) -> Results:
    z = case.z.detach().clone().double().requires_grad_()
    means = None if case.means is None else case.means.detach().clone().double().requires_grad_()
    options = {"seen": case.seen, "temperature": case.temperature, "mean_weight": case.mean_weight}
    balance = "class" if case.balanced else "none"
    loss = hycon_reference(z, case.labels, means, **options, balance=balance, ignore_index=IGNORED)
    loss.backward()
    empty = z.new_zeros(0, z.shape[1])
    dmeans = empty if means is None else torch.zeros_like(means) if means.grad is None else means.grad
    assert z.grad is not None
    return Results(loss.detach(), z.grad, dmeans)


def assert_close(got: Tensor, want: Tensor, tolerance: float, name: str, floor: float = 0.0) -> None:
    """Largest error relative to the largest entry wanted; `floor` is what entries of zero are held to."""
    assert got.shape == want.shape, name
    if not want.numel():
        return
    error = (got.double() - want).abs().max()
    allowed = tolerance * max(float(want.abs().max()), floor)
    assert error <= allowed, f"{name}: error {float(error):.3g} > {allowed:.3g}"


def check(case: Case, tolerance: float | None = None) -> None:
    dtype = case.z.dtype
    tolerance = TOLERANCE[dtype] if tolerance is None else tolerance
    got, want = fused(case), reference(case)
    assert [x.dtype for x in got] == [accumulation_dtype(dtype), dtype, accumulation_dtype(dtype)]
    # Terms of size 1 / temperature cancel, in the loss and in the gradient of a row.
    assert_close(got.loss, want.loss, tolerance, "loss", 1 / case.temperature)
    floor = 0.1 / case.temperature / len(case.z)
    assert_close(got.dz, want.dz, tolerance, "dz", floor)
    norms = 1.0 if case.means is None else case.means.double().norm(dim=1, keepdim=True)  # gradients are in 1 / norms
    assert_close(got.dmeans * norms, want.dmeans * norms, tolerance, "dmeans", floor)


def test_hand_computed() -> None:
    # Two rows of class 0, one mean on the first axis, kappa 1, unbalanced, at temperature 1/2:
    # lse_0 = log(e^0 + e^2), pos_0 = (0 + 2) / 2; lse_1 = log(e^0 + e^0), pos_1 = 0.
    z, means = torch.eye(2, dtype=torch.float64), torch.tensor([[5.0, 0.0]], dtype=torch.float64)
    got = fused(Case(z, torch.zeros(2, dtype=torch.long), means, None, 0.5, 1.0, False))
    want = (math.log(1 + math.exp(2)) - 1 + math.log(2)) / 2
    torch.testing.assert_close(got.loss, torch.tensor(want, dtype=torch.float64))
    # d/dz_0 = (1/t) [softmax-weighted columns, as anchor and as column of row 1, less the positives] / 2.
    p = 1 / (1 + math.exp(2))  # weight of row 1 for anchor 0
    dz_0 = torch.tensor([(1 - p) - 0.5, p + 0.5 - 0.5 - 0.5], dtype=torch.float64)
    torch.testing.assert_close(got.dz[0], dz_0)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("mean_weight", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("balanced", [True, False])
def test_options(dtype: torch.dtype, mean_weight: float, balanced: bool) -> None:
    for shape in ((300, 32, 7), (97, 21, 60)):
        for seen, ignored in ((1.0, 0.0), (0.6, 0.2)):
            check(
                make_case(*shape, dtype=dtype, mean_weight=mean_weight, balanced=balanced, seen=seen, ignored=ignored)
            )


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("balanced", [True, False])
def test_without_means(dtype: torch.dtype, balanced: bool) -> None:
    for shape in ((300, 32, 7), (97, 21, 60), (50, 130, 1)):
        case = make_case(*shape, dtype=dtype, balanced=balanced, means=False, ignored=0.1)
        check(case)
        renamed = torch.where(case.labels == IGNORED, IGNORED, 7**20 - 11**15 * case.labels)  # any integers
        for x, y in zip(fused(case), fused(case._replace(labels=renamed)), strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("temperature", [10.0, 1.0, 0.05, 0.02, 0.004])
def test_temperatures(temperature: float) -> None:
    for dtype in (torch.float32, torch.float64):
        check(make_case(130, 16, 9, temperature, dtype=dtype), 10 * TOLERANCE[dtype])


@given(
    st.integers(1, 120),
    st.integers(1, 40),
    st.integers(1, 130),
    st.sampled_from([0.0, 1.0, 2.5]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.sampled_from([0.0, 0.3, 1.0]),
)
@settings(max_examples=80, deadline=None)
def test_any_shape(
    n: int, d: int, c: int, mean_weight: float, balanced: bool, means: bool, seen: float, ignored: float
) -> None:
    check(
        make_case(
            n, d, c, dtype=torch.float64, mean_weight=mean_weight, balanced=balanced, means=means, seen=seen,
            ignored=ignored, seed=n + 1000 * d,
        ),
        1e-11,
    )  # fmt: skip


def test_many_classes() -> None:
    check(make_case(16, 64, 8142))
    check(make_case(16, 64, 8142, seen=0.01))


def test_no_positives() -> None:
    alone = make_case(5, 8, 5, means=False)
    alone = alone._replace(labels=torch.arange(5))
    unseen = make_case(5, 8, 5)._replace(labels=torch.arange(5), seen=torch.zeros(5, dtype=torch.bool))
    no_kappa = make_case(5, 8, 5, mean_weight=0.0)._replace(labels=torch.arange(5))
    single = make_case(1, 8, 5, means=False)
    ignored = make_case(5, 8, 5)._replace(labels=torch.full((5,), IGNORED))
    for case in (alone, unseen, no_kappa, single, ignored):
        for x in fused(case):
            assert not x.any()


def test_one_row_with_a_mean() -> None:
    check(make_case(1, 8, 1, dtype=torch.float64))  # loss 0: nothing but its positive in the contrast
    check(make_case(1, 8, 5, dtype=torch.float64))
    check(make_case(1, 1, 5, dtype=torch.float64))


@pytest.mark.parametrize("length", [0.0, 1e-14, 1e-6, 1e6])
def test_means_of_any_length(length: float) -> None:
    # Shorter than 1e-12, F.normalize divides by 1e-12: the gradient is a constant times that of mu.
    case = make_case(40, 8, 5, dtype=torch.float64)
    assert case.means is not None
    means = case.means.clone()
    means[2] *= length
    got, want = fused(case._replace(means=means)), reference(case._replace(means=means))
    for row in range(5):
        assert_close(got.dmeans[row], want.dmeans[row], 1e-10, f"dmeans of class {row}")


def test_unseen_means_are_not_read() -> None:
    case = make_case(60, 8, 9, seen=0.5, dtype=torch.float64)
    assert case.means is not None and case.seen is not None and not case.seen.all()
    garbage = torch.where(case.seen[:, None], case.means, torch.nan)
    for x, y in zip(fused(case._replace(means=garbage)), fused(case), strict=True):
        assert torch.equal(x, y)
    assert not fused(case).dmeans[~case.seen].any()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["z", "means"])
def test_nan_in_nan_out(name: str, value: float) -> None:
    case = make_case(60, 8, 9)
    bad = getattr(case, name).clone()
    bad[3, 5] = value
    for x in fused(case._replace(**{name: bad})):
        assert x.isnan().all()


def test_upstream_gradient() -> None:
    case = make_case(60, 8, 9, dtype=torch.float64)
    one, many = fused(case), fused(case, -3.5)
    torch.testing.assert_close(many.dz, -3.5 * one.dz)
    torch.testing.assert_close(many.dmeans, -3.5 * one.dmeans)
    for x in fused(case, 0.0)[1:]:
        assert not x.any()
    for x in fused(case, math.nan)[1:]:
        assert x.isnan().all()


def test_shapes_of_what_is_saved() -> None:
    # The fakes of the Python ops rely on them.
    for means, classes, num_means in ((True, 9, 9), (False, 60, 0)):
        z, labels, of_means, seen, *rest = make_case(60, 8, 9, means=means)
        for with_gradient in (True, False):
            saved = torch.ops.allnc_C.hycon_loss_forward(z, labels, of_means, seen, *rest, IGNORED, with_gradient)
            pull = [96 + 48 * means if with_gradient else 0, 16]
            shapes = [[], [3, 60 + num_means], [60], [classes, 8], [num_means, 8], pull]
            assert [list(x.shape) for x in saved] == shapes
            assert [x.dtype for x in saved] == [torch.float32] * 2 + [torch.int64] + [torch.float32] * 3


# At 1500 rows not all exponentials are kept for the backward; in float32 at temperature 0.02 none.
@pytest.mark.parametrize("temperature", [0.1, 0.02])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("n", "c"), [(1, 1), (60, 9), (300, 70), (1500, 200)])
def test_gradient_formed_in_either_op(n: int, c: int, dtype: torch.dtype, temperature: float) -> None:
    case = make_case(n, 20, c, temperature, dtype=dtype, seen=0.8, ignored=0.1)
    for x, y in zip(fused(case), fused(case, with_gradient=False), strict=True):
        assert torch.equal(x, y)


def test_non_contiguous_inputs() -> None:
    case = make_case(60, 8, 9, seen=0.7)
    assert case.means is not None and case.seen is not None
    strided = case._replace(
        z=case.z.T.contiguous().T,
        labels=torch.stack([case.labels, case.labels], 1)[:, 0],
        means=case.means.T.contiguous().T,
        seen=torch.stack([case.seen, case.seen], 1)[:, 0],
    )
    for x, y in zip(fused(strided), fused(case), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("label", [-1, 9, 2**40])
def test_label_out_of_range(label: int) -> None:
    case = make_case(60, 8, 9)
    case.labels[17] = label
    with pytest.raises(
        RuntimeError, match=rf"labels must be in \[0, 9\) or ignore_index \(-100\); got {label} in row 17"
    ):
        fused(case)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"z": torch.ones(60)}, "z must have 2 dimensions; got 1"),
        ({"z": torch.ones(60, 8).half()}, "z must be float32, float64 or bfloat16"),
        ({"labels": torch.zeros(59, dtype=torch.long)}, r"labels must have shape \[60\]; got \[59\]"),
        ({"labels": torch.zeros(60)}, "labels must have ScalarType 4; got 6"),
        ({"means": torch.ones(9, 7)}, r"means must have shape \[9, 8\]; got \[9, 7\]"),
        ({"means": torch.ones(9, 8).double()}, "means must have ScalarType 6; got 7"),
        ({"seen": torch.ones(8, dtype=torch.bool)}, r"seen must have shape \[9\]; got \[8\]"),
        ({"temperature": 0.0}, "temperature must be > 0; got 0"),
        ({"temperature": math.nan}, "temperature must be > 0; got nan"),
        ({"mean_weight": -1.0}, "mean_weight must be >= 0; got -1"),
    ],
)
def test_wrong_arguments(change: dict[str, object], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        fused(make_case(60, 8, 9)._replace(**change))


@pytest.fixture
def restore_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("means", [True, False])
@pytest.mark.parametrize("temperature", [0.1, 0.01])
@pytest.mark.usefixtures("restore_threads")
def test_bit_equal_for_any_number_of_threads(temperature: float, means: bool) -> None:
    case = make_case(1500, 130, 30, temperature, means=means, ignored=0.1)
    torch.set_num_threads(1)
    want = fused(case)
    for threads in (2, 3, 4, 8):
        torch.set_num_threads(threads)
        for x, y in zip(fused(case), want, strict=True):
            assert torch.equal(x, y)


@pytest.mark.usefixtures("poisoned_allocations")
def test_reads_no_uninitialised_memory() -> None:
    for means in (True, False):
        check(make_case(250, 21, 13, means=means, ignored=0.1))
        check(make_case(250, 21, 400, means=means, seen=0.5))


def check_instruction_set() -> None:
    for dtype in TOLERANCE:
        for case in (make_case(200, 40, 9, dtype=dtype), make_case(50, 3, 60, 0.02, dtype=dtype)):
            check(case, 5 * TOLERANCE[dtype])


@pytest.mark.parametrize("isa", ["avx512", "avx2", "baseline"])
def test_every_instruction_set(isa: str) -> None:
    called(check_instruction_set, ALLNC_CPU_ISA=isa)
