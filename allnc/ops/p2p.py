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
Blocks = Literal["own", "cross", "all"]

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


@torch.library.custom_op("allnc::centred_unit", mutates_args=())
def _centred_unit(x: Tensor, y: Tensor | None, seen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    from allnc.kernels.centred_unit import centred_unit_forward

    u, v, scale = centred_unit_forward(x, y, seen)
    return u, scale.new_empty(0) if v is None else v, scale


@_centred_unit.register_fake
def _(x, y, seen):
    u = x.new_empty(x.shape, dtype=torch.float32)
    return u, u.new_empty(0 if y is None else x.shape), u.new_empty(1 if y is None else 2, len(x))


@torch.library.custom_op("allnc::centred_unit_backward", mutates_args=())
def _centred_unit_backward(
    du: Tensor,
    dv: Tensor | None,
    u: Tensor,
    v: Tensor | None,
    scale: Tensor,
    seen: Tensor,
    x_dtype: torch.dtype,
    y_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    from allnc.kernels.centred_unit import centred_unit_backward

    dx, dy = centred_unit_backward(du, dv, u, v, scale, seen, x_dtype, y_dtype)
    return dx, du.new_empty(0) if dy is None else dy


@_centred_unit_backward.register_fake
def _(du, dv, u, v, scale, seen, x_dtype, y_dtype):
    return u.new_empty(u.shape, dtype=x_dtype), u.new_empty(0) if v is None else u.new_empty(u.shape, dtype=y_dtype)


def _save_for_unit(ctx, inputs, output) -> None:
    x, y, seen = inputs
    u, v, scale = output
    ctx.types = (x.dtype, x.dtype if y is None else y.dtype)
    ctx.pair = y is not None
    ctx.save_for_backward(u, v, scale, seen)
    ctx.mark_non_differentiable(scale)


def _unit_autograd(ctx, du: Tensor, dv: Tensor, _dscale: Tensor | None):
    u, v, scale, seen = ctx.saved_tensors
    pair = (dv, v) if ctx.pair else (None, None)
    dx, dy = torch.ops.allnc.centred_unit_backward(du, pair[0], u, pair[1], scale, seen, *ctx.types)
    return dx, dy if ctx.pair else None, None


_centred_unit.register_autograd(_unit_autograd, setup_context=_save_for_unit)


def centred_units(x: Tensor, y: Tensor | None, seen: Tensor, *, backend: str) -> tuple[Tensor, Tensor | None]:
    """`centred_unit` of x and of y in their common accumulation type: torch operations, or two Triton launches.

    Args:
        x: [C, F] floating.
        y: as x, of any floating type; or None.
        seen: [C] bool.
        backend: "eager" or "triton" (resolved; no float64).
    """
    if backend == "triton":
        u, v, _ = torch.ops.allnc.centred_unit(x.contiguous(), None if y is None else y.contiguous(), seen)
        return u, None if y is None else v
    dtype = _pair_dtype(x, y)
    return centred_unit(x.to(dtype), seen), None if y is None else centred_unit(y.to(dtype), seen)


@torch.library.custom_op("allnc::p2p_blocks", mutates_args=())
def _p2p_blocks(
    x: Tensor, y: Tensor | None, seen: Tensor, blocks: str, form: str, temperature: float, backend: str
) -> tuple[Tensor, Tensor]:
    if backend == "triton":
        from allnc.kernels.p2p import p2p_forward

        target = kernel_target(form)
        return p2p_forward(x, y, seen, target=target, temperature=temperature, blocks=blocks)
    with torch.autocast(x.device.type, enabled=False):
        num_seen = seen.sum().to(x.dtype)
        if form == "softmax":
            pairs = [_softmax_value(*pair, seen, num_seen, temperature) for pair in _pairs(x, y, blocks)]
            return torch.stack([value for value, _ in pairs]), torch.stack([lse for _, lse in pairs])
        if form == "closed":
            total = _closed_form_sums(x, y, num_seen, blocks)
        else:
            residuals = (
                _residual(own, own if other is None else other, seen, num_seen) for own, other in _pairs(x, y, blocks)
            )
            total = torch.stack([torch.linalg.vector_norm(residual).square() for residual in residuals])
        return (total / num_seen.square()).where(num_seen >= 2, 0), x.new_empty(len(total), 0)


@_p2p_blocks.register_fake
def _(x, y, seen, blocks, form, temperature, backend):
    num_blocks = 3 if blocks == "all" else 1
    return x.new_empty(num_blocks), x.new_empty(num_blocks, len(x) if form == "softmax" else 0)


@torch.library.custom_op("allnc::p2p_blocks_backward", mutates_args=())
def _p2p_blocks_backward(
    grad: Tensor,
    lse: Tensor,
    x: Tensor,
    y: Tensor | None,
    seen: Tensor,
    blocks: str,
    form: str,
    temperature: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    if backend == "triton":
        from allnc.kernels.p2p import p2p_backward

        target = kernel_target(form)
        dx, dy = p2p_backward(grad, lse, x, y, seen, target=target, temperature=temperature, blocks=blocks)
        return dx, x.new_empty(0) if dy is None else dy
    with torch.autocast(x.device.type, enabled=False):
        num_seen = seen.sum().to(x.dtype)
        grad = grad.where(num_seen >= 2, 0)
        scale = grad / num_seen.clamp(min=1)  # [B]
        if form == "closed":
            dx, dy = _closed_backward(2 * scale / num_seen.clamp(min=1), x, y, seen, num_seen, blocks)
        else:
            parts = []
            for i, pair in enumerate(_pairs(x, y, blocks)):
                if form == "softmax":
                    parts.append(_softmax_backward(scale[i], lse[i], *pair, seen, temperature))
                else:
                    parts.append(_pairwise_backward(2 * scale[i] / num_seen.clamp(min=1), *pair, seen, num_seen))
            dx, dy = parts[-1]
            if blocks == "all":
                dx, dy = dx + parts[0][0], dy + parts[1][0]
        return dx, x.new_empty(0) if dy is None else dy


@_p2p_blocks_backward.register_fake
def _(grad, lse, x, y, seen, blocks, form, temperature, backend):
    return torch.empty_like(x), x.new_empty(0) if y is None else torch.empty_like(y)


def _save_for_blocks(ctx, inputs, output) -> None:
    x, y, seen, *ctx.rest = inputs
    ctx.save_for_backward(x, y, seen, output[1])
    ctx.mark_non_differentiable(output[1])


def _blocks_autograd(ctx, grad: Tensor, _grad_lse: Tensor | None):
    x, y, seen, lse = ctx.saved_tensors
    dx, dy = torch.ops.allnc.p2p_blocks_backward(grad, lse, x, y, seen, *ctx.rest)
    return dx, None if y is None else dy, None, None, None, None, None


_p2p_blocks.register_autograd(_blocks_autograd, setup_context=_save_for_blocks)


def kernel_target(form: str) -> Literal["etf", "softmax"]:
    """What the Triton kernels call a form."""
    return "softmax" if form == "softmax" else "etf"


def _pairs(x: Tensor, y: Tensor | None, blocks: str) -> list[tuple[Tensor, Tensor | None]]:
    """The pairs of the blocks; None where a side meets itself."""
    if y is None:
        return [(x, None)]
    return [(x, y)] if blocks == "cross" else [(x, None), (y, None), (x, y)]


def _closed_form_sums(x: Tensor, y: Tensor | None, num_seen: Tensor, blocks: str) -> Tensor:
    """Σ (X_c·Y_c' - ρ_cc')² of each block.  [B]"""
    peers = (num_seen - 1).clamp(min=1)
    gram_x = x.T @ x  # [F, F]
    gram_y = gram_x if y is None else y.T @ y
    totals = []
    for own, other in _pairs(x, y, blocks):
        other = own if other is None else other
        gram = ((gram_x if own is x else gram_y) * (gram_x if other is x else gram_y)).sum()  # <XᵀX, YᵀY>
        cross = num_seen / peers * (own * other).sum() - own.sum(0) @ other.sum(0) / peers
        totals.append(gram - 2 * cross + num_seen.square() / peers)
    return torch.stack(totals).clamp(min=0)  # sums of squares, up to rounding


def _closed_backward(
    scale: Tensor, x: Tensor, y: Tensor | None, seen: Tensor, num_seen: Tensor, blocks: str
) -> tuple[Tensor, Tensor | None]:
    """Σ of scale (X Yᵀ - ρ) Y over the blocks a side takes part in, twice for a pair with itself, without X Yᵀ."""
    peers = (num_seen - 1).clamp(min=1)
    there = seen.to(x.dtype)[:, None]

    def gradient(own: Tensor, pulls: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
        gram = torch.stack([weight * gram for weight, _, gram in pulls]).sum(0)  # [F, F]
        rows = torch.stack([weight * other for weight, other, _ in pulls]).sum(0)  # [C, F]
        return own @ gram - (num_seen * rows - there * rows.sum(0)) / peers  # ρ rows; 0 for classes not seen

    gram_x = x.T @ x
    if y is None:
        return gradient(x, [(2 * scale[0], x, gram_x)]), None
    gram_y = y.T @ y
    of_x, of_y = [(scale[-1], y, gram_y)], [(scale[-1], x, gram_x)]
    if blocks == "all":
        of_x, of_y = [(2 * scale[0], x, gram_x), *of_x], [(2 * scale[1], y, gram_y), *of_y]
    return gradient(x, of_x), gradient(y, of_y)


def _residual(x: Tensor, y: Tensor, seen: Tensor, num_seen: Tensor) -> Tensor:
    """X Yᵀ - ρ, zero in the rows and columns of unseen classes.  [C, C]"""
    there = seen.to(x.dtype)
    peers = (num_seen - 1).clamp(min=1)
    residual = (x @ y.T).addr_(there, there / peers)
    residual.diagonal().sub_(there * (1 + 1 / peers))
    return residual


def _pairwise_backward(
    scale: Tensor, x: Tensor, y: Tensor | None, seen: Tensor, num_seen: Tensor
) -> tuple[Tensor, Tensor | None]:
    """scale (X Yᵀ - ρ) Y and scale (X Yᵀ - ρ)ᵀ X; twice the first for a pair with itself."""
    if y is None:
        return 2 * scale * (_residual(x, x, seen, num_seen) @ x), None
    residual = _residual(x, y, seen, num_seen)
    return scale * (residual @ y), scale * (residual.T @ x)


def _softmax_value(
    x: Tensor, y: Tensor | None, seen: Tensor, num_seen: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """The value of one pair, and lse [C] of every class."""
    lse = x.new_zeros(len(x))
    for rows, logits in _softmax_rows(x, y, seen, temperature):
        lse[rows] = torch.logsumexp(logits, 1)
    lse = lse.where(seen & (num_seen >= 2), 0)  # a class without a peer has lse = -inf
    return temperature * lse.sum() / num_seen.clamp(min=1), lse


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


def pair_form(target: Target, shape: tuple[int, int], *, blocks: Blocks = "own", device: str = "cpu") -> str:
    """The way to compute a target at shape (C, F): "pairwise", "closed" (the squared form) or "softmax"."""
    num_classes, dim = shape
    if target == "softmax" or (target == "auto" and dim < num_classes - 1):
        return "softmax"
    return "closed" if dim < num_classes else "pairwise"


def p2p_blocks(
    x: Tensor,
    y: Tensor | None,
    seen: Tensor,
    *,
    blocks: Blocks,
    form: str,
    temperature: float,
    backend: str = "eager",
) -> Tensor:
    """P2P of rows that `centred_units` has centred and normalised, differentiable once.

    Args:
        x: [C, F] float32 or float64, zero rows for unseen classes.
        y: as x; None for blocks="own".
        seen: [C] bool.
        blocks: "own" for (x, x), "cross" for (x, y), "all" for (x, x), (y, y) and (x, y).
        form: "pairwise", "closed" or "softmax", see `pair_form`.
        temperature: τ of the softmax form.
        backend: "eager" or "triton" (float32, not for "closed"), see `blocks_backend`.

    Returns:
        [1] or, for "all", [3] of x's type.
    """
    y = None if y is None else y.contiguous()
    return torch.ops.allnc.p2p_blocks(x.contiguous(), y, seen, blocks, form, float(temperature), backend)[0]


def blocks_backend(form: str, backend: str) -> str:
    """What computes a form where the op's backend is `backend`: closed forms are library matrix products anywhere."""
    return "triton" if backend == "triton" and form != "closed" else "eager"


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
        backend: "auto" (fastest that can run), "eager" or "triton". `all_around` has this loss in one launch with
            HyCon.

    Returns:
        Scalar, float32 (float64 when x or y is float64); in [0, 4] for "etf".

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, type, range or device, or a backend that
            this op does not have.

    Source: ours, after AllNC (arXiv 2408.07253); softmax form: Jiang et al., Generalized Neural Collapse
        for a Large Number of Classes, ICML 2024.
    """
    check_p2p(x, y, seen, target, temperature)
    dtype = _pair_dtype(x, y)
    used = resolve_backend(backend, op="p2p", device=x.device, dtype=dtype, supported=("triton",))
    with torch.autocast(x.device.type, enabled=False):
        if seen is None:
            seen = torch.ones(len(x), dtype=torch.bool, device=x.device)
        own, other = centred_units(x, y, seen, backend=used)
        blocks: Blocks = "own" if y is None else "cross"
        form = pair_form(target, (x.shape[0], x.shape[1]), blocks=blocks, device=x.device.type)
        rest = {"form": form, "temperature": temperature, "backend": blocks_backend(form, used)}
        return p2p_blocks(own, other, seen, blocks=blocks, **rest).reshape(())


def _pair_dtype(x: Tensor, y: Tensor | None) -> torch.dtype:
    dtype = accumulation_dtype(x.dtype)
    return dtype if y is None else torch.promote_types(dtype, accumulation_dtype(y.dtype))


def _resolve_target(target: Target, x: Tensor) -> Target:
    return "softmax" if pair_form(target, (x.shape[0], x.shape[1])) == "softmax" else "etf"
