"""What the kernels share: tiles of rows, the similarity of two tiles, and the block sizes.

Legend: N activations, C classes, D columns (all row-major); a panel is BLOCK_M consecutive rows of one side,
a tile is a panel's product with BLOCK_N rows of the other side.
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

    block_m rows of a panel, block_n rows of a tile, block_d columns loaded at once (all of them: the panel
    stays on chip), block_g columns of the gradient one program forms.
    """

    block_m: int
    block_n: int
    block_d: int
    block_g: int
    num_warps: int
    num_stages: int


def launch_options(blocks: Blocks) -> dict[str, Any]:
    """Options of a launch; fused multiply-add is asked for because Triton's default for it is changing."""
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
    """How `tl.dot` multiplies float32: as torch.set_float32_matmul_precision says; 16-bit types are exact."""
    exact = dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    return "ieee" if exact else "tf32"


def padded_dim(dim: int) -> int:
    """Columns of a tile: the next power of two, at least the 16 that tensor cores take."""
    return max(16, triton.next_power_of_2(dim))


def forward_blocks(dim: int, dtype: torch.dtype, precision: str, arch: int) -> Blocks:
    """Sizes of the forward's tiles.

    128 x 128 is the largest product whose accumulator (64 registers a thread in 8 warps) leaves room for the
    two sums; half of it where sm_100, which reads whole rows from tensor memory, would run out of registers.
    A resident panel of 128 rows and two tiles in flight must fit the 163 KiB of sm_80, which halves BLOCK_N
    at 512 bytes a row and ends residence above. float32 products without tensor cores unroll into one FMA
    each: short chunks keep them in registers.
    """
    width = padded_dim(dim)
    if precision == "ieee" and dtype == torch.float32:
        return Blocks(block_m=64, block_n=64, block_d=min(32, width), block_g=0, num_warps=8, num_stages=2)
    row_bytes = width * dtype.itemsize
    if row_bytes > 512:
        width = 128 // dtype.itemsize
    block_n = 64 if row_bytes == 512 or (arch >= 100 and row_bytes > 128) else 128
    return Blocks(block_m=128, block_n=block_n, block_d=width, block_g=0, num_warps=8, num_stages=2)


def backward_blocks(dim: int, dtype: torch.dtype, precision: str, arch: int) -> Blocks:
    """Sizes of the backward's tiles.

    The gradient's accumulator BLOCK_M x BLOCK_G decides: 128 x 256 takes 128 of the 255 registers of a
    thread. sm_80 keeps the panel itself in registers too, so that rows of 512 bytes leave room for 64 of them
    only; on sm_100 the two exponentials of unshifted mode need more than there are for any panel of 128 rows.
    """
    width = padded_dim(dim)
    group = min(width, 256)
    if precision == "ieee" and dtype == torch.float32:
        return Blocks(block_m=64, block_n=32, block_d=min(32, width), block_g=group, num_warps=8, num_stages=1)
    row_bytes = width * dtype.itemsize
    if row_bytes > 512:
        chunk = 128 // dtype.itemsize
        return Blocks(block_m=64, block_n=chunk, block_d=chunk, block_g=group, num_warps=8, num_stages=2)
    block_m = 64 if arch >= 100 or (arch < 90 and row_bytes == 512) else 128
    return Blocks(block_m=block_m, block_n=64, block_d=width, block_g=group, num_warps=8, num_stages=2)


def wave_blocks(dtype: torch.dtype, precision: str, arch: int) -> Blocks:
    """Sizes of the tiles of K in row waves."""
    if precision == "ieee" and dtype == torch.float32:
        return Blocks(block_m=64, block_n=64, block_d=32, block_g=0, num_warps=8, num_stages=2)
    return Blocks(block_m=128, block_n=128, block_d=128 // dtype.itemsize, block_g=0, num_warps=8, num_stages=3)


@triton.jit
def matmul(x, y, accumulator, PRECISION: tl.constexpr):
    if INTERPRETED:  # the interpreter holds bfloat16 as integers and would multiply those
        x = x.to(tl.float32)
        y = y.to(tl.float32)
    return tl.dot(x, y, accumulator, input_precision=PRECISION)


@triton.jit
def narrow(x, TYPE: tl.constexpr):
    """float32 to TYPE, rounded to nearest."""
    if INTERPRETED:  # the interpreter would cut bfloat16's lower bits off
        if TYPE == tl.bfloat16:
            bits = x.to(tl.int32, bitcast=True)
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
            x = bits.to(tl.float32, bitcast=True)
    return x.to(TYPE)


@triton.jit
def load_tile(pointer, start, num_rows, column, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows from `start`, columns from `column` of a [num_rows, D] matrix, [ROWS, COLUMNS]; zeros outside."""
    rows = tl.arange(0, ROWS)
    columns = column + tl.arange(0, COLUMNS)
    mask = (rows < num_rows - start)[:, None]
    if D % COLUMNS != 0:
        mask = mask & (columns < D)[None, :]
    # Only the tile's origin can pass 2^31; 32-bit offsets inside a tile halve the address arithmetic.
    origin = pointer + tl.cast(start, tl.int64) * D
    return tl.load(origin + (rows[:, None] * D + columns[None, :]), mask=mask, other=0.0)


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
    """x_i·y_j [BLOCK_M, BLOCK_N] of a panel and a tile: as loaded, or over chunks of BLOCK_D columns."""
    s = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    if RESIDENT:
        s = matmul(x_panel, tl.trans(y_tile), s, PRECISION)
    else:
        for column in range(0, D, BLOCK_D):
            x_chunk = load_tile(x_ptr, x_start, num_x, column, D, BLOCK_M, BLOCK_D)
            y_chunk = load_tile(y_ptr, y_start, num_y, column, D, BLOCK_N, BLOCK_D)
            s = matmul(x_chunk, tl.trans(y_chunk), s, PRECISION)
    return s
