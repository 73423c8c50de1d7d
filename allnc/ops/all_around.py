"""All-around: HyCon and the three P2P terms of AllNC in one call, and one launch where Triton runs.

The rows of [Z; μ; M; W] have one Gram matrix. HyCon needs its blocks Z·Zᵀ and Z·μᵀ, P2P its blocks M·Mᵀ, W·Wᵀ and
M·Wᵀ; none needs another's result, so all of them are tiles of one grid: with the Triton backend a step is two launches
for the centred unit rows, one that prepares HyCon and one for all losses, then HyCon's and P2P's gradients and two
launches back through the rows. Elsewhere, and where `pair_form` prefers matrix products of the library for P2P, the
losses are computed one after the other by `contrast` and `p2p_values`; the values are the same.

Legend: N activations, D columns of the projection, C classes, F features.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import TYPE_CHECKING, NamedTuple, get_args

import torch
from torch import Tensor

from allnc._checks import check_choice
from allnc.ops._common import (
    Backend,
    accumulation_dtype,
    check_floating,
    check_no_tangent,
    check_same_device,
    check_shape,
    resolve_backend,
    validated_labels,
)
from allnc.ops._op import differentiable, op
from allnc.ops.hycon import Balance, Batch, Options, check_hycon, contrast, hycon_reference
from allnc.ops.hycon.fused import fuses, hycon_loss_backward
from allnc.ops.hycon.options import agreed_facts
from allnc.ops.p2p import Target, centred_units, kernel_target, p2p_reference, pair_form
from allnc.ops.p2p.p2p import check_centre_weights, p2p_blocks_backward
from allnc.ops.p2p.pairings import PAIRINGS, Pairing, pairings_of_checked
from allnc.ops.ranks import Ranks

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


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
    centre_weights: bool = True,
    **hycon_options,
) -> AllAroundLosses:
    """The terms as their formulas are written, with autograd; arguments as in `all_around`."""
    p2p_options = {"target": target, "temperature": p2p_temperature, "seen": seen}
    return AllAroundLosses(
        hycon_reference(z, labels, proj_means, seen=seen, **hycon_options),
        p2p_reference(means, **p2p_options),
        p2p_reference(weights, **p2p_options, centre=centre_weights),
        p2p_reference(means, weights, **p2p_options, centre=(True, centre_weights)),
    )


@op("all_around")
def _all_around(
    z: Tensor,
    labels: Tensor,
    proj_means: Tensor,
    x: Tensor,
    y: Tensor,
    seen: Tensor,
    temperature: float,
    mean_weight: float,
    balance: str,
    ignore_index: int,
    form: str,
    p2p_temperature: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """HyCon's loss, P2P's values [3], and p2p_lse, state, index, sums and mu for the backward."""
    from allnc.kernels.all_around import all_around_forward

    loss, prepared, values, p2p_lse = all_around_forward(
        z,
        labels,
        proj_means,
        seen,
        x,
        y,
        temperature=temperature,
        mean_weight=mean_weight,
        balance=balance,
        ignore_index=ignore_index,
        target=kernel_target(form),
        p2p_temperature=p2p_temperature,
    )
    return loss, values, p2p_lse, *prepared


@_all_around.register_fake
def _(z, labels, proj_means, x, y, seen, temperature, mean_weight, balance, ignore_index, form, p2p_temperature):
    from allnc.kernels.hycon.loss import empty_results

    loss, prepared = empty_results(z, len(x))
    return loss, x.new_empty(3), x.new_empty(3, len(x) if form == "softmax" else 0), *prepared


def _save_for_all_around(ctx, inputs, output) -> None:
    z, _, proj_means, x, y, seen, ctx.temperature, *_, ctx.form, ctx.p2p_temperature = inputs
    ctx.save_for_backward(z, proj_means, x, y, seen, *output[2:])
    ctx.mark_non_differentiable(*output[2:])


def _all_around_autograd(ctx, grad_loss: Tensor, grad_p2p: Tensor, *_unused: Tensor | None):
    z, proj_means, x, y, seen, p2p_lse, *prepared = ctx.saved_tensors
    dz, dmeans = hycon_loss_backward(grad_loss.contiguous(), z, proj_means, *prepared, ctx.temperature, "triton")
    dx, dy = p2p_blocks_backward(
        grad_p2p.contiguous(), p2p_lse, x, y, seen, "all", ctx.form, ctx.p2p_temperature, "triton"
    )
    return dz, None, dmeans, dx, dy, *(None,) * 7


_differentiable_terms = differentiable(
    _all_around, name="all_around", save=_save_for_all_around, backward=_all_around_autograd
)


def _in_one_launch(
    batch: Batch, options: Options, x: Tensor, y: Tensor, form: str, p2p_temperature: float
) -> tuple[Tensor, Tensor]:
    """HyCon's loss and P2P's values [3] of centred unit rows by the kernels."""
    z, labels, proj_means, seen, _ = batch
    assert proj_means is not None and seen is not None and not isinstance(options.temperature, Tensor)
    if not z.is_cuda:  # the interpreter has no device-side assertion
        labels = validated_labels(labels, len(proj_means), options.ignore_index)
    loss, p2p, *_ = _differentiable_terms(
        z.contiguous(),
        labels,
        proj_means.contiguous(),
        x,
        y,
        seen,
        float(options.temperature),
        float(options.mean_weight),
        options.balance,
        options.ignore_index,
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
    temperature: float | Tensor = 0.1,
    mean_weight: float = 1.0,
    balance: Balance = "class",
    anchor_weight: Tensor | None = None,
    pairings: Collection[Pairing] = PAIRINGS,
    target: Target = "auto",
    p2p_temperature: float = 0.1,
    centre_weights: bool = True,
    ignore_index: int = -100,
    group: ProcessGroup | Ranks | None = None,
    backend: Backend = "auto",
) -> AllAroundLosses:
    """HyCon of the activations and P2P of class means and classifier vectors, all terms of AllNC's geometry.

    Equal to `hycon(z, labels, proj_means)`, `p2p(means)`, `p2p(weights)` and `p2p(means, weights)`, of which the last
    two may leave the weights uncentred. With the Triton
    backend the Gram work of all four forward passes is one kernel launch, that of the gradients two, wherever all
    pairings are asked for, P2P is not faster as matrix products of the library, and HyCon's settings are those of
    the losses of this package: D <= 256, τ a number >= 1/32, no `anchor_weight`, no `group`.

    Args:
        z: [N, D] float16, bfloat16, float32 or float64; unit rows.
        labels: [N] int64 in [0, C), or `ignore_index` for rows that take no part in HyCon.
        proj_means: [C, D] class means in z's space; normalised here.
        means: [C, F] class means in the space of the classifier's input; centred and normalised here.
        weights: [C, F] classifier weight; centred and normalised here, or only normalised, see `centre_weights`.
        seen: [C] bool, classes that have means; the others are masked in every term. Default: all.
        temperature, mean_weight, balance, anchor_weight, ignore_index: as in `hycon`.
        pairings: the terms of P2P that are wanted, of "means", "weights" and "duality"; the others are 0 and cost
            nothing.
        target, p2p_temperature: `target` and `temperature` of `p2p`.
        centre_weights: False for the weights of a normalised classifier, see `centre` of `p2p`.
        group: the contrast is over the batches of all ranks, as in `hycon`; means, weights and options are the same
            on all. Gradients are shares: their sum over ranks is that of one process with all rows. One
            synchronisation; none with `Ranks` that already hold this batch's agreement.
        backend: "auto" (fastest that can run), "eager", "cpp" (CPU) or "triton".

    Returns:
        AllAroundLosses of four scalars, not weighted; float32 (float64 for float64 inputs).

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, type, range or device.
        RuntimeError: the requested backend is not available, or another rank's arguments are wrong.

    Source: ours, after AllNC (arXiv 2408.07253).
    """
    batch = Batch(z, labels, proj_means, seen, anchor_weight)
    options = Options(temperature, mean_weight, balance, "mean", ignore_index)

    def check() -> str:
        check_hycon(batch, options, least_rows=1 if group is None else 0)
        for pairing in pairings:
            check_choice("pairings", pairing, PAIRINGS)
        _check_sides(z, len(proj_means), means, weights)
        check_choice("target", target, get_args(Target))
        check_centre_weights(centre_weights)
        if not 0 < p2p_temperature < math.inf:
            raise ValueError(f"p2p_temperature must be > 0; got {p2p_temperature}")
        dtype = torch.promote_types(accumulation_dtype(means.dtype), accumulation_dtype(weights.dtype))
        dtype = torch.promote_types(dtype, z.dtype)
        return resolve_backend(backend, op="all_around", device=z.device, dtype=dtype, supported=("cpp", "triton"))

    def facts() -> dict[str, float | None]:
        return {
            **agreed_facts(batch, options),
            "F": means.shape[1],
            "p2p_temperature": p2p_temperature,
            "target (auto 0, etf 1, softmax 2)": get_args(Target).index(target),
            "pairings (the sum of means 1, weights 2, duality 4)": sum(1 << PAIRINGS.index(p) for p in set(pairings)),
            "centre_weights (False 0, True 1)": float(centre_weights),
        }

    if group is not None and not isinstance(group, Ranks):
        group = Ranks(group, check, lambda: len(z), facts)
    used = check()
    with torch.autocast(z.device.type, enabled=False):
        everyone = torch.ones(len(means), dtype=torch.bool, device=z.device) if seen is None else seen
        form, p2p_backend = pair_form(target, (len(means), means.shape[1]), blocks="all", backend=used)
        one_launch = used == p2p_backend == "triton" and set(pairings) == set(PAIRINGS)
        if one_launch and group is None and fuses(batch, options, used):
            x, y = centred_units(means, weights, everyone, backend=used, centre=(True, centre_weights))
            assert y is not None
            loss, p2p = _in_one_launch(batch._replace(seen=everyone), options, x, y, form, p2p_temperature)
            return AllAroundLosses(loss, *p2p.unbind())
        loss = contrast(batch, options, used, group)
        if not pairings:
            return AllAroundLosses(loss, *loss.new_zeros(3).unbind())
        p2p = pairings_of_checked(means, weights, everyone, pairings, target, p2p_temperature, used, centre_weights)
        return AllAroundLosses(loss, *(p2p if group is None else group.replicated(p2p)).unbind())


def _check_sides(z: Tensor, num_classes: int, means: Tensor, weights: Tensor) -> None:
    check_floating("means", means)
    check_floating("weights", weights)
    check_shape("means", means, (num_classes, "F"))
    check_shape("weights", weights, (num_classes, means.shape[1]))
    check_same_device(z=z, means=means, weights=weights)
    check_no_tangent("all_around", means, weights)
