"""HyCon from labels to loss and gradients in three launches: prepare (`classes`), forward, backward.

    lse_i = log( Σ_{j≠i} a_j exp(z_i·z_j / τ) + Σ_c b_c exp(z_i·μ_c / τ) )
    L     = (1/W) Σ_i (lse_i - pos_i)

over the W rows that have a positive and, with the lse gradients of allnc.kernels.hycon.lse for u_i = exp(-lse_i),

    W dL/dz_i = (gradient of lse) - q_i (2 s_c + κ_c μ_c - 2 z_i),  c the class of i
    W dL/dμ_c = (gradient of lse) - κ_c q_c s_c
    dL/dM_c   = (dL/dμ_c - μ_c μ_c·dL/dμ_c) / |M_c|

Symbols, `state` and `index` as in allnc.kernels.hycon.classes. What the losses ask is here and nothing else: the mean
over the rows, and 2/τ <= 64, so that exponents are shifted by the constant 1/τ; everything else goes through `lse`.

Forward. The panels of allnc.kernels.hycon.panels, one triangle. Every program counts itself when its sums are in
memory; the last one forms the loss from all of them, in a fixed order, and leaves u for the backward.

Backward. The panels of allnc.kernels.hycon.panels. A whole tile of the other terms beside the accumulator would not fit
the registers: a program writes its panel's lse gradient to scratch memory, and reads it back a few rows at a time to
add the positive term and, for a panel of μ, to go on to the raw means.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from allnc.kernels._common import (
    LN_2,
    VECTOR_BLOCK,
    Blocks,
    Matrix,
    architecture,
    device_guard,
    gather_tile,
    pointer,
    store_tile,
)
from allnc.kernels.hycon import lse
from allnc.kernels.hycon.classes import (
    SCALARS,
    STATE_ROWS,
    Labels,
    Prepared,
    hycon_prepare_kernel,
    mean_rows,
    prepare_constants,
    state_rows,
)
from allnc.kernels.hycon.lse import HALF_SCALE
from allnc.kernels.hycon.panels import Contrast, backward_panel, forward_panel

MAX_DIM = 256  # the widest rows of which one program of the backward holds a panel's whole gradient


@triton.jit
def add_sums(program, prepared, N, C, num_splits, HAS_MU: tl.constexpr, blocks: tl.constexpr):
    """One split of one panel: adds its sums of exponentials to `state`."""
    state = state_rows(prepared.state, N + C)
    contrast = Contrast(prepared.rows, mean_rows(prepared, N, blocks.dim), state.a, state.a + N)
    rows, _, total = forward_panel(
        program, contrast, state.sum, 1.0 / tl.load(prepared.state), N, C, num_splits, 0, 1,
        HAS_MU, True, True, blocks,
    )  # fmt: skip
    tl.atomic_add(state.sum + rows, total, mask=rows < N, sem="relaxed")


@triton.jit
def is_last(prepared, N):
    """Whether all other programs have come here before: what they wrote can be read, past the first-level cache."""
    # All threads' sums are issued before the barrier; the release of the one thread that counts covers them, and
    # its acquire lets the last program see those of all others.
    tl.debug_barrier()
    arrived = tl.atomic_add(prepared.index + N, 1, sem="acq_rel", scope="gpu")
    return arrived == tl.num_programs(0) - 1


@triton.jit
def finish_loss(loss_ptr, prepared, N, C, SCALED: tl.constexpr, BLOCK: tl.constexpr):
    """The loss, 1/W and each row's u, from all programs' sums."""
    state = state_rows(prepared.state, N + C)
    inverse_temperature = 1.0 / tl.load(prepared.state)
    losses = tl.zeros([BLOCK], dtype=tl.float32)
    counts = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, N, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        q = tl.load(state.q + rows, mask=rows < N, other=0.0)
        pos = tl.load(state.pos + rows, mask=rows < N, other=0.0)
        # What other programs wrote in this launch is read past the first-level cache.
        total = tl.load(state.sum + rows, mask=rows < N, other=1.0, cache_modifier=".cg")
        # A row that takes no part counts 0 even where nothing is contrasted with it (lse = -inf).
        in_loss = q != 0
        losses += tl.where(in_loss, tl.log2(total) * LN_2 + inverse_temperature - pos, 0.0)
        counts += in_loss.to(tl.float32)
        u = tl.where(in_loss & (total != 0), 1.0 / total, 0.0)
        if SCALED:
            u *= HALF_SCALE
        tl.store(state.u + rows, u, mask=rows < N)
    per_row = 1.0 / tl.maximum(tl.sum(counts, 0), 1.0)
    tl.store(prepared.state + 1, per_row)
    tl.store(loss_ptr, tl.sum(losses, 0) * per_row)


@triton.jit(do_not_specialize=["N", "C", "num_splits"])
def hycon_loss_fwd_kernel(
    prepared,
    loss_ptr,
    N,
    C,
    num_splits,
    HAS_MU: tl.constexpr,
    SCALED: tl.constexpr,
    blocks: tl.constexpr,
    BLOCK: tl.constexpr,
):
    add_sums(tl.program_id(0), prepared, N, C, num_splits, HAS_MU, blocks)
    if is_last(prepared, N):
        finish_loss(loss_ptr, prepared, N, C, SCALED, BLOCK)


@triton.jit(do_not_specialize=["N", "C"])
def hycon_loss_bwd_kernel(
    grad_ptr,
    means_ptr,
    prepared,
    scratch_ptr,
    dz_ptr,
    dmeans_ptr,
    N,
    C,
    HAS_MU: tl.constexpr,
    SCALED: tl.constexpr,
    blocks: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """The gradient of one panel of z or, behind those, of the means."""
    D: tl.constexpr = blocks.dim
    BLOCK_M: tl.constexpr = blocks.block_m
    BLOCK_G: tl.constexpr = blocks.block_g
    state = state_rows(prepared.state, N + C)
    inverse_temperature = 1.0 / tl.load(prepared.state)
    mu_ptr = mean_rows(prepared, N, D)
    dx, start, num_x, of_mean = backward_panel(
        tl.program_id(0), state.u, prepared.rows, mu_ptr, inverse_temperature, N, C, N, HAS_MU, True, blocks
    )
    lse_gradient_ptr = scratch_ptr
    if HAS_MU:
        lse_gradient_ptr += tl.where(of_mean, tl.cast(N, tl.int64) * D, 0)
    store_tile(Matrix(lse_gradient_ptr, num_x), dx, start, 0, D)
    tl.debug_barrier()  # other threads of this program read it back

    factor = tl.load(prepared.state + 1) * tl.load(grad_ptr)  # of the positive term
    of_lse = factor * inverse_temperature
    if SCALED:
        of_lse /= HALF_SCALE
    columns = tl.arange(0, BLOCK_G)
    for first in range(0, BLOCK_M, BLOCK_R):
        rows = start + first + tl.arange(0, BLOCK_R)
        valid = rows < num_x
        dx_rows = gather_tile(lse_gradient_ptr, rows, valid, columns, D) * of_lse
        if of_mean:
            if HAS_MU:
                kappa = tl.load(state.sum + N + rows, mask=valid, other=0.0)
                q = tl.load(state.q + N + rows, mask=valid, other=0.0) * factor
                dx_rows -= (kappa * q)[:, None] * gather_tile(prepared.sums, rows, valid, columns, D)
                norm = tl.load(state.pos + N + rows, mask=valid, other=1.0)
                inverse = 1.0 / norm  # 0 for a class without a mean, or whose mean has no direction
                mu = gather_tile(means_ptr, rows, valid & (inverse != 0), columns, D) * inverse[:, None]
                dx_rows = (dx_rows - mu * tl.sum(mu * dx_rows, 1)[:, None]) * inverse[:, None]
                store_tile(Matrix(dmeans_ptr, num_x), dx_rows, start + first, 0, D)
        else:
            group = tl.load(prepared.index + rows, mask=valid, other=-1)
            in_class = group >= 0
            q = tl.load(state.q + rows, mask=valid, other=0.0) * factor
            z = gather_tile(prepared.rows, rows, valid, columns, D)
            dx_rows += (2.0 * q)[:, None] * (z - gather_tile(prepared.sums, group, in_class, columns, D))
            if HAS_MU:
                kappa = tl.load(state.sum + N + group, mask=in_class, other=0.0) * q
                dx_rows -= kappa[:, None] * gather_tile(mu_ptr, group, in_class, columns, D)
            store_tile(Matrix(dz_ptr, num_x), dx_rows, start + first, 0, D)


# Elements of a gradient completed at once, 16 registers a thread.
_ROW_TILE = 4096

# Comparing every label with every class reads 8 N G bytes from the second-level cache: up to here a few times ten
# microseconds by its bandwidth, about what sorting takes in launches alone.
_SCAN_LIMIT = 2**25


def loss_forward_constants(
    dim: int, dtype: torch.dtype, *, has_mu: bool, arch: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Compile-time arguments and launch options of `hycon_loss_fwd_kernel`."""
    of_lse, options = lse.forward_constants(dim, dtype, has_mu=has_mu, shifted=True, triangle=True, arch=arch)
    scaled = dtype == torch.float16
    return {"HAS_MU": has_mu, "SCALED": scaled, "blocks": of_lse["blocks"], "BLOCK": VECTOR_BLOCK}, options


def loss_backward_constants(
    dim: int, dtype: torch.dtype, *, has_mu: bool, arch: int, num_rows: int, num_means: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Compile-time arguments and launch options of `hycon_loss_bwd_kernel`.

    One program forms a panel's gradient, so that no two add to one number. While panels are fewer than an H200's 132
    multiprocessors they are halved, down to 32 rows; below that each would only wait longer for the same tiles.
    """
    of_lse, options = lse.backward_constants(dim, dtype, has_mu=has_mu, shifted=True, arch=arch)
    blocks: Blocks = of_lse["blocks"]
    block_m = blocks.block_m
    while block_m > 32 and triton.cdiv(num_rows, block_m) + triton.cdiv(num_means, block_m) < lse.PROGRAMS // 2:
        block_m //= 2
    if block_m < blocks.block_m:
        blocks, options = blocks._replace(block_m=block_m), options | {"num_warps": 4}
    block_r = min(block_m, _ROW_TILE // blocks.block_g)
    return {"HAS_MU": has_mu, "SCALED": dtype == torch.float16, "blocks": blocks, "BLOCK_R": block_r}, options


def forward_grid(num_rows: int, num_means: int, blocks: Blocks) -> tuple[int, int]:
    """Programs of the forward, and how many of them share a panel."""
    num_panels = triton.cdiv(num_rows, blocks.block_m)
    mean_tiles = triton.cdiv(num_means, blocks.block_n)
    splits = lse.num_splits(num_panels, blocks.block_m // blocks.block_n, mean_tiles=mean_tiles)
    return num_panels * splits, splits


def empty_results(z: Tensor, num_means: int | None) -> tuple[Tensor, Prepared]:
    """Memory for what the forward writes: the loss and the rest; num_means is None without means."""
    num_rows, dim = z.shape
    num_classes, num_means = (num_rows, 0) if num_means is None else (num_means, num_means)

    def floats(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=z.device)

    prepared = Prepared(
        state=floats(SCALARS.value + STATE_ROWS * (num_rows + num_means)),
        index=torch.empty(num_rows + 1, dtype=torch.int32, device=z.device),
        sums=floats(num_classes, dim),
        rows=torch.empty((num_rows + num_means, dim), dtype=z.dtype, device=z.device),
    )
    return floats(), prepared


def start_loss(
    z: Tensor,
    labels: Tensor,
    means: Tensor | None,
    seen: Tensor | None,
    *,
    temperature: float,
    mean_weight: float,
    balance: str,
    ignore_index: int,
) -> tuple[Tensor, Prepared]:
    """The prepare launch, and memory for the loss; arguments as in `hycon_loss_forward`, z contiguous."""
    labels = labels.contiguous()
    means = None if means is None else means.contiguous()
    seen = None if seen is None else seen.contiguous()
    num_rows, dim = z.shape
    num_means = 0 if means is None else len(means)
    num_classes = num_rows if means is None else num_means
    sorted_labels = num_rows * num_classes > _SCAN_LIMIT
    constants, options = prepare_constants(
        dim,
        has_mu=means is not None,
        has_seen=seen is not None,
        balanced=balance == "class",
        sorted_labels=sorted_labels,
    )
    ordered, label_order = labels.sort(stable=True) if sorted_labels else (labels, labels)
    loss, prepared = empty_results(z, None if means is None else num_means)
    order = torch.empty_like(prepared.index[:num_rows])
    with device_guard(z):
        hycon_prepare_kernel[(num_classes + triton.cdiv(num_rows, VECTOR_BLOCK),)](
            z, Labels(labels, ordered, label_order), pointer(means, z), pointer(seen, z), order, prepared,
            num_rows, num_means, num_classes, ignore_index, float(temperature), float(mean_weight),
            **constants, **options,
        )  # fmt: skip
    return loss, prepared


def hycon_loss_forward(
    z: Tensor,
    labels: Tensor,
    means: Tensor | None,
    seen: Tensor | None,
    *,
    temperature: float,
    mean_weight: float,
    balance: str,
    ignore_index: int,
) -> tuple[Tensor, Prepared]:
    """HyCon's loss by the formula at the head, in two launches (a few more, to sort, for many labels and classes).

    Args:
        z: [N, D] float16, bfloat16 or float32 unit rows, D <= MAX_DIM.
        labels: [N] int64 in [0, C) or ignore_index; without means, any. Others stop the program on a GPU.
        means: [C, D] floating, any length; or None.
        seen: [C] bool, classes that have a mean; None for all.
        temperature: τ >= 1/32.
        mean_weight: κ >= 0.
        balance: "class" or "none".
        ignore_index: label of rows that take no part.

    Returns:
        The loss, 0-dim float32, 0 where no row has a positive; and what the backward needs. Sums are added by atomics:
        equal calls are equal up to the rounding of their order.
    """
    z = z.contiguous()
    num_rows, dim = z.shape
    num_means = 0 if means is None else len(means)
    constants, options = loss_forward_constants(dim, z.dtype, has_mu=means is not None, arch=architecture(z.device))
    programs, splits = forward_grid(num_rows, num_means, constants["blocks"])
    loss, prepared = start_loss(
        z,
        labels,
        means,
        seen,
        temperature=temperature,
        mean_weight=mean_weight,
        balance=balance,
        ignore_index=ignore_index,
    )
    with device_guard(z):
        hycon_loss_fwd_kernel[(programs,)](prepared, loss, num_rows, num_means, splits, **constants, **options)
    return loss, prepared


def hycon_loss_backward(
    grad: Tensor, z: Tensor, means: Tensor | None, prepared: Prepared
) -> tuple[Tensor, Tensor | None]:
    """Gradients of `hycon_loss_forward`, in one launch without atomics.

    Args:
        grad: 0-dim float32, gradient of the loss; read by the kernel, never by the host.
        z, means: as in the forward; of z only the shape and type are read.
        prepared: the forward's.

    Returns:
        dz [N, D] in z's type, and dmeans [C, D] in means', or None without means.
    """
    means = None if means is None else means.contiguous()
    num_rows, dim = z.shape
    num_means = 0 if means is None else len(means)
    constants, options = loss_backward_constants(
        dim,
        z.dtype,
        has_mu=means is not None,
        arch=architecture(z.device),
        num_rows=num_rows,
        num_means=num_means,
    )
    dz = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    dmeans = None if means is None else torch.empty_like(means)
    scratch = torch.empty((num_rows + num_means, dim), dtype=torch.float32, device=z.device)
    block_m = constants["blocks"].block_m
    num_panels = triton.cdiv(num_rows, block_m) + triton.cdiv(num_means, block_m)
    with device_guard(z):
        hycon_loss_bwd_kernel[(num_panels,)](
            grad, pointer(means, dz), prepared, scratch, dz, pointer(dmeans, dz), num_rows, num_means,
            **constants, **options,
        )  # fmt: skip
    return dz, dmeans
