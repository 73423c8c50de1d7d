"""Numbers that can be worked out on paper: the simplex ETF, its floors, and the schedule."""

from __future__ import annotations

import math

import pytest
import torch

from allnc.losses import GBBN
from allnc.metrics import collapse, ideal_angle
from allnc.metrics.measures import distance_to_etf
from allnc.ops.p2p import p2p
from tests.ops.test_p2p import simplex


def _tight_frame(num_classes: int, dim: int) -> torch.Tensor:
    """Centred unit rows with XᵀX = (C/F) I: cosines and sines of F/2 whole frequencies.  [C, F]"""
    angle = 2 * math.pi * torch.arange(num_classes).double()[:, None] / num_classes
    frequency = torch.arange(1, dim // 2 + 1).double()
    return torch.cat((torch.cos(angle * frequency), torch.sin(angle * frequency)), 1) / math.sqrt(dim / 2)


def test_ideal_angle_of_ten_classes() -> None:
    assert round(ideal_angle(10), 1) == 96.4
    assert math.isclose(math.cos(math.radians(ideal_angle(10))), -1 / 9)
    assert ideal_angle(2) == 180


@pytest.mark.parametrize("num_classes", [2, 10, 100])
def test_normalised_simplex_gram(num_classes: int) -> None:
    """E = (I - J/C)/sqrt(C-1) has Frobenius norm 1 and is the normalised Gram matrix of a simplex ETF."""
    vectors = simplex(num_classes, num_classes)
    assert distance_to_etf(vectors, vectors, vectors @ vectors.T) < 1e-13
    # The identity's product with E is sqrt((C - 1) / C) of both norms.
    identity = torch.eye(num_classes, dtype=torch.float64)
    wanted = math.sqrt(2 - 2 * math.sqrt((num_classes - 1) / num_classes))
    assert math.isclose(distance_to_etf(identity, identity, identity), wanted, rel_tol=1e-12)
    assert torch.allclose(torch.linalg.vector_norm(vectors, dim=1), torch.ones(num_classes, dtype=torch.float64))


def test_floor_of_the_squared_form() -> None:
    """100 classes in 64 columns: at least 1/F - 1/(C-1) = 0.00552, which a tight frame reaches."""
    frame = _tight_frame(100, 64).requires_grad_()
    value = p2p(frame, target="etf")
    assert round(value.item(), 5) == round(1 / 64 - 1 / 99, 5) == 0.00552
    assert math.isclose(value.item(), 1 / 64 - 1 / 99, rel_tol=1e-9)
    assert float(torch.autograd.grad(value, frame)[0].abs().max()) < 1e-12
    assert p2p(torch.randn(100, 64, dtype=torch.float64), target="etf").item() > value.item()


def test_the_floor_does_not_separate_and_the_softmax_form_does() -> None:
    """Six classes in two columns: a triangle used twice reaches the floor although classes coincide."""
    triangle = simplex(3, 2)
    doubled, hexagon = torch.cat((triangle, triangle)), _tight_frame(6, 2)
    floor = 1 / 2 - 1 / 5
    assert math.isclose(p2p(doubled, target="etf").item(), floor) and math.isclose(
        p2p(hexagon, target="etf").item(), floor
    )
    assert p2p(doubled).item() > p2p(hexagon).item() + 0.3
    # Its small-temperature limit is the largest cosine: 1 for the coincident pairs, cos 60° in the hexagon.
    assert math.isclose(p2p(doubled, temperature=1e-3).item(), 1, abs_tol=1e-3)
    assert math.isclose(p2p(hexagon, temperature=1e-3).item(), 0.5, abs_tol=1e-3)


def test_tight_frame_cosines() -> None:
    """RMS cosine sqrt((C-F)/(F(C-1))): 0.0754 for 100 classes in 64 columns, reached by a tight frame."""
    frame = _tight_frame(100, 64)
    measures = collapse(frame, torch.arange(100), frame)
    assert round(measures["tight_frame_floor"], 4) == 0.0754
    assert math.isclose(measures["tight_frame_floor"], math.sqrt(36 / (64 * 99)))
    assert math.isclose(measures["cosine_rms_means"], measures["tight_frame_floor"], rel_tol=1e-9)
    assert measures["cosine_max_means"] > measures["tight_frame_floor"]


def test_schedule() -> None:
    """η = 1 - (T/T_max)^γ: BBN's parabola, the line, and a late switch."""
    counts = [10, 1]
    assert [GBBN(counts, gamma=2).eta(t) for t in (0.0, 0.25, 0.5, 1.0)] == [1, 0.9375, 0.75, 0]
    assert [GBBN(counts, gamma=1).eta(t) for t in (0.0, 0.25, 0.5, 1.0)] == [1, 0.75, 0.5, 0]
    assert round(GBBN(counts, gamma=10).eta(0.9), 3) == 0.651
