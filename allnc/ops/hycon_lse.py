"""HyCon's N² work: every activation's log-sum-exp over all others and all class means, and its gradient.

    lse_i = log( Σ_{j≠i} a_j exp(z_i·z_j/τ) + Σ_c b_c exp(z_i·mu_c/τ) )

and, for g = dL/dlse and u_i = g_i exp(-lse_i),

    dz_i  = (1/τ) [ Σ_{j≠i} exp(z_i·z_j/τ) (u_i a_j + u_j a_i) z_j + u_i Σ_c b_c exp(z_i·mu_c/τ) mu_c ]
    dmu_c = (1/τ) b_c Σ_i u_i exp(z_i·mu_c/τ) z_i

It needs no labels. The ops are `allnc::hycon_lse`, `allnc::hycon_lse_part` (one of several ranks' share) and
`allnc::hycon_lse_backward`, each with dense, C++ and Triton code.

Legend: N activations, D columns, C classes; a [N], b [C] column weights >= 0; τ temperature.
"""

from __future__ import annotations

import torch
from torch import Tensor

# With the constant shift every exponent is S - 1/τ >= -2/τ. At 64 the smallest term is e^-64 = 1.6e-28, which leaves a
# factor of 1e10 for the column weights before float32 (1.2e-38) loses it.
_SHIFT_LIMIT = 64.0


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
    grad: Tensor, lse: Tensor, z: Tensor, mu: Tensor | None, a: Tensor, b: Tensor | None, temperature: Tensor, own: int
) -> tuple[Tensor, Tensor]:
    lse = lse.where(grad != 0, torch.inf)  # no share for an anchor without gradient: its lse may be -inf
    logits = (z[:own] @ z.T).div_(temperature)  # [own, N]
    # Weights inside the exponent: a column of weight 0 may be far above lse, and inf times 0 is NaN.
    k = (logits + a.log()).sub_(lse[:own, None]).exp_().mul_(grad[:own, None])  # own rows as anchors
    k += logits.add_(a[:own, None].log()).sub_(lse).exp_().mul_(grad)  # and as columns of every anchor
    dz = k.fill_diagonal_(0) @ z  # [own, D]
    if mu is None or b is None:
        return dz / temperature, a.new_empty(0, z.shape[1])
    mean_share = (z[:own] @ mu.T).div_(temperature).add_(b.log()).sub_(lse[:own, None]).exp_()  # [own, C]
    mean_share.mul_(grad[:own, None])
    return (dz + mean_share @ mu) / temperature, mean_share.T @ z[:own] / temperature


def _cpp_rows(z: Tensor) -> Tensor:
    """z in a type the C++ code takes: float16 in float32, because CPUs multiply bfloat16 but not float16."""
    return z.float() if z.dtype == torch.float16 else z


@torch.library.custom_op("allnc::hycon_lse_part", mutates_args=())
def _hycon_lse_part(
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
    """lse of one part's share of the pairs, [N]: logsumexp over all parts is the whole. Not differentiable."""
    if backend == "triton":
        from allnc.kernels.hycon import hycon_lse_forward

        mu = None if mu is None else mu.to(z.dtype)  # one type for the tensor cores
        options = {"shifted": shifted, "deterministic": deterministic, "part": part, "parts": parts}
        return hycon_lse_forward(z, mu, a, b, temperature, **options)
    if backend == "cpp":
        return torch.ops.allnc_C.hycon_lse_forward(_cpp_rows(z), mu, a, b, temperature, shifted, part, parts)
    with torch.autocast(z.device.type, enabled=False):
        return _lse_forward_eager(z.to(a.dtype), mu, a, b, temperature, part, parts)


@_hycon_lse_part.register_fake
def _(z, mu, a, b, temperature, shifted, deterministic, part, parts, backend):
    return torch.empty_like(a)


@torch.library.custom_op("allnc::hycon_lse", mutates_args=())
def _hycon_lse(
    z: Tensor,
    mu: Tensor | None,
    a: Tensor,
    b: Tensor | None,
    temperature: Tensor,
    shifted: bool,
    deterministic: bool,
    backend: str,
) -> Tensor:
    return torch.ops.allnc.hycon_lse_part(z, mu, a, b, temperature, shifted, deterministic, 0, 1, backend)


@_hycon_lse.register_fake
def _(z, mu, a, b, temperature, shifted, deterministic, backend):
    return torch.empty_like(a)


@torch.library.custom_op("allnc::hycon_lse_backward", mutates_args=())
def _hycon_lse_backward(
    grad: Tensor,
    lse: Tensor,
    z: Tensor,
    mu: Tensor | None,
    a: Tensor,
    b: Tensor | None,
    temperature: Tensor,
    shifted: bool,
    own: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    if backend == "triton":
        from allnc.kernels.waves import hycon_lse_backward

        mu = None if mu is None else mu.to(z.dtype)
        dz, dmu = hycon_lse_backward(grad, lse, z, mu, a, b, temperature, shifted=shifted, own=own)
        return dz, a.new_empty(0, z.shape[1]) if dmu is None else dmu.to(a.dtype)
    if backend == "cpp":
        dz, dmu = torch.ops.allnc_C.hycon_lse_backward(grad, lse, _cpp_rows(z), mu, a, b, temperature, shifted, own)
    else:
        with torch.autocast(z.device.type, enabled=False):
            dz, dmu = _lse_backward_eager(grad, lse, z.to(a.dtype), mu, a, b, temperature, own)
    return dz.to(z.dtype), dmu


@_hycon_lse_backward.register_fake
def _(grad, lse, z, mu, a, b, temperature, shifted, own, backend):
    return z.new_empty(own, z.shape[1]), a.new_empty(0, z.shape[1]) if mu is None else torch.empty_like(mu)


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
    z, mu, a, b, temperature, ctx.shifted, _, ctx.backend = inputs  # the backward is deterministic in any case
    ctx.save_for_backward(z, mu, a, b, temperature, output)


def _lse_autograd(ctx, grad: Tensor):
    z, mu, a, b, temperature, lse = ctx.saved_tensors
    dz, dmu = torch.ops.allnc.hycon_lse_backward(
        grad.contiguous(), lse, z, mu, a, b, temperature, ctx.shifted, len(z), ctx.backend
    )
    dtemperature = temperature_gradient(z, dz, mu, dmu, temperature) if ctx.needs_input_grad[4] else None
    return dz, dmu if mu is not None else None, None, None, dtemperature, None, None, None


_hycon_lse.register_autograd(_lse_autograd, setup_context=_save_for_lse)


def hycon_lse(
    z: Tensor,
    mu: Tensor | None,
    a: Tensor,
    b: Tensor | None,
    temperature: float | Tensor,
    *,
    deterministic: bool | None = None,
    backend: str,
) -> Tensor:
    """lse_i = log( Σ_{j≠i} a_j exp(z_i·z_j/τ) + Σ_c b_c exp(z_i·mu_c/τ) ), differentiable in z, mu and τ.

    Args:
        z: [N, D] unit rows, contiguous.
        mu: [C, D] unit rows in the accumulation type of z, contiguous; or None. Triton, and
            C++ for bfloat16 where the processor multiplies it, round them to z's type.
        a: [N] column weights >= 0 in the accumulation type of z.
        b: [C] weights of the means, as a; None iff mu is None.
        temperature: τ > 0. A tensor may require a gradient; its value is never read on the host, so the
            running-maximum variant is used for it.
        deterministic: bit-equal results; None follows torch.are_deterministic_algorithms_enabled().
        backend: "eager", "cpp" or "triton" (resolved).

    Returns:
        [N] in a's type; -inf where nothing is contrasted with.
    """
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    tau = temperature_tensor(temperature, a)
    shifted = uses_constant_shift(temperature)
    return torch.ops.allnc.hycon_lse(z, mu, a, b, tau, shifted, deterministic, backend)


def uses_constant_shift(temperature: float | Tensor) -> bool:
    """Whether exp(S - 1/τ) stays in range, so that no running maximum is needed; False for a τ not known here."""
    return not isinstance(temperature, Tensor) and 2.0 / temperature <= _SHIFT_LIMIT


def temperature_tensor(temperature: float | Tensor, like: Tensor) -> Tensor:
    """τ as a 0-dim tensor of like's type and device."""
    if isinstance(temperature, Tensor):
        return temperature.to(like.dtype).reshape(())
    return torch.full((), temperature, dtype=like.dtype, device=like.device)
