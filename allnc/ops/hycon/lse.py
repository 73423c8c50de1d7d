"""HyCon's N² work: every activation's log-sum-exp over all others and all class means, and its gradient.

    lse_i = log( Σ_{j≠i} a_j exp(z_i·z_j/τ) + Σ_c b_c exp(z_i·mu_c/τ) )

and, for g = dL/dlse and u_i = g_i exp(-lse_i),

    dz_i  = (1/τ) [ Σ_{j≠i} exp(z_i·z_j/τ) (u_i a_j + u_j a_i) z_j + u_i Σ_c b_c exp(z_i·mu_c/τ) mu_c ]
    dmu_c = (1/τ) b_c Σ_i u_i exp(z_i·mu_c/τ) z_i

It needs no labels. The ops are `allnc::hycon_lse` and `allnc::hycon_lse_backward`, each with dense, C++ and Triton
code. Over several ranks each does one part of the pairs of the forward, and the gradient of its own rows.

Legend: N activations, D columns, C classes; a [N], b [C] column weights >= 0; τ temperature.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from allnc.ops._op import differentiable, op
from allnc.ops.hycon.options import Options
from allnc.ops.hycon.terms import Terms

if TYPE_CHECKING:
    from allnc.ops.ranks import Ranks


def _lse_forward_eager(
    z: Tensor, mu: Tensor | None, a: Tensor, b: Tensor | None, temperature: Tensor, part: int, parts: int
) -> Tensor:
    """The whole lse of this part's rows, -inf elsewhere: rows [part N / parts, (part + 1) N / parts)."""
    rows = slice(part * len(z) // parts, (part + 1) * len(z) // parts)
    logits = (z[rows] @ z.T).div_(temperature).add_(a.log())  # [rows, N]
    logits[:, rows].fill_diagonal_(-torch.inf)
    lse = torch.full_like(a, -torch.inf)
    lse[rows] = torch.logsumexp(logits, 1)
    if mu is not None and b is not None:
        mean_logits = (z[rows] @ mu.T).div_(temperature).add_(b.log())  # [rows, C]
        lse[rows] = torch.logaddexp(lse[rows], torch.logsumexp(mean_logits, 1))
    return lse


def _lse_backward_eager(
    grad: Tensor,
    lse: Tensor,
    z: Tensor,
    mu: Tensor | None,
    a: Tensor,
    b: Tensor | None,
    temperature: Tensor,
    num_own: int,
) -> tuple[Tensor, Tensor]:
    lse = lse.where(grad != 0, torch.inf)  # no share for an anchor without gradient: its lse may be -inf
    logits = (z[:num_own] @ z.T).div_(temperature)  # [num_own, N]
    # Weights inside the exponent: a column of weight 0 may be far above lse, and inf times 0 is NaN.
    k = (logits + a.log()).sub_(lse[:num_own, None]).exp_().mul_(grad[:num_own, None])  # own rows as anchors
    k += logits.add_(a[:num_own, None].log()).sub_(lse).exp_().mul_(grad)  # and as columns of every anchor
    dz = k.fill_diagonal_(0) @ z  # [num_own, D]
    if mu is None or b is None:
        return dz / temperature, a.new_empty(0, z.shape[1])
    mean_share = (z[:num_own] @ mu.T).div_(temperature).add_(b.log()).sub_(lse[:num_own, None]).exp_()  # [num_own, C]
    mean_share.mul_(grad[:num_own, None])
    return (dz + mean_share @ mu) / temperature, mean_share.T @ z[:num_own] / temperature


def _cpp_rows(z: Tensor) -> Tensor:
    """z in a type the C++ code takes: float16 in float32, because CPUs multiply bfloat16 but not float16."""
    return z.float() if z.dtype == torch.float16 else z


@op("hycon_lse")
def _hycon_lse(
    z: Tensor,
    mu: Tensor | None,
    a: Tensor,
    b: Tensor | None,
    temperature: Tensor,
    shifted: bool,
    deterministic: bool,
    part: int,
    parts: int,
    backend: str,
) -> Tensor:
    """lse of one part's share of the pairs, [N]: logsumexp over all parts is the whole."""
    if backend == "triton":
        from allnc.kernels.hycon.lse import hycon_lse_forward

        mu = None if mu is None else mu.to(z.dtype)  # one type for the tensor cores
        options = {"shifted": shifted, "deterministic": deterministic, "part": part, "parts": parts}
        return hycon_lse_forward(z, mu, a, b, temperature, **options)
    if backend == "cpp":
        return torch.ops.allnc_C.hycon_lse_forward(_cpp_rows(z), mu, a, b, temperature, shifted, part, parts)
    with torch.autocast(z.device.type, enabled=False):
        return _lse_forward_eager(z.to(a.dtype), mu, a, b, temperature, part, parts)


@_hycon_lse.register_fake
def _(z, mu, a, b, temperature, shifted, deterministic, part, parts, backend):
    return torch.empty_like(a)


@op("hycon_lse_backward")
def _hycon_lse_backward(
    grad: Tensor,
    lse: Tensor,
    z: Tensor,
    mu: Tensor | None,
    a: Tensor,
    b: Tensor | None,
    temperature: Tensor,
    shifted: bool,
    num_own: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    if backend == "triton":
        from allnc.kernels.hycon.waves import hycon_lse_backward

        mu = None if mu is None else mu.to(z.dtype)
        dz, dmu = hycon_lse_backward(grad, lse, z, mu, a, b, temperature, shifted=shifted, own=num_own)
        return dz, a.new_empty(0, z.shape[1]) if dmu is None else dmu.to(a.dtype)
    if backend == "cpp":
        dz, dmu = torch.ops.allnc_C.hycon_lse_backward(grad, lse, _cpp_rows(z), mu, a, b, temperature, shifted, num_own)
    else:
        with torch.autocast(z.device.type, enabled=False):
            dz, dmu = _lse_backward_eager(grad, lse, z.to(a.dtype), mu, a, b, temperature, num_own)
    return dz.to(z.dtype), dmu


@_hycon_lse_backward.register_fake
def _(grad, lse, z, mu, a, b, temperature, shifted, num_own, backend):
    return z.new_empty(num_own, z.shape[1]), a.new_empty(0, z.shape[1]) if mu is None else torch.empty_like(mu)


def temperature_gradient(z: Tensor, dz: Tensor, mu: Tensor | None, dmu: Tensor, temperature: Tensor) -> Tensor:
    """dL/dτ from the other gradients.

    lse depends on z, mu and τ through z·z/τ and z·mu/τ only, so scaling the rows by s and τ by s² changes nothing:
    Σ z·dz + Σ mu·dmu + 2 τ dτ = 0.
    """
    dtype = temperature.dtype
    products = (z.to(dtype) * dz.to(dtype)).sum()
    if mu is not None:
        products = products + (mu * dmu).sum()
    return -products / (2 * temperature)


def _save_for_lse(ctx, inputs, output) -> None:
    z, mu, a, b, temperature, ctx.shifted, _, _, parts, ctx.backend = inputs  # the backward is always deterministic
    assert parts == 1, "one part's lse has no gradient of its own; see _LseAcrossRanks"
    ctx.save_for_backward(z, mu, a, b, temperature, output)


def _lse_autograd(ctx, grad: Tensor):
    z, mu, a, b, temperature, lse = ctx.saved_tensors
    dz, dmu = _hycon_lse_backward(grad.contiguous(), lse, z, mu, a, b, temperature, ctx.shifted, len(z), ctx.backend)
    dtemperature = temperature_gradient(z, dz, mu, dmu, temperature) if ctx.needs_input_grad[4] else None
    return dz, dmu if mu is not None else None, None, None, dtemperature, *(None,) * 5


_differentiable_lse = differentiable(_hycon_lse, name="hycon", save=_save_for_lse, backward=_lse_autograd)


class _LseAcrossRanks(torch.autograd.Function):
    """`allnc::hycon_lse` of the rows of all ranks; differentiable in this rank's rows, in mu and τ (their shares)."""

    @staticmethod
    def forward(ctx, z, mu, a, b, temperature, shifted, deterministic, backend, ranks):
        part = _hycon_lse(z, mu, a, b, temperature, shifted, deterministic, ranks.rank, ranks.size, backend)
        lse = ranks.logsumexp(part)
        ctx.shifted, ctx.backend, ctx.ranks = shifted, backend, ranks
        ctx.save_for_backward(z, mu, a, b, temperature, lse)
        return lse

    @staticmethod
    def backward(ctx, *grads):
        z, mu, a, b, temperature, lse = ctx.saved_tensors
        ranks: Ranks = ctx.ranks
        num_own = ranks.sizes[ranks.rank]
        dz = torch.zeros_like(z)  # of the rows of other ranks nobody asks
        if num_own == 0:
            dmu = None if mu is None else torch.zeros_like(mu)
            return dz, dmu, None, None, torch.zeros_like(temperature), *(None,) * 4
        z, a, lse, grad = (ranks.own_first(x) for x in (z, a, lse, grads[0]))
        own_dz, dmu = _hycon_lse_backward(grad, lse, z, mu, a, b, temperature, ctx.shifted, num_own, ctx.backend)
        dz[ranks.start : ranks.stop] = own_dz
        dtemperature = None
        if ctx.needs_input_grad[4]:
            dtemperature = temperature_gradient(z[:num_own], own_dz, mu, dmu, temperature)
        return dz, None if mu is None else dmu, None, None, dtemperature, *(None,) * 4


def hycon_lse(terms: Terms, options: Options, *, backend: str, ranks: Ranks | None = None) -> Tensor:
    """lse_i = log( Σ_{j≠i} a_j exp(z_i·z_j/τ) + Σ_c b_c exp(z_i·mu_c/τ) ), differentiable in z, mu and τ.

    Repeated calls are bit-equal on the CPU, and on a GPU where torch.are_deterministic_algorithms_enabled().

    Args:
        terms: z, mu, a and b are read, z and mu contiguous. mu is in the accumulation type of z; Triton, and C++ for
            bfloat16 where the processor multiplies it and τ >= 1/32, round it to z's type.
        options: the temperature is read. The value of a tensor is never read on the host, so the running-maximum
            variant is used for it.
        backend: "eager", "cpp" or "triton" (resolved).
        ranks: the ranks whose rows z are; the gradient reaches this rank's rows only.

    Returns:
        [N] in a's type; -inf where nothing is contrasted with.
    """
    arguments = (
        terms.z, terms.mu, terms.a, terms.b, _temperature_tensor(options.temperature, terms.a),
        options.shifted, torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
    if ranks is not None:
        return _LseAcrossRanks.apply(*arguments, backend, ranks)
    return _differentiable_lse(*arguments, 0, 1, backend)


def _temperature_tensor(temperature: float | Tensor, like: Tensor) -> Tensor:
    """τ as a 0-dim tensor of like's type and device."""
    if isinstance(temperature, Tensor):
        return temperature.to(like.dtype).reshape(())
    return torch.full((), temperature, dtype=like.dtype, device=like.device)
