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
LEAST_ENTRY = tl.constexpr(2.0**-100)  # rows without an entry as large have no direction, as in allnc/ops/_common.py
LEAST_SCALED = tl.constexpr(1e-30)  # keeps a scale finite where all that it scales is 0
VECTOR_BLOCK = 1024  # labels or rows a step of what only touches vectors


class Blocks(NamedTuple):
    """Sizes of one kernel's tiles and how it multiplies them: one compile-time argument.

    A kernel's numbers (N, C) are arguments of their own and not in such tuples: Triton would compile the kernel again
    for numbers that 16 divides, whatever `do_not_specialize` says, because it does not look into tuples.
    Triton 3.6 wants a field bound to a `tl.constexpr` name before it is passed on to another function.
    """

    dim: int  # columns of a row
    block_m: int  # rows of a panel
    block_n: int  # rows of a tile
    block_d: int  # columns loaded at once
    block_g: int  # columns of the gradient one program forms; 0 in a forward
    resident: bool  # whether all columns are loaded at once, so that a panel stays on chip
    precision: str  # of tl.dot


class Matrix(NamedTuple):
    """A row-major matrix inside a kernel."""

    ptr: Any
    num_rows: Any


def launch_options(num_warps: int, num_stages: int, *, alone: bool = False) -> dict[str, Any]:
    """Options of a launch; fused multiply-add is asked for because Triton's default for it is changing.

    alone: shared memory holds one program a multiprocessor, and the assembler is told not to spill for a second.
    """
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    return options | {"maxnreg": 255} if alone else options


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


def exact_float32(dtype: torch.dtype) -> bool:
    """Whether products are float32's own, without tensor cores."""
    return dtype == torch.float32 and matmul_precision(dtype) == "ieee"


def padded_dim(dim: int) -> int:
    """Columns of a tile: the next power of two, at least the 16 that tensor cores take."""
    return max(16, triton.next_power_of_2(dim))


class Tile(NamedTuple):
    """One entry of the tables below."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# Tiles by architecture and by the bytes of a row, so that a first call need not search. They were chosen from compiled
# code: no spills, and as many independent blocks on a multiprocessor as registers and shared memory allow, because
# one block's exponentials then run beside another's products. What they are worth on a GPU is a prediction;
# `benchmarks/machine_code/tune.py` measures the alternatives and prints the rows to paste. Rows are at most 512 bytes
# where they stay on chip; CHUNKED is for longer ones, which are loaded CHUNK_BYTES at a time.
CHUNKED = 0
CHUNK_BYTES = {80: 64, 90: 128, 100: 128}  # sm_80 holds a chunk in registers too: half of it leaves room for two blocks

FORWARD = {
    80: {
        128: Tile(128, 64, 8, 2),  # 128 registers: two blocks; a third stage takes 160, and one block is left
        256: Tile(128, 64, 8, 2),  # as above
        512: Tile(128, 64, 8, 2),  # the panel and two tiles are 97 KiB, as much as sm_86 and sm_89 have
        CHUNKED: Tile(128, 128, 8, 4),  # 64 columns of sums less would load half as much again for a product
    },
    90: {
        128: Tile(128, 64, 8, 3),  # 124 registers: two blocks, where 128 x 128 takes 250: one
        256: Tile(128, 64, 8, 3),  # 126 registers, 81 KiB: two blocks
        512: Tile(128, 64, 8, 2),  # 129 KiB: one block; 128 x 32 has two, but products of 32 columns starve
        CHUNKED: Tile(128, 128, 8, 3),  # 96 KiB; smaller tiles would ask more of the L2 cache than it delivers
    },
    100: {
        128: Tile(128, 128, 8, 2),  # 128 x 64 spills in triangle mode
        256: Tile(128, 64, 8, 2),  # 128 x 128 spills: a thread reads whole rows from tensor memory
        512: Tile(128, 64, 8, 2),
        CHUNKED: Tile(128, 64, 8, 3),  # as above
    },
}

BACKWARD = {
    80: {
        128: Tile(64, 64, 4, 2),  # 162 registers, 4 warps: three blocks, where 128 x 64 has one of 8 warps
        256: Tile(64, 64, 4, 2),  # 228 registers: two blocks
        512: Tile(64, 64, 8, 2),  # the panel is in registers too, and 4 warps spill in unshifted mode
    },
    90: {
        128: Tile(128, 64, 8, 2),  # 126 registers: two blocks
        256: Tile(64, 64, 4, 2),  # 164 registers, 4 warps: three blocks, where 128 x 64 has one of 8 warps
        512: Tile(128, 64, 8, 2),  # 232 registers, 128 of them sums; 64 rows in 4 warps spill in unshifted mode
    },
    100: {
        128: Tile(64, 64, 8, 2),  # two exponentials of unshifted mode need too many registers for 128 rows
        256: Tile(64, 64, 8, 2),
        512: Tile(64, 64, 8, 2),
    },
}

# Tiles of K in row waves: at most 128 registers, two blocks; 128 x 256 would leave one, which forms K, a third of the
# time at 512 columns, while nothing multiplies.
WAVES = {
    80: {CHUNKED: Tile(128, 128, 8, 4)},
    90: {CHUNKED: Tile(128, 128, 8, 3)},
    100: {CHUNKED: Tile(128, 128, 8, 3)},
}


def table_arch(arch: int) -> int:
    """The architecture whose rows hold for `arch`: 80, 90 or 100.

    Consumer GPUs (8.6, 8.9, 12.x) have sm_80's tensor-core instructions and 99 KiB of shared memory, within which
    the rows of 80 stay.
    """
    return {9: 90, 10: 100, 11: 100}.get(arch // 10, 80)


def row_class(dim: int, dtype: torch.dtype) -> int:
    """Bytes of a padded row, at least 128, as the tables have them; CHUNKED above 512."""
    row_bytes = max(128, padded_dim(dim) * dtype.itemsize)
    return row_bytes if row_bytes <= 512 else CHUNKED


def uses_waves(dim: int, dtype: torch.dtype) -> bool:
    """Whether rows are too long for the backward to keep a panel and its gradient on chip."""
    return row_class(dim, dtype) == CHUNKED


Choice = tuple[Blocks, dict[str, Any]]  # and the launch options


def forward_blocks(dim: int, dtype: torch.dtype, arch: int) -> Choice:
    """Tiles of the forward."""
    if exact_float32(dtype):  # one FMA a product: short chunks keep them in registers
        return _choice(Tile(64, 64, 8, 2), dim, dtype, columns=min(32, padded_dim(dim)))
    return _from_table(FORWARD, dim, dtype, arch, gradient=0)


def backward_blocks(dim: int, dtype: torch.dtype, arch: int) -> Choice:
    """Tiles of the backward; up to 256 columns of the gradient a program."""
    width = padded_dim(dim)
    gradient = min(width, 256)
    if exact_float32(dtype):
        return _choice(Tile(64, 32, 8, 1), dim, dtype, columns=min(32, width), gradient=gradient)
    if uses_waves(dim, dtype):
        chunk = 128 // dtype.itemsize
        blocks, options = _choice(Tile(64, chunk, 8, 2), dim, dtype, columns=chunk, gradient=gradient)
        return blocks, options | {"maxnreg": 255}  # one program a multiprocessor, by shared or tensor memory
    return _from_table(BACKWARD, dim, dtype, arch, gradient)


def wave_blocks(dim: int, dtype: torch.dtype, arch: int) -> Choice:
    """Tiles of K in row waves, for `dim` columns that whole chunks fill."""
    if exact_float32(dtype):
        return _choice(Tile(64, 64, 8, 2), dim, dtype, columns=32)
    arch = table_arch(arch)
    return _choice(WAVES[arch][CHUNKED], dim, dtype, columns=CHUNK_BYTES[arch] // dtype.itemsize)


def _from_table(table: dict[int, dict[int, Tile]], dim: int, dtype: torch.dtype, arch: int, gradient: int) -> Choice:
    arch, row = table_arch(arch), row_class(dim, dtype)
    columns = CHUNK_BYTES[arch] // dtype.itemsize if row == CHUNKED else padded_dim(dim)
    return _choice(table[arch][row], dim, dtype, columns, gradient)


def _choice(tile: Tile, dim: int, dtype: torch.dtype, columns: int, gradient: int = 0) -> Choice:
    blocks = Blocks(
        dim, tile.block_m, tile.block_n, columns, gradient, resident=columns >= dim, precision=matmul_precision(dtype)
    )
    return blocks, launch_options(tile.num_warps, tile.num_stages, alone=row_class(dim, dtype) == 512)


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
def near_one(largest):
    """A power of two that brings entries of at most `largest`, a scalar, near 1, so that their squares neither overflow
    nor vanish; and whether they are all below LEAST_ENTRY.
    """
    bounded = tl.minimum(tl.maximum(largest, LEAST_ENTRY), 2.0**126)
    return tl.exp2(-tl.floor(tl.log2(bounded))), largest < LEAST_ENTRY


@triton.jit
def load_tile(matrix, start, column, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows from `start` and columns from `column` of a matrix of D columns; zeros outside.  # [ROWS, COLUMNS]"""
    rows = tl.arange(0, ROWS)
    columns = column + tl.arange(0, COLUMNS)
    mask = (rows < matrix.num_rows - start)[:, None]
    if D % COLUMNS != 0:
        mask = mask & (columns < D)[None, :]
    # Only the tile's origin can pass 2^31; 32-bit offsets inside a tile halve the address arithmetic.
    origin = matrix.ptr + tl.cast(start, tl.int64) * D
    return tl.load(origin + (rows[:, None] * D + columns[None, :]), mask=mask, other=0.0)


@triton.jit
def store_tile(matrix, x, start, column, D: tl.constexpr):
    """Writes x [ROWS, COLUMNS], narrowed, to rows from `start` and columns from `column` of a matrix of D columns."""
    rows = tl.arange(0, x.shape[0])
    columns = column + tl.arange(0, x.shape[1])
    mask = (start + rows < matrix.num_rows)[:, None] & (columns < D)[None, :]
    origin = matrix.ptr + tl.cast(start, tl.int64) * D
    tl.store(origin + (rows[:, None] * D + columns[None, :]), narrow(x, matrix.ptr.dtype.element_ty), mask=mask)


@triton.jit
def gather_tile(ptr, rows, valid, columns, D: tl.constexpr):
    """Those rows and columns of a matrix of D columns in float32; zeros where not valid.  # [ROWS, COLUMNS]"""
    mask = valid[:, None] & (columns < D)[None, :]
    return tl.load(ptr + rows.to(tl.int64)[:, None] * D + columns[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def similarity(x, y, x_start, y_start, x_panel, y_tile, blocks: tl.constexpr):
    """x_i·y_j of a panel of x and a tile of y: as loaded, or over chunks of columns.  # [BLOCK_M, BLOCK_N]"""
    D: tl.constexpr = blocks.dim
    BLOCK_M: tl.constexpr = blocks.block_m
    BLOCK_N: tl.constexpr = blocks.block_n
    BLOCK_D: tl.constexpr = blocks.block_d
    PRECISION: tl.constexpr = blocks.precision
    s = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    if blocks.resident:
        s = matmul(x_panel, tl.trans(y_tile), s, PRECISION)
    else:
        for column in range(0, D, BLOCK_D):
            x_chunk = load_tile(x, x_start, column, D, BLOCK_M, BLOCK_D)
            y_chunk = load_tile(y, y_start, column, D, BLOCK_N, BLOCK_D)
            s = matmul(x_chunk, tl.trans(y_chunk), s, PRECISION)
    return s
