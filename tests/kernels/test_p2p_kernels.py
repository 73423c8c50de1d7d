"""P2P's kernels against dense float64 formulas with autograd."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.launches import count_launches
from tests.poison import poisoned_memory
from tests.tolerances import assert_as_exact

pytest.importorskip("triton")

import allnc.kernels.centred_unit as p2p_units
from allnc.kernels.centred_unit import centred_unit_backward, centred_unit_forward
from allnc.kernels.p2p import PairBlocks, p2p_backward, p2p_forward
from allnc.ops.p2p import centred_unit
from tests.kernels.test_hycon_kernels import DEVICE

__all__ = ["poisoned_memory"]  # a fixture: pytest finds it by name

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning:triton"),  # log2(0) is meant
]
TARGETS = ["etf", "softmax"]
BLOCKS: list[PairBlocks] = ["own", "cross", "all"]


def pair_value(x: Tensor, y: Tensor, target: str, temperature: float) -> Tensor:
    """P2P of one pair of [K, F] centred unit rows, all of them seen, as the formula is written."""
    if len(x) < 2:
        return (x.sum() + y.sum()) * 0
    gram = x @ y.T
    own = torch.eye(len(x), dtype=torch.bool, device=x.device)
    if target == "etf":
        return (gram - torch.where(own, 1.0, -1 / (len(x) - 1))).square().mean()
    exponent = (gram - (0 if x is y else gram.diag()[:, None])) / temperature
    return temperature * exponent.masked_fill(own, -torch.inf).logsumexp(1).mean()


def dense_values(x: Tensor, y: Tensor, seen: Tensor, target: str, temperature: float, blocks: PairBlocks) -> Tensor:
    x, y = x[seen], y[seen]
    pairs = {"own": [(x, x)], "cross": [(x, y)], "all": [(x, x), (y, y), (x, y)]}[blocks]
    return torch.stack([pair_value(*pair, target, temperature) for pair in pairs])


def dense(x, y, seen, target, temperature, blocks, grad, dtype) -> list[Tensor]:
    """Values and gradients in `dtype`."""
    leaves = [x.to(dtype).requires_grad_(), y.to(dtype).requires_grad_()]
    values = dense_values(leaves[0], leaves[1], seen, target, temperature, blocks)
    grads = torch.autograd.grad(values, leaves, grad.to(dtype), allow_unused=True)
    return [values.detach(), *(g for g in grads if g is not None)]


def unit_classes(c: int, f: int, seen: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, y = (F.normalize(torch.randn(c, f, generator=generator), dim=1).to(DEVICE) * seen[:, None] for _ in range(2))
    return x, y


def check(c: int, f: int, seen: Tensor, target, blocks: PairBlocks, temperature: float = 0.1, seed: int = 0) -> None:
    x, y = unit_classes(c, f, seen, seed)
    grad = torch.tensor([0.7] if blocks != "all" else [0.7, -1.3, 0.4], device=DEVICE)
    other = None if blocks == "own" else y
    rest = {"target": target, "temperature": temperature, "blocks": blocks}
    values, lse = p2p_forward(x, other, seen, **rest)
    got = [values, *p2p_backward(grad, lse, x, other, seen, **rest)]
    if blocks == "own":
        assert got.pop() is None
    exact, eager = (
        dense(x, y, seen, target, temperature, blocks, grad, dtype) for dtype in (torch.float64, torch.float32)
    )
    for mine, same, want in zip(got, eager, exact, strict=True):
        assert_as_exact(mine, same, want, growth=max(1.0, 0.02 / temperature), floor=1.0)
    for gradient in got[1:]:
        assert not gradient[~seen].any()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize(("c", "f"), [(10, 16), (65, 33), (3, 300), (17, 520)])
def test_values_and_gradients(c: int, f: int, blocks: PairBlocks, target: str) -> None:
    check(c, f, (torch.arange(c) % 4 != 1).to(DEVICE), target, blocks)


@settings(max_examples=25, deadline=None)
@given(
    data=st.data(),
    c=st.integers(1, 40),
    f=st.integers(1, 40),
    blocks=st.sampled_from(BLOCKS),
    target=st.sampled_from(TARGETS),
    temperature=st.sampled_from([0.005, 0.1, 1.0]),
)
def test_any_shape_and_mask(data: st.DataObject, c: int, f: int, blocks, target: str, temperature: float) -> None:
    seen = torch.tensor(data.draw(st.lists(st.booleans(), min_size=c, max_size=c))).to(DEVICE)
    check(c, f, seen, target, blocks, temperature, data.draw(st.integers(0, 99)))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize(("c", "num_seen"), [(1, 1), (5, 0), (5, 1)])
def test_no_pair_no_loss(c: int, num_seen: int, blocks: PairBlocks, target) -> None:
    seen = (torch.arange(c) < num_seen).to(DEVICE)
    x, y = unit_classes(c, 6, seen)
    other = None if blocks == "own" else y
    rest = {"target": target, "temperature": 0.1, "blocks": blocks}
    values, lse = p2p_forward(x, other, seen, **rest)
    assert not values.any()
    for gradient in p2p_backward(torch.ones_like(values), lse, x, other, seen, **rest):
        assert gradient is None or not gradient.any()


def test_an_extreme_temperature_meets_classes_not_seen() -> None:
    """All seen classes opposed at τ = 0.005: exp(0 - l) of a class not seen is e^200, and must not become inf · 0."""
    seen = torch.tensor([True, False, True, False], device=DEVICE)
    x = torch.tensor([[1.0, 0.0], [0.0, 0.0], [-1.0, 0.0], [0.0, 0.0]], device=DEVICE)
    grad = torch.ones(3, device=DEVICE)
    values, lse = p2p_forward(x, x.clone(), seen, target="softmax", temperature=0.005, blocks="all")
    assert values.tolist() == pytest.approx([-1, -1, -2], rel=1e-6)
    dx, dy = p2p_backward(grad, lse, x, x.clone(), seen, target="softmax", temperature=0.005, blocks="all")
    # (X, X): each class pulls at the other twice, (1/2)(1 + 1) x_other; (X, Y): (1/2)(y_other - y_own).
    want = torch.tensor([[-2.0, 0.0], [0.0, 0.0], [2.0, 0.0], [0.0, 0.0]], device=DEVICE)
    assert dy is not None
    torch.testing.assert_close(dx, want)
    torch.testing.assert_close(dy, want)


def test_values_and_gradients_are_two_launches_and_one(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = count_launches(monkeypatch)
    check(9, 7, torch.ones(9, dtype=torch.bool, device=DEVICE), "etf", "all")
    assert launched == ["p2p_fwd_kernel", "p2p_finish_kernel", "p2p_bwd_kernel"]


@pytest.mark.parametrize("target", TARGETS)
def test_equal_calls_are_equal_bit_for_bit(target) -> None:
    seen = torch.ones(40, dtype=torch.bool, device=DEVICE)
    x, y = unit_classes(40, 20, seen)
    first, second = (p2p_forward(x, y, seen, target=target, temperature=0.1, blocks="all")[0] for _ in range(2))
    assert torch.equal(first, second)


def unit_case(c: int, f: int, dtypes: tuple[torch.dtype, ...], seen: Tensor, offset: float) -> list[Tensor]:
    generator = torch.Generator().manual_seed(c + f)
    rows = [(torch.randn(c, f, generator=generator) + offset).to(DEVICE, dtype) for dtype in dtypes]
    for matrix in rows:
        matrix[~seen] = math.nan  # rows of classes not seen are never read
    return rows


def check_units(
    c: int,
    f: int,
    dtypes: tuple[torch.dtype, ...],
    seen: Tensor,
    offset: float = 1.0,
    centre: tuple[bool, bool] = (True, True),
) -> None:
    rows = unit_case(c, f, dtypes, seen, offset)
    u, v, scale = centred_unit_forward(rows[0], rows[1] if len(rows) > 1 else None, seen, centre)
    grads = [torch.randn(c, f, device=DEVICE) for _ in rows]
    got_grads = centred_unit_backward(
        grads[0], grads[1] if len(rows) > 1 else None, u, v, scale, seen, centre, rows[0].dtype, rows[-1].dtype
    )
    for matrix, grad, unit, of_matrix, centred in zip(rows, grads, (u, v), got_grads, centre, strict=False):
        results = []
        for dtype in (torch.float64, torch.float32):
            leaf = matrix.to(dtype).requires_grad_()
            want = centred_unit(leaf, seen, centred)
            results.append((want, torch.autograd.grad(want, leaf, grad.to(dtype))[0]))
        (exact, exact_grad), (same, same_grad) = results
        assert unit is not None and of_matrix is not None and of_matrix.dtype == matrix.dtype
        # Rows nearer to the centre than they are long: the rounding of x - m is 1/|x - m| times larger in u, and once
        # more in du's share along u, which is left out. With one column all of du lies along u.
        rows_seen = matrix[seen].detach().double()
        centre_of = rows_seen.mean(0) if centred else 0.0
        distance = float((rows_seen - centre_of).norm(dim=1).min()) if len(rows_seen) > 1 else 1.0
        length = float(rows_seen.norm(dim=1).max()) if len(rows_seen) else 1.0
        condition = max(1.0, length / distance)
        assert_as_exact(unit, same, exact, floor=condition)
        assert_as_exact(of_matrix, same_grad.to(matrix.dtype), exact_grad, floor=condition / distance)


@pytest.mark.parametrize(
    ("c", "f", "dtypes"),
    [
        (10, 16, (torch.float32,)),
        (70, 33, (torch.bfloat16, torch.float32)),
        (300, 5, (torch.float32, torch.float16)),
        (9, 1100, (torch.float16, torch.bfloat16)),
    ],
)
def test_centred_unit_rows(c: int, f: int, dtypes: tuple[torch.dtype, ...]) -> None:
    check_units(c, f, dtypes, (torch.arange(c) % 4 != 1).to(DEVICE))
    check_units(c, f, dtypes, (torch.arange(c) % 4 != 1).to(DEVICE), centre=(len(dtypes) > 1, False))


@settings(max_examples=25, deadline=None)
@given(data=st.data(), c=st.integers(1, 90), f=st.integers(1, 40), sides=st.integers(1, 2))
def test_centred_unit_rows_of_any_shape_and_mask(data: st.DataObject, c: int, f: int, sides: int) -> None:
    seen = torch.tensor(data.draw(st.lists(st.booleans(), min_size=c, max_size=c))).to(DEVICE)
    centre = (data.draw(st.booleans()), data.draw(st.booleans()))
    check_units(c, f, (torch.float32,) * sides, seen, centre=centre)


def test_many_classes_share_the_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """More panels than shares: a share has several panels, the last one fewer rows."""
    monkeypatch.setattr(p2p_units, "SHARES", 4)
    constants, _ = p2p_units.unit_constants(1100)
    assert constants["BLOCK_C"] == 4 and p2p_units.shares_of(66, 4) == (4, 20)
    check_units(66, 1100, (torch.float32,) * 2, (torch.arange(66) % 7 != 1).to(DEVICE))


def test_a_row_at_the_centre_has_no_direction_and_no_gradient() -> None:
    x = torch.randn(4, 8, device=DEVICE) + 1000
    x = torch.cat((x, x.mean(0, keepdim=True)))
    seen = torch.ones(5, dtype=torch.bool, device=DEVICE)
    u, _, scale = centred_unit_forward(x, None, seen)
    assert not u[4].any() and scale[0, 4] == 0 and bool((u[:4].norm(dim=1) - 1).abs().max() < 1e-5)
    dx, _ = centred_unit_backward(torch.ones_like(u), None, u, None, scale, seen, (True, True), x.dtype, x.dtype)
    assert bool(dx.isfinite().all())
