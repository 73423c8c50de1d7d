"""The launch that computes HyCon and P2P together, against dense float64 formulas."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.tolerances import assert_as_exact

pytest.importorskip("triton")

from allnc.kernels.all_around import all_around_forward
from tests.kernels.test_hycon_kernels import DEVICE, Case, dense_lse, make_case

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning:triton")  # log2(0) is meant


def p2p_pair(x: Tensor, y: Tensor, target: str, temperature: float) -> Tensor:
    """P2P of one pair of [K, F] centred unit rows, all of them seen, as the formula is written."""
    gram = x @ y.T
    own = torch.eye(len(x), dtype=torch.bool, device=x.device)
    if target == "etf":
        return (gram - torch.where(own, 1.0, -1 / (len(x) - 1))).square().mean()
    exponent = (gram - (0 if x is y else gram.diag()[:, None])) / temperature
    return temperature * exponent.masked_fill(own, -torch.inf).logsumexp(1).mean()


def p2p_dense(x: Tensor, y: Tensor, seen: Tensor, target: str, dtype: torch.dtype) -> Tensor:
    x, y = x[seen].to(dtype), y[seen].to(dtype)
    return torch.stack([p2p_pair(*pair, target, 0.07) for pair in ((x, x), (y, y), (x, y))])


def classes(c: int, f: int, seen: Tensor) -> tuple[Tensor, Tensor]:
    x, y = (F.normalize(torch.randn(c, f), dim=1).to(DEVICE) * seen[:, None] for _ in range(2))
    return x, y


def run(case: Case, x: Tensor, y: Tensor, seen: Tensor, target, *, temperature=0.07, tau=0.1, **mode):
    mode = {"shifted": True, "deterministic": False} | mode
    tau = torch.tensor(tau, device=DEVICE)
    lse, rows = all_around_forward(*case[:4], tau, x, y, seen, target=target, p2p_temperature=temperature, **mode)
    assert rows.shape == (3, len(seen)) and not rows[:, ~seen].any()
    return lse, rows.sum(1)


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    empty, empty_like = torch.empty, torch.empty_like
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(math.nan))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kw: empty_like(*args, **kw).fill_(math.nan))


@pytest.mark.parametrize("target", ["etf", "softmax"])
@pytest.mark.parametrize(
    ("n", "d", "c", "f", "dtype", "tau", "mode"),
    [
        (70, 20, 100, 48, torch.float32, 0.1, {}),
        (150, 16, 65, 33, torch.bfloat16, 0.1, {"deterministic": True}),
        (33, 300, 7, 5, torch.float16, 0.01, {"shifted": False}),
    ],
)
def test_both_losses(target: str, n: int, d: int, c: int, f: int, dtype: torch.dtype, tau: float, mode) -> None:
    case = make_case(n, d, c, dtype)
    seen = (torch.arange(c) % 4 != 1).to(DEVICE)
    x, y = classes(c, f, seen)
    lse, values = run(case, x, y, seen, target, tau=tau, **mode)
    assert_as_exact(lse, dense_lse(case, tau, torch.float32), dense_lse(case, tau, torch.float64), scale=1 / tau)
    want = p2p_dense(x, y, seen, target, torch.float64)
    assert_as_exact(values, p2p_dense(x, y, seen, target, torch.float32), want)


def test_hand_computed_values() -> None:
    case = make_case(3, 4, 0)
    k = 4
    seen = torch.ones(k, dtype=torch.bool, device=DEVICE)
    simplex = torch.tensor([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]], device=DEVICE) / math.sqrt(3)
    together = torch.tensor([[0.0, 1.0, 0.0]], device=DEVICE).repeat(k, 1)
    # At the simplex ETF the target is met; with all classes in one direction every Gram entry is 1.
    assert run(case, simplex, simplex, seen, "etf")[1].tolist() == pytest.approx([0, 0, 0], abs=1e-6)
    values = run(case, together, simplex, seen, "etf")[1]
    # (X, X): K (K-1) (1 + 1/(K-1))² / K²; (X, Y): the second components of the simplex, all ±1/√3.
    column = simplex[:, 1].tolist()
    cross = sum((g - (1 if i == j else -1 / 3)) ** 2 for i in range(k) for j, g in enumerate(column))
    assert values.tolist() == pytest.approx([k / (k - 1), 0, cross / k**2], abs=1e-6)
    values = run(case, together, together, seen, "softmax", temperature=0.2)[1]
    expected = [1 + 0.2 * math.log(k - 1)] * 2 + [0.2 * math.log(k - 1)]
    assert values.tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("target", ["etf", "softmax"])
@pytest.mark.parametrize(("c", "num_seen"), [(1, 1), (5, 0), (5, 1), (5, 2)])
def test_few_classes_seen(target: str, c: int, num_seen: int) -> None:
    case = make_case(4, 8, c)
    seen = (torch.arange(c) < num_seen).to(DEVICE)
    x, y = classes(c, 6, seen)
    values = run(case, x, y, seen, target)[1]
    if num_seen < 2:
        assert values.tolist() == [0, 0, 0]
    else:
        want = p2p_dense(x, y, seen, target, torch.float64)
        assert values.tolist() == pytest.approx(want.tolist(), rel=1e-5)
