"""P2P: peer-to-peer alignment of class means and classifier vectors, pair by pair (restores NC2 and NC3).

Over the K classes seen so far, with X = unit(x - mean_c x), Y = unit(y - mean_c y), of a side that is not centred
without its mean subtracted, and the simplex ETF's Gram
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

import math

import torch
from torch import Tensor

from allnc._checks import check_choice
from allnc.ops._common import (
    Backend,
    check_floating,
    check_no_tangent,
    check_same_device,
    check_seen,
    check_shape,
    resolve_backend,
    unit_rows,
)
from allnc.ops._op import differentiable, op
from allnc.ops.p2p.centred_unit import BOTH, Centre, centred_units, pair_dtype
from allnc.ops.p2p.forms import (
    Blocks,
    Target,
    blocks_backward,
    blocks_forward,
    kept_shape,
    kernel_target,
    pair_form,
    pairs_of,
)


def p2p_reference(
    x: Tensor,
    y: Tensor | None = None,
    *,
    target: Target = "auto",
    temperature: float = 0.1,
    seen: Tensor | None = None,
    centre: bool | Centre = True,
) -> Tensor:
    """P2P as the formula is written, pair by pair with C x C matrices and autograd; arguments as in `p2p`."""
    dtype = pair_dtype(x, y)
    target, (centre_x, centre_y) = _resolve_target(target, x), _both(centre)
    keep = torch.ones(len(x), dtype=torch.bool, device=x.device) if seen is None else seen
    own = x.to(dtype)[keep]  # [K, F]
    other = own if y is None else y.to(dtype)[keep]  # [K, F]
    num_seen = len(own)
    if num_seen < 2:
        return (own.sum() + other.sum()) * 0
    X = unit_rows(own - own.mean(0) if centre_x else own)
    Y = X if y is None else unit_rows(other - other.mean(0) if centre_y else other)
    cosines = X @ Y.T  # [K, K]
    same = torch.eye(num_seen, dtype=torch.bool, device=x.device)
    if target == "etf":
        rho = torch.full_like(cosines, -1 / (num_seen - 1)).masked_fill(same, 1)
        return (cosines - rho).square().sum() / num_seen**2
    exponents = cosines if y is None else cosines - (X * Y).sum(1, keepdim=True)
    return temperature * torch.logsumexp((exponents / temperature).masked_fill(same, -torch.inf), 1).mean()


@op("p2p_blocks")
def _p2p_blocks(
    x: Tensor,
    y: Tensor | None,
    seen: Tensor,
    blocks: str,
    form: str,
    temperature: float,
    with_gradient: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Values [B], and what the backward needs: `kept_shape`, or of the Triton kernels lse [B, C] (softmax)."""
    if backend == "triton":
        from allnc.kernels.p2p import p2p_forward

        rest = {"target": kernel_target(form), "temperature": temperature, "blocks": blocks}
        return p2p_forward(x, y, seen, **rest)
    options = {"form": form, "temperature": temperature, "with_gradient": with_gradient}
    with torch.autocast(x.device.type, enabled=False):
        return blocks_forward(x, y, seen, blocks=blocks, **options)


@_p2p_blocks.register_fake
def _(x, y, seen, blocks, form, temperature, with_gradient, backend):
    num_blocks = len(pairs_of(x, y, blocks))
    if backend == "triton":
        return x.new_empty(num_blocks), x.new_empty(num_blocks, len(x) if form == "softmax" else 0)
    return x.new_empty(num_blocks), x.new_empty(kept_shape(x, y, blocks, form, with_gradient))


@op("p2p_blocks_backward")
def p2p_blocks_backward(
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
    else:
        with torch.autocast(x.device.type, enabled=False):
            dx, dy = blocks_backward(grad, kept, x, y, seen, blocks=blocks, form=form)
    return dx, x.new_empty(0) if dy is None else dy


@p2p_blocks_backward.register_fake
def _(grad, kept, x, y, seen, blocks, form, temperature, backend):
    return torch.empty_like(x), x.new_empty(0) if y is None else torch.empty_like(y)


def _save_for_blocks(ctx, inputs, output) -> None:
    x, y, seen, *rest, _, backend = inputs
    ctx.rest = (*rest, backend)
    ctx.save_for_backward(x, y, seen, output[1])
    ctx.mark_non_differentiable(output[1])


def _blocks_autograd(ctx, grad: Tensor, _grad_kept: Tensor | None):
    x, y, seen, kept = ctx.saved_tensors
    dx, dy = p2p_blocks_backward(grad.contiguous(), kept, x, y, seen, *ctx.rest)
    return dx, None if y is None else dy, None, None, None, None, None, None


_differentiable_blocks = differentiable(_p2p_blocks, name="p2p", save=_save_for_blocks, backward=_blocks_autograd)


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
    """P2P of rows that are ready, as of `centred_units`, differentiable once.

    Args:
        x: [C, F] float32 or float64, zero rows for unseen classes.
        y: as x; None for blocks="own".
        seen: [C] bool.
        blocks: "own" for (x, x), "cross" for (x, y), "all" for (x, x), (y, y) and (x, y).
        form: "pairwise", "closed" or "softmax", see `pair_form`.
        temperature: τ of the softmax form.
        backend: "eager" or "triton" (float32, not for "closed"). C++ has all of it in one op, `p2p_values`.

    Returns:
        [1] or, for "all", [3] of x's type.
    """
    y = None if y is None else y.contiguous()
    rest = (blocks, form, float(temperature), needs_gradient(x, y), backend)
    return _differentiable_blocks(x.contiguous(), y, seen, *rest)[0]


@op("p2p_values")
def _p2p_values(
    x: Tensor,
    y: Tensor | None,
    seen: Tensor,
    centre_x: bool,
    centre_y: bool,
    blocks: str,
    form: str,
    temperature: float,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Values [B], and their gradients by x and y [C, F]: of the blocks of a side with itself, of the cross block.

    In C++, from rows that are not centred yet. A gradient that is not asked for has no elements.
    """
    ops, dtype = torch.ops.allnc_C, pair_dtype(x, y)
    own, cross = blocks != "cross", blocks != "own"
    with torch.autocast(x.device.type, enabled=False):
        centre = (centre_x, centre_y)
        u, v, scale = ops.centred_unit_forward(x, y, seen, *centre, dtype)
        v = None if y is None else v
        options = (form == "softmax", temperature, with_gradient)
        values, of_units = ops.p2p_blocks_forward(u, v, seen, own, cross, *options)
        if not with_gradient:
            return values, u.new_empty(0), u.new_empty(0), u.new_empty(0), u.new_empty(0)

        def through_centring(du: Tensor, dv: Tensor | None) -> tuple[Tensor, Tensor]:
            return ops.centred_unit_backward(du, dv, u, v, scale, seen, *centre, dtype, dtype)

        own_x, own_y, cross_x, cross_y = (u.new_empty(0) for _ in range(4))
        if own:
            own_x, own_y = through_centring(of_units[0], None if y is None else of_units[1])
        if cross:
            cross_x, cross_y = through_centring(of_units[-2], of_units[-1])
        return values, own_x, own_y, cross_x, cross_y


@_p2p_values.register_fake
def _(x, y, seen, centre_x, centre_y, blocks, form, temperature, with_gradient):
    dtype = pair_dtype(x, y)

    def empty(wanted: bool) -> Tensor:
        return x.new_empty(x.shape if wanted and with_gradient else 0, dtype=dtype)

    own, cross = blocks != "cross", blocks != "own"
    values = x.new_empty(len(pairs_of(x, y, blocks)), dtype=dtype)
    return values, empty(own), empty(own and y is not None), empty(cross), empty(cross)


def _save_for_values(ctx, inputs, output) -> None:
    x, y, _, _, _, ctx.blocks, *_ = inputs
    ctx.types = (x.dtype, None if y is None else y.dtype)
    origins = (side if needed else None for side, needed in zip((x, y), ctx.needs_input_grad, strict=False))
    ctx.save_for_backward(*origins, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _values_autograd(ctx, grad: Tensor, *_unused: Tensor | None):
    _, _, own_x, own_y, cross_x, cross_y = ctx.saved_tensors
    x_type, y_type = ctx.types
    if ctx.blocks == "own":
        dx, dy = own_x * grad[0], own_y * grad[-1]
    elif ctx.blocks == "cross":
        dx, dy = cross_x * grad[0], cross_y * grad[0]
    else:
        dx = torch.addcmul(own_x * grad[0], cross_x, grad[2])
        dy = torch.addcmul(own_y * grad[1], cross_y, grad[2])
    return dx.to(x_type), None if y_type is None else dy.to(y_type), *(None,) * 7


_differentiable_values = differentiable(_p2p_values, name="p2p", save=_save_for_values, backward=_values_autograd)


def values_in_cpp(
    x: Tensor,
    y: Tensor | None,
    seen: Tensor,
    *,
    blocks: Blocks,
    form: str,
    temperature: float,
    centre: Centre = BOTH,
) -> Tensor:
    """`p2p_values` in C++ in a form that it has, "pairwise" or "softmax"."""
    rest = (*centre, blocks, form, float(temperature), needs_gradient(x, y))
    return _differentiable_values(x.contiguous(), None if y is None else y.contiguous(), seen, *rest)[0]


def p2p_values(
    x: Tensor,
    y: Tensor | None,
    seen: Tensor,
    *,
    blocks: Blocks,
    target: Target,
    temperature: float,
    backend: str,
    centre: Centre = BOTH,
) -> Tensor:
    """P2P of several blocks at once, from rows as they are: `p2p` of arguments that `check_p2p` has passed.

    Args:
        x: [C, F] floating, of any length and centre.
        y: as x; None for blocks="own".
        seen: [C] bool.
        blocks: "own" for (x, x), "cross" for (x, y), "all" for (x, x), (y, y) and (x, y).
        target, temperature: as in `p2p`.
        backend: "eager", "cpp" or "triton" (resolved).
        centre: whether x, and whether y, is centred.

    Returns:
        [1] or, for "all", [3] in the accumulation type of x and y.
    """
    with torch.autocast(x.device.type, enabled=False):
        form, computed_by = pair_form(target, (x.shape[0], x.shape[1]), blocks=blocks, backend=backend)
        if computed_by == "cpp":
            return values_in_cpp(x, y, seen, blocks=blocks, form=form, temperature=temperature, centre=centre)
        own, other = centred_units(x, y, seen, backend=backend, centre=centre)
        rest = {"form": form, "temperature": temperature, "backend": computed_by}
        return p2p_blocks(own, other, seen, blocks=blocks, **rest)


def needs_gradient(x: Tensor, y: Tensor | None) -> bool:
    """Whether autograd will ask for a gradient of x or y."""
    return torch.is_grad_enabled() and (x.requires_grad or (y is not None and y.requires_grad))


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
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be > 0; got {temperature}")
    check_same_device(x=x, y=y, seen=seen)
    check_no_tangent("p2p", x, y)


def check_centre_weights(centre_weights: object) -> None:
    """Raise TypeError unless it is True or False; anything else would count as one of them, or fail in an op."""
    if not isinstance(centre_weights, bool):
        raise TypeError(f"centre_weights must be True or False; got {centre_weights!r}")


def p2p(
    x: Tensor,
    y: Tensor | None = None,
    *,
    target: Target = "auto",
    temperature: float = 0.1,
    seen: Tensor | None = None,
    centre: bool | Centre = True,
    backend: Backend = "auto",
) -> Tensor:
    """Peer-to-peer loss: pulls the cosines between the rows of x and of y towards those of a simplex ETF.

    Both are centred over the seen classes and normalised here, whatever their lengths: a row that coincides with the
    centre to rounding, or all rows where every entry is below 8e-31, are zero rows without gradient. With fewer than
    two seen classes the loss and its gradient are 0.

    What is centred is compared as if a part that all rows share did not matter. Nor does it in a linear classifier,
    whose softmax is the same without it. In a normalised one it does: give `centre=(True, False)` for class means with
    its vectors, which are zero in sum in a simplex ETF, and are pulled there.

    Args:
        x: [C, F] float16, bfloat16, float32 or float64; class means or classifier vectors.
        y: [C, F], the peers of x; None for x with itself. Its type may differ from x's.
        target: "etf" (squared distance to the simplex ETF's cosines), "softmax" (separation, for F < C - 1,
            where no simplex ETF exists) or "auto": "etf" if F >= C - 1, else "softmax".
        temperature: τ > 0 of the softmax form, on cosines (no unit).
        seen: [C] bool, classes that take part. Default: all.
        centre: whether both, or (x, y) each, are centred; False normalises rows as they are, and a row shorter than
            1e-9 of the longest is a zero row.
        backend: "auto" (fastest that can run), "eager", "cpp" (CPU) or "triton". C++ and the kernels are used at shapes
            where they should be faster than matrix products of the library. `all_around` has this loss in one launch
            with HyCon.

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
    used = resolve_backend(backend, op="p2p", device=x.device, dtype=dtype, supported=("cpp", "triton"))
    if seen is None:
        seen = torch.ones(len(x), dtype=torch.bool, device=x.device)
    options = {"target": target, "temperature": temperature, "backend": used, "centre": _both(centre)}
    return p2p_values(x, y, seen, blocks="own" if y is None else "cross", **options).reshape(())


def _both(centre: bool | Centre) -> Centre:
    """Return whether x, and whether y, is centred."""
    if isinstance(centre, bool):
        return centre, centre
    if not isinstance(centre, tuple) or [*map(type, centre)] != [bool, bool]:
        raise TypeError(f"centre must be True, False or two of them, (x, y); got {centre!r}")
    return centre


def _resolve_target(target: Target, x: Tensor) -> Target:
    return "softmax" if pair_form(target, (x.shape[0], x.shape[1]))[0] == "softmax" else "etf"
