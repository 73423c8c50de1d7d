"""All-around: HyCon and the three P2P terms of AllNC in one call, and one launch where Triton runs.

The rows of [Z; μ; M; W] have one Gram matrix. HyCon needs its blocks Z·Zᵀ and Z·μᵀ, P2P its blocks M·Mᵀ, W·Wᵀ and
M·Wᵀ; none needs another's result, so all of them are tiles of one grid: with the Triton backend a step is two launches
for the centred unit rows, one that prepares HyCon and one for all losses, then HyCon's and P2P's gradients and two
launches back through the rows. Where `pair_form` prefers matrix products of the library for P2P, and on other
backends, the losses are computed one after the other by `hycon_fused` or `hycon_lse` and `p2p_blocks`; the values are
the same.

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
    validated_labels,
)
from allnc.ops.contrast import Balance, check_hycon
from allnc.ops.hycon import hycon_of_checked, hycon_reference
from allnc.ops.hycon_lse import uses_constant_shift
from allnc.ops.hycon_triton import fuses
from allnc.ops.p2p import (
    Target,
    centred_units,
    kernel_target,
    p2p_blocks,
    p2p_reference,
    pair_form,
)


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
    labels: Tensor,
    proj_means: Tensor,
    x: Tensor,
    y: Tensor,
    seen: Tensor,
    anchor_weight: Tensor | None,
    temperature: Tensor | None,
    tau: float,
    mean_weight: float,
    balance: str,
    ignore_index: int,
    shifted: bool,
    deterministic: bool,
    form: str,
    p2p_temperature: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    from allnc.kernels.all_around import all_around_forward

    loss, prepared, values, p2p_lse = all_around_forward(
        z,
        labels,
        proj_means,
        seen,
        anchor_weight,
        tau if temperature is None else temperature,
        x,
        y,
        mean_weight=mean_weight,
        balance=balance,
        ignore_index=ignore_index,
        shifted=shifted,
        deterministic=deterministic,
        target=kernel_target(form),
        p2p_temperature=p2p_temperature,
    )
    state, index, sums, mu = prepared
    return loss, values, p2p_lse, state, index, sums, mu


@_all_around.register_fake
def _(z, labels, proj_means, x, y, seen, anchor_weight, *rest):
    from allnc.kernels.hycon_loss import empty_results

    shifted, form = rest[5], rest[7]
    p2p_lse = x.new_empty(3, len(x) if form == "softmax" else 0)
    loss, prepared = empty_results(z, len(x), weighted=anchor_weight is not None, reduction="mean", shifted=shifted)
    return loss, x.new_empty(3), p2p_lse, *prepared


@torch.library.custom_op("allnc::all_around_backward", mutates_args=())
def _all_around_backward(
    grad_loss: Tensor,
    grad_p2p: Tensor,
    z: Tensor,
    proj_means: Tensor,
    x: Tensor,
    y: Tensor,
    seen: Tensor,
    p2p_lse: Tensor,
    state: Tensor,
    index: Tensor,
    sums: Tensor,
    mu: Tensor,
    shifted: bool,
    tau_gradient: bool,
    form: str,
    p2p_temperature: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from allnc.kernels.hycon_loss import Prepared, hycon_loss_backward

    dz, dmeans, dtau = hycon_loss_backward(
        grad_loss,
        z,
        proj_means,
        Prepared(state, index, sums, mu),
        reduction="mean",
        shifted=shifted,
        tau_gradient=tau_gradient,
    )
    dx, dy = torch.ops.allnc.p2p_blocks_backward(grad_p2p, p2p_lse, x, y, seen, "all", form, p2p_temperature, "triton")
    assert dmeans is not None
    return dz, dmeans, x.new_empty(0) if dtau is None else dtau, dx, dy


@_all_around_backward.register_fake
def _(grad_loss, grad_p2p, z, proj_means, x, y, seen, p2p_lse, state, index, sums, mu, shifted, tau_gradient, *rest):
    dtau = x.new_empty(len(z) + len(x) if tau_gradient else 0)
    return torch.empty_like(z), torch.empty_like(proj_means), dtau, torch.empty_like(x), torch.empty_like(y)


def _save_for_all_around(ctx, inputs, output) -> None:
    z, _, proj_means, x, y, seen, *_, ctx.shifted, _, ctx.form, ctx.p2p_temperature = inputs
    ctx.save_for_backward(z, proj_means, x, y, seen, *output[2:])
    ctx.mark_non_differentiable(*output[2:])


def _all_around_autograd(ctx, grad_loss: Tensor, grad_p2p: Tensor, *_unused: Tensor | None):
    tau_gradient = ctx.needs_input_grad[7]
    dz, dmeans, dtau, dx, dy = torch.ops.allnc.all_around_backward(
        grad_loss.contiguous(), grad_p2p.contiguous(), *ctx.saved_tensors,
        ctx.shifted, tau_gradient, ctx.form, ctx.p2p_temperature,
    )  # fmt: skip
    dtau = dtau.sum() if tau_gradient else None
    return dz, None, dmeans, dx, dy, None, None, dtau, *(None,) * 8


_all_around.register_autograd(_all_around_autograd, setup_context=_save_for_all_around)


def _in_one_launch(
    z: Tensor,
    labels: Tensor,
    proj_means: Tensor,
    x: Tensor,
    y: Tensor,
    seen: Tensor,
    *,
    temperature: float | Tensor,
    mean_weight: float,
    balance: str,
    anchor_weight: Tensor | None,
    ignore_index: int,
    form: str,
    p2p_temperature: float,
) -> tuple[Tensor, Tensor]:
    """HyCon's loss and P2P's values [3] of centred unit rows by the kernels."""
    if not z.is_cuda:  # the interpreter has no device-side assertion
        labels = validated_labels(labels, len(proj_means), ignore_index)
    learned = isinstance(temperature, Tensor)
    loss, p2p, *_ = torch.ops.allnc.all_around(
        z,
        labels,
        proj_means.contiguous(),
        x,
        y,
        seen,
        anchor_weight,
        temperature.float().reshape(()) if isinstance(temperature, Tensor) else None,
        0.0 if learned else float(temperature),
        float(mean_weight),
        balance,
        ignore_index,
        uses_constant_shift(temperature),
        torch.are_deterministic_algorithms_enabled(),
        form,
        float(p2p_temperature),
    )
    return loss, p2p


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
    backend the Gram work of all four forward passes is one kernel launch, that of the gradients two, wherever D <= 256,
    `anchor_weight` needs no gradient and P2P is not faster as matrix products of the library.

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
    hycon_arguments = (z, labels, proj_means, seen, temperature, mean_weight, balance, anchor_weight, "mean")
    check_hycon(*hycon_arguments)
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
        everyone = torch.ones(num_classes, dtype=torch.bool, device=z.device) if seen is None else seen
        x, y = centred_units(means, weights, everyone, backend=backend_used)
        assert y is not None
        form, p2p_backend = pair_form(target, (num_classes, means.shape[1]), blocks="all", backend=backend_used)
        if backend_used == p2p_backend == "triton" and fuses(z, anchor_weight):
            loss, p2p = _in_one_launch(
                z,
                labels,
                proj_means,
                x,
                y,
                everyone,
                temperature=temperature,
                mean_weight=mean_weight,
                balance=balance,
                anchor_weight=anchor_weight,
                ignore_index=ignore_index,
                form=form,
                p2p_temperature=p2p_temperature,
            )
        else:
            loss = hycon_of_checked(*hycon_arguments, ignore_index, backend_used)
            options = {"form": form, "temperature": p2p_temperature, "backend": p2p_backend}
            p2p = p2p_blocks(x, y, everyone, blocks="all", **options)
        return AllAroundLosses(loss, *p2p.unbind())
