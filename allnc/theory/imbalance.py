"""What class imbalance does to the minimiser: minority collapse, SELI, groups of classes, P2P and logit adjustment.

Legend: K classes, n_k samples of class k, N in all, d columns, P variables; a group has classes of equal counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad

from allnc._checks import check_integer
from allnc.theory.closed_form import collapse_threshold, seli, zero_modes
from allnc.theory.landscape import ZERO, spectrum
from allnc.theory.model import Problem
from allnc.theory.solve import Geometry, certificate, geometry, minimise, minimise_function

_VANISHED = 1e-4  # length below which a vector has no direction, after a minimisation to a gradient of 1e-7


class Step(NamedTuple):
    """Minority classes just below and just above their threshold."""

    counts: tuple[int, ...]
    loss: str
    factor: float  # of the threshold
    root: float  # sqrt(λ_W λ_H)
    separation: float  # largest 1 - cos of two classifier vectors of the smallest group
    feature_norm: float  # largest of the smallest group
    certificate: float | None  # <= 1 proves the global minimum; None with relu


def at_threshold(problem: Problem, factors: Sequence[float], *, starts: int = 3, seed: int = 0) -> list[Step]:
    """Minimise with penalties around the threshold at which the smallest classes collapse.

    Args:
        problem: with at least two classes of the smallest count; its penalties keep their ratio.
        factors: of the predicted threshold.
        starts: of each minimisation, of which the lowest counts.
        seed: of the starts.
    """
    least = min(problem.counts)
    small = [k for k, count in enumerate(problem.counts) if count == least]
    if len(small) < 2:
        raise ValueError(f"counts must have two classes of the smallest count; got {problem.counts}")
    steps = []
    for factor in factors:
        root = factor * collapse_threshold(problem, least)
        scaled = with_root(problem, root)
        begin = scaled.random_starts(starts, seed=seed)
        found = minimise(scaled, begin, tolerance=1e-7 if problem.relu else 1e-10)
        x = found.x[found.value.argmin()]
        shape = geometry(scaled, x)
        separation = 1 - float(shape.weight_cosines[small][:, small].min())
        proof = None if problem.relu else certificate(scaled, x).ratio
        longest = float(shape.mean_norms[small].max())
        steps.append(Step(problem.counts, problem.loss, factor, root, separation, longest, proof))
    return steps


def with_root(problem: Problem, root: float) -> Problem:
    """The problem with both penalties scaled so that sqrt(λ_W λ_H) is `root`."""
    scale = root / problem.root_of_penalties
    return replace(problem, lambda_w=scale * problem.lambda_w, lambda_h=scale * problem.lambda_h)


def phase_diagram(
    problem: Problem, ratios: Sequence[int], roots: Sequence[float], *, starts: int = 2, seed: int = 0
) -> Tensor:
    """Cosine of two minority classifier vectors over imbalance and penalty, K/2 classes of each kind.

    Args:
        problem: its loss, form and P2P; counts and penalties are replaced. rows must be "classes".
        ratios: R, samples of a majority class; a minority class has one.
        roots: sqrt(λ_W λ_H).
        starts: of each cell, of which the lowest counts.
        seed: of the starts.

    Returns:
        [len(roots), len(ratios)], NaN where the minority's vectors have vanished.
    """
    K = problem.num_classes
    cells = [
        replace(problem, counts=(ratio,) * (K // 2) + (1,) * (K - K // 2), lambda_w=root, lambda_h=root)
        for root in roots
        for ratio in ratios
    ]
    begin = problem.random_starts(starts, seed=seed).repeat(len(cells), 1)  # [cells · starts, P]
    all_cells = [cell for cell in cells for _ in range(starts)]
    found = minimise(all_cells, begin, tolerance=1e-7, max_iterations=1500)
    best = found.value.view(len(cells), starts).argmin(1)
    cosines = []
    for number, cell in enumerate(cells):
        W, _, _ = cell.point(found.x[number * starts + int(best[number])])
        first, second = W[-1], W[-2]
        long = first.norm() > _VANISHED and second.norm() > _VANISHED
        cosines.append(float(F.cosine_similarity(first, second, dim=0)) if long else math.nan)
    return torch.tensor(cosines).view(len(roots), len(ratios))


class Limit(NamedTuple):
    """How far the minimiser is from SELI at one penalty."""

    root: float
    weights: float  # distance of the normalised Gram matrix of W to SELI's
    means: float  # the same of the class means
    growth: float | None  # the same of dZ / d log(1/root), by the difference to the penalty before


def seli_limit(counts: Sequence[int], roots: Sequence[float], *, seed: int = 0) -> list[Limit]:
    """CE without bias as the penalties vanish, beside SELI, which is Z = onehot - 1/K up to a factor.

    Z grows as log(1/λ) (onehot - 1/K) plus a constant: its own distance falls as 1/log(1/λ), that of its growth much
    faster, so that the limit is seen at penalties that float64 can resolve.

    Args:
        counts: n_k.
        roots: falling values of sqrt(λ_W λ_H).
        seed: of the starts.
    """
    K = len(counts)
    of_w, of_h = seli(counts)
    target = torch.eye(K, dtype=torch.float64) - 1 / K
    problem = Problem(loss="ce", counts=tuple(counts), dim=K, rows="classes", lambda_b=None)
    x, before, results = problem.random_starts(1, seed=seed), None, []
    for root in roots:
        scaled = with_root(problem, root)
        # From the minimiser of the penalty before; near rounding, steps cannot bring the gradient further down.
        x = minimise(scaled, x, tolerance=1e-5 * root, max_iterations=300).x
        W, H, _ = scaled.point(x[0])
        Z = H @ W.T
        growth = None
        if before is not None:
            growth = _distance(Z - before, target)
        results.append(Limit(root, _distance(W @ W.T, of_w), _distance(H @ H.T, of_h), growth))
        before = Z
    return results


def _distance(matrix: Tensor, target: Tensor) -> float:
    return float((matrix / matrix.norm() - target / target.norm()).norm())


class Group(NamedTuple):
    """Classes of equal counts at a minimiser."""

    count: int
    classes: int
    collapsed_predicted: bool
    weight_norm: float
    feature_norm: float
    within: float | None  # cosine of two classifier vectors of the group; None for one class
    with_largest: float | None  # cosine of a vector of the group and one of the largest group
    duality: float  # cosine of classifier vector and class mean


def groups_of(problem: Problem, *, starts: int = 3, seed: int = 0) -> tuple[list[Group], float]:
    """The minimiser by groups of equal counts, and its certificate."""
    found = minimise(problem, problem.random_starts(starts, seed=seed))
    x = found.x[found.value.argmin()]
    shape = geometry(problem, x)
    return [_group(problem, shape, count) for count in sorted(set(problem.counts), reverse=True)], certificate(
        problem, x
    ).ratio


def _group(problem: Problem, shape: Geometry, count: int) -> Group:
    members = [k for k, n in enumerate(problem.counts) if n == count]
    largest = problem.counts.index(max(problem.counts))
    pairs = list(combinations(members, 2))
    return Group(
        count=count,
        classes=len(members),
        collapsed_predicted=problem.root_of_penalties >= collapse_threshold(problem, count),
        weight_norm=float(shape.weight_norms[members].mean()),
        feature_norm=float(shape.mean_norms[members].mean()),
        within=sum(float(shape.weight_cosines[i, j]) for i, j in pairs) / len(pairs) if pairs else None,
        with_largest=None if largest in members else float(shape.weight_cosines[members[0], largest]),
        duality=float(shape.duality[members].mean()),
    )


@dataclass(frozen=True)
class Regularised:
    """The lowest point found with P2P, and how far it is from the simplex."""

    loss: str
    classifier: str
    p2p: tuple[float, float, float]
    p2p_target: str
    value: float
    gradient_norm: float
    means_off: float  # largest abs(cos + 1/(K-1)) of two centred class means
    weights_off: float  # the same of centred classifier vectors
    duality_off: float  # largest 1 - cos of a class's two centred vectors
    minority: float  # cosine of two classifier vectors of the smallest classes, not centred
    curvature: float  # smallest eigenvalue of the Hessian
    zeros: int
    zeros_predicted: int
    starts: int
    reached: int  # starts that ended at this value
    worst: float  # value of the worst end, minus this value


def regularised(problem: Problem, *, starts: int, seed: int = 0) -> Regularised:
    """The minimiser with P2P by many starts, and its Hessian.

    Args:
        problem: with rows="classes"; P2P's weights may be zeros.
        starts: number of random starts.
        seed: of the starts.
    """
    check_integer("starts", starts, minimum=1)
    # Where only directions count the gradient shrinks with the rows' length: every row begins at length one.
    begin = problem.random_starts(starts, seed=seed)
    if problem.spherical:
        begin = F.normalize(begin.view(starts, -1, problem.dim), dim=2).flatten(1)
    # Rows of free length leave the last digits of the gradient to rounding, where each step is tried many times.
    found = minimise(problem, begin, tolerance=1e-8 if problem.spherical else 1e-10)
    at = int(found.value.argmin())
    x = found.x[at]
    if problem.spherical:
        x = F.normalize(x.view(-1, problem.dim), dim=1).flatten()
    shape = geometry(problem, x)
    W, H, _ = problem.point(x)
    A, B = _centred_unit(H), _centred_unit(W)
    K = problem.num_classes
    pairs = ~torch.eye(K, dtype=torch.bool)
    eigenvalues = spectrum(problem, x)
    singular = torch.linalg.svdvals(torch.cat([W, H]))
    ends = found.value - found.value[at]
    smallest = sorted(range(K), key=lambda k: problem.counts[k])[:2]
    return Regularised(
        loss=problem.loss,
        classifier=problem.classifier,
        p2p=problem.p2p,
        p2p_target=problem.p2p_target,
        value=float(found.value[at]),
        gradient_norm=float(found.gradient_norm[at]),
        means_off=float(((A @ A.T)[pairs] + 1 / (K - 1)).abs().max()),
        weights_off=float(((B @ B.T)[pairs] + 1 / (K - 1)).abs().max()),
        duality_off=float(1 - (A * B).sum(1).min()),
        minority=float(shape.weight_cosines[smallest[0], smallest[1]]),
        curvature=float(eigenvalues[0]),
        zeros=int((eigenvalues.abs() <= ZERO * eigenvalues.abs().max()).sum()),
        zeros_predicted=zero_modes(problem, int((singular > 1e-6 * singular[0]).sum())),
        starts=starts,
        reached=int((ends < 1e-8).sum()),
        worst=float(ends.max()),
    )


def _centred_unit(x: Tensor) -> Tensor:
    return F.normalize(x - x.mean(0), dim=1)


class BestSimplex(NamedTuple):
    """The best of all points at which P2P is zero, for the objective without P2P."""

    value: float
    gradient_norm: float  # of that objective in all variables; no simplex is its critical point if this is not 0
    along: float  # the part of the gradient along the family, 0 up to the solver's tolerance
    margin: float  # logit of the own class above the mean of the others, mean over classes


def best_simplex(problem: Problem, *, seed: int = 0) -> BestSimplex:
    """Minimise the objective without P2P over all simplices, and look whether it would stay there.

    P2P has no gradient at a simplex, in either of its forms. So a simplex is a critical point of the objective
    with P2P, at whichever weights, exactly if it is one of the objective without. The simplices are W = 1 mᵀ + r E,
    H = 1 m'ᵀ + r' E with a simplex ETF E; of unit vectors, m and m' are orthogonal to it.

    Args:
        problem: with rows="classes" and d >= K; its P2P weights are not read.
        seed: of the starts.
    """
    plain = replace(problem, p2p=(0.0, 0.0, 0.0))
    K, d = plain.num_classes, plain.dim
    if d < K:
        raise ValueError(f"dim must be >= K = {K}; got {d}")
    E = F.normalize(torch.eye(K, dtype=torch.float64) - 1 / K, dim=1)
    E = F.pad(E, (0, d - K))  # [K, d]
    normal = F.pad(torch.ones(K, dtype=torch.float64), (0, d - K))  # orthogonal to all of E
    of_b = plain.sizes[2]

    def place(y: Tensor) -> Tensor:
        if plain.spherical:
            W, H = E + y[0] * normal, E + y[1] * normal
            return plain.variables(F.normalize(W, dim=1), F.normalize(H, dim=1))
        r, m, own_m, b = y.split([2, d, d, of_b])
        return plain.variables(m + r[0] * E, own_m + r[1] * E, b)

    size = 2 if plain.spherical else 2 + 2 * d + of_b
    generator = torch.Generator().manual_seed(seed)
    begin = 0.1 * torch.randn(4, size, dtype=torch.float64, generator=generator)
    begin[:, :2] += 0.0 if plain.spherical else 1.0
    found = minimise_function(lambda y: plain.value(place(y)), begin)
    at = int(found.value.argmin())
    x = place(found.x[at])
    logits = plain.logits(plain.point(x))
    own = logits.diagonal()
    margin = float((own - (logits.sum(1) - own) / (K - 1)).mean())
    gradient = float(grad(plain.value)(x).norm())
    return BestSimplex(float(found.value[at]), gradient, float(found.gradient_norm[at]), margin)
