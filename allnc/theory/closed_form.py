"""What is known in closed form of the unconstrained-feature model: minimisers, curvature of saddles, thresholds.

With equal counts n and c = sqrt(n λ_W λ_H), the global minimiser of CE, LS, FL and ½ MSE is a simplex ETF:
W H̄ᵀ = a (I - J/K), with the a of `margin`. For a loss whose gradient by the logits z_i, at a sample of a class that is
treated as all classes of its group, is -κ u for changes u that sum to zero within the group, a pair of directions
(u xᵀ, x vᵀ) that the point does not use has curvature from

    [ λ_W   -σ  ]
    [ -σ    λ_H ],   σ = κ sqrt(n) / N

so that groups split, or not, by the same rule at the origin (one group of all classes), at a point where classes are
merged, and for a minority of n samples a class. κ is 1 for CE, logit adjustment and ½ MSE, 1 - s for smoothing s, and
(1-p)^γ - γ p (1-p)^(γ-1) log p for FL at probability p.

Legend: K classes, n samples of a class, N in all, d columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from scipy.optimize import brentq
from torch import Tensor

from allnc._checks import check_integer, check_interval
from allnc.theory.model import Problem


class Minimiser(NamedTuple):
    """The collapsed minimiser: W H̄ᵀ = a (I - J/K)."""

    a: float  # logit of the own class above the others; 0 if all variables vanish; for SupCon none: NaN
    weight_norm: float  # ‖w_k‖ of each class
    feature_norm: float  # ‖h_i‖ of each sample
    cosine: float  # of two classes; NaN if all variables vanish
    value: float


def minimiser(problem: Problem) -> Minimiser:
    """The global minimiser for equal counts and d >= K - 1.

    For FL it is the best point of the simplex family, which is the global minimiser unless other local minima exist
    (`focal_window`).

    Args:
        problem: "ce", "ls", "fl", "mse" (free bias, λ_b = 0) or "supcon"; linear classifier, no relu, no P2P.

    Raises:
        ValueError: another problem.

    Source: Zhou et al., Are All Losses Created Equal, NeurIPS 2022; SupCon: Graf et al., Dissecting Supervised
        Contrastive Learning, ICML 2021; factor n and the value: ours.
    """
    _check_collapses(problem)
    K, n = problem.num_classes, problem.per_class
    if problem.loss == "supcon":
        others = (K - 1) * n * math.exp(-K / (K - 1) / problem.temperature)
        return Minimiser(math.nan, math.nan, 1.0, -1 / (K - 1), math.log(n - 1 + others))
    a = margin(problem)
    balance = math.sqrt(problem.lambda_h * n / problem.lambda_w)
    squared = a * (K - 1) / K
    cosine = -1 / (K - 1) if a > 0 else math.nan
    return Minimiser(a, math.sqrt(squared * balance), math.sqrt(squared / balance), cosine, _family_value(problem, a))


def margin(problem: Problem) -> float:
    """a >= 0 of the minimiser, the logit of the own class above the others; arguments as in `minimiser`."""
    _check_collapses(problem)
    K = problem.num_classes
    c = math.sqrt(problem.per_class) * problem.root_of_penalties
    if problem.loss == "mse":
        return max(0.0, 1 - K * c)
    if problem.loss == "fl":
        stationary = [a for a in focal_family(K, problem.gamma, c) if a > 0]
        return min([0.0, *stationary], key=lambda a: _family_value(problem, a))
    smoothed = c + (problem.smoothing / K if problem.loss == "ls" else 0.0)
    odds = 1 / smoothed - K + 1
    return math.log(odds) if odds > 1 else 0.0


def pull(problem: Problem, probability: float) -> float:
    """κ: how strongly a sample pulls the logits of its own class and of those treated alike apart.

    Args:
        problem: any but "supcon".
        probability: of the own class, in (0, 1); only FL depends on it.
    """
    if problem.loss == "ls":
        return 1 - problem.smoothing
    if problem.loss == "fl":
        p, gamma = probability, problem.gamma
        return (1 - p) ** gamma - gamma * p * (1 - p) ** (gamma - 1) * math.log(p)
    return 1.0


def splitting_curvature(problem: Problem, count: int, probability: float) -> float:
    """Smallest curvature at a point that treats some classes of `count` samples alike, in unused directions.

    Args:
        problem: any but "supcon", with a linear classifier and no P2P.
        count: n, of each of the classes.
        probability: of such a class at its own samples.

    Source: Zhu et al., NeurIPS 2021, at the origin of CE; the others: ours.
    """
    pulled = pull(problem, probability) * math.sqrt(count) / problem.num_samples
    mean, half = (problem.lambda_w + problem.lambda_h) / 2, (problem.lambda_w - problem.lambda_h) / 2
    return mean - math.hypot(half, pulled)


def origin_curvature(problem: Problem) -> float:
    """Smallest eigenvalue of the Hessian at W = H = 0 with the best bias, for equal counts."""
    return splitting_curvature(problem, problem.per_class, 1 / problem.num_classes)


def collapse_threshold(problem: Problem, count: int) -> float:
    """Least sqrt(λ_W λ_H) at which classifier vectors of the classes of `count` samples coincide.

    κ sqrt(n) / N for CE, LS, ½ MSE and logit adjustment, which gives classes of equal counts equal priors. With
    features h >= 0 of CE without bias, sqrt((K-1)/K) times that; there the features of these classes vanish.

    Raises:
        ValueError: a loss or a form of the model without a known threshold.

    Source: Hong and Ling, Neural Collapse for Unconstrained Feature Model under Cross-Entropy Loss with Imbalanced
        Data, JMLR 2024; Dang et al., ICML 2024 (h >= 0); other losses: ours.
    """
    if problem.loss in ("fl", "supcon") or problem.spherical or any(problem.p2p):
        raise ValueError("the threshold is known for convex losses, a linear classifier and no P2P")
    threshold = pull(problem, math.nan) * math.sqrt(count) / problem.num_samples
    if not problem.relu:
        return threshold
    if problem.loss != "ce" or problem.lambda_b is not None:
        raise ValueError("with relu the threshold is known for loss 'ce' without a bias (lambda_b=None)")
    return math.sqrt((problem.num_classes - 1) / problem.num_classes) * threshold


def zero_modes(problem: Problem, rank: int) -> int:
    """Zero eigenvalues that symmetry explains at a point whose features and classifier span `rank` dimensions.

    Rotations of the d columns move such a point in d(d-1)/2 - (d-r)(d-r-1)/2 directions. Where only directions count,
    the length of each row is free as well; a bias of penalty 0 can be shifted, except with the squared error.
    """
    d = problem.dim
    modes = (d * (d - 1) - (d - rank) * (d - rank - 1)) // 2
    of_w, of_h, of_b = problem.sizes
    if problem.spherical:
        modes += (of_w + of_h) // d
    return modes + (1 if of_b and problem.lambda_b == 0 and problem.loss != "mse" else 0)


def focal_family(num_classes: int, gamma: float, c: float) -> list[float]:
    """All a > 0 at which the focal loss of the simplex family a (I - J/K) is stationary.

    Roots of F(p) = (1-p)^γ [(1-p) - γ p log p] = (K-1) c in p > 1/K. F rises up to `focal_convex_from` and falls after
    it: there are none, one or two.
    """
    check_integer("num_classes", num_classes, minimum=2)
    top = focal_convex_from(gamma)
    low = 1 / num_classes
    wanted = (num_classes - 1) * c

    def excess(p: float) -> float:
        return _focal_slope(p, gamma) - wanted

    roots = []
    for start, stop in ((low, top), (max(low, top), 1 - 1e-15)):
        if start < stop and excess(start) * excess(stop) < 0:
            roots.append(_root(excess, start, stop))
    return [math.log(p * (num_classes - 1) / (1 - p)) for p in roots]


def focal_convex_from(gamma: float) -> float:
    """p*: the focal loss is convex in the logits exactly where the own class's probability is p* or more.

    p* is the root of (1-p)(2γ + 1 + γ log p) = γ² p log p, for any number of classes; 0 for γ = 0. The logits with
    p >= p* are a convex set. So among the points at which every sample has p >= p*, a critical point that passes the
    certificate has the least value, and one that fails it has negative curvature as soon as d exceeds its rank.

    Source: ours.
    """
    check_interval("gamma", gamma, 0)
    if gamma == 0:
        return 0.0

    def curvature(p: float) -> float:
        return (1 - p) * (2 * gamma + 1 + gamma * math.log(p)) - gamma**2 * p * math.log(p)

    return _root(curvature, 1e-300, 0.5)


def focal_window(num_classes: int, gamma: float) -> tuple[float, float] | None:
    """The range of K c in which both the origin and a simplex are local minima of FL; None if there is none.

    Below it the origin is a saddle (κ > K c); above it the simplex family has no stationary point, as K c exceeds
    K/(K-1) max F. There is a window for every K > 1/p* (γ = 3: K >= 18).

    Source: ours.
    """
    top = focal_convex_from(gamma)
    if top * num_classes <= 1:
        return None
    ratio = num_classes / (num_classes - 1)
    return ratio * _focal_slope(1 / num_classes, gamma), ratio * _focal_slope(top, gamma)


def seli(counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Gram matrices of classifier and class features that λ -> 0 leads to, up to a factor each.

    With the SVD V Λ Uᵀ of the K x N matrix onehot - 1/K: W Wᵀ = V Λ Vᵀ and HᵀH = U Λ Uᵀ, here with one feature a class.

    Returns:
        [K, K] of the classifier vectors, [K, K] of the class means; float64.

    Source: Thrampoulidis et al., Imbalance Trouble: Revisiting Neural-Collapse Geometry, NeurIPS 2022.
    """
    K = len(counts)
    roots = torch.tensor(counts, dtype=torch.float64).sqrt()  # the columns of a class, as one of their norm
    V, S, Uh = torch.linalg.svd((torch.eye(K, dtype=torch.float64) - 1 / K) * roots)
    return V * S @ V.T, (Uh.T * S @ Uh) / torch.outer(roots, roots)


def _root(function: Callable[[float], float], low: float, high: float) -> float:
    return float(brentq(function, low, high, xtol=1e-16))  # pyright: ignore[reportArgumentType]


def _check_collapses(problem: Problem) -> None:
    known = problem.loss in ("ce", "ls", "fl", "mse", "supcon") and problem.classifier == "linear"
    if not known or problem.relu or any(problem.p2p):
        raise ValueError("closed forms are known for ce, ls, fl, mse and supcon, linear, without relu and P2P")
    if problem.loss == "mse" and problem.lambda_b != 0:
        raise ValueError(f"lambda_b must be 0 for the closed form of mse; got {problem.lambda_b}")
    if problem.dim < problem.num_classes - 1:
        raise ValueError(f"dim must be >= K - 1 = {problem.num_classes - 1} for a simplex; got {problem.dim}")
    _ = problem.per_class


def _family_value(problem: Problem, a: float) -> float:
    """f of the balanced factors of a (I - J/K), with the best bias."""
    K = problem.num_classes
    identity = torch.eye(K, dtype=torch.float64) - 1 / K
    logits = a * identity + (1 / K if problem.loss == "mse" else 0.0)
    coefficients = problem.coefficients()
    rows = logits[problem.labels]
    loss = float(problem.mean_loss(rows, coefficients))
    return loss + math.sqrt(problem.per_class) * problem.root_of_penalties * a * (K - 1)


def _focal_slope(p: float, gamma: float) -> float:
    """F(p) = -dℓ/da of the focal loss ℓ along the simplex family."""
    return (1 - p) ** gamma * ((1 - p) - gamma * p * math.log(p))
