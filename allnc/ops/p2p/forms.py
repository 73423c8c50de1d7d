"""How P2P is computed of centred unit rows: which form at which shape, and its values and gradients.

    pairwise  rows of the C x C residuals X Yᵀ - ρ, some at a time
    softmax   rows of the C x C softmax weights, some at a time
    closed    the squared form from F x F matrices, without X Yᵀ

A gradient needs the residuals, or the weights, that the value is made of: the first two forms go on to it while they
are at hand, before the gradient of the value is known, and the backward multiplies by that. In torch operations here,
or in C++ (csrc/cpu/p2p.cpp), which forms one triangle of the residuals of a side with itself.

Legend: C classes, F features, K classes seen, B blocks.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Target = Literal["auto", "etf", "softmax"]
Blocks = Literal["own", "cross", "all"]

# Entries of the C x C matrix that torch operations hold at a time: 16 MB in float32, whatever C is.
_CHUNK_ENTRIES = 1 << 22

# Predictions for GPUs, see `pair_form`: columns of the gradient for which the kernels compute G once, and what some
# thirty launches of small torch operations (0.1 ms) are worth at 30 TFLOP/s.
_KERNEL_COLUMNS = 512
_LAUNCH_OPERATIONS = 3 * 10**9
# What the closed form's small torch operations (0.35 ms) are worth at a core's 100 to 150 GFLOP/s.
_CLOSED_OPERATIONS = 5 * 10**7


def pair_form(
    target: Target, shape: tuple[int, int], *, blocks: Blocks = "own", backend: str = "eager"
) -> tuple[str, str]:
    """How to compute a target at shape (C, F): the form and what computes it.

    The squared form is "pairwise" (C x C matrices) or "closed" (F x F matrices), whichever takes fewer operations in
    its matrix products, forward and backward: closed 4, 8, 8 times C F² for own, cross, all blocks, pairwise 4, 6, 14
    times C² F. The closed form needs the Gram matrix of each side once, whatever the blocks; hence F < C, 3/4 C and
    7/4 C. Measured on a CPU, one thread (benchmarks/results/p2p-forms-cpu.csv, centring included): in none of 36 cases,
    twelve shapes from C = 10, F = 64 to C = 8142, F = 2048 and three kinds of blocks, is the other form faster by more
    than 5 %.

    With the C++ backend pairwise takes 3, 6, 12 times C² F, and closed still is some sixty torch operations, which
    makes it the slower one of small matrices. In none of the same 36 cases is the other form faster, and what is chosen
    is 1.2 to 350 times as fast as the formula by autograd. At C = 100, 400 and 1000 with nine F from C/2 to 2 C the
    other form was nowhere faster by more than 2 %.

    With the Triton backend there are the kernels, which take fewer launches but form G again for every 512 columns of
    the gradient, and matrix products of the library. Its rule counts operations too, with an allowance for the
    launches, and is a prediction that no GPU has confirmed.

    Args:
        target: as in `p2p`.
        shape: (C, F).
        blocks: as in `p2p_blocks`.
        backend: "eager", "cpp" or "triton", that of the op (resolved).

    Returns:
        Form, "pairwise", "closed" or "softmax", and what computes it, "eager", "cpp" or "triton", for `p2p_blocks`.
    """
    num_classes, dim = shape
    by_classes, by_columns = num_classes * num_classes * dim, num_classes * dim * dim
    which = ("own", "cross", "all").index(blocks)
    softmax = target == "softmax" or (target == "auto" and dim < num_classes - 1)
    form, operations = "softmax", (6, 6, 18)[which] * by_classes
    if not softmax:
        form, operations = "pairwise", ((3, 6, 12) if backend == "cpp" else (4, 6, 14))[which] * by_classes
        closed = (4, 8, 8)[which] * by_columns + (_CLOSED_OPERATIONS if backend == "cpp" else 0)
        if closed < operations:
            form, operations = "closed", closed
    if backend == "triton":
        forward = ((2, 2, 6) if softmax else (1, 2, 4))[which]
        backward = (2, 4, 8)[which] * (-(-dim // _KERNEL_COLUMNS) + 1)
        if (forward + backward) * by_classes <= operations + _LAUNCH_OPERATIONS:
            return "softmax" if softmax else "pairwise", "triton"
    return form, "cpp" if backend == "cpp" and form != "closed" else "eager"


def kernel_target(form: str) -> Literal["etf", "softmax"]:
    """What the Triton kernels call a form."""
    return "softmax" if form == "softmax" else "etf"


def pairs_of(x: Tensor, y: Tensor | None, blocks: str) -> list[tuple[Tensor, Tensor | None]]:
    """The pairs of the blocks; None where a side meets itself."""
    if y is None:
        return [(x, None)]
    return [(x, y)] if blocks == "cross" else [(x, None), (y, None), (x, y)]


def kept_shape(x: Tensor, y: Tensor | None, blocks: str, form: str, with_gradient: bool) -> tuple[int, ...]:
    """What the forward leaves for the backward: Gram matrices, or a gradient for each side of each block."""
    num_classes, dim = x.shape
    if form == "closed":
        return (len(_sides(x, y)), dim, dim)
    num_gradients = sum(1 if other is None else 2 for _, other in pairs_of(x, y, blocks))
    return (num_gradients, num_classes if with_gradient else 0, dim)


def blocks_forward(
    x: Tensor,
    y: Tensor | None,
    seen: Tensor,
    *,
    blocks: str,
    form: str,
    temperature: float,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Values [B], and what the backward needs, see `kept_shape`."""
    num_seen = seen.sum().to(x.dtype)
    kept = x.new_zeros(kept_shape(x, y, blocks, form, with_gradient))
    if form == "closed":
        for gram, side in zip(kept, _sides(x, y), strict=True):
            torch.mm(side.T, side, out=gram)
        total = _closed_form_sums(kept, x, y, num_seen, blocks)
    else:
        gradients = iter(kept)
        totals = []
        for own, other in pairs_of(x, y, blocks):
            dx = next(gradients)
            dy = dx if other is None else next(gradients)
            rest = (form, temperature, (dx, dy) if with_gradient else None)
            totals.append(_visit_pair(own, other, seen, num_seen, *rest))
        total = torch.stack(totals)
        if with_gradient:
            kept.mul_(_gradient_scale(num_seen, form))
    value = temperature * total / num_seen.clamp(min=1) if form == "softmax" else total / num_seen.square()
    return value.where(num_seen >= 2, 0), kept


def blocks_backward(
    grad: Tensor, kept: Tensor, x: Tensor, y: Tensor | None, seen: Tensor, *, blocks: str, form: str
) -> tuple[Tensor, Tensor | None]:
    """Gradients of x and y from those of the values [B]."""
    if form == "closed":
        num_seen = seen.sum().to(x.dtype)
        scale = grad * _gradient_scale(num_seen, form)  # [B]
        return _closed_backward(scale, kept, x, y, seen, num_seen, blocks)
    if y is None:
        return kept[0] * grad, None
    if blocks == "cross":
        return kept[0] * grad, kept[1] * grad
    return (kept[0] * grad[0]).addcmul_(kept[2], grad[2]), (kept[1] * grad[1]).addcmul_(kept[3], grad[2])


def _gradient_scale(num_seen: Tensor, form: str) -> Tensor:
    """The factor of what products with residuals or softmax weights add up to; 0 below two classes."""
    scale = 1 / num_seen.clamp(min=1)
    return (scale if form == "softmax" else 2 * scale.square()).where(num_seen >= 2, 0)


def _visit_pair(
    x: Tensor,
    y: Tensor | None,
    seen: Tensor,
    num_seen: Tensor,
    form: str,
    temperature: float,
    gradients: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """Σ (X_c·Y_c' - ρ_cc')² or, of the softmax form, Σ_c lse_c; adds their gradients, up to a factor, to `gradients`.

    With y None x meets itself, and the second gradient is not used.
    """
    other = x if y is None else y
    total = x.new_zeros(())
    for start in range(0, len(x), max(1, _CHUNK_ENTRIES // len(x))):
        rows = slice(start, min(start + max(1, _CHUNK_ENTRIES // len(x)), len(x)))
        matrix = x[rows] @ other.T  # [rows, C]
        if form == "softmax":
            total += _softmax_(matrix, rows, seen, num_seen, temperature, with_other=y is not None)
        else:
            total += _residual_(matrix, rows, seen, num_seen)
        if gradients is not None:
            dx, dy = gradients
            dx[rows].addmm_(matrix, other)
            if y is not None:
                dy.addmm_(matrix.T, x[rows])
            elif form == "softmax":
                dx.addmm_(matrix.T, x[rows])
            else:
                dx[rows].mul_(2)  # residuals are symmetric
    return total


def _residual_(products: Tensor, rows: slice, seen: Tensor, num_seen: Tensor) -> Tensor:
    """Subtracts ρ from products [rows, C] where both classes are seen; the sum of squares."""
    there = seen.to(products.dtype)
    peers = (num_seen - 1).clamp(min=1)
    products.addr_(there[rows], there / peers)
    products[:, rows].diagonal().sub_(there[rows] * (1 + 1 / peers))
    return torch.linalg.vector_norm(products).square()


def _softmax_(
    products: Tensor, rows: slice, seen: Tensor, num_seen: Tensor, temperature: float, *, with_other: bool
) -> Tensor:
    """Turns products [rows, C] into temperature times the gradient by them of Σ lse, which it returns.

    With another side, the product with the class's own vector there is subtracted from the exponents.
    """
    own = products[:, rows].diagonal()  # [rows], a view
    used = seen[rows] & (num_seen >= 2)  # [rows]
    of_own = own / temperature if with_other else torch.zeros_like(own)
    own.fill_(-torch.inf)
    products.div_(temperature).masked_fill_(~seen, -torch.inf)
    lse = torch.logsumexp(products, 1).where(used, 0)  # without a peer -inf
    products.sub_(lse[:, None]).exp_().mul_(used[:, None])
    if with_other:
        own.sub_(used.to(own.dtype))
    return (lse - of_own).where(used, 0).sum()


def _sides(x: Tensor, y: Tensor | None) -> list[Tensor]:
    return [x] if y is None else [x, y]


def _closed_form_sums(grams: Tensor, x: Tensor, y: Tensor | None, num_seen: Tensor, blocks: str) -> Tensor:
    """Σ (X_c·Y_c' - ρ_cc')² of each block.  [B]"""
    peers = (num_seen - 1).clamp(min=1)
    totals = []
    for own, other in pairs_of(x, y, blocks):
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
