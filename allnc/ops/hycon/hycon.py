"""HyCon, softmax form: contrast of activations with activations *and* class means (restores NC1).

    S_ij = z_i·z_j / τ        T_ic = z_i·μ_c / τ        μ_c = unit(M_c)
    lse_i = log( Σ_{j≠i} a_j exp S_ij + Σ_c b_c exp T_ic )
    pos_i = ( Σ_{j≠i, y_j=y_i} S_ij + κ T_{i,y_i} ) / ( n_{y_i} - 1 + κ )
    L     = Σ_i g_i (lse_i - pos_i) / Σ_i g_i

Only lse needs N² work, and it needs no labels (lse.py); the rest is O(N D) (terms.py). What the losses of this package
ask, all of it is one op (fused.py). Over several ranks the same terms are formed of the rows of all (allnc.ops.ranks).

Legend: N activations, D columns, C classes; n_c activations of class c; κ mean_weight; g anchor_weight.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from allnc.ops._common import Backend, accumulation_dtype, debug_checks, resolve_backend, unit_rows
from allnc.ops.hycon.fused import fuses, hycon_fused
from allnc.ops.hycon.lse import hycon_lse
from allnc.ops.hycon.options import Balance, Batch, Options, Reduction, agreed_facts, check_hycon
from allnc.ops.hycon.terms import build_terms, reduce_anchors, reduce_terms
from allnc.ops.ranks import Ranks

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
    use = labels != ignore_index  # [N]
    z = z.to(accumulation_dtype(z.dtype)).where(use[:, None], 0)  # [N, D]
    same = (labels[:, None] == labels[None, :]) & use[:, None] & use[None, :]  # [N, N]
    other = ~torch.eye(len(z), dtype=torch.bool, device=z.device) & use[None, :]  # [N, N]
    count = same.sum(1).to(z.dtype)  # [N], n_{y_i}

    logits = z @ z.T / temperature  # [N, N]
    own_logit, in_mean = torch.zeros_like(count), torch.zeros_like(count)  # [N], [N]
    mean_terms = []
    if means is not None:
        seen = torch.ones(len(means), dtype=torch.bool, device=z.device) if seen is None else seen
        mean_logits = z @ unit_rows(means.to(z.dtype).where(seen[:, None], 0)).T / temperature  # [N, C], T
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
    weight = valid.to(z.dtype) if anchor_weight is None else anchor_weight.to(z.dtype).where(valid, 0)
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
        labels: [N] int64 in [0, C), or `ignore_index` for rows that take no part at all, whatever they hold. Without
            means, any integers.
        means: [C, D] class means in z's space, any length: normalised here. A mean whose entries are all below 8e-31
            has no direction: it is a zero row without gradient. Differentiable. For float16 and bfloat16 z, Triton,
            and C++ on processors that multiply bfloat16 if τ >= 1/32, round the unit means to z's type, their logits
            by up to 2^-12/τ and 2^-9/τ.
        seen: [C] bool, classes that have a mean; the others are masked, whatever their rows hold. Default: all.
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
    batch = Batch(z, labels, means, seen, anchor_weight)
    options = Options(temperature, mean_weight, balance, reduction, ignore_index)

    def check() -> str:
        check_hycon(batch, options, least_rows=1 if group is None else 0)
        return resolve_backend(backend, op="hycon", device=z.device, dtype=z.dtype, supported=("cpp", "triton"))

    if group is None:
        return contrast(batch, options, check())
    ranks = Ranks(group, check, lambda: len(z), lambda: agreed_facts(batch, options))
    return contrast(batch, options, check(), ranks)


def contrast(batch: Batch, options: Options, backend: str, ranks: Ranks | None = None) -> Tensor:
    """`hycon` of what `check_hycon` has passed, on a backend that can run; over `ranks` if given."""
    with torch.autocast(batch.z.device.type, enabled=False):
        if ranks is None and fuses(batch, options, backend):
            return hycon_fused(batch, options, backend)
        batch = batch._replace(z=batch.z.contiguous())
        if ranks is not None:
            batch = _gather(batch, ranks)
        terms = build_terms(batch, options, ranks)
        lse = hycon_lse(terms, options, backend=backend, ranks=ranks)
        return reduce_terms(lse, terms, options.reduction)


def _gather(batch: Batch, ranks: Ranks) -> Batch:
    """The batch with the rows of all ranks."""
    if ranks.num_rows == 0:
        raise ValueError("z must have at least one row on some rank; got none on all ranks")
    z, labels, means, _, anchor_weight = batch
    if means is not None and debug_checks():
        ranks.check_same("means", means.to(accumulation_dtype(means.dtype)))
    weight = None if anchor_weight is None else ranks.gather(anchor_weight)
    return batch._replace(z=ranks.gather(z), labels=ranks.gather(labels), anchor_weight=weight)
