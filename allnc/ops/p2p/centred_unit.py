"""Rows centred over the classes seen and scaled to unit length: what P2P compares.

    m = (1/K) Σ_c x_c, or 0 of a side that is not centred,   u_c = (x_c - m) / |x_c - m|

with the sum over the K classes seen. In torch operations, or for two matrices at once in C++ or in two Triton launches.

Legend: C classes, F features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from allnc.ops._common import LEAST_ENTRY, accumulation_dtype, normal_scale
from allnc.ops._op import differentiable, op

Centre = tuple[bool, bool]
BOTH: Centre = (True, True)
SHORTEST = 2.0**-30  # of the longest row's length, from which on a row that is not centred has a direction


def centred_unit(x: Tensor, seen: Tensor, centre: bool = True) -> Tensor:
    """Rows of x minus the mean of the seen rows, at unit length and differentiable; zero rows if not seen.

    A row that coincides with the centre to rounding has no direction: it becomes a zero row with zero
    gradient, not a unit row of amplified noise. So do all rows where every entry is below LEAST_ENTRY.

    Args:
        x: [C, F] floating, of any size; rows of unseen classes are never read into the result, whatever they hold.
        seen: [C] bool.
        centre: False leaves the mean where it is; then rows without a direction are those shorter than SHORTEST of the
            longest.

    Returns:
        [C, F] in the accumulation type of x (float32, or float64 for float64 x).
    """
    x = x.to(accumulation_dtype(x.dtype)).where(seen[:, None], 0)  # [C, F]
    largest = x.detach().abs().amax()
    x = x * normal_scale(largest)  # one scale for all rows, because they are centred together
    centred = (x - x.sum(0) / seen.sum().clamp(min=1)).where(seen[:, None], 0) if centre else x
    squared = centred.square().sum(1, keepdim=True)  # [C, 1]
    least = 8 * torch.finfo(x.dtype).eps if centre else SHORTEST
    noise = least * torch.linalg.vector_norm(x.detach(), dim=1).amax()
    has_direction = (squared > noise.square()) & ~(largest < LEAST_ENTRY)  # with NaN neither
    return (centred * squared.where(has_direction, 1).rsqrt().where(has_direction, 0)).contiguous()


@op("centred_unit")
def _centred_unit(
    x: Tensor, y: Tensor | None, seen: Tensor, centre_x: bool, centre_y: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Unit rows u [C, F], v (as u, or [0]) and 1 / length of the centred rows, 0 for rows of zeros [sides, C]."""
    if backend == "cpp":
        return torch.ops.allnc_C.centred_unit_forward(x, y, seen, centre_x, centre_y, pair_dtype(x, y))
    from allnc.kernels.centred_unit import centred_unit_forward

    u, v, scale = centred_unit_forward(x, y, seen, (centre_x, centre_y))
    return u, scale.new_empty(0) if v is None else v, scale


@_centred_unit.register_fake
def _(x, y, seen, centre_x, centre_y, backend):
    u = x.new_empty(x.shape, dtype=pair_dtype(x, y))
    return u, u.new_empty(0 if y is None else x.shape), u.new_empty(1 if y is None else 2, len(x))


@op("centred_unit_backward")
def _centred_unit_backward(
    du: Tensor,
    dv: Tensor | None,
    u: Tensor,
    v: Tensor | None,
    scale: Tensor,
    seen: Tensor,
    centre_x: bool,
    centre_y: bool,
    x_dtype: torch.dtype,
    y_dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor]:
    if backend == "cpp":
        centre = (centre_x, centre_y)
        return torch.ops.allnc_C.centred_unit_backward(du, dv, u, v, scale, seen, *centre, x_dtype, y_dtype)
    from allnc.kernels.centred_unit import centred_unit_backward

    dx, dy = centred_unit_backward(du, dv, u, v, scale, seen, (centre_x, centre_y), x_dtype, y_dtype)
    return dx, du.new_empty(0, dtype=y_dtype) if dy is None else dy


@_centred_unit_backward.register_fake
def _(du, dv, u, v, scale, seen, centre_x, centre_y, x_dtype, y_dtype, backend):
    return u.new_empty(u.shape, dtype=x_dtype), u.new_empty(0 if v is None else u.shape, dtype=y_dtype)


def _save_for_unit(ctx, inputs, output) -> None:
    x, y, seen, *ctx.centre, ctx.backend = inputs
    u, v, scale = output
    ctx.types = (x.dtype, x.dtype if y is None else y.dtype)
    ctx.pair = y is not None
    ctx.save_for_backward(u, v, scale, seen)
    ctx.mark_non_differentiable(scale)


def _unit_autograd(ctx, du: Tensor, dv: Tensor, _dscale: Tensor | None):
    u, v, scale, seen = ctx.saved_tensors
    pair = (dv, v) if ctx.pair else (None, None)
    rest = (*ctx.centre, *ctx.types, ctx.backend)
    dx, dy = _centred_unit_backward(du, pair[0], u, pair[1], scale, seen, *rest)
    return dx, dy if ctx.pair else None, None, None, None, None


_differentiable_unit = differentiable(_centred_unit, name="p2p", save=_save_for_unit, backward=_unit_autograd)


def centred_units(
    x: Tensor, y: Tensor | None, seen: Tensor, *, backend: str, centre: Centre = BOTH
) -> tuple[Tensor, Tensor | None]:
    """`centred_unit` of x and of y in their common accumulation type: torch operations, C++ or two Triton launches.

    Args:
        x: [C, F] floating.
        y: as x, of any floating type; or None.
        seen: [C] bool.
        backend: "eager", "cpp" (CPU) or "triton" (resolved; no float64).
        centre: whether x, and whether y, is centred.
    """
    if backend != "eager":
        y = None if y is None else y.contiguous()
        u, v, _ = _differentiable_unit(x.contiguous(), y, seen, *centre, backend)
        return u, None if y is None else v
    dtype = pair_dtype(x, y)
    u = centred_unit(x.to(dtype), seen, centre[0])
    return u, None if y is None else centred_unit(y.to(dtype), seen, centre[1])


def pair_dtype(x: Tensor, y: Tensor | None) -> torch.dtype:
    """The accumulation type of x and y together."""
    dtype = accumulation_dtype(x.dtype)
    return dtype if y is None else torch.promote_types(dtype, accumulation_dtype(y.dtype))
