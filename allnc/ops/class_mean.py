"""Running class means: an exponential moving average of the batches' class means that gradients pass through.

With the batch sums s_c = Σ_{i: y_i = c} f_i, the counts n_c and momentum m, for every class with n_c > 0:

    b_c = s_c / n_c
    M_c <- b_c                     if class c was never seen before
    M_c <- m M_c + (1 - m) b_c     otherwise
    dL/df_i = k_{y_i} dL/dM_{y_i} / n_{y_i},    k = 1 for a class seen first, 1 - m otherwise

Classes absent from the batch keep their mean. gradient="straight_through" has k = 1 throughout: the value is
the moving average, the gradient that of the batch mean, which is not weakened by 1 - m. Over several ranks s_c and n_c
are sums over the rows of all.

Legend: N activations, C classes, F columns (features).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from allnc._checks import check_choice
from allnc.ops._common import (
    Backend,
    accumulation_dtype,
    check_floating,
    check_labels,
    check_same_device,
    check_seen,
    check_shape,
    label_errors,
    resolve_backend,
    validated_labels,
)
from allnc.ops._op import differentiable, op
from allnc.ops.ranks import Ranks

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

MeanGradient = Literal["exact", "straight_through"]


def class_mean_ema_reference(
    features: Tensor,
    labels: Tensor,
    means: Tensor,
    seen: Tensor,
    *,
    momentum: float = 0.9,
    gradient: MeanGradient = "exact",
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor, Tensor]:
    """The update as the formula is written, by autograd and without changing the state.

    Arguments as in `class_mean_ema`. Arithmetic is in the accumulation type of features.

    Returns:
        Means after the batch [C, F] (differentiable in features), seen classes [C] bool, n_c [C] int64.
    """
    f = features.to(accumulation_dtype(features.dtype))  # [N, F]
    use = labels != ignore_index  # [N]
    row_class = labels.where(use, 0)  # [N]
    counts = labels.new_zeros(len(means)).index_add(0, row_class, use.long())  # [C], n_c
    sums = _class_sums(f.where(use[:, None], 0), row_class, len(means))  # [C, F], s_c
    batch = sums / counts.clamp(min=1)[:, None]  # [C, F], b_c
    present = counts > 0  # [C]
    old = means.detach().to(f.dtype)  # [C, F]
    moved = torch.where(seen[:, None], momentum * old + (1 - momentum) * batch, batch)
    value = torch.where(present[:, None], moved, old)
    if gradient == "straight_through":
        value = value.detach() + torch.where(present[:, None], batch - batch.detach(), 0)
    return value, seen | present, counts


def _class_sums(f: Tensor, row_class: Tensor, num_classes: int) -> Tensor:
    """Sums [C, F] of the rows of each class; of many rows in segments of at most 256, which are then added up.

    One long sum would lose digits: the mean of 65,536 rows near 10 is off by 8e-5, that of 4,096 by 5e-6.
    """
    num_rows, segment_rows = len(f), 256
    if num_rows <= 4096:
        return f.new_zeros(num_classes, f.shape[1]).index_add(0, row_class, f)
    ordered, order = row_class.sort(stable=True)
    starts = torch.arange(num_rows, device=f.device) % segment_rows == 0  # [N]
    starts[1:] |= ordered[1:] != ordered[:-1]
    segment = starts.cumsum(0) - 1  # [N], of the ordered rows
    num_segments = num_classes + -(-num_rows // segment_rows)
    class_of = row_class.new_zeros(num_segments).scatter(0, segment, ordered)
    partial = f.new_zeros(num_segments, f.shape[1])
    partial = partial.index_add(0, torch.empty_like(segment).scatter(0, order, segment), f)
    return f.new_zeros(num_classes, f.shape[1]).index_add(0, class_of, partial)


@torch.library.custom_op("allnc::class_mean_ema", mutates_args=("means", "seen"))
def _class_mean_ema(
    features: Tensor,
    labels: Tensor,
    means: Tensor,
    seen: Tensor,
    momentum: float,
    ignore_index: int,
    deterministic: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    if backend != "eager":
        arguments = (features, labels, means, seen, momentum, ignore_index, deterministic)
        with label_errors(labels, len(means), ignore_index):
            return torch.ops.allnc_C.class_mean_ema_forward(*arguments)
    seen_before = seen.clone()
    with torch.autocast(features.device.type, enabled=False), _deterministic_algorithms(deterministic):
        value, seen_after, counts = class_mean_ema_reference(
            features, labels, means, seen, momentum=momentum, ignore_index=ignore_index
        )
    means.copy_(value)
    seen.copy_(seen_after)
    return value, seen_before, counts


@_class_mean_ema.register_fake
def _(features, labels, means, seen, momentum, ignore_index, deterministic, backend):
    return means.new_empty(means.shape), seen.new_empty(seen.shape), labels.new_empty(seen.shape)


@contextlib.contextmanager
def _deterministic_algorithms(enabled: bool) -> Iterator[None]:
    """Makes index_add bit-equal on CUDA, where it otherwise adds in the order the threads arrive."""
    if not enabled or torch.are_deterministic_algorithms_enabled():
        yield
        return
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@op("class_mean_ema_backward")
def _class_mean_ema_backward(
    grad_value: Tensor,
    labels: Tensor,
    counts: Tensor,
    seen_before: Tensor,
    momentum: float,
    straight_through: bool,
    ignore_index: int,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    if backend != "eager":
        return torch.ops.allnc_C.class_mean_ema_backward(
            grad_value, labels, counts, seen_before, momentum, straight_through, ignore_index, dtype
        )
    use = labels != ignore_index  # [N]
    factor = torch.ones_like(counts, dtype=grad_value.dtype)  # [C], k
    if not straight_through:
        factor = factor.masked_fill(seen_before, 1 - momentum)
    share = grad_value * (factor / counts.clamp(min=1))[:, None]  # [C, F]
    return share.to(dtype)[labels.where(use, 0)].masked_fill(~use[:, None], 0)  # [N, F]


@_class_mean_ema_backward.register_fake
def _(grad_value, labels, counts, seen_before, momentum, straight_through, ignore_index, dtype, backend):
    return grad_value.new_empty(len(labels), grad_value.shape[1], dtype=dtype)


def _update_over_ranks(
    features: Tensor,
    labels: Tensor,
    means: Tensor,
    seen: Tensor,
    momentum: float,
    ignore_index: int,
    deterministic: bool,
    backend: str,
    group: ProcessGroup,
) -> tuple[Tensor, Tensor, Tensor]:
    """What the op does, with the sums and counts of all ranks: one exchange of C (F + 1) numbers."""
    # This rank's means are those that the op makes of an empty state.
    own, seen_before, counts = torch.ops.allnc.class_mean_ema(
        features, labels, torch.zeros_like(means), torch.zeros_like(seen), 0.0, ignore_index, deterministic, backend
    )
    counts = counts.to(own.dtype)[:, None]
    sums = torch.cat([own * counts, counts], 1)  # [C, F + 1]
    dist.all_reduce(sums, group=group)
    counts = sums[:, -1]
    present = counts > 0
    batch = sums[:, :-1] / counts.clamp(min=1)[:, None]
    moved = torch.where(seen[:, None], momentum * means + (1 - momentum) * batch, batch)
    value = torch.where(present[:, None], moved, means)
    seen_before = seen.clone()
    means.copy_(value)
    seen.logical_or_(present)
    return value, seen_before, counts.long()


def _copy_of_value(
    features: Tensor,  # [N, F]
    value: Tensor,  # [C, F]
    *rest: object,
) -> Tensor:
    return value.detach()  # a view of it could not be changed in place


def _save_for_update(ctx, inputs, output) -> None:
    features, _, labels, counts, seen_before, ctx.group, *ctx.options, ctx.backend = inputs
    ctx.dtype = features.dtype
    ctx.save_for_backward(labels, counts, seen_before)


def _update_autograd(ctx, grad_value: Tensor):
    if ctx.group is not None:  # what each rank has is the share of its own loss
        grad_value = grad_value.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad_value, group=ctx.group)
    grad_features = _class_mean_ema_backward(grad_value, *ctx.saved_tensors, *ctx.options, ctx.dtype, ctx.backend)
    return grad_features, *(None,) * 9


# The value of the update, as it is, with its gradient: an op that updates its arguments can have none itself.
_with_gradient = differentiable(_copy_of_value, name="class_mean_ema", save=_save_for_update, backward=_update_autograd)


def class_mean_ema(
    features: Tensor,
    labels: Tensor,
    means: Tensor,
    seen: Tensor,
    *,
    momentum: float = 0.9,
    gradient: MeanGradient = "exact",
    ignore_index: int = -100,
    deterministic: bool | None = None,
    group: ProcessGroup | Ranks | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Move a batch into the running class means and return the new means, differentiable in the features.

    Args:
        features: [N, F] float16, bfloat16, float32 or float64; N may be 0.
        labels: [N] int64 in [0, C), or `ignore_index` for rows that take no part.
        means: [C, F] the running means, float32 (float64 for float64 features). Updated in place.
        seen: [C] bool, classes that have a mean. Updated in place.
        momentum: m in [0, 1), share of the old mean that is kept.
        gradient: "exact", or "straight_through" for the gradient of the batch means (k = 1).
        ignore_index: label of rows that take no part.
        deterministic: bit-equal results on every run; None follows
            torch.are_deterministic_algorithms_enabled(). The CPU is always deterministic.
        group: the batch is that of all ranks of this process group, each of which brings some rows, or none. All must
            call, with the same state, which stays bit-equal on all. The gradient is right where each rank's loss is
            a share, as that of `hycon(group=...)`: shares are added up before they reach the features. One
            synchronisation; none with `Ranks` that already hold this batch's agreement.
        backend: "auto" (fastest that can run), "eager", "cpp" (CPU) or "cuda".

    Returns:
        [C, F] the means after the batch in the type of `means`; shares no memory with it.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, type, range or device. A label out of
            range is a ValueError on the CPU and a device-side assertion on CUDA, which is not waited for.
        RuntimeError: the requested backend is not available.

    Source: ours, after AllNC (arXiv 2408.07253).
    """

    def check() -> str:
        _check(features, labels, means, seen, momentum, gradient)
        if group is not None:  # found later, a wrong label would leave the other ranks waiting
            validated_labels(labels, len(means), ignore_index)
        return resolve_backend(
            backend, op="class_mean_ema", device=features.device, dtype=features.dtype, supported=("cpp", "cuda")
        )

    def facts() -> dict[str, float | None]:
        return {"C": len(means), "F": features.shape[1], "momentum": momentum, "gradient": float(gradient == "exact")}

    if group is not None and not isinstance(group, Ranks):
        group = Ranks(group, check, lambda: len(features), facts)
    used = check()
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    if used != "cpp":  # which looks at each label before it changes anything
        labels = validated_labels(labels, len(means), ignore_index)
    momentum, straight_through = float(momentum), gradient == "straight_through"
    arguments = (features.detach(), labels, means, seen, momentum, ignore_index, deterministic, used)
    if group is None:
        process_group = None
        value, seen_before, counts = torch.ops.allnc.class_mean_ema(*arguments)
    else:
        process_group = group.group
        value, seen_before, counts = _update_over_ranks(*arguments, process_group)
    return _with_gradient(
        features, value, labels, counts, seen_before, process_group, momentum, straight_through, ignore_index, used
    )


def _check(features: Tensor, labels: Tensor, means: Tensor, seen: Tensor, momentum: float, gradient: str) -> None:
    check_floating("features", features)
    check_shape("features", features, ("N", "F"))
    check_floating("means", means)
    check_shape("means", means, ("C", features.shape[1]))
    if len(means) == 0:
        raise ValueError(f"means must have at least one row, a class; got {list(means.shape)}")
    wanted = accumulation_dtype(features.dtype)
    if means.dtype != wanted:
        raise ValueError(
            f"means must be {wanted} for {features.dtype} features; got {means.dtype}. "
            "Keep the running means in the accumulation type, whatever type the features have"
        )
    if means.requires_grad:
        raise ValueError("means must not require a gradient: it is state, updated in place. Use a buffer")
    check_labels(labels, features.shape[0])
    check_seen(seen, means.shape[0])
    check_same_device(features=features, labels=labels, means=means, seen=seen)
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must be in [0, 1); got {momentum}")
    check_choice("gradient", gradient, ("exact", "straight_through"))
