"""HyCon's gradient where a row and its gradient are too wide to stay on chip: waves of rows, and library GEMMs.

With X = [z; μ], and u, a as in allnc.kernels.hycon.lse (a mean is a row with u = 0 and a = b_c),

    K_ij  = exp(X_i·X_j / τ) (u_i a_j + u_j a_i)  for i != j, K_ii = 0
    dz_i  = (1/τ) Σ_j K_ij X_j          over all N + C columns j
    dμ_c  = (1/τ) Σ_i K_ic z_i          over the rows i < own

Legend: N activations, C class means, D columns; own <= N rows, the first, whose gradient is asked for; a wave is
WAVE consecutive rows of them; W is N + C rounded up.

One launch a wave writes its K [WAVE, W] in z's type; two products of the library, with float32 sums, give the wave's
dz = K X and its share of dμ = K_means^T z. That is 4 own N D operations in all, in place of the 2 N² D (D/256 + 1) of a
kernel that computes S again for every 256 columns it can hold. Memory: the workspace of WAVE · W, and a copy of X
padded to whole tiles: with it every row starts on 16 bytes and no load has to mask columns, whatever D is.

K costs one write and one read of device memory, 4 bytes (of 16-bit types) for 4 D operations: at D = 512 under half
of what a GPU's memory moves in the time of the products, so K need not fit the L2 cache.

Launch grid: (panels of the wave · tiles of X), the panels of one tile next to each other: the wave, a few MB, stays in
the L2 cache while X passes once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from allnc.kernels._common import (
    LEAST_SCALED,
    VECTOR_BLOCK,
    Matrix,
    architecture,
    device_guard,
    exact_float32,
    narrow,
    pointer,
    similarity,
    table_arch,
    uses_waves,
    wave_blocks,
)
from allnc.kernels.hycon.lse import HALF_SCALE, hycon_lse_terms_kernel, hycon_panel_backward, terms_constants
from allnc.kernels.hycon.panels import pair_coefficient, pair_terms

WAVE = 1024  # rows: 8 panels of 128, and a first dimension that library GEMMs fill a GPU with from D = 2048 on
_PAD = 64  # elements: 128 bytes of 16-bit types, and a multiple of every BLOCK_D


@triton.jit
def halves(s, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and the right half of the columns."""
    return tl.split(tl.permute(tl.reshape(s, [ROWS, 2, COLUMNS // 2]), [0, 2, 1]))


@triton.jit
def write_coefficients(
    s,
    row_terms,
    rows,
    first,
    num_stored,
    term_ptr,
    inverse_temperature,
    k_ptr,
    num_terms,
    width,
    SHIFTED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """K [ROWS, COLUMNS] of the rows `rows` and the columns from `first` on; k_ptr is at the first row, column 0."""
    columns = first + tl.arange(0, COLUMNS)
    # One comparison an element, beside D products: not worth a loop of its own for the tiles on the diagonal.
    s = tl.where(rows[:, None] != columns[None, :], s, float("-inf"))
    column_terms = pair_terms(term_ptr, columns, columns < num_terms, num_terms, SHIFTED)
    k = pair_coefficient(s, inverse_temperature, row_terms, column_terms, SHIFTED)
    # Columns past num_terms are written too, as zeros: the products run over the whole width.
    mask = (tl.arange(0, ROWS) < num_stored)[:, None] & (columns < width)[None, :]
    offsets = tl.arange(0, ROWS)[:, None] * width + columns[None, :]
    tl.store(k_ptr + offsets, narrow(k, k_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["start", "count", "N", "num_terms"])
def hycon_wave_kernel(
    term_ptr,
    rows_ptr,
    temperature_ptr,
    k_ptr,
    start,
    count,
    N,
    num_terms,
    width,
    SHIFTED: tl.constexpr,
    EIGHTHS: tl.constexpr,
    blocks: tl.constexpr,
):
    """One tile of K [count, width], for the rows start .. start + count - 1 of X [num_terms, D] against all."""
    BLOCK_M: tl.constexpr = blocks.block_m
    BLOCK_N: tl.constexpr = blocks.block_n
    num_panels = tl.cdiv(count, BLOCK_M)
    origin = tl.program_id(0) % num_panels * BLOCK_M
    first = tl.program_id(0) // num_panels * BLOCK_N
    rows = start + origin + tl.arange(0, BLOCK_M)
    x = Matrix(rows_ptr, num_terms)
    s = similarity(x, x, start + origin, first, 0.0, 0.0, blocks)
    row_terms = pair_terms(term_ptr, rows, rows < N, num_terms, SHIFTED)
    inverse_temperature = 1.0 / tl.load(temperature_ptr)
    k_panel = k_ptr + tl.cast(origin, tl.int64) * width
    # A few columns at a time: the terms of all columns at once would take more registers than the sums do, and leave
    # one block a multiprocessor, with nothing to compute while it forms K.
    left, right = halves(s, BLOCK_M, BLOCK_N)
    PIECE: tl.constexpr = BLOCK_N // 8 if EIGHTHS else BLOCK_N // 4
    for i in tl.static_range(2):  # pyright: ignore[reportGeneralTypeIssues]
        half = halves(left if i == 0 else right, BLOCK_M, BLOCK_N // 2)
        for j in tl.static_range(2):  # pyright: ignore[reportGeneralTypeIssues]
            column = first + (2 * i + j) * (BLOCK_N // 4)
            if EIGHTHS:
                pair = halves(half[j], BLOCK_M, BLOCK_N // 4)
                for k in tl.static_range(2):  # pyright: ignore[reportGeneralTypeIssues]
                    write_coefficients(
                        pair[k], row_terms, rows, column + k * PIECE, count - origin, term_ptr,
                        inverse_temperature, k_panel, num_terms, width, SHIFTED, BLOCK_M, PIECE,
                    )  # fmt: skip
            else:
                write_coefficients(
                    half[j], row_terms, rows, column, count - origin, term_ptr,
                    inverse_temperature, k_panel, num_terms, width, SHIFTED, BLOCK_M, PIECE,
                )  # fmt: skip


def wave_constants(dim: int, dtype: torch.dtype, *, shifted: bool, arch: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Compile-time arguments and launch options of `hycon_wave_kernel`.

    Smaller pieces take fewer registers, except on sm_80, where the loop over chunks may be unrolled: there eighths of
    512 columns spill and quarters do not.
    """
    blocks, options = wave_blocks(_padded(dim), dtype, arch)
    eighths = table_arch(arch) >= 90
    if eighths and not exact_float32(dtype):  # room for two blocks a multiprocessor
        options |= {"maxnreg": 65536 // (2 * 32 * options["num_warps"])}
    return {"SHIFTED": shifted, "EIGHTHS": eighths, "blocks": blocks._replace(resident=False)}, options


def _padded(size: int) -> int:
    return triton.cdiv(size, _PAD) * _PAD


def _padded_rows(z: Tensor, mu: Tensor | None) -> Tensor:
    """[z; mu] in [W, padded D], zeros around it; z itself where it has that form."""
    num_rows, dim = z.shape
    num_means = 0 if mu is None else len(mu)
    shape = (_padded(num_rows + num_means), _padded(dim))
    if mu is None and shape == z.shape:
        return z
    rows = torch.empty(shape, dtype=z.dtype, device=z.device)
    rows[:num_rows, :dim] = z
    if mu is not None:
        rows[num_rows : num_rows + num_means, :dim] = mu
    rows[num_rows + num_means :] = 0
    rows[: num_rows + num_means, dim:] = 0
    return rows


def _matmul_into(out: Tensor, x: Tensor, y: Tensor) -> None:
    """out = x @ y, float32: 16-bit products are summed without a rounding on the way, and autocast changes nothing."""
    if x.dtype == torch.float32:
        torch.mm(x, y, out=out)
    elif x.is_cuda:
        torch.mm(x, y, out_dtype=torch.float32, out=out)
    else:  # interpreted: torch has this product for GPUs only
        torch.mm(x.float(), y.float(), out=out)


def hycon_wave_backward(
    grad_lse: Tensor,
    lse: Tensor,
    z: Tensor,
    mu: Tensor | None,
    a: Tensor,
    b: Tensor | None,
    temperature: Tensor,
    *,
    shifted: bool,
    own: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """What `allnc.kernels.hycon.lse.hycon_panel_backward` computes, for any D and meant for the large.

    Args:
        grad_lse: [N] float32, dL/dlse.
        lse: [N] float32, the forward's result.
        z: [N, D] float16, bfloat16 or float32 unit rows.
        mu: [C, D] unit rows of z's type, or None.
        a, b: [N], [C] float32 column weights >= 0; b is None if and only if mu is.
        temperature: 0-dim float32 tensor on z's device; never read by the host.
        shifted: the caller guarantees 2/τ <= 64.
        own: 1 <= own <= N, rows whose gradient is asked for, the first. Default: all N.

    Returns:
        dz [own, D] in z's type, and dmu [C, D] in mu's, the share of the rows before own; None without mu. No atomics.
    """
    z, a = z.contiguous(), a.contiguous()
    mu, b = (None, None) if mu is None or b is None else (mu.contiguous(), b.contiguous())
    grad_lse, lse = grad_lse.contiguous(), lse.contiguous()
    num_rows, dim = z.shape
    num_means = 0 if mu is None else len(mu)
    num_terms = num_rows + num_means
    own = num_rows if own is None else own
    scaled = z.dtype == torch.float16
    constants, options = wave_constants(dim, z.dtype, shifted=shifted, arch=architecture(z.device))

    rows = _padded_rows(z, mu)  # [W, padded D]
    width = len(rows)
    grad_max = torch.linalg.vector_norm(grad_lse, torch.inf) if scaled else temperature
    terms = torch.empty((2 if shifted else 3, num_terms), dtype=torch.float32, device=z.device)
    factor = 1 / temperature  # 0-dim
    if scaled:
        factor = factor * grad_max.clamp(min=LEAST_SCALED.value) / HALF_SCALE.value
    dz = torch.empty((own, dim), dtype=z.dtype, device=z.device)
    workspace = torch.empty((min(WAVE, own), width), dtype=z.dtype, device=z.device)
    dz_sum = torch.empty((len(workspace), rows.shape[1]), dtype=torch.float32, device=z.device)
    # From a column on 128 bytes, as tensor cores want it: a few rows of z before the means are formed in vain.
    first_mean = num_rows // _PAD * _PAD
    dmu_shape = (width - first_mean if num_means else 0, rows.shape[1])
    dmu_sum = torch.zeros(dmu_shape, dtype=torch.float32, device=z.device)
    dmu_wave = torch.empty(dmu_shape, dtype=torch.float32, device=z.device)

    with device_guard(z):
        choice = {"HAS_MU": mu is not None, "SHIFTED": shifted, "SCALED": scaled}
        hycon_lse_terms_kernel[(triton.cdiv(num_terms, VECTOR_BLOCK),)](
            grad_lse, grad_max, lse, a, pointer(b, a), temperature, terms, num_rows, num_means,
            **terms_constants(choice),
        )  # fmt: skip
        num_tiles = triton.cdiv(width, constants["blocks"].block_n)
        for start in range(0, own, WAVE):
            count = min(WAVE, own - start)
            hycon_wave_kernel[(triton.cdiv(count, constants["blocks"].block_m) * num_tiles,)](
                terms, rows, temperature, workspace, start, count, num_rows, num_terms, width,
                **constants, **options,
            )  # fmt: skip
            k, of_wave = workspace[:count], dz_sum[:count]
            _matmul_into(of_wave, k, rows)
            torch.mul(of_wave[:, :dim], factor, out=dz[start : start + count])
            if mu is not None:
                _matmul_into(dmu_wave, k[:, first_mean:].T, rows[start : start + count])
                dmu_sum += dmu_wave
    if mu is None:
        return dz, None
    return dz, dmu_sum[num_rows - first_mean : num_terms - first_mean, :dim].mul_(factor).to(mu.dtype)


def hycon_lse_backward(
    grad_lse: Tensor,
    lse: Tensor,
    z: Tensor,
    mu: Tensor | None,
    a: Tensor,
    b: Tensor | None,
    temperature: Tensor,
    *,
    shifted: bool,
    own: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of hycon_lse_forward: by one kernel where a row's gradient stays on chip, in waves where it does not.

    Arguments and results as in `hycon_wave_backward`.
    """
    backward = hycon_wave_backward if uses_waves(z.shape[1], z.dtype) else hycon_panel_backward
    return backward(grad_lse, lse, z, mu, a, b, temperature, shifted=shifted, own=own)
