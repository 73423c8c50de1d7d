"""What the kernels share: tiles of rows, the similarity of two tiles, and the block sizes.

Legend: N activations, C classes, D columns (all row-major); a panel is BLOCK_M consecutive rows of one side, a tile is
a panel's product with BLOCK_N rows of the other side.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton import knobs

INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)

# Up to this many columns a panel stays on chip for the whole loop; 256 columns of a 16-bit type are 64 KiB for 128 rows.
MAX_RESIDENT_DIM = 256

TRITON_TYPE = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


class Blocks(NamedTuple):
    """Sizes of one kernel's tiles and its launch options."""

    block_m: int
    block_n: int
    block_d: int
    block_g: int
    num_warps: int
    num_stages: int


def matmul_precision(dtype: torch.dtype) -> str:
    """How `tl.dot` multiplies: float32 follows torch.set_float32_matmul_precision; 16-bit types are exact products."""
    exact = dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    return "ieee" if exact else "tf32"


def padded_dim(dim: int) -> int:
    """Columns of a tile: the next power of two, at least the 16 that tensor cores take."""
    return max(16, triton.next_power_of_2(dim))


@triton.jit
def matmul(x, y, accumulator, PRECISION: tl.constexpr):
    if INTERPRETED:  # the interpreter holds bfloat16 as integers and would multiply those
        x = x.to(tl.float32)
        y = y.to(tl.float32)
    return tl.dot(x, y, accumulator, input_precision=PRECISION)


@triton.jit
def load_tile(pointer, start, num_rows, column, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows [start, start + ROWS) and columns [column, column + COLUMNS) of a [num_rows, D] matrix; zeros outside."""
    rows = tl.arange(0, ROWS)
    columns = column + tl.arange(0, COLUMNS)
    mask = (rows < num_rows - start)[:, None]
    if D % COLUMNS != 0:
        mask = mask & (columns < D)[None, :]
    # Only the tile's origin can pass 2^31; offsets inside a tile stay 32-bit, which halves the address arithmetic.
    origin = pointer + tl.cast(start, tl.int64) * D
    return tl.load(origin + (rows[:, None] * D + columns[None, :]), mask=mask, other=0.0)  # [ROWS, COLUMNS]


@triton.jit
def similarity(
    x_panel,
    y_tile,
    x_ptr,
    y_ptr,
    x_start,
    y_start,
    num_x,
    num_y,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    RESIDENT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """x_i·y_j for a panel and a tile [BLOCK_M, BLOCK_N]: from the loaded tiles, or over chunks of BLOCK_D columns."""
    s = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    if RESIDENT:
        s = matmul(x_panel, tl.trans(y_tile), s, PRECISION)
    else:
        for column in range(0, D, BLOCK_D):
            x_chunk = load_tile(x_ptr, x_start, num_x, column, D, BLOCK_M, BLOCK_D)
            y_chunk = load_tile(y_ptr, y_start, num_y, column, D, BLOCK_N, BLOCK_D)
            s = matmul(x_chunk, tl.trans(y_chunk), s, PRECISION)
    return s
