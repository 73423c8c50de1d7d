"""The launch that computes HyCon and P2P together, against the float64 references and HyCon's own launch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.launches import count_launches
from tests.poison import poisoned_memory
from tests.tolerances import assert_as_exact

pytest.importorskip("triton")

from allnc.kernels.all_around import all_around_forward
from allnc.kernels.hycon.loss import hycon_loss_forward
from allnc.kernels.p2p import p2p_forward
from allnc.ops.hycon import hycon_reference
from tests.kernels.test_hycon_kernels import DEVICE
from tests.kernels.test_p2p_kernels import dense_values, unit_classes

__all__ = ["poisoned_memory"]  # a fixture: pytest finds it by name

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning:triton"),  # log2(0) is meant
]


def make_case(n: int, d: int, c: int, f: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(n + d + c + f)
    seen = torch.arange(c) % 4 != 1
    labels = torch.randint(0, c, (n,), generator=generator)
    labels[::9] = -100
    case = {
        "z": F.normalize(torch.randn(n, d, generator=generator), dim=1).to(dtype),
        "labels": labels,
        "means": torch.randn(c, d, generator=generator),
        "seen": seen,
    }
    return {name: value.to(DEVICE) if isinstance(value, Tensor) else value for name, value in case.items()}


def hycon_options(**changes: Any) -> dict[str, Any]:
    options = {"mean_weight": 1.0, "balance": "class", "ignore_index": -100}
    return options | changes


@pytest.mark.parametrize("target", ["etf", "softmax"])
@pytest.mark.parametrize(
    ("n", "d", "c", "f", "dtype", "tau", "changes"),
    [
        (70, 20, 70, 18, torch.float32, 0.1, {}),
        (150, 16, 65, 33, torch.bfloat16, 0.1, {"balance": "none"}),
        (33, 200, 7, 5, torch.float16, 1 / 32, {"mean_weight": 0.5}),
        (5, 8, 1, 3, torch.float32, 0.2, {}),
    ],
)
def test_both_losses(target, n: int, d: int, c: int, f: int, dtype: torch.dtype, tau: float, changes) -> None:
    case = make_case(n, d, c, f, dtype)
    seen = case["seen"]
    x, y = unit_classes(c, f, seen)
    options = hycon_options(**changes)
    loss, _, values, _ = all_around_forward(
        **case, temperature=tau, x=x, y=y, target=target, p2p_temperature=0.07, **options
    )
    in_reference = {name: options[name] for name in ("mean_weight", "balance", "ignore_index")}
    exact, same = (
        hycon_reference(case["z"].to(to), case["labels"], case["means"], seen=seen, temperature=tau, **in_reference)
        for to in (torch.float64, torch.float32)
    )
    assert_as_exact(loss, same, exact, dtype=dtype, floor=1 / tau)
    want = dense_values(x.double(), y.double(), seen, target, 0.07, "all")
    assert_as_exact(values, dense_values(x, y, seen, target, 0.07, "all"), want, floor=1.0)


@pytest.mark.parametrize("target", ["etf", "softmax"])
def test_equals_the_launches_of_each_loss(target) -> None:
    """Values, and all that the backward kernels read; sums that are added by atomics up to rounding."""
    case = make_case(90, 24, 40, 30)
    options = hycon_options()
    x, y = unit_classes(40, 30, case["seen"])
    p2p_options = {"target": target, "temperature": 0.07, "blocks": "all"}
    loss, prepared, values, lse = all_around_forward(
        **case, temperature=0.15, x=x, y=y, target=target, p2p_temperature=0.07, **options
    )
    want, want_prepared = hycon_loss_forward(**case, temperature=0.15, **options)
    want_values, want_lse = p2p_forward(x, y, case["seen"], **p2p_options)
    torch.testing.assert_close(loss, want, rtol=1e-6, atol=0)
    assert torch.equal(prepared.index[:-1], want_prepared.index[:-1])  # the last one counts programs
    for name in ("state", "sums", "rows"):
        torch.testing.assert_close(
            getattr(prepared, name), getattr(want_prepared, name), rtol=1e-6, atol=0, equal_nan=True
        )
    torch.testing.assert_close(values, want_values, rtol=1e-6, atol=1e-7)  # chunks of other widths
    torch.testing.assert_close(lse, want_lse, rtol=1e-6, atol=1e-6)


def test_hand_computed_values() -> None:
    case = make_case(3, 4, 4, 3)
    case["seen"] = torch.ones(4, dtype=torch.bool, device=DEVICE)
    simplex = torch.tensor([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]], device=DEVICE) / math.sqrt(3)
    together = torch.tensor([[0.0, 1.0, 0.0]], device=DEVICE).repeat(4, 1)

    def values(x: Tensor, y: Tensor, target, temperature: float = 0.07) -> list[float]:
        rest = {"target": target, "p2p_temperature": temperature, **hycon_options()}
        return all_around_forward(**case, temperature=0.1, x=x, y=y, **rest)[2].tolist()

    # At the simplex ETF the target is met; with all classes in one direction every Gram entry is 1.
    assert values(simplex, simplex, "etf") == pytest.approx([0, 0, 0], abs=1e-6)
    # (X, X): K (K-1) (1 + 1/(K-1))² / K²; (X, Y): the second components of the simplex, all ±1/√3.
    column = simplex[:, 1].tolist()
    cross = sum((g - (1 if i == j else -1 / 3)) ** 2 for i in range(4) for j, g in enumerate(column))
    assert values(together, simplex, "etf") == pytest.approx([4 / 3, 0, cross / 16], abs=1e-6)
    expected = [1 + 0.2 * math.log(3)] * 2 + [0.2 * math.log(3)]
    assert values(together, together, "softmax", 0.2) == pytest.approx(expected, rel=1e-6)


def test_one_launch_prepares_and_one_has_everything_else(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = count_launches(monkeypatch)
    case = make_case(20, 8, 6, 5)
    x, y = unit_classes(6, 5, case["seen"])
    rest = {"target": "etf", "p2p_temperature": 0.1, **hycon_options()}
    all_around_forward(**case, temperature=0.1, x=x, y=y, **rest)
    assert launched == ["hycon_prepare_kernel", "all_around_fwd_kernel"]
