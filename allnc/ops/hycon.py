"""HyCon, softmax form: contrast of activations with activations *and* class means (restores NC1).

    S_ij = z_i·z_j / τ        T_ic = z_i·μ_c / τ        μ_c = unit(M_c)
    lse_i = log( Σ_{j≠i} a_j exp S_ij + Σ_c b_c exp T_ic )
    pos_i = ( Σ_{j≠i, y_j=y_i} S_ij + κ T_{i,y_i} ) / ( n_{y_i} - 1 + κ )
    L     = Σ_i g_i (lse_i - pos_i) / Σ_i g_i

Only lse needs N² work, and it needs no labels (allnc.ops.hycon_lse, with a C++ and a Triton twin); the rest is O(N D)
(allnc.ops.contrast). Across ranks: allnc.ops.hycon_ranks.

Legend: N activations, D columns, C classes; n_c activations of class c; κ mean_weight; g anchor_weight.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from allnc.ops._common import Backend, accumulation_dtype
from allnc.ops.contrast import (
    Balance,
    Reduction,
    build_contrast,
    check_hycon,
    reduce_anchors,
    reduce_contrast,
    resolve_hycon,
)
from allnc.ops.hycon_lse import hycon_lse, uses_constant_shift
from allnc.ops.hycon_ranks import hycon_across_ranks
from allnc.ops.hycon_triton import fuses, hycon_fused

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def hycon_reference(
    z: Tensor,
    labels: Tensor,
    means: Tensor | None = None,
    *,
    seen: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    mean_weight: float = 1.0,
    balance: Balance = "class",
    anchor_weight: Tensor | None = None,
    reduction: Reduction = "mean",
    ignore_index: int = -100,
) -> Tensor:
    """HyCon as the formula is written, with N x N matrices and autograd; arguments as in `hycon`.

    The text to check the fused versions against, and the eager rival of the benchmarks. Arithmetic is in the
    accumulation type of z (float32, or float64 for float64 z).
    """
    z = z.to(accumulation_dtype(z.dtype))  # [N, D]
    use = labels != ignore_index  # [N]
    same = (labels[:, None] == labels[None, :]) & use[:, None] & use[None, :]  # [N, N]
    other = ~torch.eye(len(z), dtype=torch.bool, device=z.device) & use[None, :]  # [N, N]
    count = same.sum(1).to(z.dtype)  # [N], n_{y_i}

    logits = z @ z.T / temperature  # [N, N]
    own_logit, in_mean = torch.zeros_like(count), torch.zeros_like(count)  # [N], [N]
    mean_terms = []
    if means is not None:
        seen = torch.ones(len(means), dtype=torch.bool, device=z.device) if seen is None else seen
        mean_logits = z @ F.normalize(means.to(z.dtype), dim=1).T / temperature  # [N, C], T
        own = labels.where(use, 0)  # [N]
        own_logit = mean_logits.gather(1, own[:, None]).squeeze(1)
        in_mean = (seen[own] & use).to(z.dtype)
        per_class = z.new_zeros(len(means)).index_add(0, own, use.to(z.dtype))  # [C], n_c
        b = 1 / (per_class + 1) if balance == "class" else torch.ones_like(per_class)
        mean_terms = [torch.where(seen, mean_logits + b.log(), -torch.inf)]
    a = 1 / (count + in_mean).clamp(min=1) if balance == "class" else torch.ones_like(count)  # [N]
    terms = torch.cat([torch.where(other, logits + a.log(), -torch.inf), *mean_terms], 1)  # [N, N + C]

    num_positive = count - 1 + mean_weight * in_mean  # [N]
    valid = use & (num_positive > 0)
    lse = torch.logsumexp(terms.where(valid[:, None], 0), 1)  # [N]; rows left out may be empty: no -inf - -inf
    positive = (logits * (same & other)).sum(1) + mean_weight * in_mean * own_logit
    pos = positive / num_positive.where(valid, 1)
    weight = valid.to(z.dtype) if anchor_weight is None else anchor_weight.to(z.dtype) * valid
    return reduce_anchors(lse - pos, weight, reduction)


def hycon(
    z: Tensor,
    labels: Tensor,
    means: Tensor | None = None,
    *,
    seen: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    mean_weight: float = 1.0,
    balance: Balance = "class",
    anchor_weight: Tensor | None = None,
    reduction: Reduction = "mean",
    ignore_index: int = -100,
    group: ProcessGroup | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Hybrid contrast: each activation against all other activations and all class means, by softmax.

    Without means and with balance="none" this is the supervised contrastive loss (SupCon) exactly. Rows that have
    no positive (alone in their class, without a mean) add nothing to the sum nor to the normaliser.

    Args:
        z: [N, D] float16, bfloat16, float32 or float64; unit rows (environment ALLNC_DEBUG=1 checks them).
        labels: [N] int64 in [0, C), or `ignore_index` for rows that take no part at all. Without means, any
            integers.
        means: [C, D] class means in z's space, any length: normalised here. Differentiable.
        seen: [C] bool, classes that have a mean; the others are masked. Default: all.
        temperature: τ > 0, or a one-element tensor, which may require a gradient.
        mean_weight: κ >= 0, weight of the own class mean among the positives.
        balance: "class": each class enters the denominator as the average over its activations and its mean;
            "none": every activation and mean counts 1.
        anchor_weight: [N] >= 0, weight g of each anchor. Default: 1.
        reduction: "mean" over the anchors' weights, "sum", or "none" for the weighted values [N].
        ignore_index: label of rows that take no part.
        group: contrast over the batches of all ranks of this process group. All must call; local batches may differ
            in size, and be empty; means, seen and options must be the same (ALLNC_DEBUG=1 compares means). The
            result is the same on every rank: the loss of the whole batch ("none": its values in rank order).
            Gradients: of that loss with respect to this rank's z; for means and temperature this rank's share,
            where the sum over ranks is the whole. DistributedDataParallel averages over ranks where the shares
            have to be added: multiply the loss by the number of ranks. One synchronisation; torch.compile
            does not trace it.
        backend: "auto" (fastest that can run), "eager", "cpp" (CPU) or "triton".

    Returns:
        Scalar, or [N] for reduction="none"; float32 (float64 for float64 z).

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, type, range or device.
        RuntimeError: the requested backend is not available, or another rank's arguments are wrong.

    Source: ours, after AllNC (arXiv 2408.07253); SupCon: Khosla et al., NeurIPS 2020; class balance: Zhu et al.,
        Balanced Contrastive Learning, CVPR 2022.
    """
    arguments = (z, labels, means, seen, temperature, mean_weight, balance, anchor_weight, reduction)
    if group is not None:
        return hycon_across_ranks(*arguments, ignore_index, group, backend)
    check_hycon(*arguments)
    return hycon_of_checked(*arguments, ignore_index, resolve_hycon(backend, z))


def hycon_of_checked(
    z: Tensor,
    labels: Tensor,
    means: Tensor | None,
    seen: Tensor | None,
    temperature: float | Tensor,
    mean_weight: float,
    balance: Balance,
    anchor_weight: Tensor | None,
    reduction: Reduction,
    ignore_index: int,
    backend: str,
) -> Tensor:
    """`hycon` of arguments that `check_hycon` has passed, on a backend that `resolve_hycon` has chosen."""
    with torch.autocast(z.device.type, enabled=False):
        if backend == "triton" and fuses(z, anchor_weight):
            return hycon_fused(
                z,
                labels,
                means,
                seen=seen,
                temperature=temperature,
                mean_weight=mean_weight,
                balance=balance,
                anchor_weight=anchor_weight,
                reduction=reduction,
                ignore_index=ignore_index,
                shifted=uses_constant_shift(temperature),
            )
        z = z.contiguous()
        contrast = build_contrast(
            z, labels, means, seen, temperature, mean_weight, balance, anchor_weight, ignore_index
        )
        lse = hycon_lse(z, contrast.mu, contrast.a, contrast.b, temperature, backend=backend)
        return reduce_contrast(lse, contrast, reduction)
