"""What the kernels share: tiles of rows, the similarity of two tiles, and the block sizes.

Legend: N activations, C classes, D columns (all row-major); a panel is BLOCK_M consecutive rows of one side, a tile is
a panel's product with BLOCK_N rows of the other side.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)

class Blocks(NamedTuple):
    """Sizes of one kernel's tiles and its launch options.

    block_m rows of a panel, block_n rows of a tile, block_d columns loaded at once (all of them: the panel stays on
    chip), block_g columns of the gradient one program forms.
    """

    block_m: int
    block_n: int
    block_d: int
    block_g: int
    num_warps: int
    num_stages: int


def launch_options(blocks: Blocks) -> dict[str, Any]:
    """Options of a launch; fused multiply-adds are asked for because Triton's default for them is changing."""
    return {"num_warps": blocks.num_warps, "num_stages": blocks.num_stages, "enable_fp_fusion": True}


@functools.lru_cache(maxsize=None)
def architecture(device: torch.device) -> int:
    """Compute capability as 80, 90, 100, ...; 90 where Triton interprets."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def device_guard(tensor: Tensor) -> AbstractContextManager[Any]:
    """Makes the tensor's GPU the current one, on which Triton launches; nothing on the CPU."""
    return torch.cuda.device_of(tensor)


def pointer(tensor: Tensor | None, other: Tensor) -> Tensor:
    """An absent tensor's argument: a kernel that does not read it still has to be given some tensor."""
    return other if tensor is None else tensor


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
