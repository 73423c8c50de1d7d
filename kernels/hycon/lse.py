"""HyCon's log-sum-exp and its gradient, without the N x N matrix.

    lse_i = log( Σ_{j≠i} a_j exp(z_i·z_j / τ) + Σ_c b_c exp(z_i·μ_c / τ) )

and, for g = dL/dlse and u_i = g_i exp(-lse_i) (0 where g_i = 0),

    dz_i  = (1/τ) [ Σ_{j≠i} exp(z_i·z_j / τ) (u_i a_j + u_j a_i) z_j + u_i Σ_c b_c exp(z_i·μ_c / τ) μ_c ]
    dμ_c  = (1/τ) b_c Σ_i u_i exp(z_i·μ_c / τ) z_i

Legend: z [N, D] activations and μ [C, D] class means with unit rows; a [N], b [C] column weights >= 0; τ temperature.

Shifted mode: rows are unit, so z_i·z_j / τ <= 1/τ and exp(S - 1/τ) cannot overflow; no running maximum. The
caller promises 2/τ <= 64, so that it cannot underflow either. Unshifted mode: a running maximum in the
forward, and in the backward every exponent is relative to the lse of its own anchor, right for any τ.

Tiling. The rows are cut into T panels of BLOCK_M. A panel visits the panels at distance 0, 1, 2, ... to its
right, round the end (panel + distance mod T), in tiles of BLOCK_N columns. Distance 0, where i = j must be
left out, is a loop of its own, so that the loop over all other tiles carries no comparison. Rows past N are
loaded as zeros with weight zero, which makes their terms vanish without a mask on the tile.

Forward grid, shifted: (T · splits). S is symmetric: distances up to T/2 meet every pair of panels once, and
every panel has the same number of tiles. A tile's exponentials are summed along rows, weighted with a_j, into
registers, and along columns, weighted with a_i, into memory by atomics. `splits` programs share a panel while
there are too few panels for the device. A second, small launch turns the sums into lse. Forward grid,
deterministic or unshifted: (T), all distances, row sums only, no atomics: twice the work. Several ranks share a
forward as `parts`: the tiles of all panels, numbered one after the other, are dealt out in turn.

Backward grid: (panels of the own rows + panels of μ); of several ranks, each asks for its own rows.
K_ij = exp(S_ij)(u_i a_j + u_j a_i) is symmetric and holds the gradient of row *and* column, so that one
exponential (two in unshifted mode) and one product K z_j a tile give dz without atomics. A mean is a row with
u = 0 and a = b_c: the same formula gives z against μ, and dμ. A first, small launch forms u, so that no program
computes it again for every tile. Up to 512 bytes a row a panel's gradient stays on chip; beyond, see
allnc.kernels.hycon.waves. The forward takes any D: S is summed over chunks of columns where a panel does not fit.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from allnc.kernels._common import (
    LEAST_SCALED,
    LN_2,
    LOG2_E,
    VECTOR_BLOCK,
    Matrix,
    architecture,
    backward_blocks,
    device_guard,
    forward_blocks,
    pointer,
    store_tile,
)
from allnc.kernels.hycon.panels import Contrast, backward_panel, forward_panel

# float16 ends at 6e-8, above the coefficients K of a mean over 10^4 anchors. They are scaled so that max |g|
# is 2^14: |K| <= 2 max |g| stays below 65504 and everything above 4e-9 max |g| keeps full precision.
HALF_SCALE = tl.constexpr(16384.0)


@triton.jit(do_not_specialize=["N", "C", "num_splits", "part", "num_parts"])
def hycon_lse_fwd_kernel(
    contrast,
    temperature_ptr,
    out_ptr,
    N,
    C,
    num_splits,
    part,
    num_parts,
    HAS_MU: tl.constexpr,
    SHIFTED: tl.constexpr,
    TRIANGLE: tl.constexpr,
    blocks: tl.constexpr,
):
    """One split of one panel of one part: adds to the sums of exponentials (TRIANGLE), or writes the panel's lse."""
    inverse_temperature = 1.0 / tl.load(temperature_ptr)
    rows, maximum, total = forward_panel(
        tl.program_id(0), contrast, out_ptr, inverse_temperature, N, C, num_splits, part, num_parts,
        HAS_MU, SHIFTED, TRIANGLE, blocks,
    )  # fmt: skip
    if TRIANGLE:
        tl.atomic_add(out_ptr + rows, total, mask=rows < N, sem="relaxed")
    else:
        # The maximum is that of z_i·z_j: one rounding makes it lse, as large as 1/τ, and the backward undoes
        # it with the same 1/τ.
        shift = inverse_temperature
        if not SHIFTED:
            shift *= maximum
        tl.store(out_ptr + rows, tl.log2(total) * LN_2 + shift, mask=rows < N)


@triton.jit(do_not_specialize=["N"])
def hycon_lse_finish_kernel(sum_ptr, temperature_ptr, N, BLOCK: tl.constexpr):
    """lse_i = log(sum_i) + 1/τ, in place, once every program of the triangle has added its part."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(sum_ptr + rows, mask=rows < N, other=1.0)
    lse = tl.log2(total) * LN_2 + 1.0 / tl.load(temperature_ptr)
    tl.store(sum_ptr + rows, lse, mask=rows < N)


@triton.jit(do_not_specialize=["N", "C"])
def hycon_lse_terms_kernel(
    grad_ptr,
    grad_max_ptr,
    lse_ptr,
    a_ptr,
    b_ptr,
    temperature_ptr,
    term_ptr,
    N,
    C,
    HAS_MU: tl.constexpr,
    SHIFTED: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What rows of [z; μ] bring to K, [2 or 3, N + C]: (u, a) in shifted mode, (g, log2 a, lse) otherwise."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    weight = tl.load(a_ptr + index, mask=index < N, other=0.0)
    grad = tl.load(grad_ptr + index, mask=index < N, other=0.0)
    lse = tl.load(lse_ptr + index, mask=index < N, other=float("-inf"))
    if HAS_MU:
        weight += tl.load(b_ptr + (index - N), mask=(index >= N) & (index < N + C), other=0.0)
    # An empty contrast set (lse = -inf) has no gradient, whatever g; comparing with != lets NaN through.
    used = (grad != 0) & (lse != float("-inf"))
    lse = tl.where(used, lse, float("inf"))
    if SCALED:
        grad *= HALF_SCALE / tl.maximum(tl.load(grad_max_ptr), LEAST_SCALED)
    stored = index < N + C
    if SHIFTED:
        exponent = (1.0 / tl.load(temperature_ptr) - lse) * LOG2_E
        tl.store(term_ptr + index, grad * tl.exp2(exponent), mask=stored)
        tl.store(term_ptr + (N + C) + index, weight, mask=stored)
    else:
        tl.store(term_ptr + index, grad, mask=stored)
        tl.store(term_ptr + (N + C) + index, tl.log2(weight), mask=stored)
        tl.store(term_ptr + 2 * (N + C) + index, lse, mask=stored)


@triton.jit(do_not_specialize=["N", "C", "num_own"])
def hycon_lse_bwd_kernel(
    term_ptr,
    grad_max_ptr,
    z_ptr,
    mu_ptr,
    temperature_ptr,
    dz_ptr,
    dmu_ptr,
    N,
    C,
    num_own,
    HAS_MU: tl.constexpr,
    SHIFTED: tl.constexpr,
    SCALED: tl.constexpr,
    blocks: tl.constexpr,
):
    """The gradient of one panel of the own rows of z, or of μ."""
    D: tl.constexpr = blocks.dim
    inverse_temperature = 1.0 / tl.load(temperature_ptr)
    dx, start, num_x, of_mean = backward_panel(
        tl.program_id(0), term_ptr, z_ptr, mu_ptr, inverse_temperature, N, C, num_own, HAS_MU, SHIFTED, blocks
    )
    factor = inverse_temperature
    if SCALED:
        factor *= tl.maximum(tl.load(grad_max_ptr), LEAST_SCALED) / HALF_SCALE
    dx_ptr = dz_ptr
    if HAS_MU:
        if of_mean:
            dx_ptr = dmu_ptr
    store_tile(Matrix(dx_ptr, num_x), dx * factor, start, 0, D)


# Programs for two on every multiprocessor of an H100/H200; a smaller GPU runs them in turns.
PROGRAMS = 264


def forward_constants(
    dim: int, dtype: torch.dtype, *, has_mu: bool, shifted: bool, triangle: bool, arch: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Compile-time arguments and launch options of `hycon_lse_fwd_kernel`.

    The running maximum of unshifted mode leaves room for half a tile where a thread reads whole rows of it (sm_100).
    """
    blocks, options = forward_blocks(dim, dtype, arch)
    if not shifted and arch >= 100:
        blocks = blocks._replace(block_n=min(blocks.block_n, 64))
    return {"HAS_MU": has_mu, "SHIFTED": shifted, "TRIANGLE": triangle, "blocks": blocks}, options


def backward_constants(
    dim: int, dtype: torch.dtype, *, has_mu: bool, shifted: bool, arch: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Compile-time arguments and launch options of `hycon_lse_bwd_kernel`.

    Beside an accumulator of 128 registers a thread, the two exponentials of unshifted mode leave room for half a tile.
    """
    blocks, options = backward_blocks(dim, dtype, arch)
    accumulator = blocks.block_m * blocks.block_g // (32 * options["num_warps"])
    if not shifted and accumulator >= 128:
        blocks = blocks._replace(block_n=min(blocks.block_n, 32))
    return {"HAS_MU": has_mu, "SHIFTED": shifted, "SCALED": dtype == torch.float16, "blocks": blocks}, options


def terms_constants(backward: dict[str, Any]) -> dict[str, Any]:
    """Compile-time arguments of `hycon_lse_terms_kernel`, from those of the backward it prepares."""
    return {name: backward[name] for name in ("HAS_MU", "SHIFTED", "SCALED")} | {"BLOCK": VECTOR_BLOCK}


def finish_constants() -> dict[str, Any]:
    """Compile-time arguments of `hycon_lse_finish_kernel`."""
    return {"BLOCK": VECTOR_BLOCK}


def num_splits(num_panels: int, tiles_per_panel: int, num_parts: int = 1, mean_tiles: int = 0) -> int:
    """Programs that share a part's tiles of a panel of the triangle: enough for the device, at most one a tile."""
    tiles = triton.cdiv((num_panels // 2 + 1) * tiles_per_panel + mean_tiles, num_parts)
    return max(1, min(PROGRAMS // num_panels, tiles))


def hycon_lse_forward(
    z: Tensor,
    mu: Tensor | None,
    a: Tensor,
    b: Tensor | None,
    temperature: Tensor,
    *,
    shifted: bool,
    deterministic: bool,
    part: int = 0,
    parts: int = 1,
) -> Tensor:
    """lse [N], the log-sum-exp of every activation's weighted similarities, by the formula at the head.

    With `parts` > 1 only one part's share of the tiles is computed, equal to every other part's within one tile;
    the logsumexp over all parts is the whole lse.

    Args:
        z: [N, D] float16, bfloat16 or float32 unit rows.
        mu: [C, D] unit rows of z's type, or None.
        a: [N] float32 column weights >= 0.
        b: [C] float32 column weights >= 0; None if and only if mu is None.
        temperature: 0-dim float32 tensor on z's device; read by the kernel, never by the host.
        shifted: the caller guarantees 2/τ <= 64. One triangle of S is computed, unless `deterministic`.
        deterministic: no atomics: repeated calls are equal bit for bit.
        part, parts: which share of how many, 0 <= part < parts.

    Returns:
        [N] float32; -inf for an anchor whose contrast set, or this part of it, is empty.
    """
    z, a = z.contiguous(), a.contiguous()
    mu, b = (None, None) if mu is None or b is None else (mu.contiguous(), b.contiguous())
    num_rows, dim = z.shape
    triangle = shifted and not deterministic
    constants, options = forward_constants(
        dim, z.dtype, has_mu=mu is not None, shifted=shifted, triangle=triangle, arch=architecture(z.device)
    )
    blocks = constants["blocks"]
    num_panels = triton.cdiv(num_rows, blocks.block_m)
    num_means = 0 if mu is None else len(mu)
    splits = 1
    if triangle:
        tiles_per_panel = blocks.block_m // blocks.block_n
        splits = num_splits(num_panels, tiles_per_panel, parts, triton.cdiv(num_means, blocks.block_n))
    out = torch.zeros_like(a) if triangle else torch.empty_like(a)  # [N]
    with device_guard(z):
        contrast = Contrast(z, pointer(mu, z), a, pointer(b, a))
        hycon_lse_fwd_kernel[(num_panels * splits,)](
            contrast, temperature, out, num_rows, num_means, splits, part, parts, **constants, **options
        )
        if triangle:
            finish = (triton.cdiv(num_rows, VECTOR_BLOCK),)
            hycon_lse_finish_kernel[finish](out, temperature, num_rows, **finish_constants())
    return out


def hycon_panel_backward(
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
    """Gradients of `hycon_lse_forward` with respect to z and mu; no atomics, so equal calls are equal bit for bit.

    For D of which `_common.uses_waves` is false; `waves.hycon_lse_backward` takes any.

    With `own`, of the first `own` rows only: their whole gradient, as anchors and as columns of all N anchors, and
    their share of dmu, the sum over the anchors i < own. The work is proportional to own.

    Args:
        grad_lse: [N] float32, dL/dlse.
        lse: [N] float32, the forward's result.
        z, mu, a, b, temperature, shifted: as in the forward.
        own: 1 <= own <= N; None for all N.

    Returns:
        dz [own, D] in z's type and dmu [C, D] in mu's, or None without mu.
    """
    z, a = z.contiguous(), a.contiguous()
    mu, b = (None, None) if mu is None or b is None else (mu.contiguous(), b.contiguous())
    grad_lse, lse = grad_lse.contiguous(), lse.contiguous()
    num_rows, dim = z.shape
    own = num_rows if own is None else own
    constants, options = backward_constants(
        dim, z.dtype, has_mu=mu is not None, shifted=shifted, arch=architecture(z.device)
    )
    num_means = 0 if mu is None else len(mu)
    grad_max = torch.linalg.vector_norm(grad_lse, torch.inf) if constants["SCALED"] else temperature
    terms = torch.empty((2 if shifted else 3, num_rows + num_means), dtype=torch.float32, device=z.device)
    dz, dmu = torch.empty_like(z[:own]), None if mu is None else torch.empty_like(mu)
    block_m = constants["blocks"].block_m
    num_panels = triton.cdiv(own, block_m) + triton.cdiv(num_means, block_m)
    with device_guard(z):
        hycon_lse_terms_kernel[(triton.cdiv(num_rows + num_means, VECTOR_BLOCK),)](
            grad_lse, grad_max, lse, a, pointer(b, a), temperature, terms, num_rows, num_means,
            **terms_constants(constants),
        )  # fmt: skip
        hycon_lse_bwd_kernel[(num_panels,)](
            terms, grad_max, z, pointer(mu, z), temperature, dz, pointer(dmu, dz), num_rows, num_means,
            own, **constants, **options,
        )  # fmt: skip
    return dz, dmu
