"""The unconstrained-feature model against its closed forms."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.func import grad

from allnc.losses.longtail import CrossEntropy, LogitAdjusted
from allnc.losses.regression import MeanSquaredError
from allnc.ops.p2p import Target, p2p_reference
from allnc.theory.closed_form import (
    collapse_threshold,
    focal_convex_from,
    focal_window,
    margin,
    minimiser,
    origin_curvature,
    splitting_curvature,
    zero_modes,
)
from allnc.theory.imbalance import at_threshold, best_simplex, groups_of, regularised, seli_limit, with_root
from allnc.theory.landscape import descend, focal_bistability, least_curvature, merged, origin, simplex, spectrum
from allnc.theory.model import CONVEX, LossName, Problem
from allnc.theory.solve import certificate, geometry, minimise, own_probabilities

COLLAPSING: tuple[LossName, ...] = ("ce", "ls", "fl", "mse")


def balanced(loss: LossName, num_classes: int = 4, dim: int = 4, count: int = 2) -> Problem:
    """Penalties that differ, so that a formula that mixes them up fails."""
    return Problem(
        loss=loss,
        counts=(count,) * num_classes,
        dim=dim,
        lambda_w=0.04,
        lambda_h=0.01,
        lambda_b=0.0 if loss == "mse" else 0.01,
    )


def imbalanced(loss: LossName = "ce") -> Problem:
    return Problem(loss=loss, counts=(100, 100, 10, 10), dim=4, rows="classes", lambda_w=0.02, lambda_h=0.005)


def orthogonal_margins(problem: Problem) -> list[float]:
    """a_k of each class for CE with features h >= 0, without bias and d >= K, any counts.

    Class means are orthogonal and every class stands alone: its samples have the logits a_k (e_k - 1/K), with

        1 - p_k = N sqrt(λ_W λ_H / n_k) sqrt((K-1)/K),   p_k = e^a_k / (e^a_k + K - 1)

    and a_k = 0, a feature that vanishes, once the right side reaches 1 - 1/K.

    Source: Dang et al., Neural Collapse for Cross-entropy Class-Imbalanced Learning with Unconstrained ReLU Features
        Model, ICML 2024; the formula in this form: ours.
    """
    K, root = problem.num_classes, problem.root_of_penalties
    margins = []
    for count in problem.counts:
        miss = problem.num_samples * root * math.sqrt((K - 1) / (K * count))
        margins.append(math.log((K - 1) * (1 / miss - 1)) if miss < 1 - 1 / K else 0.0)
    return margins


@pytest.mark.parametrize("loss", COLLAPSING)
@pytest.mark.parametrize(("num_classes", "dim"), [(4, 3), (4, 4), (4, 8), (10, 9), (10, 10), (10, 20)])
def test_five_starts_reach_the_closed_form(loss: LossName, num_classes: int, dim: int) -> None:
    problem = balanced(loss, num_classes, dim, count=1 if num_classes == 10 else 2)
    known = minimiser(problem)
    found = minimise(problem, problem.random_starts(5), tolerance=1e-8)
    off_diagonal = ~torch.eye(num_classes, dtype=torch.bool)
    for x in found.x:
        shape = geometry(problem, x)
        assert (shape.weight_norms - known.weight_norm).abs().max() < 1e-6
        assert (shape.mean_norms - known.feature_norm).abs().max() < 1e-6
        assert (shape.weight_cosines[off_diagonal] - known.cosine).abs().max() < 1e-6
        assert (shape.mean_cosines[off_diagonal] - known.cosine).abs().max() < 1e-6
        assert shape.duality.min() > 1 - 1e-6
        assert shape.spread < 1e-6
    assert (found.value - known.value).abs().max() < 1e-12


def test_margins_of_a_hand_computed_case() -> None:
    """n = 4, λ_W = 1/100, λ_H = 1/400: c = 2/200 = 0.01; K = 4."""
    shared = Problem(loss="ce", counts=(4,) * 4, dim=3, lambda_w=0.01, lambda_h=0.0025, smoothing=0.1)
    assert margin(shared) == pytest.approx(math.log(97))
    assert margin(replace(shared, loss="ls")) == pytest.approx(math.log(1 / 0.035 - 3))
    assert margin(replace(shared, loss="mse", lambda_b=0.0)) == pytest.approx(0.96)
    assert minimiser(shared).weight_norm ** 2 == pytest.approx(math.log(97) * 0.75)  # λ_H n = λ_W: norms are equal
    assert margin(replace(shared, lambda_w=25.0)) == 0.0  # K c >= 1


@pytest.mark.parametrize("loss", COLLAPSING)
def test_the_origin_curves_as_predicted(loss: LossName) -> None:
    problem = balanced(loss, dim=5)
    x = origin(problem)
    assert grad(problem.value)(x).norm() < 1e-15
    assert least_curvature(problem, x)[0] == pytest.approx(origin_curvature(problem), abs=1e-8)
    assert origin_curvature(problem) < -1e-3


@pytest.mark.parametrize("loss", COLLAPSING)
@pytest.mark.parametrize("groups", [[0, 0, 1, 2], [0, 0, 1, 1]])
def test_merged_classes_are_strict_saddles(loss: LossName, groups: list[int]) -> None:
    problem = balanced(loss, dim=4)
    x = merged(problem, groups, starts=2)
    assert grad(problem.value)(x).norm() < 1e-8
    own = own_probabilities(problem, x)
    shared = [k for k in range(4) if groups.count(groups[k]) > 1]
    predicted = min(splitting_curvature(problem, 2, float(own[2 * k])) for k in shared)
    curvature, direction = least_curvature(problem, x)
    assert curvature == pytest.approx(predicted, abs=1e-8)
    assert curvature < -1e-3
    if loss in CONVEX:
        assert certificate(problem, x).ratio > 1.1
    assert float(descend(problem, x, direction).value.min()) == pytest.approx(minimiser(problem).value, abs=1e-10)


@pytest.mark.parametrize("loss", COLLAPSING)
@pytest.mark.parametrize("dim", [3, 6])
def test_the_minimum_has_the_rotations_zero_modes_and_no_others(loss: LossName, dim: int) -> None:
    problem = balanced(loss, dim=dim)
    found = minimise(problem, problem.random_starts(1))
    eigenvalues = spectrum(problem, found.x[0])
    assert eigenvalues[0] > -1e-9
    expected = {3: 3, 6: 12}[dim]  # 3 rotations in 3 dimensions; 15 - 3 in 6
    assert zero_modes(problem, 3) == expected
    assert int((eigenvalues < 1e-7).sum()) == expected
    assert eigenvalues[expected] > 1e-4
    assert certificate(problem, found.x[0]).ratio == pytest.approx(1, abs=1e-7)


def test_supcon_ends_in_a_simplex() -> None:
    problem = replace(balanced("ce"), loss="supcon", lambda_w=0.0, lambda_h=0.0, lambda_b=None)
    found = minimise(problem, problem.random_starts(2))
    assert (found.value - minimiser(problem).value).abs().max() < 1e-12
    cosines = geometry(problem, found.x[0]).mean_cosines
    assert (cosines[~torch.eye(4, dtype=torch.bool)] + 1 / 3).abs().max() < 1e-6
    eigenvalues = spectrum(problem, found.x[0])
    assert int((eigenvalues.abs() < 1e-8).sum()) == zero_modes(problem, 3) == 6 - 0 + 8


def test_the_losses_are_those_that_train() -> None:
    problem = replace(imbalanced("logit_adjusted"), counts=(5, 3, 2, 2))
    samples = replace(problem, rows="samples")
    z = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    of_samples = z[samples.labels]
    wanted = LogitAdjusted(problem.counts)(of_samples, samples.labels)
    assert float(problem.mean_loss(z, problem.coefficients())) == pytest.approx(float(wanted), rel=1e-6)
    plain = CrossEntropy(4, label_smoothing=0.05)(of_samples, samples.labels)
    ls = replace(problem, loss="ls")
    assert float(ls.mean_loss(z, ls.coefficients())) == pytest.approx(float(plain), rel=1e-12)
    squared = replace(samples, loss="mse")
    onehot = torch.eye(4, dtype=torch.float64)[samples.labels]
    half = 0.5 * (of_samples - onehot).square().sum(1).mean()
    assert float(squared.mean_loss(of_samples, squared.coefficients())) == pytest.approx(float(half), rel=1e-12)
    trained = MeanSquaredError(4)(15 * of_samples, samples.labels)
    assert float(trained) * 4 / 450 == pytest.approx(float(half), rel=1e-12)


@pytest.mark.parametrize("loss", ["ce", "logit_adjusted"])
def test_the_minority_collapses_exactly_at_the_threshold(loss: LossName) -> None:
    below, above = at_threshold(imbalanced(loss), (0.99, 1.01), starts=1)
    assert below.separation > 0.05
    assert above.separation < 1e-9
    for step in (below, above):
        assert step.certificate == pytest.approx(1, abs=1e-6)
    assert above.root == pytest.approx(1.01 * math.sqrt(10) / 220)


def test_features_that_cannot_be_negative_are_orthogonal() -> None:
    problem = replace(imbalanced(), relu=True, lambda_b=None)
    problem = with_root(problem, 0.5 * collapse_threshold(problem, 10))
    found = minimise(problem, problem.random_starts(8), tolerance=1e-7)
    x = found.x[found.value.argmin()]
    cosines = geometry(problem, x).mean_cosines
    assert cosines[~torch.eye(4, dtype=torch.bool)].abs().max() < 1e-4
    logits = problem.logits(problem.point(x))
    assert torch.allclose(
        logits.amax(1) - logits.amin(1), torch.tensor(orthogonal_margins(problem)).double(), atol=1e-4
    )


def test_only_the_rare_group_collapses() -> None:
    problem = Problem(loss="ce", counts=(50, 50, 5, 5), dim=4, rows="classes", lambda_b=None)
    groups, proof = groups_of(with_root(problem, math.sqrt(math.sqrt(250)) / 110), starts=1)
    assert [group.collapsed_predicted for group in groups] == [False, True]
    assert groups[0].within is not None and groups[0].within < 0.5
    assert groups[1].within == pytest.approx(1, abs=1e-9)
    assert proof == pytest.approx(1, abs=1e-6)


def test_vanishing_penalties_lead_to_seli() -> None:
    limit = seli_limit((100, 100, 10, 10), [1e-2, 1e-3, 1e-4, 1e-5])
    for closer, before in zip(limit[1:], limit[:-1], strict=True):
        assert closer.weights < before.weights
        assert closer.means < before.means
    growth = [step.growth for step in limit[1:]]
    assert all(value is not None for value in growth)
    assert growth == sorted(growth, reverse=True)  # type: ignore[type-var]
    assert growth[-1] < 0.02  # type: ignore[operator]


def test_focal_window_by_hand_and_by_starts() -> None:
    """At p = 1/K the curve is (29/30)³ (29/30 + 3 log(30)/30), and K c = K/(K-1) of it."""
    low, high = focal_window(30, 3.0)  # type: ignore[misc]
    assert low == pytest.approx(30 / 29 * (29 / 30) ** 3 * (29 / 30 + math.log(30) / 10))
    assert focal_window(17, 3.0) is None
    assert focal_window(18, 3.0) is not None
    (window,) = focal_bistability(30, 3.0, [(low + high) / 2], starts=3)
    assert window.separated[0] == 0 and window.separated[1] == 30
    assert window.probability == pytest.approx(window.probability_predicted, abs=1e-6)
    assert window.origin_curvature > 1e-5
    assert window.simplex_curvature is not None and window.simplex_curvature > -1e-8
    assert window.barrier_curvature is not None and window.barrier_curvature < -1e-5


def test_focal_loss_is_convex_from_its_probability_on() -> None:
    top = focal_convex_from(3.0)
    problem = replace(imbalanced(), loss="fl", rows="samples", counts=(1,) * 10)

    def curvature(p: float) -> float:
        z = torch.zeros(10, dtype=torch.float64)
        z[0] = math.log(9 * p / (1 - p))
        label = replace(problem, counts=(1,) * 10).coefficients()
        rows = torch.zeros(10, 10, dtype=torch.float64)

        def of_first(first: torch.Tensor) -> torch.Tensor:
            return problem.mean_loss(torch.cat([first[None], rows[1:]]), label)

        return float(torch.linalg.eigvalsh(torch.func.hessian(of_first)(z))[0])

    assert curvature(top * 1.02) > -1e-12
    assert curvature(top * 0.98) < -1e-6


def test_no_simplex_is_critical_under_imbalance() -> None:
    for problem in (imbalanced(), imbalanced("logit_adjusted")):
        scaled = with_root(problem, 0.3 * collapse_threshold(problem, 10))
        found = best_simplex(scaled)
        assert found.along < 1e-9
        assert found.gradient_norm > 1e-2
        assert best_simplex(replace(scaled, loss="ce", counts=(55,) * 4)).gradient_norm < 1e-8


@pytest.mark.parametrize("target", ["etf", "softmax"])
def test_p2p_has_no_gradient_at_a_simplex(target: Target) -> None:
    """Whatever the centres and lengths; what `best_simplex` rests on."""
    generator = torch.Generator().manual_seed(0)
    E = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=generator)).Q[:4]
    E = E - E.mean(0)
    x, y = 2 * E + torch.randn(6, dtype=torch.float64, generator=generator), 0.5 * E
    for gradient in (
        grad(lambda v: p2p_reference(v, target=target))(x),
        grad(lambda v: p2p_reference(v, y, target=target))(x),
        grad(lambda v: p2p_reference(x, v, target=target))(y),
    ):
        assert gradient.norm() < 1e-12
    assert grad(lambda v: p2p_reference(v, target=target))(x * torch.arange(6)).norm() > 1e-3


def test_p2p_brings_the_minimiser_nearer_to_the_simplex() -> None:
    problem = with_root(imbalanced(), 0.3 * math.sqrt(10) / 220)
    plain, weak, strong = (regularised(replace(problem, p2p=(w,) * 3), starts=2) for w in (0.0, 1.0, 10.0))
    separating = regularised(replace(problem, p2p=(1.0,) * 3, p2p_target="softmax"), starts=2)
    assert plain.weights_off > weak.weights_off > 4 * strong.weights_off > 1e-3
    assert weak.weights_off > 2 * separating.weights_off > 1e-3  # the nearer of both at the same weights
    for row in (plain, weak, strong, separating):
        assert row.curvature > -1e-8
        assert row.zeros == row.zeros_predicted == 6
        assert row.worst < 1e-10


def test_simplex_is_the_closed_form() -> None:
    problem = balanced("ls", dim=5)
    x = simplex(problem, margin(problem))
    assert grad(problem.value)(x).norm() < 1e-12
    assert float(problem.value(x)) == pytest.approx(minimiser(problem).value, abs=1e-12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": "hinge"}, "loss must be one of"),
        ({"p2p_target": "auto"}, "p2p_target must be one of"),
        ({"p2p_temperature": 0.0}, "p2p_temperature must be > 0"),
        ({"lambda_w": 0.0}, "lambda_w must be > 0"),
        ({"classifier": "normalised"}, "lambda_w must be 0 where only directions count"),
        ({"loss": "fl"}, "rows must be 'samples'"),
        ({"counts": (3,)}, "at least two classes"),
    ],
)
def test_what_a_problem_refuses(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(imbalanced(), **changes)  # type: ignore[arg-type]


def test_what_has_no_closed_form_says_so() -> None:
    with pytest.raises(ValueError, match="counts must be equal"):
        minimiser(imbalanced())
    with pytest.raises(ValueError, match="lambda_b must be 0"):
        minimiser(replace(balanced("mse"), lambda_b=0.1))
    with pytest.raises(ValueError, match="certificate needs"):
        certificate(replace(imbalanced(), p2p=(1.0, 0.0, 0.0)), torch.zeros(36, dtype=torch.float64))
