"""HyCon from labels to loss and gradients in three launches: prepare (hycon_classes), forward, backward.

    lse_i = log( Σ_{j≠i} a_j exp(z_i·z_j / τ) + Σ_c b_c exp(z_i·μ_c / τ) )
    L     = Σ_i w_i (lse_i - pos_i) / W,  W = Σ w_i (mean) or 1 (sum, none)

and, with the lse gradients of allnc.kernels.hycon for u_i = w_i exp(-lse_i),

    W dL/dz_i = (gradient of lse) - q_i (s_c + κ_c μ_c - 2 z_i) - t_c,  c the class of i
    W dL/dμ_c = (gradient of lse) - κ_c t_c
    dL/dM_c   = (dL/dμ_c - μ_c μ_c·dL/dμ_c) / |M_c|
    dL/dτ     = -(Σ_i z_i·dL/dz_i + Σ_c μ_c·dL/dμ_c) / 2τ

the last because L depends on rows and τ through z·z/τ and z·μ/τ only: rows times s and τ times s² change nothing.
Symbols, `state` and `index` as in allnc.kernels.hycon_classes.

Forward. The panels of allnc.kernels.hycon_panels. Every program counts itself when its sums are in memory; the last one
forms the loss from all of them, in a fixed order, and leaves u for the backward. Deterministic or unshifted, the
programs that share a panel write their sums side by side and the last one adds them, in order.

Backward. The panels of allnc.kernels.hycon_panels. A whole tile of the other terms beside the accumulator would not fit
the registers: a program writes its panel's lse gradient to scratch memory, and reads it back a few rows at a time to
add the positive term and, for a panel of μ, to go on to the raw means. With one gradient a row (reduction "none") u,
q and t are weighted with it first, by a launch of its own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from allnc.kernels import hycon
from allnc.kernels._common import LEAST_SCALED, LN_2, LOG2_E, VECTOR_BLOCK, architecture, device_guard, pointer
from allnc.kernels.hycon import HALF_SCALE
from allnc.kernels.hycon_classes import (
    LEAST_NORM,
    SCALARS,
    gather_tile,
    hycon_prepare_kernel,
    hycon_weigh_kernel,
    prepare_constants,
    state_rows,
    weigh_constants,
)
from allnc.kernels.hycon_panels import backward_panel, forward_sums, store_tile


@triton.jit
def finish_loss(
    state_ptr,
    partial_ptr,
    loss_ptr,
    N,
    C,
    num_splits,
    MEAN: tl.constexpr,
    NONE: tl.constexpr,
    SHIFTED: tl.constexpr,
    TRIANGLE: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The loss, 1/W and the scale of u, and each row's u and sum or lse, from all programs' sums."""
    u_ptr, _, sum_ptr, _, weight_ptr, pos_ptr, _ = state_rows(state_ptr, N + C)
    inverse_temperature = 1.0 / tl.load(state_ptr)

    weights = tl.zeros([BLOCK], dtype=tl.float32)
    largest = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, N, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        weight = tl.load(weight_ptr + rows, mask=rows < N, other=0.0)
        weights += weight
        largest = tl.maximum(largest, tl.abs(weight))
    per_weight = 1.0
    if MEAN:
        total_weight = tl.sum(weights, 0)
        per_weight = 1.0 / tl.where(total_weight == 0, 1.0, total_weight)
    scale = 1.0
    if SCALED:
        scale = HALF_SCALE / tl.maximum(tl.max(largest, 0), LEAST_SCALED)
    tl.store(state_ptr + 1, per_weight)
    tl.store(state_ptr + 2, scale)

    losses = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, N, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        weight = tl.load(weight_ptr + rows, mask=rows < N, other=0.0)
        pos = tl.load(pos_ptr + rows, mask=rows < N, other=0.0)
        # What other programs wrote in this launch is read past the first-level cache.
        shift = inverse_temperature
        if TRIANGLE:
            total = tl.load(sum_ptr + rows, mask=rows < N, other=1.0, cache_modifier=".cg")
        else:
            total = tl.zeros([BLOCK], dtype=tl.float32)
            maximum = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
            if not SHIFTED:
                for split in range(num_splits):
                    of_split = tl.load(
                        partial_ptr + (num_splits + split) * N + rows, mask=rows < N, other=0.0, cache_modifier=".cg"
                    )
                    maximum = tl.maximum(maximum, of_split)
            origin = tl.where(maximum == float("-inf"), 0.0, maximum)
            for split in range(num_splits):
                of_split = tl.load(partial_ptr + split * N + rows, mask=rows < N, other=1.0, cache_modifier=".cg")
                if not SHIFTED:
                    part_maximum = tl.load(
                        partial_ptr + (num_splits + split) * N + rows, mask=rows < N, other=0.0, cache_modifier=".cg"
                    )
                    of_split *= tl.exp2((part_maximum - origin) * (inverse_temperature * LOG2_E))
                total += of_split
            if not SHIFTED:
                shift *= maximum
        lse = tl.log2(total) * LN_2 + shift
        # A row that takes no part counts 0 even where nothing is contrasted with it (lse = -inf).
        used = weight != 0
        loss = weight * (tl.where(used, lse, 0.0) - pos)
        if NONE:
            tl.store(loss_ptr + rows, loss, mask=rows < N)
        losses += loss
        used = used & (total != 0)
        if SHIFTED:
            tl.store(u_ptr + rows, tl.where(used, weight * scale / total, 0.0), mask=rows < N)
            if not TRIANGLE:
                tl.store(sum_ptr + rows, total, mask=rows < N)
        else:
            tl.store(u_ptr + rows, weight * scale, mask=rows < N)
            tl.store(sum_ptr + rows, tl.where(used, lse, float("inf")), mask=rows < N)
    if not NONE:
        tl.store(loss_ptr, tl.sum(losses, 0) * per_weight)


@triton.jit
def loss_sums(
    program,
    z_ptr,
    mu_ptr,
    state_ptr,
    partial_ptr,
    N,
    C,
    num_splits,
    D: tl.constexpr,
    HAS_MU: tl.constexpr,
    SHIFTED: tl.constexpr,
    TRIANGLE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    RESIDENT: tl.constexpr,
):
    """One split of one panel: its sums of exponentials, to `state` (TRIANGLE) or side by side to partial_ptr."""
    _, a_ptr, sum_ptr, _, _, _, plain_a_ptr = state_rows(state_ptr, N + C)
    if not SHIFTED:
        a_ptr = plain_a_ptr
    rows, maximum, total = forward_sums(
        program, z_ptr, mu_ptr, a_ptr, a_ptr + N, state_ptr, sum_ptr, N, C, num_splits, 0, 1,
        D, HAS_MU, SHIFTED, TRIANGLE, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D, RESIDENT,
    )  # fmt: skip
    if TRIANGLE:
        tl.atomic_add(sum_ptr + rows, total, mask=rows < N, sem="relaxed")
    else:
        split = program % num_splits
        tl.store(partial_ptr + split * N + rows, total, mask=rows < N)
        if not SHIFTED:
            tl.store(partial_ptr + (num_splits + split) * N + rows, maximum, mask=rows < N)


@triton.jit
def is_last(index_ptr, N, num_classes):
    """Whether all other programs have come here before: what they wrote can be read, past the first-level cache."""
    # All threads' sums are issued before the barrier; the release of the one thread that counts covers them, and
    # its acquire lets the last program see those of all others.
    tl.debug_barrier()
    arrived = tl.atomic_add(index_ptr + N + 2 * num_classes, 1, sem="acq_rel", scope="gpu")
    return arrived == tl.num_programs(0) - 1


@triton.jit(do_not_specialize=["N", "C", "num_classes", "num_splits"])
def hycon_loss_fwd_kernel(
    z_ptr,
    mu_ptr,
    state_ptr,
    index_ptr,
    partial_ptr,
    loss_ptr,
    N,
    C,
    num_classes,
    num_splits,
    D: tl.constexpr,
    HAS_MU: tl.constexpr,
    SHIFTED: tl.constexpr,
    TRIANGLE: tl.constexpr,
    SCALED: tl.constexpr,
    MEAN: tl.constexpr,
    NONE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    RESIDENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    loss_sums(
        tl.program_id(0), z_ptr, mu_ptr, state_ptr, partial_ptr, N, C, num_splits,
        D, HAS_MU, SHIFTED, TRIANGLE, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D, RESIDENT,
    )  # fmt: skip
    if is_last(index_ptr, N, num_classes):
        finish_loss(state_ptr, partial_ptr, loss_ptr, N, C, num_splits, MEAN, NONE, SHIFTED, TRIANGLE, SCALED, BLOCK)


@triton.jit(do_not_specialize=["N", "C"])
def hycon_loss_bwd_kernel(
    grad_ptr,
    z_ptr,
    mu_ptr,
    means_ptr,
    sums_ptr,
    pull_ptr,
    state_ptr,
    weighted_ptr,
    index_ptr,
    scratch_ptr,
    dz_ptr,
    dmeans_ptr,
    dots_ptr,
    N,
    C,
    D: tl.constexpr,
    HAS_MU: tl.constexpr,
    HAS_PULL: tl.constexpr,
    HAS_TAU: tl.constexpr,
    NONE: tl.constexpr,
    SCALED: tl.constexpr,
    SHIFTED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_R: tl.constexpr,
    RESIDENT: tl.constexpr,
):
    width = N + C
    term_ptr, _, _, q_ptr, kappa_ptr, norm_ptr, _ = state_rows(state_ptr, width)
    u_ptr = term_ptr
    if NONE:
        u_ptr = weighted_ptr
        q_ptr = weighted_ptr + width
    dx, start, num_x, of_mean = backward_panel(
        tl.program_id(0), u_ptr, term_ptr, z_ptr, mu_ptr, state_ptr, N, C, N,
        D, HAS_MU, SHIFTED, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_G, RESIDENT,
    )  # fmt: skip
    lse_gradient_ptr = scratch_ptr
    if HAS_MU:
        lse_gradient_ptr += tl.where(of_mean, tl.cast(N, tl.int64) * D, 0)
    store_tile(lse_gradient_ptr, dx, start, num_x, 0, D)
    tl.debug_barrier()  # other threads of this program read it back

    tau = tl.load(state_ptr)
    factor = tl.load(state_ptr + 1)  # of the positive term
    if not NONE:
        factor *= tl.load(grad_ptr)
    of_lse = factor / (tau * tl.load(state_ptr + 2))
    if NONE and SCALED:
        of_lse *= tl.maximum(tl.load(grad_ptr), LEAST_SCALED)  # the largest gradient of a row, left out of u
    columns = tl.arange(0, BLOCK_G)
    for first in range(0, BLOCK_M, BLOCK_R):
        rows = start + first + tl.arange(0, BLOCK_R)
        valid = rows < num_x
        dx_rows = gather_tile(lse_gradient_ptr, rows, valid, columns, D) * of_lse
        if of_mean:
            if HAS_MU:
                kappa = tl.load(kappa_ptr + N + rows, mask=valid, other=0.0) * factor
                if not HAS_PULL:  # t_c = q s_c: the rows of a class have one weight
                    kappa *= tl.load(q_ptr + N + rows, mask=valid, other=0.0)
                dx_rows -= kappa[:, None] * gather_tile(pull_ptr, rows, valid, columns, D)
                norm = tl.load(norm_ptr + N + rows, mask=valid, other=1.0)
                inverse = 1.0 / tl.maximum(norm, LEAST_NORM)
                mu = gather_tile(means_ptr, rows, valid, columns, D) * inverse[:, None]
                dot = tl.sum(mu * dx_rows, 1)
                if HAS_TAU:
                    tl.store(dots_ptr + N + rows, dot / (-2.0 * tau), mask=valid)
                # A mean shorter than the least norm is only multiplied, by a constant.
                dot = tl.where(norm >= LEAST_NORM, dot, 0.0)
                dx_rows = (dx_rows - mu * dot[:, None]) * inverse[:, None]
                store_tile(dmeans_ptr, dx_rows, start + first, num_x, 0, D)
        else:
            group = tl.load(index_ptr + rows, mask=valid, other=-1)
            in_class = group >= 0
            q = tl.load(q_ptr + rows, mask=valid, other=0.0) * factor
            z = gather_tile(z_ptr, rows, valid, columns, D)
            of_sum = q
            if HAS_PULL:
                dx_rows -= factor * gather_tile(pull_ptr, group, in_class, columns, D)
            else:
                of_sum = 2.0 * q  # t_c = q s_c again
            dx_rows += (2.0 * q)[:, None] * z - of_sum[:, None] * gather_tile(sums_ptr, group, in_class, columns, D)
            if HAS_MU:
                kappa = tl.load(kappa_ptr + N + group, mask=in_class, other=0.0) * q
                dx_rows -= kappa[:, None] * gather_tile(mu_ptr, group, in_class, columns, D)
            if HAS_TAU:
                tl.store(dots_ptr + rows, tl.sum(z * dx_rows, 1) / (-2.0 * tau), mask=valid)
            store_tile(dz_ptr, dx_rows, start + first, num_x, 0, D)


# Elements of a gradient completed at once, 16 registers a thread.
_ROW_TILE = 4096

# Comparing every label with every class reads 8 N G bytes from the second-level cache: up to here a few times ten
# microseconds by its bandwidth, about what sorting takes in launches alone.
_SCAN_LIMIT = 2**25


class Prepared(NamedTuple):
    """What the backward needs of the forward; `state` and `index` are laid out as the file's head says."""

    state: Tensor  # float32
    index: Tensor  # int32; with reduction "none" `order` is behind it
    sums: Tensor  # [G, D] float32 class sums s_c; [2, G, D] with t_c behind them for rows of unequal weight
    mu: Tensor  # [C, D] unit rows in z's type; [0, D] without means


def loss_forward_constants(
    dim: int, dtype: torch.dtype, *, has_mu: bool, shifted: bool, triangle: bool, reduction: str, arch: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Compile-time arguments and launch options of `hycon_loss_fwd_kernel`."""
    constants, options = hycon.forward_constants(
        dim, dtype, has_mu=has_mu, shifted=shifted, triangle=triangle, arch=arch
    )
    constants |= {
        "SCALED": dtype == torch.float16,
        "MEAN": reduction == "mean",
        "NONE": reduction == "none",
        "BLOCK": VECTOR_BLOCK,
    }
    return constants, options


def loss_backward_constants(
    dim: int,
    dtype: torch.dtype,
    *,
    has_mu: bool,
    has_pull: bool,
    has_tau: bool,
    none: bool,
    shifted: bool,
    arch: int,
    num_rows: int,
    num_means: int,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Compile-time arguments and launch options of `hycon_loss_bwd_kernel`.

    One program forms a panel's gradient, so that no two add to one number. While panels are fewer than an H200's 132
    multiprocessors they are halved, down to 32 rows; below that each would only wait longer for the same tiles.
    """
    constants, options = hycon.backward_constants(dim, dtype, has_mu=has_mu, shifted=shifted, arch=arch)
    block_m = constants["BLOCK_M"]
    while block_m > 32 and triton.cdiv(num_rows, block_m) + triton.cdiv(num_means, block_m) < hycon.PROGRAMS // 2:
        block_m //= 2
    if block_m < constants["BLOCK_M"]:
        constants["BLOCK_M"], options["num_warps"] = block_m, 4
    block_r = min(constants["BLOCK_M"], _ROW_TILE // constants["BLOCK_G"])
    return constants | {"HAS_PULL": has_pull, "HAS_TAU": has_tau, "NONE": none, "BLOCK_R": block_r}, options


def fits(dim: int, dtype: torch.dtype, arch: int) -> bool:
    """Whether one program of the backward forms whole rows of the gradient, which these kernels rely on."""
    constants, _ = hycon.backward_constants(dim, dtype, has_mu=True, shifted=True, arch=arch)
    return constants["BLOCK_G"] >= dim


def forward_grid(z: Tensor, num_means: int, constants: dict[str, Any]) -> tuple[int, int, Tensor]:
    """Programs of the forward, how many of them share a panel, and memory for what those write side by side."""
    num_panels = triton.cdiv(len(z), constants["BLOCK_M"])
    tiles_per_panel = constants["BLOCK_M"] // constants["BLOCK_N"]
    mean_tiles = triton.cdiv(num_means, constants["BLOCK_N"])
    if constants["TRIANGLE"]:
        splits = hycon.num_splits(num_panels, tiles_per_panel, mean_tiles=mean_tiles)
        return num_panels * splits, splits, torch.empty(0, dtype=torch.float32, device=z.device)
    splits = hycon.shared_by(num_panels, num_panels * tiles_per_panel + mean_tiles)
    size = (1 if constants["SHIFTED"] else 2) * splits * len(z)
    return num_panels * splits, splits, torch.empty(size, dtype=torch.float32, device=z.device)


def empty_results(
    z: Tensor, num_means: int | None, *, weighted: bool, reduction: str, shifted: bool
) -> tuple[Tensor, Prepared]:
    """What the forward writes: the loss and the rest. `weighted` tells of anchor weights; no means is None."""
    num_rows, dim = z.shape
    num_classes, num_means = (num_rows, 0) if num_means is None else (num_means, num_means)

    def floats(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=z.device)

    index_size = (2 if reduction == "none" else 1) * num_rows + 2 * num_classes + 1
    of_sums = (2, num_classes, dim) if weighted and reduction != "none" else (num_classes, dim)
    prepared = Prepared(
        state=floats(SCALARS.value + (6 if shifted else 7) * (num_rows + num_means)),
        index=torch.empty(index_size, dtype=torch.int32, device=z.device),
        sums=floats(*of_sums),
        mu=torch.empty((num_means, dim), dtype=z.dtype, device=z.device),
    )
    return floats(num_rows) if reduction == "none" else floats(), prepared


def start_loss(
    z: Tensor,
    labels: Tensor,
    means: Tensor | None,
    seen: Tensor | None,
    anchor_weight: Tensor | None,
    temperature: Tensor | float,
    *,
    mean_weight: float,
    balance: str,
    reduction: str,
    ignore_index: int,
    shifted: bool,
) -> tuple[Tensor, Prepared]:
    """The prepare launch, and memory for the loss; arguments as in `hycon_loss_forward`, z contiguous."""
    labels = labels.contiguous()
    means = None if means is None else means.contiguous()
    seen = None if seen is None else seen.contiguous()
    anchor_weight = None if anchor_weight is None else anchor_weight.contiguous()
    num_rows, dim = z.shape
    num_means = 0 if means is None else len(means)
    num_classes = num_rows if means is None else num_means
    has_tau = isinstance(temperature, Tensor)
    sorted_labels = num_rows * num_classes > _SCAN_LIMIT
    constants, options = prepare_constants(
        dim,
        has_mu=means is not None,
        has_seen=seen is not None,
        has_weight=anchor_weight is not None,
        has_pull=anchor_weight is not None and reduction != "none",
        has_tau=has_tau,
        balanced=balance == "class",
        shifted=shifted,
        sorted_labels=sorted_labels,
    )
    ordered, label_order = labels.sort(stable=True) if sorted_labels else (labels, labels)
    loss, prepared = empty_results(
        z, None if means is None else num_means, weighted=anchor_weight is not None, reduction=reduction,
        shifted=shifted,
    )  # fmt: skip
    state, index, sums, mu = prepared
    # Ignored rows leave the list's end unwritten: where it is part of the result, that is 0.
    order = index[-num_rows:].zero_() if reduction == "none" else torch.empty_like(index[:num_rows])
    with device_guard(z):
        hycon_prepare_kernel[(num_classes + triton.cdiv(num_rows, VECTOR_BLOCK),)](
            z, labels, ordered, label_order, pointer(means, z), pointer(seen, z), pointer(anchor_weight, z),
            temperature if has_tau else state, mu, sums, state, index, order,
            num_rows, num_means, num_classes, ignore_index, 0.0 if has_tau else temperature, float(mean_weight),
            **constants, **options,
        )  # fmt: skip
    return loss, prepared


def hycon_loss_forward(
    z: Tensor,
    labels: Tensor,
    means: Tensor | None,
    seen: Tensor | None,
    anchor_weight: Tensor | None,
    temperature: Tensor | float,
    *,
    mean_weight: float,
    balance: str,
    reduction: str,
    ignore_index: int,
    shifted: bool,
    deterministic: bool,
) -> tuple[Tensor, Prepared]:
    """HyCon's loss by the formula at the head, in two launches (a few more, to sort, for many labels and classes).

    Args:
        z: [N, D] float16, bfloat16 or float32 unit rows, for which `fits` holds.
        labels: [N] int64 in [0, C) or ignore_index; without means, any. Others stop the program on a GPU.
        means: [C, D] floating, any length; or None.
        seen: [C] bool, classes that have a mean; None for all.
        anchor_weight: [N] floating >= 0; None for 1.
        temperature: τ > 0, or a 0-dim floating tensor, never read by the host.
        mean_weight: κ >= 0.
        balance: "class" or "none".
        reduction: "mean", "sum" or "none".
        ignore_index: label of rows that take no part.
        shifted: the caller guarantees 2/τ <= 64. One triangle of S is computed, unless `deterministic`.
        deterministic: no atomics on data: repeated calls are equal bit for bit.

    Returns:
        The loss, 0-dim or [N], float32; and what the backward needs.
    """
    z = z.contiguous()
    num_rows, dim = z.shape
    num_means = 0 if means is None else len(means)
    constants, options = loss_forward_constants(
        dim,
        z.dtype,
        has_mu=means is not None,
        shifted=shifted,
        triangle=shifted and not deterministic,
        reduction=reduction,
        arch=architecture(z.device),
    )
    programs, splits, partial = forward_grid(z, num_means, constants)
    loss, prepared = start_loss(
        z,
        labels,
        means,
        seen,
        anchor_weight,
        temperature,
        mean_weight=mean_weight,
        balance=balance,
        reduction=reduction,
        ignore_index=ignore_index,
        shifted=shifted,
    )
    with device_guard(z):
        hycon_loss_fwd_kernel[(programs,)](
            z, prepared.mu, prepared.state, prepared.index, partial, loss, num_rows, num_means,
            num_rows if means is None else num_means, splits, **constants, **options,
        )  # fmt: skip
    return loss, prepared


def hycon_loss_backward(
    grad: Tensor,
    z: Tensor,
    means: Tensor | None,
    prepared: Prepared,
    *,
    reduction: str,
    shifted: bool,
    tau_gradient: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of `hycon_loss_forward`, in one launch (two or three for reduction "none"); no atomics.

    Args:
        grad: 0-dim or, for reduction "none", [N] float32: gradient of the loss.
        z, means, reduction, shifted: as in the forward.
        prepared: the forward's.
        tau_gradient: whether the temperature's gradient is asked for.

    Returns:
        dz [N, D] in z's type; dmeans [C, D] in means' or None; terms [N + C] float32 whose sum is dL/dτ, or None.
    """
    z, means = z.contiguous(), None if means is None else means.contiguous()
    state, index, sums, mu = prepared
    num_rows, dim = z.shape
    num_means = len(mu)
    none = reduction == "none"
    num_classes = sums.shape[-2]
    has_pull = none or sums.dim() == 3
    constants, options = loss_backward_constants(
        dim,
        z.dtype,
        has_mu=means is not None,
        has_pull=has_pull,
        has_tau=tau_gradient,
        none=none,
        shifted=shifted,
        arch=architecture(z.device),
        num_rows=num_rows,
        num_means=num_means,
    )
    width = num_rows + num_means
    dz, dmeans = torch.empty_like(z), None if means is None else torch.empty_like(means)
    dots = torch.empty(width, dtype=torch.float32, device=z.device) if tau_gradient else None
    scratch = torch.empty((width, dim), dtype=torch.float32, device=z.device)
    weighted, pull = state, sums[-1] if sums.dim() == 3 else sums
    with device_guard(z):
        if none:
            weighted = torch.empty((2, width), dtype=torch.float32, device=z.device)
            pull = torch.empty_like(sums)
            weigh, weigh_options = weigh_constants(dim, z.dtype)
            grad_max = torch.linalg.vector_norm(grad, torch.inf) if constants["SCALED"] else state
            hycon_weigh_kernel[(num_classes + triton.cdiv(width, VECTOR_BLOCK),)](
                grad, grad_max, z, state, index, index[-num_rows:], weighted, pull,
                num_rows, num_means, num_classes, grad.stride(0), **weigh, **weigh_options,
            )  # fmt: skip
            grad = grad_max
        num_panels = triton.cdiv(num_rows, constants["BLOCK_M"]) + triton.cdiv(num_means, constants["BLOCK_M"])
        hycon_loss_bwd_kernel[(num_panels,)](
            grad, z, mu, pointer(means, z), sums, pull, state, weighted, index, scratch, dz, pointer(dmeans, dz),
            pointer(dots, state), num_rows, num_means, **constants, **options,
        )  # fmt: skip
    return dz, dmeans, dots
