"""HyCon's loss and P2P's three blocks in one launch, behind HyCon's prepare launch.

Formulas and symbols: allnc.kernels.hycon.loss for HyCon, allnc.kernels.p2p for P2P. Legend: N activations, D columns of
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

from allnc.kernels._common import CHUNKED, architecture, device_guard, row_class
from allnc.kernels.hycon.classes import Prepared
from allnc.kernels.hycon.loss import (
    add_sums,
    finish_loss,
    forward_grid,
    is_last,
    loss_forward_constants,
    start_loss,
)
from allnc.kernels.p2p import (
    Classes,
    forward_tiles,
    num_programs,
    p2p_finish_program,
    p2p_forward_program,
    p2p_outputs,
    panel_rows,
)


@triton.jit(do_not_specialize=["N", "C", "num_splits", "num_hycon", "num_own", "num_cross", "p2p_temperature"])
def all_around_fwd_kernel(
    prepared,
    loss_ptr,
    classes,
    partial_ptr,
    p2p_lse_ptr,
    p2p_ptr,
    N,
    C,
    num_splits,
    num_hycon,
    num_own,
    num_cross,
    p2p_temperature,
    SCALED: tl.constexpr,
    blocks: tl.constexpr,
    ETF: tl.constexpr,
    p2p_blocks: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    if program < num_hycon:
        add_sums(program, prepared, N, C, num_splits, True, blocks)
    else:
        p2p_forward_program(
            program - num_hycon, classes, partial_ptr, p2p_lse_ptr, C, p2p_temperature, ETF, 0, p2p_blocks
        )
    if is_last(prepared, N):
        finish_loss(loss_ptr, prepared, N, C, SCALED, BLOCK)
        for kind in range(3):
            p2p_finish_program(kind, classes.seen, partial_ptr, p2p_ptr, C, num_own, num_cross, ETF, 0, BLOCK)


def all_around_constants(
    dim: int,
    dtype: torch.dtype,
    num_classes: int,
    features: int,
    *,
    arch: int,
    target: Literal["etf", "softmax"],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Compile-time arguments and launch options of `all_around_fwd_kernel`.

    P2P's chunks are of 16 columns: with the warps and stages of HyCon's tiles, whose launch it shares, they need no
    more registers and shared memory than those (chunks of 32 spill on sm_100). On sm_80 they need some more beside
    panels of 256 bytes a row and beside chunks, whose tiles are halved too; the assembler is told not to spill for the
    sake of a second program an SM.
    """
    constants, options = loss_forward_constants(dim, dtype, has_mu=True, arch=arch)
    del constants["HAS_MU"]
    p2p_rows = panel_rows(num_classes)
    if arch < 90 and row_class(dim, dtype) in (256, CHUNKED):
        options |= {"maxnreg": 255}
    if arch < 90 and row_class(dim, dtype) == CHUNKED:
        blocks = constants["blocks"]
        constants["blocks"], p2p_rows = blocks._replace(block_n=min(blocks.block_n, 64)), min(p2p_rows, 32)
    p2p_blocks = forward_tiles(features, torch.float32, p2p_rows, chunk=16)
    return constants | {"ETF": target == "etf", "p2p_blocks": p2p_blocks}, options


def all_around_forward(
    z: Tensor,
    labels: Tensor,
    means: Tensor,
    seen: Tensor,
    x: Tensor,
    y: Tensor,
    *,
    temperature: float,
    mean_weight: float,
    balance: str,
    ignore_index: int,
    target: Literal["etf", "softmax"],
    p2p_temperature: float,
) -> tuple[Tensor, Prepared, Tensor, Tensor]:
    """HyCon's loss and the values of P2P's blocks (x, x), (y, y), (x, y), in two launches.

    Args:
        z, labels, means, temperature, mean_weight, balance, ignore_index: as in
            `allnc.kernels.hycon.loss.hycon_loss_forward`.
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
        dim, z.dtype, num_classes, features, arch=architecture(z.device), target=target
    )
    num_hycon, splits = forward_grid(num_rows, num_classes, constants["blocks"])
    num_own, num_cross = num_programs(num_classes, constants["p2p_blocks"], etf=constants["ETF"])
    num_p2p = 2 * num_own + num_cross
    partial, values, p2p_lse = p2p_outputs(x, num_p2p, 3, target)
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
        all_around_fwd_kernel[(num_hycon + num_p2p,)](
            prepared, loss, Classes(x, y, seen), partial, p2p_lse, values, num_rows, num_classes, splits,
            num_hycon, num_own, num_cross, p2p_temperature, **constants, **options,
        )  # fmt: skip
    return loss, prepared, values, p2p_lse
