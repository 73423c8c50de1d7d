"""HyCon over the batches of several processes: `allnc.hycon(..., group=...)`.

Every rank computes the O(N D) part for all rows, its even share of the pairs of tiles of lse, and the gradient of the
whole batch's loss with respect to its own rows. The gradients of means and temperature are sums over anchors, of which
each rank forms the share of its own.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from allnc.ops._common import FLOATING, Backend, accumulation_dtype, debug_checks
from allnc.ops.contrast import Balance, Reduction, build_contrast, check_hycon, reduce_contrast, resolve_hycon
from allnc.ops.hycon_lse import temperature_gradient, temperature_tensor, uses_constant_shift
from allnc.ops.ranks import Ranks


class _LseAcrossRanks(torch.autograd.Function):
    """`hycon_lse` of the rows of all ranks; differentiable in this rank's rows z, in mu and τ (their shares)."""

    @staticmethod
    def forward(ctx, z, mu, temperature, z_all, a, b, shifted, deterministic, backend, ranks):
        part = torch.ops.allnc.hycon_lse_part(
            z_all, mu, a, b, temperature, shifted, deterministic, ranks.rank, ranks.size, backend
        )
        lse = ranks.logsumexp(part)
        ctx.shifted, ctx.backend, ctx.ranks = shifted, backend, ranks
        ctx.save_for_backward(z_all, mu, a, b, temperature, lse)
        return lse

    @staticmethod
    def backward(ctx, *grads):
        z, mu, a, b, temperature, lse = ctx.saved_tensors
        ranks: Ranks = ctx.ranks
        own = ranks.sizes[ranks.rank]
        if own == 0:
            return z[:0], None if mu is None else torch.zeros_like(mu), torch.zeros_like(temperature), *(None,) * 7
        z, a, lse, grad = (ranks.own_first(x) for x in (z, a, lse, grads[0]))
        dz, dmu = torch.ops.allnc.hycon_lse_backward(grad, lse, z, mu, a, b, temperature, ctx.shifted, own, ctx.backend)
        dtemperature = temperature_gradient(z[:own], dz, mu, dmu, temperature) if ctx.needs_input_grad[2] else None
        return dz, dmu if mu is not None else None, dtemperature, *(None,) * 7


def hycon_across_ranks(
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
    group: dist.ProcessGroup,
    backend: Backend,
) -> Tensor:
    def check() -> None:
        check_hycon(z, labels, means, seen, temperature, mean_weight, balance, anchor_weight, reduction, least_rows=0)
        resolve_hycon(backend, z)

    def facts() -> dict[str, float | None]:
        return {
            "D": z.shape[1],
            "z's type (float16 0, bfloat16 1, float32 2, float64 3)": FLOATING.index(z.dtype),
            "the number of means": None if means is None else len(means),
            "seen's presence": float(seen is not None),
            "temperature": None if isinstance(temperature, Tensor) else temperature,
            "mean_weight": mean_weight,
            "balance (none 0, class 1)": float(balance == "class"),
            "anchor_weight's presence": float(anchor_weight is not None),
            "reduction (mean 0, sum 1, none 2)": ("mean", "sum", "none").index(reduction),
            "ignore_index": ignore_index,
        }

    ranks = Ranks(group, check, lambda: len(z), facts)
    if ranks.num_rows == 0:
        raise ValueError("z must have at least one row on some rank; got none on all ranks")
    if means is not None and debug_checks():
        ranks.check_same("means", means.to(accumulation_dtype(means.dtype)))
    with torch.autocast(z.device.type, enabled=False):
        z_all, labels = ranks.gather(z), ranks.gather(labels)
        weight = None if anchor_weight is None else ranks.gather(anchor_weight)
        contrast = build_contrast(
            z_all, labels, means, seen, temperature, mean_weight, balance, weight, ignore_index, ranks
        )
        lse = _LseAcrossRanks.apply(
            z,
            contrast.mu,
            temperature_tensor(temperature, contrast.a),
            z_all.detach(),
            contrast.a,
            contrast.b,
            uses_constant_shift(temperature),
            torch.are_deterministic_algorithms_enabled(),
            resolve_hycon(backend, z),
            ranks,
        )
        return reduce_contrast(lse, contrast, reduction)
