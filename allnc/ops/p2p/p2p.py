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

from allnc._checks import check_choice
from allnc.ops._common import (
    Backend,
    check_floating,
    check_same_device,
    check_seen,
    check_shape,
    resolve_backend,
)
from allnc.ops.p2p.centred_unit import centred_units, pair_dtype

Target = Literal["auto", "etf", "softmax"]
Blocks = Literal["own", "cross", "all"]

# Entries of the similarity matrix that the softmax form holds at a time: 16 MB in float32, whatever C is.
_CHUNK_ENTRIES = 1 << 22

# Predictions for GPUs, see `pair_form`: columns of the gradient for which the kernels compute G once, and what some
# thirty launches of small torch operations (0.1 ms) are worth at 30 TFLOP/s.
_KERNEL_COLUMNS = 512
_LAUNCH_OPERATIONS = 3 * 10**9


def p2p_reference(
    x: Tensor,
    y: Tensor | None = None,
    *,
    target: Target = "auto",
    temperature: float = 0.1,
    seen: Tensor | None = None,
) -> Tensor:
    """P2P as the formula is written, pair by pair with C x C matrices and autograd; arguments as in `p2p`."""
    dtype = pair_dtype(x, y)
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


@torch.library.custom_op("allnc::p2p_blocks", mutates_args=())
def _p2p_blocks(
    x: Tensor, y: Tensor | None, seen: Tensor, blocks: str, form: str, temperature: float, backend: str
) -> tuple[Tensor, Tensor]:
    """Values [B], and what the backward needs: lse [B, C], residuals [B, C, C] or Gram matrices [sides, F, F]."""
    if backend == "triton":
        from allnc.kernels.p2p import p2p_forward

        rest = {"target": kernel_target(form), "temperature": temperature, "blocks": blocks}
        return p2p_forward(x, y, seen, **rest)
    with torch.autocast(x.device.type, enabled=False):
        num_seen = seen.sum().to(x.dtype)
        kept = x.new_empty(_kept_shape(x, y, blocks, form))
        if form == "closed":
            for gram, side in zip(kept, _sides(x, y), strict=True):
                torch.mm(side.T, side, out=gram)
            total = _closed_form_sums(kept, x, y, num_seen, blocks)
        elif form == "pairwise":
            for residual, pair in zip(kept, _pairs(x, y, blocks), strict=True):
                _write_residual(residual, *pair, seen, num_seen)
            total = torch.linalg.vector_norm(kept, dim=(1, 2)).square()
        else:
            for lse, pair in zip(kept, _pairs(x, y, blocks), strict=True):
                for rows, logits in _softmax_rows(*pair, seen, temperature):
                    lse[rows] = torch.logsumexp(logits, 1)
            kept.masked_fill_(~seen | (num_seen < 2), 0)  # a class without a peer has lse = -inf
            return temperature * kept.sum(1) / num_seen.clamp(min=1), kept
        return (total / num_seen.square()).where(num_seen >= 2, 0), kept


@_p2p_blocks.register_fake
def _(x, y, seen, blocks, form, temperature, backend):
    num_blocks = 3 if blocks == "all" else 1
    in_kernel = backend == "triton" and form != "softmax"
    return x.new_empty(num_blocks), x.new_empty((num_blocks, 0) if in_kernel else _kept_shape(x, y, blocks, form))


@torch.library.custom_op("allnc::p2p_blocks_backward", mutates_args=())
def _p2p_blocks_backward(
    grad: Tensor,
    kept: Tensor,
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

        rest = {"target": kernel_target(form), "temperature": temperature, "blocks": blocks}
        dx, dy = p2p_backward(grad, kept, x, y, seen, **rest)
        return dx, x.new_empty(0) if dy is None else dy
    with torch.autocast(x.device.type, enabled=False):
        num_seen = seen.sum().to(x.dtype)
        grad = grad.where(num_seen >= 2, 0)
        scale = grad / num_seen.clamp(min=1)  # [B]
        if form != "softmax":
            scale = 2 * scale / num_seen.clamp(min=1)
        if form == "closed":
            dx, dy = _closed_backward(scale, kept, x, y, seen, num_seen, blocks)
        else:
            parts = []
            for weight, of_pair, (own, other) in zip(scale, kept, _pairs(x, y, blocks), strict=True):
                if form == "softmax":
                    parts.append(_softmax_backward(weight, of_pair, own, other, seen, temperature))
                elif other is None:
                    parts.append(((of_pair @ own).mul_(2 * weight), None))
                else:
                    parts.append(((of_pair @ other).mul_(weight), (of_pair.T @ own).mul_(weight)))
            dx, dy = parts[-1]
            if blocks == "all":
                dx, dy = dx + parts[0][0], dy + parts[1][0]
        return dx, x.new_empty(0) if dy is None else dy


@_p2p_blocks_backward.register_fake
def _(grad, kept, x, y, seen, blocks, form, temperature, backend):
    return torch.empty_like(x), x.new_empty(0) if y is None else torch.empty_like(y)


def _save_for_blocks(ctx, inputs, output) -> None:
    x, y, seen, *ctx.rest = inputs
    ctx.save_for_backward(x, y, seen, output[1])
    ctx.mark_non_differentiable(output[1])


def _blocks_autograd(ctx, grad: Tensor, _grad_kept: Tensor | None):
    x, y, seen, kept = ctx.saved_tensors
    dx, dy = torch.ops.allnc.p2p_blocks_backward(grad.contiguous(), kept, x, y, seen, *ctx.rest)
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


def _sides(x: Tensor, y: Tensor | None) -> list[Tensor]:
    return [x] if y is None else [x, y]


def _kept_shape(x: Tensor, y: Tensor | None, blocks: str, form: str) -> tuple[int, ...]:
    """Shape of what the forward leaves for the backward, no larger than x and y where `pair_form` chooses the form."""
    num_classes, dim = x.shape
    num_blocks = 3 if blocks == "all" else 1
    if form == "closed":
        return (len(_sides(x, y)), dim, dim)
    return (num_blocks, num_classes) if form == "softmax" else (num_blocks, num_classes, num_classes)


def _closed_form_sums(grams: Tensor, x: Tensor, y: Tensor | None, num_seen: Tensor, blocks: str) -> Tensor:
    """Σ (X_c·Y_c' - ρ_cc')² of each block.  [B]"""
    peers = (num_seen - 1).clamp(min=1)
    totals = []
    for own, other in _pairs(x, y, blocks):
        other = own if other is None else other
        gram = (grams[0 if own is x else -1] * grams[0 if other is x else -1]).sum()  # <XᵀX, YᵀY>
        cross = num_seen / peers * (own * other).sum() - own.sum(0) @ other.sum(0) / peers
        totals.append(gram - 2 * cross + num_seen.square() / peers)
    return torch.stack(totals).clamp(min=0)  # sums of squares, up to rounding


def _closed_backward(
    scale: Tensor, grams: Tensor, x: Tensor, y: Tensor | None, seen: Tensor, num_seen: Tensor, blocks: str
) -> tuple[Tensor, Tensor | None]:
    """Σ of scale (X Yᵀ - ρ) Y over the blocks a side takes part in, twice for a pair with itself, without X Yᵀ."""
    peers = (num_seen - 1).clamp(min=1)
    there = seen.to(x.dtype)[:, None]

    def gradient(own: Tensor, pulls: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
        gram, rows = torch.zeros_like(grams[0]), torch.zeros_like(own)  # [F, F], [C, F]
        for weight, other, of_other in pulls:
            gram.addcmul_(weight, of_other)
            rows.addcmul_(weight, other)
        # ρ rows, 0 for classes not seen.
        return (own @ gram).sub_(rows * (num_seen / peers)).add_(there * (rows.sum(0) / peers))

    if y is None:
        return gradient(x, [(2 * scale[0], x, grams[0])]), None
    of_x, of_y = [(scale[-1], y, grams[1])], [(scale[-1], x, grams[0])]
    if blocks == "all":
        of_x, of_y = [(2 * scale[0], x, grams[0]), *of_x], [(2 * scale[1], y, grams[1]), *of_y]
    return gradient(x, of_x), gradient(y, of_y)


def _write_residual(residual: Tensor, x: Tensor, y: Tensor | None, seen: Tensor, num_seen: Tensor) -> None:
    """X Yᵀ - ρ, zero in the rows and columns of unseen classes.  [C, C]"""
    there = seen.to(x.dtype)
    peers = (num_seen - 1).clamp(min=1)
    torch.mm(x, (x if y is None else y).T, out=residual)
    residual.addr_(there, there / peers)
    residual.diagonal().sub_(there * (1 + 1 / peers))


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


def pair_form(
    target: Target, shape: tuple[int, int], *, blocks: Blocks = "own", backend: str = "eager"
) -> tuple[str, str]:
    """How to compute a target at shape (C, F): the form and what computes it.

    The squared form is "pairwise" (C x C matrices) or "closed" (F x F matrices), whichever takes fewer operations in
    its matrix products, forward and backward: closed 4, 8, 8 times C F² for own, cross, all blocks, pairwise 4, 6, 14
    times C² F. The closed form needs the Gram matrix of each side once, whatever the blocks; hence F < C, 3/4 C and
    7/4 C. Measured on a CPU, benchmarks/results/p2p-forms-cpu.csv: at none of
    its 38 shapes is the other form faster by more than 4 %.

    With the Triton backend there are the kernels, which take fewer launches but form G again for every 512 columns of
    the gradient, and matrix products of the library. Its rule counts operations too, with an allowance for the
    launches, and is a prediction that no GPU has confirmed.

    Args:
        target: as in `p2p`.
        shape: (C, F).
        blocks: as in `p2p_blocks`.
        backend: "eager" or "triton", that of the op (resolved).

    Returns:
        Form, "pairwise", "closed" or "softmax", and backend, "eager" or "triton", for `p2p_blocks`.
    """
    num_classes, dim = shape
    by_classes, by_columns = num_classes * num_classes * dim, num_classes * dim * dim
    which = ("own", "cross", "all").index(blocks)
    softmax = target == "softmax" or (target == "auto" and dim < num_classes - 1)
    form, operations = "softmax", (8, 8, 24)[which] * by_classes
    if not softmax:
        form, operations = "pairwise", (4, 6, 14)[which] * by_classes
        closed = (4, 8, 8)[which] * by_columns
        if closed < operations:
            form, operations = "closed", closed
    if backend == "triton":
        forward = ((2, 2, 6) if softmax else (1, 2, 4))[which]
        backward = (2, 4, 8)[which] * (-(-dim // _KERNEL_COLUMNS) + 1)
        if (forward + backward) * by_classes <= operations + _LAUNCH_OPERATIONS:
            return "softmax" if softmax else "pairwise", "triton"
    return form, "eager"


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
        backend: "eager" or "triton" (float32, not for "closed").

    Returns:
        [1] or, for "all", [3] of x's type.
    """
    y = None if y is None else y.contiguous()
    return torch.ops.allnc.p2p_blocks(x.contiguous(), y, seen, blocks, form, float(temperature), backend)[0]


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
        backend: "auto" (fastest that can run), "eager" or "triton", whose kernels are used at shapes where they
            should be faster than matrix products of the library. `all_around` has this loss in one launch with HyCon.

    Returns:
        Scalar, float32 (float64 when x or y is float64); in [0, 4] for "etf".

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, type, range or device, or a backend that
            this op does not have.

    Source: ours, after AllNC (arXiv 2408.07253); softmax form: Jiang et al., Generalized Neural Collapse
        for a Large Number of Classes, ICML 2024.
    """
    check_p2p(x, y, seen, target, temperature)
    dtype = pair_dtype(x, y)
    used = resolve_backend(backend, op="p2p", device=x.device, dtype=dtype, supported=("triton",))
    with torch.autocast(x.device.type, enabled=False):
        if seen is None:
            seen = torch.ones(len(x), dtype=torch.bool, device=x.device)
        own, other = centred_units(x, y, seen, backend=used)
        blocks: Blocks = "own" if y is None else "cross"
        form, computed_by = pair_form(target, (x.shape[0], x.shape[1]), blocks=blocks, backend=used)
        rest = {"form": form, "temperature": temperature, "backend": computed_by}
        return p2p_blocks(own, other, seen, blocks=blocks, **rest).reshape(())


def _resolve_target(target: Target, x: Tensor) -> Target:
    return "softmax" if pair_form(target, (x.shape[0], x.shape[1]))[0] == "softmax" else "etf"
