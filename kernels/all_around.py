"""HyCon's loss and P2P's three blocks in one launch, behind HyCon's prepare launch.

Formulas and symbols: allnc.kernels.hycon_loss for HyCon, allnc.kernels.p2p for P2P. Legend: N activations, D columns of
the projection, C classes, F columns of the features.

Launch grid: first the programs of HyCon's forward, which are the long ones, then those of P2P's: tiles (etf) or
panels (softmax) of the blocks (X, X), (Y, Y), (X, Y). None needs another's result. Every program counts itself when
its sums are in memory; the last one forms HyCon's loss and P2P's values from all of them, in a fixed order.

The gradients are two launches, HyCon's and P2P's own: in one launch every program would be given the registers of the
hungrier kernel, and nothing would be saved but the launch.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from allnc.kernels._common import architecture, device_guard, matmul_precision, padded_dim, pointer
from allnc.kernels.hycon_classes import VECTOR_BLOCK, hycon_prepare_kernel, prepare_constants, state_rows
from allnc.kernels.hycon_loss import _SCAN_LIMIT as SCAN_LIMIT
from allnc.kernels.hycon_loss import Prepared, empty_results, finish_loss, loss_forward_constants
from allnc.kernels.hycon_loss import _num_splits as loss_splits
from allnc.kernels.hycon_panels import forward_sums
from allnc.kernels.p2p import num_programs, p2p_finish_program, p2p_forward_program, p2p_outputs, panel_rows


@triton.jit(do_not_specialize=["N", "C", "num_splits", "num_hycon", "num_own", "num_cross", "p2p_temperature"])
def all_around_fwd_kernel(
    z_ptr,
    mu_ptr,
    state_ptr,
    index_ptr,
    partial_ptr,
    loss_ptr,
    x_ptr,
    y_ptr,
    seen_ptr,
    p2p_partial_ptr,
    p2p_lse_ptr,
    p2p_ptr,
    N,
    C,
    num_splits,
    num_hycon,
    num_own,
    num_cross,
    p2p_temperature,
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
    F: tl.constexpr,
    ETF: tl.constexpr,
    P2P_PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    program = tl.program_id(0)
    if program < num_hycon:
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
    else:
        p2p_forward_program(
            program - num_hycon, x_ptr, y_ptr, seen_ptr, p2p_partial_ptr, p2p_lse_ptr, C, p2p_temperature,
            F, ETF, 0, P2P_PRECISION, BLOCK_C, BLOCK_F,
        )  # fmt: skip
    # All threads' sums are issued before the barrier; the release of the one thread that counts covers them, and
    # its acquire lets the last program see those of all others.
    tl.debug_barrier()
    arrived = tl.atomic_add(index_ptr + N + 2 * C, 1, sem="acq_rel", scope="gpu")
    if arrived == tl.num_programs(0) - 1:
        finish_loss(state_ptr, partial_ptr, loss_ptr, N, C, num_splits, MEAN, NONE, SHIFTED, TRIANGLE, SCALED, BLOCK)
        for kind in range(3):
            p2p_finish_program(kind, seen_ptr, p2p_partial_ptr, p2p_ptr, C, num_own, num_cross, ETF, 0, BLOCK)


def all_around_constants(
    dim: int,
    dtype: torch.dtype,
    num_classes: int,
    features: int,
    *,
    shifted: bool,
    triangle: bool,
    arch: int,
    target: Literal["etf", "softmax"],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Compile-time arguments and launch options of `all_around_fwd_kernel`.

    P2P's chunks are of 16 columns: with the warps and stages of HyCon's tiles, whose launch it shares, they need no
    more registers and shared memory than those (chunks of 32 spill on sm_100). With panels of 512 bytes a row shared
    memory holds one program an SM, and the assembler is told not to spill a few registers for the sake of a second.
    """
    constants, options = loss_forward_constants(
        dim, dtype, has_mu=True, shifted=shifted, triangle=triangle, reduction="mean", arch=arch
    )
    constants |= {
        "F": features,
        "ETF": target == "etf",
        "P2P_PRECISION": matmul_precision(torch.float32),
        "BLOCK_C": panel_rows(num_classes),
        "BLOCK_F": min(16, padded_dim(features)),
    }
    if constants["BLOCK_D"] * dtype.itemsize >= 512:
        options |= {"maxnreg": 255}
    return constants, options


def launch_prepare(
    z: Tensor,
    labels: Tensor,
    means: Tensor,
    seen: Tensor,
    anchor_weight: Tensor | None,
    temperature: Tensor | float,
    prepared: Prepared,
    *,
    mean_weight: float,
    balance: str,
    ignore_index: int,
    shifted: bool,
) -> None:
    """Launches what HyCon needs to know of rows and classes before any panel, into `prepared`; contiguous tensors."""
    num_rows, dim = z.shape
    num_classes = len(means)
    has_tau, has_pull = isinstance(temperature, Tensor), anchor_weight is not None
    sorted_labels = num_rows * num_classes > SCAN_LIMIT
    constants, options = prepare_constants(
        dim,
        has_mu=True,
        has_seen=True,
        has_weight=has_pull,
        has_pull=has_pull,
        has_tau=has_tau,
        balanced=balance == "class",
        shifted=shifted,
        sorted_labels=sorted_labels,
    )
    ordered, label_order = labels.sort(stable=True) if sorted_labels else (labels, labels)
    state, index, sums, mu = prepared
    order = torch.empty_like(index[:num_rows])
    with device_guard(z):
        hycon_prepare_kernel[(num_classes + triton.cdiv(num_rows, VECTOR_BLOCK),)](
            z, labels, ordered, label_order, means, seen, pointer(anchor_weight, z), temperature if has_tau else state,
            mu, sums, state, index, order, num_rows, num_classes, num_classes, ignore_index,
            0.0 if has_tau else temperature, float(mean_weight), **constants, **options,
        )  # fmt: skip


def all_around_forward(
    z: Tensor,
    labels: Tensor,
    means: Tensor,
    seen: Tensor,
    anchor_weight: Tensor | None,
    temperature: Tensor | float,
    x: Tensor,
    y: Tensor,
    *,
    mean_weight: float,
    balance: str,
    ignore_index: int,
    shifted: bool,
    deterministic: bool,
    target: Literal["etf", "softmax"],
    p2p_temperature: float,
) -> tuple[Tensor, Prepared, Tensor, Tensor]:
    """HyCon's loss and the values of P2P's blocks (x, x), (y, y), (x, y), in two launches.

    Args:
        z, labels, means, anchor_weight, temperature, mean_weight, balance, ignore_index, shifted, deterministic: as
            in `allnc.kernels.hycon_loss.hycon_loss_forward`, for reduction "mean".
        seen: [C] bool, classes that have means.
        x, y: [C, F] float32 centred unit rows, zero for classes not seen, as in `allnc.kernels.p2p.p2p_forward`.
        target, p2p_temperature: as there.

    Returns:
        The loss, 0-dim float32, and what HyCon's backward needs; P2P's values [3] and what its backward needs.
    """
    z, labels, means, seen = z.contiguous(), labels.contiguous(), means.contiguous(), seen.contiguous()
    anchor_weight = None if anchor_weight is None else anchor_weight.contiguous()
    x, y = x.contiguous(), y.contiguous()
    num_rows, dim = z.shape
    num_classes, features = x.shape
    triangle = shifted and not deterministic
    constants, options = all_around_constants(
        dim,
        z.dtype,
        num_classes,
        features,
        shifted=shifted,
        triangle=triangle,
        arch=architecture(z.device),
        target=target,
    )
    num_panels = triton.cdiv(num_rows, constants["BLOCK_M"])
    splits = loss_splits(num_rows, num_classes, constants)
    partial_size = 0 if triangle else (1 if shifted else 2) * splits * num_rows
    partial = torch.empty(partial_size, dtype=torch.float32, device=z.device)
    loss, prepared = empty_results(
        z, num_classes, weighted=anchor_weight is not None, reduction="mean", shifted=shifted
    )
    num_own, num_cross = num_programs(num_classes, constants)
    num_hycon, num_p2p = num_panels * splits, 2 * num_own + num_cross
    p2p_partial, values, p2p_lse = p2p_outputs(x, num_p2p, 3, target)
    launch_prepare(
        z,
        labels,
        means,
        seen,
        anchor_weight,
        temperature,
        prepared,
        mean_weight=mean_weight,
        balance=balance,
        ignore_index=ignore_index,
        shifted=shifted,
    )
    with device_guard(z):
        all_around_fwd_kernel[(num_hycon + num_p2p,)](
            z, prepared.mu, prepared.state, prepared.index, partial, loss, x, y, seen, p2p_partial, p2p_lse, values,
            num_rows, num_classes, splits, num_hycon, num_own, num_cross, p2p_temperature, **constants, **options,
        )  # fmt: skip
    return loss, prepared, values, p2p_lse
