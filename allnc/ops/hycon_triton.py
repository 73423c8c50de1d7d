"""HyCon on the Triton backend as one op: three launches from labels to gradients (allnc.kernels.hycon_loss).

`allnc.hycon` without this op computes everything but lse in torch, some eighty launches; here the launches of a step
are prepare, forward and backward, so that small batches gain most.
"""

from __future__ import annotations

import torch
from torch import Tensor

from allnc.ops._common import validated_labels

MAX_DIM = 256  # the widest rows of which one program can hold a panel's whole gradient


def fuses(z: Tensor, anchor_weight: Tensor | None) -> bool:
    """Whether `hycon_fused` takes these: D of at most 256 columns, and no gradient for the anchor weights."""
    return z.shape[1] <= MAX_DIM and (anchor_weight is None or not anchor_weight.requires_grad)


@torch.library.custom_op("allnc::hycon_fused", mutates_args=())
def _hycon_fused(
    z: Tensor,
    labels: Tensor,
    means: Tensor | None,
    seen: Tensor | None,
    anchor_weight: Tensor | None,
    tau: Tensor | None,
    temperature: float,
    mean_weight: float,
    balance: str,
    reduction: str,
    ignore_index: int,
    shifted: bool,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from allnc.kernels.hycon_loss import hycon_loss_forward

    loss, (state, index, sums, mu) = hycon_loss_forward(
        z,
        labels,
        means,
        seen,
        anchor_weight,
        temperature if tau is None else tau,
        mean_weight=mean_weight,
        balance=balance,
        reduction=reduction,
        ignore_index=ignore_index,
        shifted=shifted,
        deterministic=deterministic,
    )
    return loss, state, index, sums, mu


@_hycon_fused.register_fake
def _(
    z,
    labels,
    means,
    seen,
    anchor_weight,
    tau,
    temperature,
    mean_weight,
    balance,
    reduction,
    ignore_index,
    shifted,
    deterministic,
):
    from allnc.kernels.hycon_loss import empty_results

    loss, prepared = empty_results(
        z, None if means is None else len(means), weighted=anchor_weight is not None, reduction=reduction,
        shifted=shifted,
    )  # fmt: skip
    return loss, *prepared


@torch.library.custom_op("allnc::hycon_fused_backward", mutates_args=())
def _hycon_fused_backward(
    grad: Tensor,
    z: Tensor,
    means: Tensor | None,
    state: Tensor,
    index: Tensor,
    sums: Tensor,
    mu: Tensor,
    reduction: str,
    shifted: bool,
    tau_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from allnc.kernels.hycon_loss import Prepared, hycon_loss_backward

    prepared = Prepared(state, index, sums, mu)
    dz, dmeans, terms = hycon_loss_backward(
        grad, z, means, prepared, reduction=reduction, shifted=shifted, tau_gradient=tau_gradient
    )
    absent = grad.new_empty(0)
    return dz, absent if dmeans is None else dmeans, grad.new_empty(0) if terms is None else terms.sum()


@_hycon_fused_backward.register_fake
def _(grad, z, means, state, index, sums, mu, reduction, shifted, tau_gradient):
    dmeans = grad.new_empty(0) if means is None else means.new_empty(means.shape)
    return z.new_empty(z.shape), dmeans, grad.new_empty(() if tau_gradient else 0)


def _save_for_fused(ctx, inputs, output) -> None:
    z, _, means, _, _, _, _, _, _, ctx.reduction, _, ctx.shifted, _ = inputs
    _, *prepared = output
    ctx.save_for_backward(z, means, *prepared)
    ctx.mark_non_differentiable(*prepared)
    ctx.set_materialize_grads(False)  # no zeros for what has no gradient


def _fused_autograd(ctx, grad: Tensor, *_: None):
    z, means, *prepared = ctx.saved_tensors
    tau_gradient = ctx.needs_input_grad[5]
    dz, dmeans, dtau = torch.ops.allnc.hycon_fused_backward(
        grad, z, means, *prepared, ctx.reduction, ctx.shifted, tau_gradient
    )
    dmeans = None if means is None else dmeans
    return (dz, None, dmeans, None, None, dtau if tau_gradient else None) + 7 * (None,)


_hycon_fused.register_autograd(_fused_autograd, setup_context=_save_for_fused)


def hycon_fused(
    z: Tensor,
    labels: Tensor,
    means: Tensor | None = None,
    *,
    seen: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    mean_weight: float = 1.0,
    balance: str = "class",
    anchor_weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    shifted: bool,
    deterministic: bool | None = None,
) -> Tensor:
    """`allnc.hycon` on the Triton backend, for arguments that it has checked and that `fuses` accepts.

    Args:
        z: [N, D] float16, bfloat16 or float32 unit rows on a CUDA device (the CPU where Triton interprets).
        labels, means, seen, temperature, mean_weight, balance, anchor_weight, reduction, ignore_index: as in
            `allnc.hycon`. Differentiable in z, means and temperature.
        shifted: temperature is a number and 2/τ is small enough for a constant shift of the exponents.
        deterministic: bit-equal results; None follows torch.are_deterministic_algorithms_enabled().

    Returns:
        Scalar, or [N] for reduction="none"; float32.

    Raises:
        ValueError: a label out of range, on the CPU; on CUDA a device-side assertion stops the program.
    """
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    if means is not None and not z.is_cuda:
        labels = validated_labels(labels, len(means), ignore_index)  # the interpreter has no device-side assertion
    tau = temperature.float().reshape(()) if isinstance(temperature, Tensor) else None
    return torch.ops.allnc.hycon_fused(
        z.contiguous(),
        labels,
        None if means is None else means.contiguous(),
        seen,
        anchor_weight,
        tau,
        0.0 if isinstance(temperature, Tensor) else temperature,
        mean_weight,
        balance,
        reduction,
        ignore_index,
        shifted,
        deterministic,
    )[0]
