"""HyCon's O(N D) part: column weights, the positive term, and the reduction to a loss.

    pos_i = ( Σ_{j≠i, y_j=y_i} z_i·z_j + κ z_i·μ_{y_i} ) / ( τ (n_{y_i} - 1 + κ) )
    L     = Σ_i g_i (lse_i - pos_i) / Σ_i g_i

The positive term needs one sum per class: Σ_{j in class} z_i·z_j = z_i·(class sum).

Legend: N activations, D columns, C classes; n_c activations of class c; κ mean_weight; g anchor_weight.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from allnc.ops._common import accumulation_dtype, unit_rows, validated_labels
from allnc.ops.hycon.options import Batch, Options, Reduction

if TYPE_CHECKING:
    from allnc.ops.ranks import Ranks


class Terms(NamedTuple):
    """What HyCon needs."""

    z: Tensor  # [N, D] unit rows, 0 for rows that take no part
    mu: Tensor | None  # [C, D] unit rows
    a: Tensor  # [N] column weights of the activations
    b: Tensor | None  # [C] column weights of the means
    pos: Tensor  # [N] mean logit of the positives, 0 for rows that take no part
    valid: Tensor  # [N] bool, rows that have a positive
    weight: Tensor  # [N] anchor weights, 0 for rows that take no part


def build_terms(batch: Batch, options: Options, ranks: Ranks | None = None) -> Terms:
    """Column weights, positive term and anchor weights in O(N D), without a synchronisation.

    With `ranks`, the batch holds the rows of all ranks, and means and temperature get their gradient from this rank's
    anchors only.
    """
    z, labels, means, seen, anchor_weight = batch
    temperature, mean_weight, balance, _, ignore_index = options
    dtype = accumulation_dtype(z.dtype)
    use = labels != ignore_index  # [N]
    z = z.where(use[:, None], 0)  # rows that take no part may hold anything, and NaN times a weight of 0 is NaN
    if means is None:
        row_class, num_classes = _dense_classes(labels), len(labels)
    else:
        row_class, num_classes = validated_labels(labels, len(means), ignore_index).where(use, 0), len(means)
    uses = use.to(dtype)
    counts = uses.new_zeros(num_classes).index_add(0, row_class, uses)  # [C], n_c
    zf = z.to(dtype)
    class_sum = zf.new_zeros(num_classes, z.shape[1]).index_add(0, row_class, zf)  # [C, D]

    positives = class_sum[row_class] - zf  # [N, D], sum of the positives of each anchor
    count = counts[row_class]  # [N]
    in_mean = torch.zeros_like(count)  # [N], 1 where the anchor's class has a mean
    mu = b = None
    if means is not None:
        there = means if seen is None else means.where(seen[:, None], 0)  # [C, D]
        mu = unit_rows(there.to(dtype))  # [C, D]
        has_mean = torch.ones_like(counts) if seen is None else seen.to(dtype)  # [C]
        in_mean = has_mean[row_class]
        own_mean = mu[row_class] if ranks is None else ranks.share(mu[row_class])  # [N, D]
        positives = positives + (mean_weight * in_mean)[:, None] * own_mean
        b = has_mean / (counts + 1) if balance == "class" else has_mean
    a = uses / (count + in_mean).clamp(min=1) if balance == "class" else uses
    num_positive = count - 1 + mean_weight * in_mean  # [N]
    valid = use & (num_positive > 0)
    if ranks is not None and isinstance(temperature, Tensor):
        temperature = ranks.share(temperature.reshape(1).expand(len(z)))
    pos = (zf * positives).sum(1) / (num_positive.where(valid, 1) * temperature)
    weight = valid.to(dtype) if anchor_weight is None else anchor_weight.to(dtype).where(valid, 0)
    return Terms(z, mu, a, b, pos.where(valid, 0), valid, weight)


def _dense_classes(labels: Tensor) -> Tensor:
    """An index in [0, N) for each row, equal for rows of equal label, found without knowing C (no synchronisation)."""
    ordered, order = labels.sort()
    starts = F.pad((ordered[1:] != ordered[:-1]).long(), (1, 0))
    return torch.empty_like(labels).scatter(0, order, starts.cumsum(0))


def reduce_anchors(loss: Tensor, weight: Tensor, reduction: Reduction) -> Tensor:
    """Weighted mean (0 where no anchor has weight), sum, or the weighted values of the anchors' losses [N]."""
    weighted = weight * loss  # [N]
    if reduction == "none":
        return weighted
    if reduction == "sum":
        return weighted.sum()
    total = weight.sum()
    return weighted.sum() / total.where(total > 0, 1)


def reduce_terms(lse: Tensor, terms: Terms, reduction: Reduction) -> Tensor:
    """The loss from its two terms; rows that take no part count as 0 even where their lse is -inf."""
    return reduce_anchors(lse.where(terms.valid, 0) - terms.pos, terms.weight, reduction)
