"""HyCon, cosine form: each activation with its other views and its class mean, no negatives (restores NC1).

    L = - mean_i [ cos(h_i, sg(f_i')) ] - mean_i [ cos(f_i, sg(M_{y_i})) ]

i' is the other view of i, h = predictor(f), and sg stops the gradient: h learns from the first term, f from
the second. With more than two views the first cosine is averaged over all other views; with a single view
there is none, and only the class-mean term remains. No negatives, so O(N F).

Rows are view-major: row v·B + b is view v of image b.

Legend: V views, B images, N = V·B activations, F features, C classes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from allnc.ops._common import (
    Backend,
    accumulation_dtype,
    check_floating,
    check_labels,
    check_same_device,
    check_seen,
    check_shape,
    resolve_backend,
    validated_labels,
)


def hycon_cosine_reference(
    h: Tensor,
    f: Tensor,
    labels: Tensor,
    means: Tensor,
    *,
    num_views: int = 2,
    seen: Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """Cosine HyCon as its formula is written, by pairs of views; arguments as in `hycon_cosine`."""
    dtype = accumulation_dtype(torch.promote_types(h.dtype, f.dtype))
    h, f, means = h.to(dtype), f.to(dtype), means.to(dtype).detach()
    use = labels != ignore_index  # [N]
    loss = f.sum() * 0
    by_view = [t.chunk(num_views) for t in (h, f.detach(), use)]
    cosines = [
        F.cosine_similarity(by_view[0][v], by_view[1][w], dim=1)[by_view[2][v]]
        for v in range(num_views)
        for w in range(num_views)
        if w != v
    ]
    if cosines and bool(use.any()):
        loss = loss - torch.cat(cosines).mean()
    known = use if seen is None else use & seen[labels.where(use, 0)]
    if bool(known.any()):
        loss = loss - F.cosine_similarity(f[known], means[labels[known]], dim=1).mean()
    return loss


class _Cosines(NamedTuple):
    unit_h: Tensor  # [N, F]
    unit_f: Tensor  # [N, F]
    inverse_h: Tensor  # [N, 1] 1/‖h‖
    inverse_f: Tensor  # [N, 1]
    partner: Tensor  # [N, F] mean of the unit rows of the other views
    mean: Tensor  # [N, F] unit class mean
    view: Tensor  # [N] cosine with the other views
    own: Tensor  # [N] cosine with the class mean
    view_weight: Tensor  # [N] share of the row in the first mean, 0 for rows that take no part
    own_weight: Tensor  # [N] share of the row in the second mean


def _unit(x: Tensor) -> tuple[Tensor, Tensor]:
    """Unit rows and 1/‖row‖; both 0 for a zero row, which has no direction and gets no gradient."""
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    inverse = norm.reciprocal().where(norm > 0, 0)
    return x * inverse, inverse


def _cosines(
    h: Tensor, f: Tensor, labels: Tensor, means: Tensor, seen: Tensor, num_views: int, ignore_index: int
) -> _Cosines:
    dtype = accumulation_dtype(torch.promote_types(h.dtype, f.dtype))
    use = labels != ignore_index  # [N]
    group = labels.where(use, 0)
    known = use & seen[group]
    unit_h, inverse_h = _unit(h.to(dtype).where(use[:, None], 0))
    unit_f, inverse_f = _unit(f.to(dtype).where(use[:, None], 0))
    mean = _unit(means.to(dtype))[0][group].where(known[:, None], 0)

    views = unit_f.unflatten(0, (num_views, -1))  # [V, B, F]
    others = views.flip(0) if num_views == 2 else (views.sum(0) - views) / max(1, num_views - 1)
    partner = others.flatten(0, 1) if num_views > 1 else torch.zeros_like(unit_f)
    return _Cosines(
        unit_h,
        unit_f,
        inverse_h,
        inverse_f,
        partner,
        mean,
        view=(unit_h * partner).sum(1),
        own=(unit_f * mean).sum(1),
        view_weight=use / use.sum().clamp(min=1).to(dtype),
        own_weight=known / known.sum().clamp(min=1).to(dtype),
    )


@torch.library.custom_op("allnc::hycon_cosine", mutates_args=())
def _hycon_cosine(
    h: Tensor, f: Tensor, labels: Tensor, means: Tensor, seen: Tensor, num_views: int, ignore_index: int
) -> Tensor:
    with torch.autocast(h.device.type, enabled=False):
        c = _cosines(h, f, labels, means, seen, num_views, ignore_index)
        return -(c.view_weight * c.view).sum() - (c.own_weight * c.own).sum()


@_hycon_cosine.register_fake
def _(h, f, labels, means, seen, num_views, ignore_index):
    return h.new_empty((), dtype=accumulation_dtype(torch.promote_types(h.dtype, f.dtype)))


@torch.library.custom_op("allnc::hycon_cosine_backward", mutates_args=())
def _hycon_cosine_backward(
    grad: Tensor,
    h: Tensor,
    f: Tensor,
    labels: Tensor,
    means: Tensor,
    seen: Tensor,
    num_views: int,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    with torch.autocast(h.device.type, enabled=False):
        c = _cosines(h, f, labels, means, seen, num_views, ignore_index)
        per_h = (-grad * c.view_weight)[:, None] * c.inverse_h
        per_f = (-grad * c.own_weight)[:, None] * c.inverse_f
        dh = per_h * (c.partner - c.view[:, None] * c.unit_h)
        df = per_f * (c.mean - c.own[:, None] * c.unit_f)
        return dh.to(h.dtype).contiguous(), df.to(f.dtype).contiguous()


@_hycon_cosine_backward.register_fake
def _(grad, h, f, labels, means, seen, num_views, ignore_index):
    return h.new_empty(h.shape), f.new_empty(f.shape)


def _save_for_cosine(ctx, inputs, output) -> None:
    h, f, labels, means, seen, ctx.num_views, ctx.ignore_index = inputs
    ctx.save_for_backward(h, f, labels, means, seen)


def _cosine_autograd(ctx, grad: Tensor):
    dh, df = torch.ops.allnc.hycon_cosine_backward(grad, *ctx.saved_tensors, ctx.num_views, ctx.ignore_index)
    return dh, df, None, None, None, None, None


_hycon_cosine.register_autograd(_cosine_autograd, setup_context=_save_for_cosine)


def hycon_cosine(
    h: Tensor,
    f: Tensor,
    labels: Tensor,
    means: Tensor,
    *,
    num_views: int = 2,
    seen: Tensor | None = None,
    ignore_index: int = -100,
    backend: Backend = "auto",
) -> Tensor:
    """Hybrid contrast by cosine: predictions with other views' features, features with their class mean.

    The targets (features of the other views, class means) are constants: h gets its gradient from the first
    term, f from the second, `means` gets none. All rows are normalised here.

    Args:
        h: [N, F] float16, bfloat16, float32 or float64; the predictor's output, view-major (row v·B + b).
        f: [N, F] features, rows as in h. Its type may differ from h's.
        labels: [N] int64 in [0, C), or `ignore_index` for rows that take no part at all (all views of an
            image alike).
        means: [C, F] class means, any length.
        num_views: V >= 1, a divisor of N. The first term averages over the V - 1 other views; with V = 1 it
            is absent and h is not used.
        seen: [C] bool, classes that have a mean; rows of the others have no second term. Default: all.
        ignore_index: label of rows that take no part.
        backend: "auto" or "eager": torch operations on every device.

    Returns:
        Scalar in [-2, 2]; float32 (float64 when h or f is float64).

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, type, range or device, or a backend that
            this op does not have.

    Source: ours, after AllNC (arXiv 2408.07253), Figure 5; stop-gradient: Chen & He, SimSiam, CVPR 2021.
    """
    check_floating("h", h)
    check_floating("f", f)
    check_floating("means", means)
    check_shape("h", h, ("N", "F"))
    check_shape("f", f, (h.shape[0], h.shape[1]))
    check_shape("means", means, ("C", h.shape[1]))
    if h.shape[0] == 0 or h.shape[1] == 0:
        raise ValueError(f"h must have at least one row and one column; got {list(h.shape)}")
    if isinstance(num_views, bool) or not isinstance(num_views, int) or num_views < 1:
        raise ValueError(f"num_views must be an integer >= 1; got {num_views!r}")
    if h.shape[0] % num_views:
        raise ValueError(
            f"h must have a multiple of num_views = {num_views} rows; got {h.shape[0]}. "
            "Stack all images of view 0, then all images of view 1, and so on"
        )
    check_labels(labels, h.shape[0])
    if seen is not None:
        check_seen(seen, means.shape[0])
    check_same_device(h=h, f=f, labels=labels, means=means, seen=seen)
    resolve_backend(backend, op="hycon_cosine", device=h.device, dtype=h.dtype, supported=())
    if seen is None:
        seen = torch.ones(means.shape[0], dtype=torch.bool, device=h.device)
    labels = validated_labels(labels, means.shape[0], ignore_index)
    return torch.ops.allnc.hycon_cosine(h, f, labels, means.detach(), seen, num_views, ignore_index)
