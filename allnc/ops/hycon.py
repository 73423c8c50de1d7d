"""HyCon, softmax form: contrast of activations with activations *and* class means (restores NC1).

    S_ij = z_i·z_j / τ        T_ic = z_i·μ_c / τ        μ_c = unit(M_c)
    lse_i = log( Σ_{j≠i} a_j exp S_ij + Σ_c b_c exp T_ic )
    pos_i = ( Σ_{j≠i, y_j=y_i} S_ij + κ T_{i,y_i} ) / ( n_{y_i} - 1 + κ )
    L     = Σ_i g_i (lse_i - pos_i) / Σ_i g_i

Only lse needs N² work, and it needs no labels: it is the op `allnc::hycon_lse`, with a C++ and a Triton twin.
The positive term needs one sum per class, Σ_{j in class} S_ij = z_i·(class sum)/τ, and is O(N D) torch code.

Legend: N activations, D columns, C classes; n_c activations of class c; κ mean_weight; g anchor_weight.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

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

Balance = Literal["class", "none"]
Reduction = Literal["mean", "sum", "none"]

# With the constant shift every exponent is S - 1/τ >= -2/τ. At 64 the smallest term is e^-64 = 1.6e-28, which leaves a
# factor of 1e10 for the column weights before float32 (1.2e-38) loses it.
_SHIFT_LIMIT = 64.0


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
    return _reduce(lse - pos, weight, reduction)


def _lse_forward_eager(z: Tensor, mu: Tensor | None, a: Tensor, b: Tensor | None, temperature: Tensor) -> Tensor:
    logits = (z @ z.T).div_(temperature)  # [N, N]
    logits.add_(a.log()).fill_diagonal_(-torch.inf)
    if mu is None or b is None:
        return torch.logsumexp(logits, 1)
    mean_logits = (z @ mu.T).div_(temperature).add_(b.log())  # [N, C]
    return torch.logaddexp(torch.logsumexp(logits, 1), torch.logsumexp(mean_logits, 1))


def _lse_backward_eager(
    grad: Tensor, lse: Tensor, z: Tensor, mu: Tensor | None, a: Tensor, b: Tensor | None, temperature: Tensor
) -> tuple[Tensor, Tensor]:
    lse = lse.where(grad != 0, torch.inf)[:, None]  # no share for an anchor without gradient: its lse may be -inf
    # Weights inside the exponent: a column of weight 0 may be far above lse, and inf times 0 is NaN.
    share = (z @ z.T).div_(temperature).add_(a.log()).sub_(lse).exp_()  # [N, N], times g_i: the softmax's gradient
    share.fill_diagonal_(0).mul_(grad[:, None])
    dz = share @ z + share.T @ z
    if mu is None or b is None:
        return dz / temperature, a.new_empty(0, z.shape[1])
    mean_share = (z @ mu.T).div_(temperature).add_(b.log()).sub_(lse).exp_().mul_(grad[:, None])  # [N, C]
    return (dz + mean_share @ mu) / temperature, mean_share.T @ z / temperature


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
    if backend == "triton":
        from allnc.kernels.hycon import hycon_lse_forward

        mu = None if mu is None else mu.to(z.dtype)  # one type for the tensor cores
        return hycon_lse_forward(z, mu, a, b, temperature, shifted=shifted, deterministic=deterministic)
    z = z.to(a.dtype)
    if backend == "cpp":
        return torch.ops.allnc_C.hycon_lse_forward(z, mu, a, b, temperature, shifted)
    with torch.autocast(z.device.type, enabled=False):
        return _lse_forward_eager(z, mu, a, b, temperature)


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
    backend: str,
) -> tuple[Tensor, Tensor]:
    if backend == "triton":
        from allnc.kernels.hycon import hycon_lse_backward

        mu = None if mu is None else mu.to(z.dtype)
        dz, dmu = hycon_lse_backward(grad, lse, z, mu, a, b, temperature, shifted=shifted)
        return dz, a.new_empty(0, z.shape[1]) if dmu is None else dmu.to(a.dtype)
    zf = z.to(a.dtype)
    if backend == "cpp":
        dz, dmu = torch.ops.allnc_C.hycon_lse_backward(grad, lse, zf, mu, a, b, temperature, shifted)
    else:
        with torch.autocast(z.device.type, enabled=False):
            dz, dmu = _lse_backward_eager(grad, lse, zf, mu, a, b, temperature)
    return dz.to(z.dtype), dmu


@_hycon_lse_backward.register_fake
def _(grad, lse, z, mu, a, b, temperature, shifted, backend):
    return torch.empty_like(z), a.new_empty(0, z.shape[1]) if mu is None else torch.empty_like(mu)


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
        grad.contiguous(), lse, z, mu, a, b, temperature, ctx.shifted, ctx.backend
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
        mu: [C, D] unit rows in the accumulation type of z, contiguous; or None. Triton rounds them to z's type.
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
) -> Contrast:
    """Column weights, positive term and anchor weights of HyCon in O(N D), without a synchronisation."""
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
        partners = partners + (mean_weight * in_mean)[:, None] * mu[group]
        b = has_mean / (counts + 1) if balance == "class" else has_mean
    a = uses / (count + in_mean).clamp(min=1) if balance == "class" else uses
    num_positive = count - 1 + mean_weight * in_mean  # [N]
    valid = use & (num_positive > 0)
    pos = (zf * partners).sum(1) / (num_positive.where(valid, 1) * temperature)
    weight = valid.to(dtype) if anchor_weight is None else anchor_weight.to(dtype) * valid
    return Contrast(mu, a, b, pos.where(valid, 0), weight)


def _dense_groups(labels: Tensor) -> Tensor:
    """An index in [0, N) per row, equal for rows of equal label, found without knowing C (no synchronisation)."""
    ordered, order = labels.sort()
    starts = F.pad((ordered[1:] != ordered[:-1]).long(), (1, 0))
    return torch.empty_like(labels).scatter(0, order, starts.cumsum(0))


def _reduce(loss: Tensor, weight: Tensor, reduction: Reduction) -> Tensor:
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
    return _reduce(lse - contrast.pos, contrast.weight, reduction)


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
) -> None:
    """Raise ValueError or TypeError with name, expected and got for arguments `hycon` cannot take."""
    check_floating("z", z)
    check_shape("z", z, ("N", "D"))
    num_rows, dim = z.shape
    if num_rows == 0 or dim == 0:
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
        backend: "auto" (fastest that can run), "eager", "cpp" (CPU) or "triton".

    Returns:
        Scalar, or [N] for reduction="none"; float32 (float64 for float64 z).

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, type, range or device.
        RuntimeError: the requested backend is not available.

    Source: ours, after AllNC (arXiv 2408.07253); SupCon: Khosla et al., NeurIPS 2020; class balance: Zhu et al.,
        Balanced Contrastive Learning, CVPR 2022.
    """
    check_hycon(z, labels, means, seen, temperature, mean_weight, balance, anchor_weight, reduction)
    backend_used = resolve_backend(backend, op="hycon", device=z.device, dtype=z.dtype, supported=("cpp", "triton"))
    with torch.autocast(z.device.type, enabled=False):
        z = z.contiguous()
        contrast = build_contrast(
            z, labels, means, seen, temperature, mean_weight, balance, anchor_weight, ignore_index
        )
        lse = hycon_lse(z, contrast.mu, contrast.a, contrast.b, temperature, backend=backend_used)
        return reduce_contrast(lse, contrast, reduction)
