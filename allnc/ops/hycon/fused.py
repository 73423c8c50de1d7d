"""HyCon's loss from labels to gradients as one op, for what the losses of this package ask of it.

On Triton a step is three launches (prepare, forward, backward; allnc.kernels.hycon.loss), on the CPU one C++ call each
way, of which the forward also forms what the gradient takes N² operations for; the lse path computes the O(N D) part in
torch, some eighty calls. Settings that no loss uses take that path.

Legend: N activations, D columns, C classes, G = C or, without means, N.
"""

from __future__ import annotations

import torch
from torch import Tensor

from allnc.ops._common import accumulation_dtype, label_errors, validated_labels
from allnc.ops._op import differentiable, op
from allnc.ops.hycon.options import Batch, Options

MAX_DIM = 256  # the widest rows of which one Triton program can hold a panel's whole gradient
_CPP_STATE_ROWS, _CPP_PANEL, _CACHE_LINE = 3, 48, 64  # see csrc/schema.cpp


def fuses(batch: Batch, options: Options, backend: str) -> bool:
    """Whether `hycon_fused` takes this: the mean over anchors of weight 1, τ a number.

    On Triton also D <= 256, 2/τ <= 64, and no demand for deterministic algorithms.
    """
    if options.reduction != "mean" or batch.anchor_weight is not None or isinstance(options.temperature, Tensor):
        return False
    if backend == "triton":
        deterministic = torch.are_deterministic_algorithms_enabled()
        return batch.z.shape[1] <= MAX_DIM and options.shifted and not deterministic
    return backend == "cpp"


@op("hycon_loss")
def _hycon_loss(
    z: Tensor,
    labels: Tensor,
    means: Tensor | None,
    seen: Tensor | None,
    temperature: float,
    mean_weight: float,
    balance: str,
    ignore_index: int,
    with_gradient: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss, and state, index, sums, mu and (C++, if with_gradient) pull for the backward."""
    if backend == "cpp":
        balanced = balance == "class"
        arguments = (z, labels, means, seen, temperature, mean_weight, balanced, ignore_index, with_gradient)
        if means is None:  # any label is right
            return torch.ops.allnc_C.hycon_loss_forward(*arguments)
        with label_errors(labels, len(means), ignore_index):
            return torch.ops.allnc_C.hycon_loss_forward(*arguments)
    from allnc.kernels.hycon.loss import hycon_loss_forward

    settings = {"temperature": temperature, "mean_weight": mean_weight, "balance": balance}
    loss, prepared = hycon_loss_forward(z, labels, means, seen, **settings, ignore_index=ignore_index)
    return loss, *prepared, z.new_empty(0)


@_hycon_loss.register_fake
def _(z, labels, means, seen, temperature, mean_weight, balance, ignore_index, with_gradient, backend):
    if backend == "triton":
        from allnc.kernels.hycon.loss import empty_results

        loss, prepared = empty_results(z, None if means is None else len(means))
        return loss, *prepared, z.new_empty(0)
    num_rows, dim = z.shape
    num_means = 0 if means is None else len(means)
    sums = z.new_empty((num_means or num_rows, dim), dtype=accumulation_dtype(z.dtype))
    state = sums.new_empty(_CPP_STATE_ROWS, num_rows + num_means)
    padded = sum(-(-rows // _CPP_PANEL) * _CPP_PANEL for rows in (num_rows, num_means)) if with_gradient else 0
    line = _CACHE_LINE // sums.element_size()
    pull = sums.new_empty(padded, (-(-dim // line) // 2 * 2 + 1) * line)
    return sums.new_empty(()), state, labels.new_empty(num_rows), sums, sums.new_empty(num_means, dim), pull


@op("hycon_loss_backward")
def hycon_loss_backward(
    grad: Tensor,
    z: Tensor,
    means: Tensor | None,
    state: Tensor,
    index: Tensor,
    sums: Tensor,
    mu: Tensor,
    temperature: float,
    backend: str,
    pull: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    if backend == "cpp":
        saved = (state, index, sums, mu, sums.new_empty(0, 0) if pull is None else pull)
        dz, dmeans = torch.ops.allnc_C.hycon_loss_backward(grad, z, means, *saved, temperature)
        return dz, grad.new_empty(0) if means is None else dmeans
    from allnc.kernels.hycon.loss import Prepared, hycon_loss_backward

    dz, dmeans = hycon_loss_backward(grad, z, means, Prepared(state, index, sums, mu))
    return dz, grad.new_empty(0) if dmeans is None else dmeans


@hycon_loss_backward.register_fake
def _(grad, z, means, state, index, sums, mu, temperature, backend, pull=None):
    return z.new_empty(z.shape), sums.new_empty(0) if means is None else means.new_empty(means.shape)


def _save_for_loss(ctx, inputs, output) -> None:
    z, _, means, _, ctx.temperature, *_, ctx.backend = inputs
    _, *prepared = output
    ctx.save_for_backward(z, means, *prepared)
    ctx.mark_non_differentiable(*prepared)
    ctx.set_materialize_grads(False)  # no zeros for what has no gradient


def _loss_autograd(ctx, grad: Tensor, *_: None):
    z, means, *prepared, pull = ctx.saved_tensors
    dz, dmeans = hycon_loss_backward(grad, z, means, *prepared, ctx.temperature, ctx.backend, pull)
    return dz, None, None if means is None else dmeans, *(None,) * 7


_differentiable_loss = differentiable(_hycon_loss, name="hycon", save=_save_for_loss, backward=_loss_autograd)


def hycon_fused(batch: Batch, options: Options, backend: str) -> Tensor:
    """`allnc.hycon` in one op, for what `check_hycon` has passed and `fuses` accepts.

    Returns:
        Scalar, float32 (float64 for float64 z).

    Raises:
        ValueError: a label out of range, on the CPU; on CUDA a device-side assertion stops the program.
    """
    z, labels, means, seen, _ = batch
    dtype = z.dtype
    if backend == "cpp":
        z = z.float() if dtype == torch.float16 else z  # CPUs multiply bfloat16 but not float16
        means = None if means is None else means.to(accumulation_dtype(dtype))
    if means is not None and backend != "cpp" and not z.is_cuda:  # C++ checks them, and on a GPU a kernel
        labels = validated_labels(labels, len(means), options.ignore_index)
    temperature, mean_weight, balance, _, ignore_index = options
    assert not isinstance(temperature, Tensor)
    with_gradient = torch.is_grad_enabled() and (z.requires_grad or (means is not None and means.requires_grad))
    return _differentiable_loss(
        z.contiguous(),
        labels.contiguous(),
        None if means is None else means.contiguous(),
        seen,
        float(temperature),
        float(mean_weight),
        balance,
        ignore_index,
        with_gradient,
        backend,
    )[0]
