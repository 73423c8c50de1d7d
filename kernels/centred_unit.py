"""Rows centred over the classes seen and scaled to unit length, for one or two matrices, forward and backward.

    m = (1/K) Σ_c x_c,   u_c = r_c (x_c - m),   r_c = 1/|x_c - m|, or 0 where |x_c - m| <= noise
    dc_c = r_c (du_c - u_c (u_c·du_c)),   dx_c = dc_c - (1/K) Σ_c' dc_c'

or, of a side that is not centred, m = 0 and dx_c = dc_c. Sums are over the K classes seen; rows of the others are never
read and their results are zero. A row as near to the centre as rounding puts it, noise = 8 ε max_c |x_c|, has no
direction and no gradient; nor has one of a side that is not centred up to noise = 2^-30 max_c |x_c|, nor any where
max_c |x_c| is below 2^-100. Lengths are formed of rows times a power of two, so that no square overflows or vanishes.

Legend: C classes, F columns; x [C, F] and, if there is a second matrix, y [C, F], each in a type of its own; side 0
is x, side 1 is y.

Both directions need one sum over all rows before any row can be finished, hence two launches: the first adds the rows
of each of up to 64 shares of the classes, the second adds these partial sums in order (no atomics: equal calls are
equal bit for bit) and finishes BLOCK_C rows a program. A program holds whole rows, padded to WIDTH columns.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from allnc.kernels._common import device_guard, launch_options, narrow, near_one, padded_dim, pointer
from allnc.kernels.p2p import count_seen

SHARES = 64
_NOISE = tl.constexpr(8 * torch.finfo(torch.float32).eps)
_SHORTEST = tl.constexpr(2.0**-30)  # as in allnc/ops/p2p/centred_unit.py


class Sides(NamedTuple):
    """The same of both sides, [C, F] each; tensors at a launch, pointers in a kernel. The first, twice, of one side."""

    x: Any
    y: Any


@triton.jit
def load_rows(sides, side, offsets, mask):
    """Rows of one side as float32, zeros where masked."""
    if side == 0:
        rows = tl.load(sides.x + offsets, mask=mask, other=0.0).to(tl.float32)
    else:
        rows = tl.load(sides.y + offsets, mask=mask, other=0.0).to(tl.float32)
    return rows


@triton.jit
def seen_offsets(seen_ptr, start, C, F: tl.constexpr, BLOCK_C: tl.constexpr, WIDTH: tl.constexpr):
    """Row numbers, offsets and mask of the columns of the classes seen among BLOCK_C rows."""
    rows = start + tl.arange(0, BLOCK_C)
    columns = tl.arange(0, WIDTH)
    in_rows = tl.load(seen_ptr + rows, mask=rows < C, other=0) != 0
    offsets = rows.to(tl.int64)[:, None] * F + columns[None, :]
    return rows, offsets, in_rows[:, None] & (columns < F)[None, :]


@triton.jit
def added_shares(sum_ptr, num_shares, F: tl.constexpr, WIDTH: tl.constexpr):
    """Σ of the partial sums of one side.  [WIDTH]"""
    columns = tl.arange(0, WIDTH)
    total = tl.zeros([WIDTH], dtype=tl.float32)
    for share in range(num_shares):
        total += tl.load(sum_ptr + share * F + columns, mask=columns < F, other=0.0)
    return total


@triton.jit
def centre_of(total, seen_ptr, side, C, CENTRE_X: tl.constexpr, CENTRE_Y: tl.constexpr):
    """The mean over the classes seen of rows that add up to `total`, or zeros of a side that is not centred."""
    centred = ((side == 0) & CENTRE_X) | ((side == 1) & CENTRE_Y)
    return tl.where(centred, total / tl.maximum(count_seen(seen_ptr, C), 1.0), 0.0), centred


@triton.jit
def unit_gradient(du, u, scale_ptr, side, rows, offsets, mask, C):
    """dc of some rows, and zeros where masked."""
    u_rows = load_rows(u, side, offsets, mask)
    du_rows = load_rows(du, side, offsets, mask)
    scale = tl.load(scale_ptr + side * C + rows, mask=rows < C, other=0.0)
    return scale[:, None] * (du_rows - u_rows * tl.sum(u_rows * du_rows, 1)[:, None])


@triton.jit(do_not_specialize=["C", "num_shares", "share_rows"])
def unit_sums_kernel(
    x,
    seen_ptr,
    sum_ptr,
    length_ptr,
    C,
    num_shares,
    share_rows,
    F: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Each share's sum of rows [sides, shares, F] and largest length [sides, shares]."""
    program = tl.program_id(0)
    side = program // num_shares
    first = program % num_shares * share_rows
    total = tl.zeros([WIDTH], dtype=tl.float32)
    largest = tl.zeros([BLOCK_C], dtype=tl.float32)
    for start in range(first, tl.minimum(first + share_rows, C), BLOCK_C):
        _, offsets, mask = seen_offsets(seen_ptr, start, C, F, BLOCK_C, WIDTH)
        rows = load_rows(x, side, offsets, mask)
        total += tl.sum(rows, 0)
        factor, _ = near_one(tl.max(tl.max(tl.abs(rows), 1), 0))
        scaled = rows * factor
        largest = tl.maximum(largest, tl.sqrt(tl.sum(scaled * scaled, 1)) / factor)
    columns = tl.arange(0, WIDTH)
    tl.store(sum_ptr + program * F + columns, total, mask=columns < F)
    tl.store(length_ptr + program, tl.max(largest, 0))


@triton.jit(do_not_specialize=["C", "num_shares"])
def unit_rows_kernel(
    x,
    seen_ptr,
    sum_ptr,
    length_ptr,
    u,
    scale_ptr,
    C,
    num_shares,
    F: tl.constexpr,
    CENTRE_X: tl.constexpr,
    CENTRE_Y: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WIDTH: tl.constexpr,
    SHARES: tl.constexpr,
):
    """u (v for the second side) of BLOCK_C rows, and r [sides, C]."""
    num_panels = tl.cdiv(C, BLOCK_C)
    side = tl.program_id(0) // num_panels
    shares = tl.arange(0, SHARES)
    length_ptr += side * num_shares
    largest = tl.max(tl.load(length_ptr + shares, mask=shares < num_shares, other=0.0), 0)
    total = added_shares(sum_ptr + side * num_shares * F, num_shares, F, WIDTH)
    centre, centred = centre_of(total, seen_ptr, side, C, CENTRE_X, CENTRE_Y)

    rows, offsets, mask = seen_offsets(seen_ptr, tl.program_id(0) % num_panels * BLOCK_C, C, F, BLOCK_C, WIDTH)
    factor, short = near_one(largest)
    # Scaled before they are subtracted, because the difference of two large rows may overflow.
    scaled = load_rows(x, side, offsets, mask) * factor - (centre * factor)[None, :]
    scaled = tl.where(mask, scaled, 0.0)
    squared = tl.sum(scaled * scaled, 1)
    noise = largest * factor * tl.where(centred, _NOISE, _SHORTEST)
    has_direction = squared > tl.where(short, float("inf"), noise * noise)
    scale = tl.where(has_direction, tl.rsqrt(tl.where(has_direction, squared, 1.0)), 0.0)
    out_ptr = u.x
    if side == 1:
        out_ptr = u.y
    inside = (rows < C)[:, None] & (tl.arange(0, WIDTH) < F)[None, :]
    tl.store(out_ptr + offsets, scaled * scale[:, None], mask=inside)
    tl.store(scale_ptr + side * C + rows, scale * factor, mask=rows < C)


@triton.jit(do_not_specialize=["C", "num_shares", "share_rows"])
def unit_bwd_sums_kernel(
    du,
    u,
    scale_ptr,
    seen_ptr,
    sum_ptr,
    C,
    num_shares,
    share_rows,
    F: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Each share's sum of dc, [sides, shares, F]."""
    program = tl.program_id(0)
    side = program // num_shares
    first = program % num_shares * share_rows
    total = tl.zeros([WIDTH], dtype=tl.float32)
    for start in range(first, tl.minimum(first + share_rows, C), BLOCK_C):
        rows, offsets, mask = seen_offsets(seen_ptr, start, C, F, BLOCK_C, WIDTH)
        total += tl.sum(unit_gradient(du, u, scale_ptr, side, rows, offsets, mask, C), 0)
    columns = tl.arange(0, WIDTH)
    tl.store(sum_ptr + program * F + columns, total, mask=columns < F)


@triton.jit(do_not_specialize=["C", "num_shares"])
def unit_bwd_rows_kernel(
    du,
    u,
    scale_ptr,
    seen_ptr,
    sum_ptr,
    dx,
    C,
    num_shares,
    F: tl.constexpr,
    CENTRE_X: tl.constexpr,
    CENTRE_Y: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """dx (dy for the second side) of BLOCK_C rows."""
    num_panels = tl.cdiv(C, BLOCK_C)
    side = tl.program_id(0) // num_panels
    total = added_shares(sum_ptr + side * num_shares * F, num_shares, F, WIDTH)
    centre, _ = centre_of(total, seen_ptr, side, C, CENTRE_X, CENTRE_Y)
    rows, offsets, mask = seen_offsets(seen_ptr, tl.program_id(0) % num_panels * BLOCK_C, C, F, BLOCK_C, WIDTH)
    dc = unit_gradient(du, u, scale_ptr, side, rows, offsets, mask, C)
    dx_rows = tl.where(mask, dc - centre[None, :], 0.0)
    inside = (rows < C)[:, None] & (tl.arange(0, WIDTH) < F)[None, :]
    if side == 0:
        tl.store(dx.x + offsets, narrow(dx_rows, dx.x.dtype.element_ty), mask=inside)
    else:
        tl.store(dx.y + offsets, narrow(dx_rows, dx.y.dtype.element_ty), mask=inside)


def unit_constants(features: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Compile-time arguments, but SHARES, and launch options: tiles of 8192 elements, 32 registers a thread."""
    width = padded_dim(features)
    constants = {"F": features, "BLOCK_C": max(1, min(64, 8192 // width)), "WIDTH": width}
    return constants, launch_options(num_warps=8, num_stages=2)


def centres(centre: tuple[bool, bool]) -> dict[str, Any]:
    """Compile-time arguments that say which side is centred."""
    return {"CENTRE_X": centre[0], "CENTRE_Y": centre[1]}


def shares_of(num_classes: int, block_c: int) -> tuple[int, int]:
    """Number of shares of the classes and rows of a share, a multiple of BLOCK_C."""
    panels = triton.cdiv(num_classes, block_c)
    share_rows = triton.cdiv(panels, SHARES) * block_c
    return triton.cdiv(num_classes, share_rows), share_rows


def centred_unit_forward(
    x: Tensor, y: Tensor | None, seen: Tensor, centre: tuple[bool, bool] = (True, True)
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Centred unit rows of x and y in two launches, by the formula at the head.

    Args:
        x: [C, F] float16, bfloat16 or float32.
        y: [C, F], its type may differ from x's; or None.
        seen: [C] bool.
        centre: whether x, and whether y, is centred.

    Returns:
        u and v [C, F] float32, v None where y is, and r [1 or 2, C] float32 for the backward.
    """
    x, seen = x.contiguous(), seen.contiguous()
    y = None if y is None else y.contiguous()
    (num_classes, features), sides = x.shape, 1 if y is None else 2
    constants, options = unit_constants(features)
    num_shares, share_rows = shares_of(num_classes, constants["BLOCK_C"])
    like = {"dtype": torch.float32, "device": x.device}
    sums = torch.empty((sides, num_shares, features), **like)
    lengths = torch.empty((sides, num_shares), **like)
    u, v = torch.empty(x.shape, **like), None if y is None else torch.empty(x.shape, **like)
    scale = torch.empty((sides, num_classes), **like)
    with device_guard(x):
        unit_sums_kernel[(sides * num_shares,)](
            Sides(x, pointer(y, x)), seen, sums, lengths, num_classes, num_shares, share_rows, **constants, **options
        )
        unit_rows_kernel[(sides * triton.cdiv(num_classes, constants["BLOCK_C"]),)](
            Sides(x, pointer(y, x)), seen, sums, lengths, Sides(u, pointer(v, u)), scale, num_classes, num_shares,
            **constants, **centres(centre), SHARES=SHARES, **options,
        )  # fmt: skip
    return u, v, scale


def centred_unit_backward(
    du: Tensor,
    dv: Tensor | None,
    u: Tensor,
    v: Tensor | None,
    scale: Tensor,
    seen: Tensor,
    centre: tuple[bool, bool],
    x_dtype: torch.dtype,
    y_dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of `centred_unit_forward` with respect to x and y in two launches.

    Args:
        du, dv: [C, F] float32, dL/du and dL/dv; dv None where v is.
        u, v, scale, seen, centre: results and arguments of the forward.
        x_dtype, y_dtype: types of x and y, and of their gradients.

    Returns:
        dx and dy [C, F], zero rows for classes not seen; dy None where v is.
    """
    du, seen = du.contiguous(), seen.contiguous()
    dv = None if dv is None else dv.contiguous()
    (num_classes, features), sides = u.shape, len(scale)
    constants, options = unit_constants(features)
    num_shares, share_rows = shares_of(num_classes, constants["BLOCK_C"])
    sums = torch.empty((sides, num_shares, features), dtype=torch.float32, device=u.device)
    dx = torch.empty(u.shape, dtype=x_dtype, device=u.device)
    dy = None if v is None else torch.empty(u.shape, dtype=y_dtype, device=u.device)
    inputs = (Sides(du, pointer(dv, du)), Sides(u, pointer(v, u)), scale, seen, sums)
    with device_guard(u):
        unit_bwd_sums_kernel[(sides * num_shares,)](
            *inputs, num_classes, num_shares, share_rows, **constants, **options
        )
        unit_bwd_rows_kernel[(sides * triton.cdiv(num_classes, constants["BLOCK_C"]),)](
            *inputs, Sides(dx, pointer(dy, dx)), num_classes, num_shares, **centres(centre), **constants, **options
        )
    return dx, dy
