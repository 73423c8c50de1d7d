"""Minimise the unconstrained-feature model from many starts at once, and certify what is found.

Legend: B starts, P variables, K classes, R rows of features, d columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, grad_and_value, vmap

from allnc.theory.closed_form import focal_convex_from
from allnc.theory.model import CONVEX, Coefficients, Problem, class_means

_MEMORY = 12  # pairs of steps and gradient differences of L-BFGS
_TRIALS = 40  # halvings of a step
_DECREASE = 1e-4  # share of the decrease predicted by the slope that a step must bring
_ROUNDING = 16 * torch.finfo(torch.float64).eps  # of the value: near a minimum steps cannot be told by it

Objective = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # variables [B, P], indices [B] -> gradients, values


class Solution(NamedTuple):
    """Where the starts ended."""

    x: Tensor  # [B, P]
    value: Tensor  # [B]
    gradient_norm: Tensor  # [B]


def minimise(
    problem: Problem | Sequence[Problem],
    starts: Tensor,
    *,
    tolerance: float = 1e-10,
    max_iterations: int = 5000,
) -> Solution:
    """Minimise from every start by L-BFGS, all starts batched.

    Args:
        problem: one for all starts, or one for each of them; they may differ in counts (with rows="classes") and
            penalties only.
        starts: [B, P] float64.
        tolerance: norm of the gradient at which a start has arrived.
        max_iterations: of each start.

    Returns:
        Where each start ended, arrived or not: look at `gradient_norm`.

    Raises:
        ValueError: starts of the wrong shape, or problems of different structure.
    """
    first = problem if isinstance(problem, Problem) else problem[0]
    if starts.dim() != 2 or starts.shape[1] != sum(first.sizes):
        raise ValueError(f"starts must have shape [B, {sum(first.sizes)}]; got {list(starts.shape)}")
    if isinstance(problem, Problem):
        coefficients = problem.coefficients()
        shared = vmap(grad_and_value(problem.value), in_dims=(0, None))
        return _lbfgs(lambda x, _index: shared(x, coefficients), starts, tolerance, max_iterations)
    if len(problem) != len(starts) or any(p.sizes != first.sizes for p in problem):
        raise ValueError(f"problem must hold one of equal size for each start; got {len(problem)}")
    stacked = Coefficients(*(torch.stack(c) for c in zip(*(p.coefficients() for p in problem), strict=True)))
    each = vmap(grad_and_value(first.value))

    def evaluate(x: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        return each(x, Coefficients(*(c[index] for c in stacked)))

    return _lbfgs(evaluate, starts, tolerance, max_iterations)


def minimise_function(
    function: Callable[[Tensor], Tensor], starts: Tensor, *, tolerance: float = 1e-10, max_iterations: int = 5000
) -> Solution:
    """`minimise` of any smooth function of [P] variables that torch.func can differentiate and batch."""
    batched = vmap(grad_and_value(function))
    return _lbfgs(lambda x, _index: batched(x), starts, tolerance, max_iterations)


def _lbfgs(evaluate: Objective, starts: Tensor, tolerance: float, max_iterations: int) -> Solution:
    result = Solution(starts.clone(), starts.new_empty(len(starts)), starts.new_empty(len(starts)))
    index = torch.arange(len(starts))  # of the starts that are still on their way
    x = starts.clone()
    gradient, value = evaluate(x, index)
    steps: list[Tensor] = []  # [B, P] each
    changes: list[Tensor] = []
    for iteration in range(max_iterations + 1):
        norm = torch.linalg.vector_norm(gradient, dim=1)
        stuck = torch.zeros_like(norm, dtype=torch.bool)
        if iteration < max_iterations:
            direction = _direction(gradient, steps, changes)
            slope = (direction * gradient).sum(1)  # [B]
            uphill = slope >= 0
            direction = torch.where(uphill[:, None], -gradient, direction)
            slope = torch.where(uphill, -norm.square(), slope)
            first = (1 / norm.clamp(min=1)) if iteration == 0 else torch.ones_like(norm)
            arrived = norm <= tolerance
            moved = _search(evaluate, index, x, value, gradient, direction, slope, first, ~arrived)
            stuck = moved.stuck
        else:
            arrived, moved = torch.ones_like(stuck), None
        done = arrived | stuck
        if bool(done.any()):
            at = index[done]
            result.x[at], result.value[at], result.gradient_norm[at] = x[done], value[done], norm[done]
            if bool(done.all()):
                break
        assert moved is not None
        keep = ~done
        step, change = moved.x - x, moved.gradient - gradient
        steps, changes = [*steps[-_MEMORY + 1 :], step], [*changes[-_MEMORY + 1 :], change]
        index, x, value, gradient = index[keep], moved.x[keep], moved.value[keep], moved.gradient[keep]
        if bool(done.any()):
            steps, changes = [s[keep] for s in steps], [c[keep] for c in changes]
    return result


class _Moved(NamedTuple):
    x: Tensor
    value: Tensor
    gradient: Tensor
    stuck: Tensor  # [B] bool, no step was found


def _search(
    evaluate: Objective,
    index: Tensor,
    x: Tensor,
    value: Tensor,
    gradient: Tensor,
    direction: Tensor,
    slope: Tensor,
    length: Tensor,
    wanted: Tensor,
) -> _Moved:
    """Halve each step until the value falls enough, up to its rounding."""
    x, new_value, new_gradient, length = x.clone(), value.clone(), gradient.clone(), length.clone()
    start, open_ = x.clone(), wanted.clone()
    for _ in range(_TRIALS):
        at = open_.nonzero().squeeze(1)
        if not len(at):
            break
        trial = start[at] + length[at, None] * direction[at]
        its_gradient, its_value = evaluate(trial, index[at])
        limit = value[at] + _DECREASE * length[at] * slope[at] + _ROUNDING * value[at].abs()
        good = (its_value <= limit) & its_gradient.isfinite().all(1)
        to = at[good]
        x[to], new_value[to], new_gradient[to] = trial[good], its_value[good], its_gradient[good]
        open_[to] = False
        length[at[~good]] /= 2
    return _Moved(x, new_value, new_gradient, open_)


def _direction(gradient: Tensor, steps: list[Tensor], changes: list[Tensor]) -> Tensor:
    """-(inverse Hessian) gradient by the two loops of L-BFGS; pairs without positive curvature are passed over."""
    q = -gradient
    kept = []
    for s, y in zip(reversed(steps), reversed(changes), strict=True):
        sy = (s * y).sum(1)
        use = sy > 1e-12 * torch.linalg.vector_norm(s, dim=1) * torch.linalg.vector_norm(y, dim=1)
        rho = torch.where(use, 1 / sy.where(use, 1), 0)
        alpha = rho * (s * q).sum(1)
        q = q - alpha[:, None] * y
        kept.append((s, y, rho, alpha, sy, use))
    if kept:
        scale, known = torch.ones(len(q), dtype=q.dtype), torch.zeros(len(q), dtype=torch.bool)
        for _, y, _, _, sy, use in kept:  # the newest pair that can be used
            new = use & ~known
            scale = torch.where(new, sy / y.square().sum(1).where(new, 1), scale)
            known |= use
        q = q * scale[:, None]
    for s, y, rho, alpha, _, _ in reversed(kept):
        beta = rho * (y * q).sum(1)
        q = q + (alpha - beta)[:, None] * s
    return q


class Certificate(NamedTuple):
    """Spectral norm of the gradient by the logits against the penalties' root."""

    norm: float  # ‖∂L/∂Z‖, Z [K, N] with a column for each sample
    bound: float  # sqrt(λ_W λ_H)

    @property
    def ratio(self) -> float:
        """Norm over bound: at a critical point <= 1 proves a global minimum, > 1 that it is none."""
        return self.norm / self.bound


def certificate(problem: Problem, x: Tensor) -> Certificate:
    """The certificate of global optimality at a critical point x of a convex loss.

    A critical point with ‖∂L/∂Z‖ <= sqrt(λ_W λ_H) is a global minimum: then -∂L/∂Z over the root is a subgradient of
    the nuclear norm at Z, and f >= L(Z, b) + sqrt(λ_W λ_H) ‖Z‖_* + ½ λ_b ‖b‖² with equality there. Of one row a class
    the gradient's column k is ∂L/∂z_k / sqrt(n_k), which has the same norm.

    FL is convex where every sample's own probability is at least p* (`focal_convex_from`), a convex set of logits;
    there the certificate proves the least value within this set.

    Args:
        problem: any loss but "supcon", with a linear classifier, without relu and P2P.
        x: [P] float64.

    Raises:
        ValueError: another problem, or FL at a point outside that set: the certificate would prove nothing.

    Source: Zhu et al., A Geometric Analysis of Neural Collapse with Unconstrained Features, NeurIPS 2021.
    """
    if problem.loss == "supcon" or problem.spherical or problem.relu or any(problem.p2p):
        raise ValueError("the certificate needs a convex loss, a linear classifier, and neither P2P nor relu")
    coefficients = problem.coefficients()
    logits = problem.logits(problem.point(x))
    if problem.loss not in CONVEX:
        least, needed = float(own_probabilities(problem, x).min()), focal_convex_from(problem.gamma)
        if least < needed:
            raise ValueError(f"every own probability must be >= {needed:.4f}, where FL is convex; got {least:.4f}")
    of_rows = grad(problem.mean_loss)(logits, coefficients)  # [R, K]
    columns = of_rows / coefficients.row_count.sqrt()[:, None]
    return Certificate(float(torch.linalg.matrix_norm(columns, 2)), problem.root_of_penalties)


def own_probabilities(problem: Problem, x: Tensor) -> Tensor:
    """Probability of its class for each row of features at x [P], [R]; by softmax, whatever the loss."""
    probabilities = problem.logits(problem.point(x)).softmax(1)  # [R, K]
    return probabilities.gather(1, problem.labels[:, None]).squeeze(1)


class Geometry(NamedTuple):
    """Lengths and cosines of a point."""

    weight_norms: Tensor  # [K]
    mean_norms: Tensor  # [K] of the class means of the features
    weight_cosines: Tensor  # [K, K]
    mean_cosines: Tensor  # [K, K] of the class means, not centred
    duality: Tensor  # [K] cosine of classifier vector and class mean
    spread: float  # largest distance of a feature to its class mean


def geometry(problem: Problem, x: Tensor) -> Geometry:
    """Lengths and cosines at x [P]; where only directions count, those of unit rows. NaN for a vector of zeros."""
    W, H, _ = problem.point(x)
    if problem.spherical:
        W, H = F.normalize(W, dim=1), F.normalize(H, dim=1)
    means = class_means(H, problem.labels, problem.num_classes)
    W = means if problem.loss == "supcon" else W
    unit_w, unit_m = W / W.norm(dim=1, keepdim=True), means / means.norm(dim=1, keepdim=True)
    return Geometry(
        W.norm(dim=1),
        means.norm(dim=1),
        unit_w @ unit_w.T,
        unit_m @ unit_m.T,
        (unit_w * unit_m).sum(1),
        float((H - means[problem.labels]).norm(dim=1).max()),
    )
