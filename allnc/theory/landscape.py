"""Critical points of the unconstrained-feature model: which are there, how they curve, and what lies below them.

Legend: K classes, n samples of each, R rows of features, d columns, P variables, G groups of classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor
from torch.func import grad, vjp, vmap

from allnc._checks import check_integer
from allnc.theory.closed_form import (
    focal_convex_from,
    focal_family,
    focal_window,
    minimiser,
    origin_curvature,
    splitting_curvature,
    zero_modes,
)
from allnc.theory.model import Problem
from allnc.theory.solve import Solution, certificate, geometry, minimise, minimise_function, own_probabilities

ZERO = 1e-8  # an eigenvalue is zero below this share of the largest
_PUSH = 1e-3  # length of the step off a saddle
_CHUNK = 256  # columns of the Hessian formed together


def hessian_product(problem: Problem, x: Tensor) -> Callable[[Tensor], Tensor]:
    """The Hessian of f at x [P] as a function that multiplies [P] by it: backward through the gradient's own graph."""
    product = vjp(grad(problem.value), x)[1]  # of the transpose, which is the same
    return lambda v: product(v)[0]


def least_curvature(problem: Problem, x: Tensor) -> tuple[float, Tensor]:
    """The smallest eigenvalue of the Hessian at x [P] and its unit eigenvector [P], from Hessian-vector products."""
    times = hessian_product(problem, x)
    size = len(x)

    def shifted(v: np.ndarray) -> np.ndarray:
        v = v.reshape(-1)
        return times(torch.from_numpy(v.copy())).numpy() - v

    # The tolerance is relative to the eigenvalue, which may be zero: shifted by one, it is absolute.
    operator = LinearOperator((size, size), matvec=shifted, dtype=np.float64)  # pyright: ignore[reportCallIssue]
    start = np.random.default_rng(0).standard_normal(size)  # eigsh's own would differ from call to call
    options: dict[str, Any] = {"v0": start, "ncv": min(size, 40), "tol": 1e-12}
    values, vectors = eigsh(operator, k=1, which="SA", **options)
    return float(values[0]) + 1, torch.from_numpy(vectors[:, 0].copy())


def spectrum(problem: Problem, x: Tensor) -> Tensor:
    """All eigenvalues of the Hessian at x [P], ascending [P]; for some thousand variables at most."""
    columns = vmap(hessian_product(problem, x))
    identity = torch.eye(len(x), dtype=x.dtype)
    hessian = torch.cat([columns(part) for part in identity.split(_CHUNK)])
    return torch.linalg.eigvalsh((hessian + hessian.T) / 2)


def origin(problem: Problem) -> Tensor:
    """The critical point W = H = 0 [P], with the best bias.

    Raises:
        ValueError: only directions count, or the best bias is not known (counts that differ).
    """
    if problem.spherical:
        raise ValueError("there is no origin where only directions count")
    _ = problem.per_class
    x = torch.zeros(sum(problem.sizes), dtype=torch.float64)
    if problem.loss == "mse" and problem.lambda_b is not None:
        x[-problem.num_classes :] = 1 / problem.num_classes / (1 + problem.lambda_b)
    return x


def merged(problem: Problem, groups: Sequence[int], *, starts: int = 5, seed: int = 0) -> Tensor:
    """The critical point [P] that treats the classes of a group as one: the minimiser among all such points.

    Points with equal vectors, features and biases within each group are those that permutations of its classes leave
    unchanged, so that the gradient of f there has no part that leads away: what is stationary among them is stationary.

    Args:
        problem: with equal counts within a group.
        groups: [K] the group of each class, numbered from 0.
        starts: of the search, of which the best is taken.
        seed: of the starts.

    Raises:
        ValueError: groups of the wrong length, or of classes whose counts differ.
    """
    K = problem.num_classes
    if len(groups) != K:
        raise ValueError(f"groups must have a number for each of {K} classes; got {len(groups)}")
    group = torch.tensor(groups)
    for number in set(groups):
        if len({count for count, of in zip(problem.counts, groups, strict=True) if of == number}) > 1:
            raise ValueError(f"counts must be equal within a group; got {problem.counts} in groups {list(groups)}")
    num_groups = max(groups) + 1
    of_w, _, of_b = problem.sizes
    small = num_groups * problem.dim

    def expand(y: Tensor) -> Tensor:
        W, H, b = y.split([small if of_w else 0, small, num_groups if of_b else 0])
        rows = H.view(num_groups, -1)[group[problem.labels]]
        whole = W.view(-1, problem.dim)[group].flatten() if of_w else W
        return torch.cat([whole, rows.flatten(), b[group] if of_b else b])

    size = (small if of_w else 0) + small + (num_groups if of_b else 0)
    begin = torch.randn(starts, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    found = minimise_function(lambda y: problem.value(expand(y)), begin)
    return expand(found.x[found.value.argmin()])


def descend(problem: Problem, x: Tensor, direction: Tensor) -> Solution:
    """Follow a direction [P] of negative curvature from x [P] downhill, to both sides."""
    return minimise(problem, torch.stack([x + _PUSH * direction, x - _PUSH * direction]))


@dataclass(frozen=True)
class CriticalPoint:
    """A critical point as predicted and as found; None where nothing is predicted or asked."""

    loss: str
    kind: str  # "minimum", "origin" or "merged ..."
    value: float
    gradient_norm: float
    value_predicted: float | None
    curvature: float  # smallest eigenvalue of the Hessian
    curvature_predicted: float | None
    zeros: int | None  # zero eigenvalues
    zeros_predicted: int | None
    certificate: float | None  # ‖∂L/∂Z‖ / sqrt(λ_W λ_H)
    below: float | None  # value that is reached along the negative curvature, minus the minimum
    eigenvalues: list[float]


@dataclass(frozen=True)
class Minimum:
    """The lowest point from random starts beside the closed form; of SupCon only the cosine and the value count."""

    loss: str
    starts: int
    reached: int  # starts that ended at the closed form's value
    value_error: float  # of the best
    weight_norm_error: float | None
    feature_norm_error: float
    cosine_error: float  # largest, of the cosines of class means and of classifier vectors
    duality: float | None  # least cosine of classifier vector and class mean
    spread: float  # largest distance of a feature to its class mean


def survey(problem: Problem, *, starts: int, seed: int = 0) -> tuple[Minimum, list[CriticalPoint]]:
    """Minimise from random starts, look at the saddles, and compare everything with the closed forms.

    Args:
        problem: with equal counts, of which `minimiser` knows the closed form.
        starts: number of random starts.
        seed: of the starts.
    """
    check_integer("starts", starts, minimum=1)
    known = minimiser(problem)
    found = minimise(problem, problem.random_starts(starts, seed=seed))
    best = found.x[found.value.argmin()]
    shape = geometry(problem, best)
    K = problem.num_classes
    pairs = ~torch.eye(K, dtype=torch.bool)
    cosines = torch.cat([shape.weight_cosines[pairs], shape.mean_cosines[pairs]])
    has_weights = problem.loss != "supcon"
    minimum = Minimum(
        loss=problem.loss,
        starts=starts,
        reached=int(((found.value - known.value).abs() < 1e-9).sum()),
        value_error=abs(float(found.value.min()) - known.value),
        weight_norm_error=float((shape.weight_norms - known.weight_norm).abs().max()) if has_weights else None,
        feature_norm_error=float((shape.mean_norms - known.feature_norm).abs().max()),
        cosine_error=float((cosines - known.cosine).abs().max()),
        duality=float(shape.duality.min()) if has_weights else None,
        spread=shape.spread,
    )
    modes = zero_modes(problem, K - 1)
    points = [_critical(problem, "minimum", best, known.value, value=known.value, curvature=0.0, zeros=modes)]
    if has_weights:
        at_origin = origin(problem)
        points.append(_critical(problem, "origin", at_origin, known.value, curvature=origin_curvature(problem)))
    two = [0, 0, *range(1, K - 1)]
    halves = [k * 2 // K for k in range(K)]
    kinds = {"two classes merged": two, "merged into halves": halves} if K > 3 else {"two classes merged": two}
    for kind, groups in kinds.items():
        x = merged(problem, groups, seed=seed)
        predicted = _merged_curvature(problem, x, groups) if has_weights else None
        points.append(_critical(problem, kind, x, known.value, curvature=predicted))
    return minimum, points


def _merged_curvature(problem: Problem, x: Tensor, groups: Sequence[int]) -> float:
    own = own_probabilities(problem, x)
    first_row = {int(k): row for row, k in reversed(list(enumerate(problem.labels.tolist())))}
    shared = [k for k in range(problem.num_classes) if list(groups).count(groups[k]) > 1]
    return min(splitting_curvature(problem, problem.counts[k], float(own[first_row[k]])) for k in shared)


def _critical(
    problem: Problem,
    kind: str,
    x: Tensor,
    minimum: float,
    *,
    value: float | None = None,
    curvature: float | None,
    zeros: int | None = None,
) -> CriticalPoint:
    eigenvalues = spectrum(problem, x)
    least, direction = least_curvature(problem, x)
    zero = ZERO * float(eigenvalues.abs().max())
    below = None
    if least < -zero:
        below = float(descend(problem, x, direction).value.min()) - minimum
    try:
        proof = certificate(problem, x).ratio
    except ValueError:  # no proof for SupCon, nor for FL outside its convex region
        proof = None
    return CriticalPoint(
        loss=problem.loss,
        kind=kind,
        value=float(problem.value(x)),
        gradient_norm=float(grad(problem.value)(x).norm()),
        value_predicted=value,
        curvature=least,
        curvature_predicted=curvature,
        zeros=int((eigenvalues.abs() <= zero).sum()),
        zeros_predicted=zeros,
        certificate=proof,
        below=below,
        eigenvalues=eigenvalues.tolist(),
    )


class Window(NamedTuple):
    """Where starts of FL end at one K c: how many classes have p >= p* there, and how the points curve."""

    kc: float
    separated: list[int]  # classes at the end of each start: 0 at the origin, K at the simplex
    probability: float | None  # of the own class at the simplex found
    probability_predicted: float | None
    origin_curvature: float
    simplex_curvature: float | None  # None where not there or outside the window
    partial_curvature: float | None  # at an end where only some classes are separated
    barrier_curvature: float | None  # at the simplex family's other stationary point
    value_difference: float | None  # simplex minus origin


def focal_bistability(
    num_classes: int, gamma: float, kc: Sequence[float], *, starts: int = 9, seed: int = 0
) -> list[Window]:
    """Search FL's local minima at each K c, one sample a class, d = K; curvatures inside the window only.

    Args:
        num_classes: K with a `focal_window`.
        gamma: γ > 0.
        kc: values of K sqrt(λ_W λ_H).
        starts: of each K c: a third near the origin, a third near the simplex, a third in between.
        seed: of the starts.

    Raises:
        ValueError: there is no window.
    """
    bounds = focal_window(num_classes, gamma)
    if bounds is None:
        raise ValueError(f"num_classes must be larger for a window at gamma {gamma}; got {num_classes}")
    results = []
    for ratio in kc:
        c = ratio / num_classes
        problem = Problem(
            loss="fl", counts=(1,) * num_classes, dim=num_classes, lambda_w=c, lambda_h=c, lambda_b=1e-2, gamma=gamma
        )
        third = -(-starts // 3)
        noise = [problem.random_starts(third, seed=seed + k, size=size) for k, size in enumerate((0.05, 0.02, 0.3))]
        far = simplex(problem, 4.0)
        found = minimise(problem, torch.cat([noise[0], far + noise[1], far + noise[2]])[:starts], tolerance=1e-9)
        results.append(_window(problem, ratio, bounds[0] < ratio < bounds[1], found))
    return results


def _window(problem: Problem, ratio: float, inside: bool, found: Solution) -> Window:
    K = problem.num_classes
    at_zero = origin(problem)
    own = torch.stack([own_probabilities(problem, x) for x in found.x])  # [B, K]
    separated = (own >= focal_convex_from(problem.gamma)).sum(1).tolist()
    at = separated.index(K) if K in separated else None
    partial = next((k for k, number in enumerate(separated) if 0 < number < K), None)
    family = focal_family(K, problem.gamma, ratio / K)
    barrier = simplex(problem, family[0]) if len(family) == 2 else None
    return Window(
        kc=ratio,
        separated=separated,
        probability=None if at is None else float(own[at].min()),
        probability_predicted=1 / (1 + (K - 1) * math.exp(-family[-1])) if family else None,
        origin_curvature=least_curvature(problem, at_zero)[0],
        simplex_curvature=least_curvature(problem, found.x[at])[0] if at is not None and inside else None,
        partial_curvature=least_curvature(problem, found.x[partial])[0] if partial is not None and inside else None,
        barrier_curvature=None if barrier is None else least_curvature(problem, barrier)[0],
        value_difference=None if at is None else float(found.value[at] - problem.value(at_zero)),
    )


def simplex(problem: Problem, a: float) -> Tensor:
    """The variables [P] of the balanced simplex W H̄ᵀ = a (I - J/K) in the first K of d >= K columns, b = 0."""
    K, n = problem.num_classes, problem.per_class
    identity = torch.eye(K, dtype=torch.float64) - 1 / K  # its own square root
    frame = torch.nn.functional.pad(identity, (0, problem.dim - K))
    balance = (problem.lambda_h * n / problem.lambda_w) ** 0.25
    return problem.variables(math.sqrt(a) * balance * frame, (math.sqrt(a) / balance * frame)[problem.labels])


def landscape_problems(num_classes: int, count: int, dim: int) -> list[Problem]:
    """One problem for each loss, with the penalties that `python -m allnc.theory landscape` uses."""
    shared = Problem(
        loss="ce", counts=(count,) * num_classes, dim=dim, lambda_w=0.02, lambda_h=0.02 / count, lambda_b=0.01
    )
    return [
        shared,
        replace(shared, loss="ls"),
        replace(shared, loss="fl"),
        replace(shared, loss="mse", lambda_b=0.0),
        replace(shared, loss="supcon", lambda_w=0.0, lambda_h=0.0, lambda_b=None),
    ]
