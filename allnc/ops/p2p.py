"""P2P: peer-to-peer alignment of class means and classifier vectors, pair by pair (restores NC2 and NC3).

Over the K classes seen so far, with X = unit(x - mean_c x), Y = unit(y - mean_c y) and the simplex ETF's Gram
matrix ρ_cc' = 1 if c = c', else -1/(K-1):

    etf       P2P(X, Y) = (1/K²) Σ_{c,c'} ( X_c·Y_c' - ρ_cc' )²
    softmax   P2P(X, Y) = (τ/K) Σ_c log Σ_{c'≠c} exp( (X_c·Y_c' - X_c·Y_c [y given only]) / τ )

K points form a simplex ETF only in K - 1 dimensions or more. With fewer columns F the squared form has the
floor 1/F - 1/(K-1), which every centred tight frame reaches, including frames in which two classes
coincide. The softmax form separates instead: at small temperatures it is the largest cosine of two classes.

The squared form needs no C x C matrix: with ΣX the sum of the rows of X,

    Σ_{c,c'} ( X_c·Y_c' - ρ_cc' )² = <XᵀX, YᵀY> - 2 [ K/(K-1) Σ_c X_c·Y_c - ΣX·ΣY/(K-1) ] + K²/(K-1)

is O(C F²) against O(C² F). Unseen classes are masked by zero rows, so no shape depends on the data.

Legend: C classes, F features, K classes seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from allnc.ops._common import (
    Backend,
    accumulation_dtype,
    check_choice,
    check_floating,
    check_same_device,
    check_seen,
    check_shape,
    resolve_backend,
)

Target = Literal["auto", "etf", "softmax"]

# Entries of the similarity matrix that the softmax form holds at a time: 16 MB in float32, whatever C is.
_CHUNK_ENTRIES = 1 << 22


def p2p_reference(
    x: Tensor,
    y: Tensor | None = None,
    *,
    target: Target = "auto",
    temperature: float = 0.1,
    seen: Tensor | None = None,
) -> Tensor:
    """P2P as the formula is written, pair by pair with C x C matrices and autograd; arguments as in `p2p`."""
    dtype = _pair_dtype(x, y)
    target = _resolve_target(target, x)
    keep = torch.ones(len(x), dtype=torch.bool, device=x.device) if seen is None else seen
    own = x.to(dtype)[keep]  # [K, F]
    other = own if y is None else y.to(dtype)[keep]  # [K, F]
    num_seen = len(own)
    if num_seen < 2:
        return (own.sum() + other.sum()) * 0
    X = F.normalize(own - own.mean(0), dim=1)
    Y = F.normalize(other - other.mean(0), dim=1)
    cosines = X @ Y.T  # [K, K]
    same = torch.eye(num_seen, dtype=torch.bool, device=x.device)
    if target == "etf":
        rho = torch.full_like(cosines, -1 / (num_seen - 1)).masked_fill(same, 1)
        return (cosines - rho).square().sum() / num_seen**2
    exponents = cosines if y is None else cosines - (X * Y).sum(1, keepdim=True)
    return temperature * torch.logsumexp((exponents / temperature).masked_fill(same, -torch.inf), 1).mean()


def centred_unit(x: Tensor, seen: Tensor) -> Tensor:
    """Rows of x minus the mean of the seen rows, at unit length and differentiable; zero rows if not seen.

    A row that coincides with the centre to rounding has no direction: it becomes a zero row with zero
    gradient, not a unit row of amplified noise.

    Args:
        x: [C, F] floating; rows of unseen classes are never read into the result, whatever they hold.
        seen: [C] bool.

    Returns:
        [C, F] in the accumulation type of x (float32, or float64 for float64 x).
    """
    x = x.to(accumulation_dtype(x.dtype)).where(seen[:, None], 0)  # [C, F]
    centre = x.sum(0) / seen.sum().clamp(min=1)  # [F]
    centred = (x - centre).where(seen[:, None], 0)
    squared = centred.square().sum(1, keepdim=True)  # [C, 1]
    noise = 8 * torch.finfo(x.dtype).eps * torch.linalg.vector_norm(x.detach(), dim=1).amax()
    has_direction = squared > noise.square()
    return (centred * squared.where(has_direction, 1).rsqrt().where(has_direction, 0)).contiguous()


@torch.library.custom_op("allnc::p2p_pair", mutates_args=())
def _p2p_pair(x: Tensor, y: Tensor | None, seen: Tensor, form: str, temperature: float) -> tuple[Tensor, Tensor]:
    with torch.autocast(x.device.type, enabled=False):
        other = x if y is None else y
        num_seen = seen.sum().to(x.dtype)
        if form == "softmax":
            lse = x.new_zeros(len(x))
            for rows, logits in _softmax_rows(x, y, seen, temperature):
                lse[rows] = torch.logsumexp(logits, 1)
            lse = lse.where(seen & (num_seen >= 2), 0)  # a class without a peer has lse = -inf
            return temperature * lse.sum() / num_seen.clamp(min=1), lse
        if form == "closed":
            total = _closed_form_sum(x, other, num_seen)
        else:
            total = torch.linalg.vector_norm(_residual(x, other, seen, num_seen)).square()
        return (total / num_seen.square()).where(num_seen >= 2, 0), x.new_empty(0)


@_p2p_pair.register_fake
def _(x, y, seen, form, temperature):
    return x.new_empty(()), x.new_empty(len(x) if form == "softmax" else 0)


@torch.library.custom_op("allnc::p2p_pair_backward", mutates_args=())
def _p2p_pair_backward(
    grad: Tensor, lse: Tensor, x: Tensor, y: Tensor | None, seen: Tensor, form: str, temperature: float
) -> tuple[Tensor, Tensor]:
    with torch.autocast(x.device.type, enabled=False):
        num_seen = seen.sum().to(x.dtype)
        grad = grad.where(num_seen >= 2, 0)
        if form == "softmax":
            dx, dy = _softmax_backward(grad / num_seen.clamp(min=1), lse, x, y, seen, temperature)
        else:
            dx, dy = _squared_backward(2 * grad / num_seen.clamp(min=1).square(), x, y, seen, num_seen, form)
        return dx, x.new_empty(0) if dy is None else dy


@_p2p_pair_backward.register_fake
def _(grad, lse, x, y, seen, form, temperature):
    return torch.empty_like(x), x.new_empty(0) if y is None else torch.empty_like(y)


def _save_for_pair(ctx, inputs, output) -> None:
    x, y, seen, ctx.form, ctx.temperature = inputs
    ctx.save_for_backward(x, y, seen, output[1])


def _pair_autograd(ctx, grad: Tensor, _grad_lse: Tensor | None):
    x, y, seen, lse = ctx.saved_tensors
    dx, dy = torch.ops.allnc.p2p_pair_backward(grad, lse, x, y, seen, ctx.form, ctx.temperature)
    return dx, None if y is None else dy, None, None, None


_p2p_pair.register_autograd(_pair_autograd, setup_context=_save_for_pair)


def _closed_form_sum(x: Tensor, y: Tensor, num_seen: Tensor) -> Tensor:
    peers = (num_seen - 1).clamp(min=1)
    gram = ((x.T @ x) * (y.T @ y)).sum()  # <XᵀX, YᵀY>
    cross = num_seen / peers * (x * y).sum() - x.sum(0) @ y.sum(0) / peers
    return (gram - 2 * cross + num_seen.square() / peers).clamp(min=0)  # a sum of squares, up to rounding


def _residual(x: Tensor, y: Tensor, seen: Tensor, num_seen: Tensor) -> Tensor:
    """X Yᵀ - ρ, zero in the rows and columns of unseen classes.  [C, C]"""
    there = seen.to(x.dtype)
    peers = (num_seen - 1).clamp(min=1)
    residual = (x @ y.T).addr_(there, there / peers)
    residual.diagonal().sub_(there * (1 + 1 / peers))
    return residual


def _squared_backward(
    scale: Tensor, x: Tensor, y: Tensor | None, seen: Tensor, num_seen: Tensor, form: str
) -> tuple[Tensor, Tensor | None]:
    """scale (X Yᵀ - ρ) Y and scale (X Yᵀ - ρ)ᵀ X; twice the first for a pair with itself."""
    if y is None:
        dx, _ = _squared_backward(2 * scale, x, x, seen, num_seen, form)
        return dx, None
    if form == "pairwise":
        residual = _residual(x, y, seen, num_seen)
        return scale * (residual @ y), scale * (residual.T @ x)
    peers = (num_seen - 1).clamp(min=1)
    there = seen.to(x.dtype)[:, None]
    rho_y = (num_seen * y - there * y.sum(0)) / peers  # ρ Y; rows of unseen classes are zero
    rho_x = (num_seen * x - there * x.sum(0)) / peers
    return scale * (x @ (y.T @ y) - rho_y), scale * (y @ (x.T @ x) - rho_x)


def _softmax_rows(x: Tensor, y: Tensor | None, seen: Tensor, temperature: float) -> Iterator[tuple[slice, Tensor]]:
    """Exponents of the softmax form, some rows at a time; -inf at the own class and at unseen classes."""
    other = x if y is None else y
    num_classes = len(x)
    unseen = x.new_zeros(num_classes).masked_fill(~seen, -torch.inf)  # [C]
    step = max(1, _CHUNK_ENTRIES // num_classes)
    for start in range(0, num_classes, step):
        rows = slice(start, min(start + step, num_classes))
        logits = (x[rows] @ other.T).div_(temperature)  # [rows, C]
        own = logits[:, rows].diagonal()
        if y is not None:
            logits.sub_(own.clone()[:, None])
        own.fill_(-torch.inf)
        yield rows, logits.add_(unseen)


def _softmax_backward(
    scale: Tensor, lse: Tensor, x: Tensor, y: Tensor | None, seen: Tensor, temperature: float
) -> tuple[Tensor, Tensor | None]:
    other = x if y is None else y
    weight = scale * seen.to(x.dtype)[:, None]  # [C, 1]
    dx, dy = torch.empty_like(x), torch.zeros_like(other)  # [C, F]
    for rows, logits in _softmax_rows(x, y, seen, temperature):
        share = logits.sub_(lse[rows, None]).exp_().mul_(weight[rows])  # [rows, C]
        dx[rows] = share @ other
        dy.addmm_(share.T, x[rows])
    if y is None:
        return dx.add_(dy), None
    return dx.sub_(weight * y), dy.sub_(weight * x)


def pair_form(target: Target, shape: tuple[int, int]) -> str:
    """The way to compute a target at shape (C, F): "pairwise", "closed" (the squared form) or "softmax"."""
    num_classes, dim = shape
    if target == "softmax" or (target == "auto" and dim < num_classes - 1):
        return "softmax"
    return "closed" if dim < num_classes else "pairwise"


def p2p_pair(x: Tensor, y: Tensor | None, seen: Tensor, form: str, temperature: float) -> Tensor:
    """P2P of rows that `centred_unit` has centred and normalised, differentiable once.

    Args:
        x: [C, F] float32 or float64, zero rows for unseen classes.
        y: as x, or None for x with itself.
        seen: [C] bool.
        form: "pairwise", "closed" or "softmax", see `pair_form`.
        temperature: τ of the softmax form.

    Returns:
        Scalar of x's type.
    """
    y = None if y is None else y.contiguous()
    return torch.ops.allnc.p2p_pair(x.contiguous(), y, seen, form, float(temperature))[0]


def check_p2p(x: Tensor, y: Tensor | None, seen: Tensor | None, target: str, temperature: float) -> None:
    """Raise ValueError or TypeError with name, expected and got for arguments `p2p` cannot take."""
    check_floating("x", x)
    check_shape("x", x, ("C", "F"))
    num_classes, dim = x.shape
    if num_classes == 0 or dim == 0:
        raise ValueError(f"x must have at least one row and one column; got {list(x.shape)}")
    if y is not None:
        check_floating("y", y)
        check_shape("y", y, (num_classes, dim))
    if seen is not None:
        check_seen(seen, num_classes)
    check_choice("target", target, ("auto", "etf", "softmax"))
    if isinstance(temperature, Tensor):
        raise TypeError("temperature must be a float; got a torch.Tensor. It is not learnable here: pass its .item()")
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0; got {temperature}")
    check_same_device(x=x, y=y, seen=seen)


def p2p(
    x: Tensor,
    y: Tensor | None = None,
    *,
    target: Target = "auto",
    temperature: float = 0.1,
    seen: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Peer-to-peer loss: pulls the cosines between the rows of x and of y towards those of a simplex ETF.

    Both are centred over the seen classes and normalised here. With fewer than two seen classes the loss
    and its gradient are 0.

    Args:
        x: [C, F] float16, bfloat16, float32 or float64; class means or classifier vectors.
        y: [C, F], the peers of x; None for x with itself. Its type may differ from x's.
        target: "etf" (squared distance to the simplex ETF's cosines), "softmax" (separation, for F < C - 1,
            where no simplex ETF exists) or "auto": "etf" if F >= C - 1, else "softmax".
        temperature: τ > 0 of the softmax form, on cosines (no unit).
        seen: [C] bool, classes that take part. Default: all.
        backend: "auto" or "eager": torch operations on every device. `all_around` has this loss in one Triton
            launch with HyCon.

    Returns:
        Scalar, float32 (float64 when x or y is float64); in [0, 4] for "etf".

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, type, range or device, or a backend that
            this op does not have.

    Source: ours, after AllNC (arXiv 2408.07253); softmax form: Jiang et al., Generalized Neural Collapse
        for a Large Number of Classes, ICML 2024.
    """
    check_p2p(x, y, seen, target, temperature)
    resolve_backend(backend, op="p2p", device=x.device, dtype=x.dtype, supported=())
    with torch.autocast(x.device.type, enabled=False):
        if seen is None:
            seen = torch.ones(len(x), dtype=torch.bool, device=x.device)
        dtype = _pair_dtype(x, y)
        own = centred_unit(x.to(dtype), seen)
        other = None if y is None else centred_unit(y.to(dtype), seen)
        return p2p_pair(own, other, seen, pair_form(target, (x.shape[0], x.shape[1])), temperature)


def _pair_dtype(x: Tensor, y: Tensor | None) -> torch.dtype:
    dtype = accumulation_dtype(x.dtype)
    return dtype if y is None else torch.promote_types(dtype, accumulation_dtype(y.dtype))


def _resolve_target(target: Target, x: Tensor) -> Target:
    return "softmax" if pair_form(target, (x.shape[0], x.shape[1])) == "softmax" else "etf"
