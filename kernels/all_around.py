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

from allnc.kernels._common import CHUNKED, architecture, device_guard, matmul_precision, padded_dim, row_class
from allnc.kernels.hycon_loss import (
    Prepared,
    finish_loss,
    forward_grid,
    is_last,
    loss_forward_constants,
    loss_sums,
    start_loss,
)
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
        loss_sums(
            program, z_ptr, mu_ptr, state_ptr, partial_ptr, N, C, num_splits,
            D, HAS_MU, SHIFTED, TRIANGLE, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D, RESIDENT,
        )  # fmt: skip
    else:
        p2p_forward_program(
            program - num_hycon, x_ptr, y_ptr, seen_ptr, p2p_partial_ptr, p2p_lse_ptr, C, p2p_temperature,
            F, ETF, 0, P2P_PRECISION, BLOCK_C, BLOCK_F,
        )  # fmt: skip
    if is_last(index_ptr, N, C):
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
    more registers and shared memory than those (chunks of 32 spill on sm_100). On sm_80 they need some more beside
    panels of 256 bytes a row and beside chunks, whose tiles are halved too; the assembler is told not to spill for the
    sake of a second program an SM.
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
    if arch < 90 and row_class(dim, dtype) in (256, CHUNKED):
        options |= {"maxnreg": 255}
    if arch < 90 and row_class(dim, dtype) == CHUNKED:
        constants["BLOCK_N"], constants["BLOCK_C"] = min(constants["BLOCK_N"], 64), min(constants["BLOCK_C"], 32)
    return constants, options


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
    z, seen, x, y = z.contiguous(), seen.contiguous(), x.contiguous(), y.contiguous()
    num_rows, dim = z.shape
    num_classes, features = x.shape
    constants, options = all_around_constants(
        dim,
        z.dtype,
        num_classes,
        features,
        shifted=shifted,
        triangle=shifted and not deterministic,
        arch=architecture(z.device),
        target=target,
    )
    num_hycon, splits, partial = forward_grid(z, num_classes, constants)
    num_own, num_cross = num_programs(num_classes, constants)
    num_p2p = 2 * num_own + num_cross
    p2p_partial, values, p2p_lse = p2p_outputs(x, num_p2p, 3, target)
    loss, prepared = start_loss(
        z,
        labels,
        means,
        seen,
        anchor_weight,
        temperature,
        mean_weight=mean_weight,
        balance=balance,
        reduction="mean",
        ignore_index=ignore_index,
        shifted=shifted,
    )
    with device_guard(z):
        all_around_fwd_kernel[(num_hycon + num_p2p,)](
            z, prepared.mu, prepared.state, prepared.index, partial, loss, x, y, seen, p2p_partial, p2p_lse, values,
            num_rows, num_classes, splits, num_hycon, num_own, num_cross, p2p_temperature, **constants, **options,
        )  # fmt: skip
    return loss, prepared, values, p2p_lse
