"""Effective rank, VCI, MIR, HDR and NC5: hand-computed cases, simplex, orthoplex, invariances."""

from __future__ import annotations

import doctest
import importlib
import math

import pytest
import torch

from allnc.metrics import CollapseAccumulator, collapse, effective_rank, ideal_mir, nc5
from tests.metrics.test_collapse import _clouds
from tests.ops.test_p2p import simplex


@pytest.mark.parametrize("module", ["spectrum", "ood", "layers", "drift"])
def test_docstring_examples(module: str) -> None:
    results = doctest.testmod(importlib.import_module(f"allnc.metrics.{module}"))
    assert results.attempted > 0 and results.failed == 0


def test_effective_rank_by_hand() -> None:
    """Singular values 3 and 1 have shares 3/4 and 1/4: exp(2 log 2 - (3/4) log 3) = 4 / 3^(3/4)."""
    assert math.isclose(effective_rank(torch.tensor([[3.0, 0.0], [0.0, -1.0], [0.0, 0.0]])), 4 / 3**0.75)
    assert math.isclose(effective_rank(simplex(7, 9)), 6)
    assert effective_rank(torch.zeros(3, 2)) == 0
    with pytest.raises(ValueError, match="matrix must be finite"):
        effective_rank(torch.tensor([[math.nan]]))


def test_by_hand() -> None:
    """Classes at (4, 0) and (-4, 0), each of two samples 1 aside: the first along x, the second along y."""
    features = torch.tensor([[5.0, 0.0], [3.0, 0.0], [-4.0, 1.0], [-4.0, -1.0]])
    labels = torch.tensor([0, 0, 1, 1])
    measures = collapse(features, labels, torch.tensor([[2.0, 0.0], [0.0, 1.0]]), spectral=True)
    # Σ_W = diag(1/2, 1/2), Σ_B = diag(16, 0): tr(Σ_T⁺ Σ_B) = 16 / 16.5, rank 1.
    assert math.isclose(measures["vci"], 1 - 16 / 16.5)
    assert math.isclose(measures["effective_rank_within"], 2)
    assert math.isclose(measures["effective_rank_between"], 1)
    assert math.isclose(measures["effective_rank_weights"], 3 / 2 ** (2 / 3))  # shares 2/3 and 1/3
    # Four classes at (2, 0), (0, 1), (-2, 0), (0, -1): Σ_B = diag(2, 1/2), shares 4/5 and 1/5.
    cross = torch.tensor([[2.0, 0.0], [0.0, 1.0], [-2.0, 0.0], [0.0, -1.0]])
    wide = collapse(cross, torch.arange(4), cross, spectral=True)
    assert math.isclose(wide["effective_rank_between"], 5 / 4**0.8)
    assert "mir" not in measures  # two centred means are opposite: their Gram matrix has no entropy


def test_mutual_information_by_hand() -> None:
    """Means at 120 degrees have Gram eigenvalues 3/2, 3/2, 0; the weights of identity rows 1, 1, 1."""
    triangle = torch.tensor([[1.0, 0.0], [-0.5, math.sqrt(3) / 2], [-0.5, -math.sqrt(3) / 2]]).double()
    means = torch.cat((triangle, torch.zeros(3, 1)), 1)
    measures = collapse(means, torch.arange(3), torch.eye(3), spectral=True)
    # G_W ⊙ G_M = I: entropies log 3, log 2 and log 3.
    assert math.isclose(measures["mir"], (math.log(3) + math.log(2) - math.log(3)) / math.log(2))
    assert math.isclose(measures["hdr"], (math.log(3) - math.log(2)) / math.log(3))
    # With itself: G ⊙ G has eigenvalues 3/2, 3/4, 3/4, shares 1/2, 1/4, 1/4 and entropy (3/2) log 2.
    own = collapse(means, torch.arange(3), means, spectral=True)
    assert math.isclose(own["mir"], (2 - 1.5) * math.log(2) / math.log(2)) and own["hdr"] < 1e-12
    assert math.isclose(ideal_mir(3), 0.5)


@pytest.mark.parametrize("num_classes", [3, 10, 31])
def test_collapsed_network_has_the_ideal_values(num_classes: int) -> None:
    etf = simplex(num_classes, num_classes + 5)
    labels = torch.arange(num_classes).repeat(2)
    measures = collapse(2 * etf[labels] + 100, labels, etf, spectral=True)
    assert measures["vci"] < 1e-12 and measures["hdr"] < 1e-12
    assert math.isclose(measures["mir"], ideal_mir(num_classes), rel_tol=1e-9)
    assert math.isclose(measures["effective_rank_between"], num_classes - 1)
    assert math.isclose(measures["effective_rank_weights"], num_classes - 1)
    with pytest.raises(ValueError, match="must be >= 3"):
        ideal_mir(2)


def test_vci_against_its_definition_and_its_invariance() -> None:
    features, labels, weight = _clouds()
    got = collapse(features, labels, weight, spectral=True)["vci"]
    rows = [features[labels == c] for c in range(5)]
    M = torch.stack([r.mean(0) for r in rows])
    within = torch.stack([(r - r.mean(0)).T @ (r - r.mean(0)) / len(r) for r in rows]).mean(0)
    M = M - M.mean(0)
    between = M.T @ M / 5
    wanted = 1 - torch.trace(torch.linalg.pinv(within + between, rtol=1e-12) @ between) / 4
    assert 0.01 < got < 0.9 and math.isclose(got, float(wanted), rel_tol=1e-9)
    mapped = features @ torch.randn(7, 7, dtype=torch.float64) + 3
    assert math.isclose(collapse(mapped, labels, weight, spectral=True)["vci"], got, rel_tol=1e-7)
    same = collapse(torch.tensor([[1.0], [-1.0], [1.0], [-1.0]]), torch.tensor([0, 0, 1, 1]), torch.eye(2)[:, :1] + 1)
    assert "vci" not in same
    wide = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]])
    assert collapse(wide, torch.tensor([0, 0, 1, 1]), torch.ones(2, 1), spectral=True)["vci"] == 1


def test_orthoplex_and_tight_frames() -> None:
    """Six directions of three axes, and five of a plane: both tight, so that the RMS cosine is at its floor."""
    orthoplex = torch.cat((torch.eye(3), -torch.eye(3))).double()
    turns = 2 * math.pi * torch.arange(5).double() / 5
    pentagon = torch.stack((turns.cos(), turns.sin()), 1)
    for frame, largest, floor in (
        (orthoplex, 0.0, math.sqrt(1 / 5)),
        (pentagon, math.cos(2 * math.pi / 5), math.sqrt(3 / 8)),
    ):
        measures = collapse(7 * frame, torch.arange(len(frame)), frame)
        for of in ("means", "weights"):
            assert math.isclose(measures[f"cosine_max_{of}"], largest, abs_tol=1e-7)
            assert math.isclose(measures[f"cosine_rms_{of}"], floor, rel_tol=1e-6)
        assert math.isclose(measures["tight_frame_floor"], floor)
    energy = collapse(orthoplex, torch.arange(6), orthoplex)["energy_weights"]
    assert math.isclose(energy, (4 / math.sqrt(2) + 1 / 2) / 5)  # of each: four at sqrt 2, one at 2


def test_nc5_by_hand() -> None:
    """Means (1, 0, 0) and (-1, 1, 0); of no class are (3, 0, 4) and (-3, 0, 4), whose mean is orthogonal to both."""
    means = torch.tensor([[1.0, 0.0, 0.0], [-1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])  # class 2 is absent
    outside = torch.tensor([[3.0, 0.0, 4.0], [-3.0, 0.0, 4.0]])
    assert nc5(means, outside) == {"nc5": 0.0, "nc5_vectors": pytest.approx((0.6 + 0.6 / math.sqrt(2)) / 2)}
    assert nc5(means, outside[:1])["nc5"] == pytest.approx((0.6 + 0.6 / math.sqrt(2)) / 2)
    with pytest.raises(ValueError, match="at least one image"):
        nc5(means, outside[:0])


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_streams_are_two_passes(offset: float) -> None:
    """Batches of float32 rows with an offset, a class of one sample among them, three accumulators merged."""
    features, labels, weight = _clouds(num_classes=6)
    labels[labels == 5] = 4
    labels[17] = 5
    shifted = (features + offset).float()
    parts = [CollapseAccumulator(6, 7) for _ in range(3)]
    for index, rows in enumerate(torch.randperm(300).split(29)):
        parts[index % 3].update(shifted[rows], labels[rows])
    for other in parts[1:]:
        parts[0].merge_state(other.state())
    got = parts[0].compute(weight, spectral=True)
    exact = shifted.double()
    means = torch.stack([exact[labels == c].mean(0) for c in range(6)])
    assert torch.allclose(parts[0].means, means, rtol=1e-12)
    centred = exact - means[labels]
    shares = torch.bincount(labels).double().reciprocal()[labels] / 6
    covariance = (centred * shares[:, None]).T @ centred
    assert torch.allclose(parts[0].within_covariance(), covariance, rtol=1e-10, atol=1e-10 * float(covariance.max()))
    whole = collapse(exact - offset, labels, weight, spectral=True)
    for name, value in got.items():
        assert math.isclose(value, whole[name], rel_tol=1e-10, abs_tol=1e-12), name
