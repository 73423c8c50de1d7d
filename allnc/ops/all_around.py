"""All-around: HyCon and the three P2P terms of AllNC in one call, and one launch where Triton runs.

The rows of [Z; μ; M; W] have one Gram matrix. HyCon needs its blocks Z·Zᵀ and Z·μᵀ, P2P its blocks M·Mᵀ, W·Wᵀ and
M·Wᵀ; none needs another's result, so all of them are tiles of one grid. Elsewhere the losses are computed one after
the other by the ops `hycon_lse` and `p2p_pair`; the values are the same.

Legend: N activations, D columns of the projection, C classes, F features.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from allnc.ops._common import (
    Backend,
    accumulation_dtype,
    check_choice,
    check_floating,
    check_same_device,
    check_shape,
    resolve_backend,
)
from allnc.ops.contrast import Balance, build_contrast, check_hycon, reduce_contrast
from allnc.ops.hycon import hycon_reference
from allnc.ops.hycon_lse import hycon_lse, temperature_gradient, temperature_tensor, uses_constant_shift
from allnc.ops.p2p import Target, centred_unit, p2p_pair, p2p_reference, pair_form

# Pairs of (means or weights) in the order of AllAroundLosses.
_PAIRS = (("means", "means"), ("weights", "weights"), ("means", "weights"))


class AllAroundLosses(NamedTuple):
    """The unweighted terms, scalars: L_AllNC = hycon + w_mm p2p_means + w_ww p2p_weights + w_mw p2p_duality."""

    hycon: Tensor
    p2p_means: Tensor
    p2p_weights: Tensor
    p2p_duality: Tensor


def all_around_reference(
    z: Tensor,
    labels: Tensor,
    proj_means: Tensor,
    means: Tensor,
    weights: Tensor,
    *,
    seen: Tensor | None = None,
    target: Target = "auto",
    p2p_temperature: float = 0.1,
    **hycon_options,
) -> AllAroundLosses:
    """The terms as their formulas are written, with autograd; arguments as in `all_around`."""
    p2p_options = {"target": target, "temperature": p2p_temperature, "seen": seen}
    return AllAroundLosses(
        hycon_reference(z, labels, proj_means, seen=seen, **hycon_options),
        p2p_reference(means, **p2p_options),
        p2p_reference(weights, **p2p_options),
        p2p_reference(means, weights, **p2p_options),
    )


@torch.library.custom_op("allnc::all_around", mutates_args=())
def _all_around(
    z: Tensor,
    mu: Tensor,
    a: Tensor,
    b: Tensor,
    temperature: Tensor,
    x: Tensor,
    y: Tensor,
    seen: Tensor,
    shifted: bool,
    deterministic: bool,
    form: str,
    p2p_temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    from allnc.kernels.all_around import all_around_forward

    lse, values = all_around_forward(
        z,
        mu.to(z.dtype),
        a,
        b,
        temperature,
        x,
        y,
        seen,
        shifted=shifted,
        deterministic=deterministic,
        target="softmax" if form == "softmax" else "etf",
        p2p_temperature=p2p_temperature,
    )
    p2p_lse = values * (seen.sum() / p2p_temperature) if form == "softmax" else values.new_empty(3, 0)
    return lse, values.sum(1), p2p_lse


@_all_around.register_fake
def _(z, mu, a, b, temperature, x, y, seen, shifted, deterministic, form, p2p_temperature):
    return torch.empty_like(a), x.new_empty(3), x.new_empty(3, len(x) if form == "softmax" else 0)


def _save_for_all_around(ctx, inputs, output) -> None:
    z, mu, a, b, temperature, x, y, seen, ctx.shifted, _, ctx.form, ctx.p2p_temperature = inputs
    lse, _, p2p_lse = output
    ctx.save_for_backward(z, mu, a, b, temperature, x, y, seen, lse, p2p_lse)
    ctx.mark_non_differentiable(p2p_lse)


def _all_around_autograd(ctx, grad_lse: Tensor, grad_p2p: Tensor, _grad_p2p_lse: Tensor | None):
    z, mu, a, b, temperature, x, y, seen, lse, p2p_lse = ctx.saved_tensors
    dz, dmu = torch.ops.allnc.hycon_lse_backward(
        grad_lse.contiguous(), lse, z, mu, a, b, temperature, ctx.shifted, len(z), "triton"
    )
    pair = torch.ops.allnc.p2p_pair_backward
    rest = (seen, ctx.form, ctx.p2p_temperature)
    dx, _ = pair(grad_p2p[0], p2p_lse[0], x, None, *rest)
    dy, _ = pair(grad_p2p[1], p2p_lse[1], y, None, *rest)
    dx_duality, dy_duality = pair(grad_p2p[2], p2p_lse[2], x, y, *rest)
    dtemperature = temperature_gradient(z, dz, mu, dmu, temperature) if ctx.needs_input_grad[4] else None
    return dz, dmu, None, None, dtemperature, dx + dx_duality, dy + dy_duality, *(None,) * 5


_all_around.register_autograd(_all_around_autograd, setup_context=_save_for_all_around)


def all_around(
    z: Tensor,
    labels: Tensor,
    proj_means: Tensor,
    means: Tensor,
    weights: Tensor,
    *,
    seen: Tensor | None = None,
    temperature: float = 0.1,
    mean_weight: float = 1.0,
    balance: Balance = "class",
    anchor_weight: Tensor | None = None,
    target: Target = "auto",
    p2p_temperature: float = 0.1,
    ignore_index: int = -100,
    backend: Backend = "auto",
) -> AllAroundLosses:
    """HyCon of the activations and P2P of class means and classifier vectors, all terms of AllNC's geometry.

    Equal to `hycon(z, labels, proj_means)`, `p2p(means)`, `p2p(weights)` and `p2p(means, weights)`. With the Triton
    backend the Gram work of all four forward passes is one kernel launch.

    Args:
        z: [N, D] float16, bfloat16, float32 or float64; unit rows.
        labels: [N] int64 in [0, C), or `ignore_index` for rows that take no part in HyCon.
        proj_means: [C, D] class means in z's space; normalised here.
        means: [C, F] class means in the space of the classifier's input; centred and normalised here.
        weights: [C, F] classifier weight; centred and normalised here.
        seen: [C] bool, classes that have means; the others are masked in every term. Default: all.
        temperature, mean_weight, balance, anchor_weight, ignore_index: as in `hycon`.
        target, p2p_temperature: `target` and `temperature` of `p2p`.
        backend: "auto" (fastest that can run), "eager", "cpp" (CPU) or "triton".

    Returns:
        AllAroundLosses of four scalars, not weighted; float32 (float64 for float64 inputs).

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, type, range or device.
        RuntimeError: the requested backend is not available.

    Source: ours, after AllNC (arXiv 2408.07253).
    """
    check_hycon(z, labels, proj_means, seen, temperature, mean_weight, balance, anchor_weight, "mean")
    num_classes = len(proj_means)
    check_floating("means", means)
    check_floating("weights", weights)
    check_shape("means", means, (num_classes, "F"))
    check_shape("weights", weights, (num_classes, means.shape[1]))
    check_choice("target", target, ("auto", "etf", "softmax"))
    if not p2p_temperature > 0:
        raise ValueError(f"p2p_temperature must be > 0; got {p2p_temperature}")
    check_same_device(z=z, means=means, weights=weights)
    dtype = torch.promote_types(accumulation_dtype(means.dtype), accumulation_dtype(weights.dtype))
    widest = torch.promote_types(dtype, z.dtype)
    backend_used = resolve_backend(backend, op="all_around", device=z.device, dtype=widest, supported=("cpp", "triton"))
    with torch.autocast(z.device.type, enabled=False):
        z = z.contiguous()
        contrast = build_contrast(
            z, labels, proj_means, seen, temperature, mean_weight, balance, anchor_weight, ignore_index
        )
        if seen is None:
            seen = torch.ones(num_classes, dtype=torch.bool, device=z.device)
        rows = {"means": centred_unit(means.to(dtype), seen), "weights": centred_unit(weights.to(dtype), seen)}
        form = pair_form(target, (num_classes, means.shape[1]))
        mu, a, b = contrast.mu, contrast.a, contrast.b
        if backend_used == "triton":
            lse, p2p, _ = torch.ops.allnc.all_around(
                z,
                mu,
                a,
                b,
                temperature_tensor(temperature, a),
                rows["means"],
                rows["weights"],
                seen,
                uses_constant_shift(temperature),
                torch.are_deterministic_algorithms_enabled(),
                form,
                float(p2p_temperature),
            )
            terms = p2p.unbind()
        else:
            lse = hycon_lse(z, mu, a, b, temperature, backend=backend_used)
            terms = [p2p_pair(rows[x], None if x == y else rows[y], seen, form, p2p_temperature) for x, y in _PAIRS]
        return AllAroundLosses(reduce_contrast(lse, contrast, "mean"), *terms)
