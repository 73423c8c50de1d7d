"""HyCon's O(N D) part: argument checks, column weights, the positive term, and the reduction to a loss.

    pos_i = ( Σ_{j≠i, y_j=y_i} z_i·z_j + κ z_i·μ_{y_i} ) / ( τ (n_{y_i} - 1 + κ) )
    L     = Σ_i g_i (lse_i - pos_i) / Σ_i g_i

The positive term needs one sum per class: Σ_{j in class} z_i·z_j = z_i·(class sum).

Legend: N activations, D columns, C classes; n_c activations of class c; κ mean_weight; g anchor_weight.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from allnc.ops._common import (
    Backend,
    accumulation_dtype,
    check_choice,
    check_floating,
    check_labels,
    check_same_device,
    check_seen,
    check_shape,
    debug_checks,
    resolve_backend,
    validated_labels,
)

if TYPE_CHECKING:
    from allnc.ops.ranks import Ranks

Balance = Literal["class", "none"]
Reduction = Literal["mean", "sum", "none"]


def check_hycon(
    z: Tensor,
    labels: Tensor,
    means: Tensor | None,
    seen: Tensor | None,
    temperature: float | Tensor,
    mean_weight: float,
    balance: str,
    anchor_weight: Tensor | None,
    reduction: str,
    *,
    least_rows: int = 1,
) -> None:
    """Raise ValueError or TypeError with name, expected and got for arguments `hycon` cannot take."""
    check_floating("z", z)
    check_shape("z", z, ("N", "D"))
    num_rows, dim = z.shape
    if num_rows < least_rows or dim == 0:
        raise ValueError(f"z must have at least one row and one column; got {list(z.shape)}")
    check_labels(labels, num_rows)
    check_choice("balance", balance, ("class", "none"))
    check_choice("reduction", reduction, ("mean", "sum", "none"))
    if means is not None:
        check_floating("means", means)
        check_shape("means", means, ("C", dim))
        if seen is not None:
            check_seen(seen, len(means))
    elif seen is not None:
        raise ValueError("seen must be None when means is None; got a tensor. Pass the means it describes")
    if anchor_weight is not None:
        check_floating("anchor_weight", anchor_weight)
        check_shape("anchor_weight", anchor_weight, (num_rows,))
    if isinstance(temperature, Tensor):
        check_floating("temperature", temperature)
        if temperature.numel() != 1:
            raise ValueError(f"temperature must hold one value; got shape {list(temperature.shape)}")
    elif not temperature > 0:
        raise ValueError(f"temperature must be > 0; got {temperature}")
    if not mean_weight >= 0:
        raise ValueError(f"mean_weight must be >= 0; got {mean_weight}")
    tau = temperature if isinstance(temperature, Tensor) else None
    check_same_device(z=z, labels=labels, means=means, seen=seen, anchor_weight=anchor_weight, temperature=tau)
    if debug_checks():
        norms = z.detach().double().norm(dim=1)
        if not bool(((norms - 1).abs() < 2e-2).all()):
            worst = float(norms[(norms - 1).abs().argmax()])
            raise ValueError(f"z must have unit rows; got a row of norm {worst:.4g}. Use F.normalize(z, dim=1)")


def resolve_hycon(backend: Backend, z: Tensor) -> str:
    """The backend that hycon of these rows will use."""
    return resolve_backend(backend, op="hycon", device=z.device, dtype=z.dtype, supported=("cpp", "triton"))


class Contrast(NamedTuple):
    """What HyCon needs besides lse: the weights of its columns and the positive term. N, C, D as in the file head."""

    mu: Tensor | None  # [C, D] unit rows
    a: Tensor  # [N] column weights of the activations
    b: Tensor | None  # [C] column weights of the means
    pos: Tensor  # [N] mean logit of the positives
    weight: Tensor  # [N] anchor weights, 0 for rows that take no part


def build_contrast(
    z: Tensor,
    labels: Tensor,
    means: Tensor | None,
    seen: Tensor | None,
    temperature: float | Tensor,
    mean_weight: float,
    balance: Balance,
    anchor_weight: Tensor | None,
    ignore_index: int,
    ranks: Ranks | None = None,
) -> Contrast:
    """Column weights, positive term and anchor weights of HyCon in O(N D), without a synchronisation.

    With `ranks`, z, labels and anchor_weight hold the rows of all ranks, and means and temperature get their gradient
    from this rank's anchors only.
    """
    dtype = accumulation_dtype(z.dtype)
    use = labels != ignore_index  # [N]
    if means is None:
        group, num_groups = _dense_groups(labels), len(labels)
    else:
        group, num_groups = validated_labels(labels, len(means), ignore_index).where(use, 0), len(means)
    uses = use.to(dtype)
    counts = uses.new_zeros(num_groups).index_add(0, group, uses)  # [C], n_c
    zf = z.to(dtype)
    class_sum = zf.new_zeros(num_groups, z.shape[1]).index_add(0, group, zf * uses[:, None])  # [C, D]

    partners = class_sum[group] - zf  # [N, D], sum of the positives of each anchor
    count = counts[group]  # [N]
    in_mean = torch.zeros_like(count)  # [N], 1 where the anchor's class has a mean
    mu = b = None
    if means is not None:
        mu = F.normalize(means.to(dtype), dim=1)  # [C, D]
        has_mean = torch.ones_like(counts) if seen is None else seen.to(dtype)  # [C]
        in_mean = has_mean[group]
        own_mean = mu[group] if ranks is None else ranks.share(mu[group])  # [N, D]
        partners = partners + (mean_weight * in_mean)[:, None] * own_mean
        b = has_mean / (counts + 1) if balance == "class" else has_mean
    a = uses / (count + in_mean).clamp(min=1) if balance == "class" else uses
    num_positive = count - 1 + mean_weight * in_mean  # [N]
    valid = use & (num_positive > 0)
    if ranks is not None and isinstance(temperature, Tensor):
        temperature = ranks.share(temperature.reshape(1).expand(len(z)))
    pos = (zf * partners).sum(1) / (num_positive.where(valid, 1) * temperature)
    weight = valid.to(dtype) if anchor_weight is None else anchor_weight.to(dtype) * valid
    return Contrast(mu, a, b, pos.where(valid, 0), weight)


def _dense_groups(labels: Tensor) -> Tensor:
    """An index in [0, N) per row, equal for rows of equal label, found without knowing C (no synchronisation)."""
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


def reduce_contrast(lse: Tensor, contrast: Contrast, reduction: Reduction) -> Tensor:
    """The loss from its two terms; rows that take no part count as 0 even where their lse is -inf."""
    lse = lse.where(contrast.weight != 0, 0)
    return reduce_anchors(lse - contrast.pos, contrast.weight, reduction)
