"""Drift of class means: hand-computed cases, rotations, the best rotation against a search, errors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from allnc.metrics import drift


def rotation(dim: int) -> Tensor:
    return torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64)).Q


def test_by_hand() -> None:
    """Means at (±1, 0) that move to (±2, 0), and to (0, ±2): by 1 each, and by the hypotenuse of 1 and 2."""
    before = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert drift(before, 2 * before) == pytest.approx({"drift": 1, "drift_aligned": 1})
    assert drift(before, 2 * before.roll(1, 1)) == pytest.approx({"drift": math.sqrt(5), "drift_aligned": 1})
    assert drift(before, before + 7) == pytest.approx({"drift": 0, "drift_aligned": 0}, abs=1e-6)  # a common move


@pytest.mark.parametrize("shape", [(4, 9), (5, 6), (12, 5)])
def test_rotations_cost_the_aligned_drift_nothing(shape: tuple[int, int]) -> None:
    before = torch.randn(shape, dtype=torch.float64) + 100
    turned = before @ rotation(shape[1])
    found = drift(before, turned)
    assert found["drift"] > 0.1 and found["drift_aligned"] < 1e-12
    other = torch.randn(shape, dtype=torch.float64)
    assert drift(before, other)["drift_aligned"] == pytest.approx(drift(turned, other)["drift_aligned"], rel=1e-10)


def test_no_angle_in_the_plane_is_better() -> None:
    before, after = torch.randn(2, 5, 2, dtype=torch.float64)
    M, moved = before - before.mean(0), after - after.mean(0)
    angle = torch.linspace(0, 2 * math.pi, 20_001, dtype=torch.float64)
    turns = torch.stack((angle.cos(), -angle.sin(), angle.sin(), angle.cos()), 1).view(-1, 2, 2)
    mirrored = turns * torch.tensor([1.0, -1.0])
    best = torch.linalg.matrix_norm(moved @ torch.cat((turns, mirrored)) - M).min() / torch.linalg.matrix_norm(M)
    assert drift(before, after)["drift_aligned"] == pytest.approx(float(best), rel=1e-6)


def test_a_mean_of_zero_is_a_mean() -> None:
    """Means at 0 and 2 that move to 0 and 4: as those at ±1 that move to ±2."""
    assert drift(torch.tensor([[0.0], [2.0]]), torch.tensor([[0.0], [4.0]])) == pytest.approx(
        {"drift": 1, "drift_aligned": 1}
    )


def test_means_that_were_one_and_wrong_arguments() -> None:
    one = torch.full((7, 2), 0.1, dtype=torch.float64)
    assert drift(one, torch.randn(7, 2)) == {"drift": math.inf, "drift_aligned": math.inf}
    one = torch.ones(3, 2)
    assert drift(one, torch.randn(3, 2)) == {"drift": math.inf, "drift_aligned": math.inf}
    with pytest.raises(ValueError, match=r"after must have shape .*; got"):
        drift(one, torch.ones(3, 4))
    with pytest.raises(ValueError, match="before must be finite"):
        drift(one * math.nan, one)
    with pytest.raises(ValueError, match="before must be float16"):
        drift(one.long(), one)
    with pytest.raises(ValueError, match="at least two classes; got 1"):
        drift(torch.ones(1, 2), torch.ones(1, 2))
