"""HyCon, cosine form: each activation with its other views and its class mean, no negatives (restores NC1).

    L = - mean_i [ cos(h_i, sg(f_i')) ] - mean_i [ cos(f_i, sg(M_{y_i})) ]

i' is the other view of i, h = predictor(f), and sg stops the gradient: h learns from the first term, f from
the second. With more than two views the first cosine is averaged over all other views; with a single view
there is none, and only the class-mean term remains. Two cosines of N rows: plain torch, with its autograd.

Rows are view-major: row v·B + b is view v of image b.

Legend: V views, B images, N = V·B activations, F features, C classes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from allnc._checks import check_integer
from allnc.ops._common import (
    accumulation_dtype,
    check_floating,
    check_labels,
    check_same_device,
    check_seen,
    check_shape,
    validated_labels,
)
from allnc.ops.ranks import sum_over_ranks

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


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


def _unit(x: Tensor) -> Tensor:
    """Unit rows; a row shorter than the squares of its type show has no direction, stays zero and gets no gradient.

    A row so long that its squares overflow is NaN. Scaling rows first would take a fifth of the time of the loss.
    """
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    norm = norm + 0 * norm  # NaN for infinity, of which the reciprocal would be a silent 0
    return x * norm.where(norm != 0, 1).reciprocal().where(norm != 0, 0)


def _mean_cosine(x: Tensor, y: Tensor, use: Tensor, group: ProcessGroup | None) -> Tensor:
    """Mean of x_i·y_i over the rows in use, of all ranks of a group; 0 if there are none."""
    cosines = (x * y).sum(1)
    total, count = sum_over_ranks(torch.stack([cosines.where(use, 0).sum(), use.sum().to(x.dtype)]), group)
    return total / count.clamp(min=1)


def hycon_cosine(
    h: Tensor,
    f: Tensor,
    labels: Tensor,
    means: Tensor,
    *,
    num_views: int = 2,
    seen: Tensor | None = None,
    ignore_index: int = -100,
    group: ProcessGroup | None = None,
) -> Tensor:
    """Hybrid contrast by cosine: predictions with other views' features, features with their class mean.

    The targets (features of the other views, class means) are constants: h gets its gradient from the first
    term, f from the second, `means` gets none. All rows are normalised here: in float32 those of a length from 1e-19
    to 1e19; shorter ones are zero rows without gradient, longer ones make the loss NaN.

    Args:
        h: [N, F] float16, bfloat16, float32 or float64; the predictor's output, view-major (row v·B + b).
        f: [N, F] features, rows as in h. Its type may differ from h's.
        labels: [N] int64 in [0, C), or `ignore_index` for rows that take no part at all; the views of an image have
            one label.
        means: [C, F] class means, any length.
        num_views: V >= 1, a divisor of N. The first term averages over the V - 1 other views; with V = 1 it
            is absent and h is not used.
        seen: [C] bool, classes that have a mean; rows of the others have no second term. Default: all.
        ignore_index: label of rows that take no part.
        group: the means are over the rows of all ranks of this process group, which must all call with arguments of
            the same kinds. Gradients are shares: their sum over ranks is that of one process with all rows.

    Returns:
        Scalar in [-2, 2]; float32 (float64 when h or f is float64).

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, type, range or device.

    Source: ours, after AllNC (arXiv 2408.07253), Figure 5; stop-gradient: Chen & He, SimSiam, CVPR 2021.
    """
    check_floating("h", h)
    check_floating("f", f)
    check_floating("means", means)
    check_shape("h", h, ("N", "F"))
    num_rows, dim = h.shape
    check_shape("f", f, (num_rows, dim))
    check_shape("means", means, ("C", dim))
    if len(means) == 0:
        raise ValueError(f"means must have at least one row, a class; got {list(means.shape)}")
    if (num_rows == 0 and group is None) or dim == 0:
        raise ValueError(f"h must have at least one row and one column; got {list(h.shape)}")
    check_labels(labels, num_rows)
    if seen is not None:
        check_seen(seen, len(means))
    check_same_device(h=h, f=f, labels=labels, means=means, seen=seen)
    check_views(labels, num_views)
    labels = validated_labels(labels, len(means), ignore_index, num_views)

    with torch.autocast(h.device.type, enabled=False):
        dtype = accumulation_dtype(torch.promote_types(h.dtype, f.dtype))
        use = labels != ignore_index  # [N]
        own_class = labels.where(use, 0)
        unit_f = _unit(f.to(dtype).where(use[:, None], 0))  # rows that take no part may hold anything
        known = use if seen is None else use & seen[own_class]
        there = means.detach() if seen is None else means.detach().where(seen[:, None], 0)
        own_mean = _unit(there.to(dtype))[own_class]
        loss = -_mean_cosine(unit_f, own_mean, known, group)
        if num_views > 1:
            unit_h = _unit(h.to(dtype).where(use[:, None], 0))
            views = unit_f.detach().unflatten(0, (num_views, num_rows // num_views))  # [V, B, F]
            others = ((views.sum(0) - views) / (num_views - 1)).flatten(0, 1)
            loss = loss - _mean_cosine(unit_h, others, use, group)
        return loss


def check_views(labels: Tensor, num_views: int) -> None:
    """Raise unless labels [N] are of a multiple of num_views rows; that views are alike `validated_labels` checks."""
    check_integer("num_views", num_views, minimum=1)
    if len(labels) % num_views:
        raise ValueError(
            f"h must have a multiple of num_views = {num_views} rows; got {len(labels)}. "
            "Stack all images of view 0, then all images of view 1, and so on"
        )
