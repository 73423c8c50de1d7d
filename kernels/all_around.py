"""HyCon's log-sum-exp and P2P's three blocks in one launch.

P2P compares classes pair by pair. For X = unit(M - mean M) and Y = unit(W - mean W) over the K classes seen
so far, and each of the blocks (X, X), (Y, Y), (X, Y) with Gram matrix G = X Y^T,

    etf:      (1/K²) Σ_{c,c'} (G_cc' - ρ_cc')²,  ρ_cc = 1, ρ_cc' = -1/(K-1)
    softmax:  (τ_p/K) Σ_c log Σ_{c'≠c} exp( (G_cc' - [X, Y only] G_cc) / τ_p )

Legend: N activations, C classes, D columns of the projection, F columns of the features; z [N, D], μ [C, D],
x and y [C, F] with zero rows for classes not seen.

Launch grid: first the programs of HyCon's forward (allnc.kernels.hycon), which are the long ones, then
3 · ceil(C / BLOCK_C) panels of P2P, block kind by program id. A panel of BLOCK_C classes visits all classes
in tiles of BLOCK_C, each summed over chunks of BLOCK_F columns, and writes one value a class, [3, C]: no
atomics. Its work is 6 C² F operations beside HyCon's N² D + 2 N C D; the symmetry of (X, X) and (Y, Y) is not
used.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from allnc.kernels._common import (
    LN_2,
    LOG2_E,
    architecture,
    device_guard,
    matmul_precision,
    pointer,
    similarity,
)
from allnc.kernels.hycon import finish_triangle, forward_constants, forward_panel, num_splits

_SEEN_BLOCK = tl.constexpr(1024)
_RESIDENT = tl.constexpr(False)  # F is long: P2P's Gram matrix is summed over chunks


@triton.jit
def p2p_panel(
    program,
    x_ptr,
    y_ptr,
    seen_ptr,
    value_ptr,
    C,
    p2p_temperature,
    F: tl.constexpr,
    ETF: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """One panel of one block: the value of each of its classes, divided by K² (etf) or K (softmax)."""
    num_panels = tl.cdiv(C, BLOCK_C)
    kind = program // num_panels  # 0 is (X, X), 1 is (Y, Y), 2 is (X, Y)
    start = program % num_panels * BLOCK_C
    left_ptr = x_ptr
    if kind == 1:
        left_ptr = y_ptr
    right_ptr = y_ptr
    if kind == 0:
        right_ptr = x_ptr

    count = tl.zeros([_SEEN_BLOCK], dtype=tl.float32)
    for first in range(0, C, _SEEN_BLOCK):
        index = first + tl.arange(0, _SEEN_BLOCK)
        count += tl.load(seen_ptr + index, mask=index < C, other=0).to(tl.float32)
    num_seen = tl.sum(count, 0)
    num_others = tl.maximum(num_seen, 1.0) - 1.0
    target = -1.0 / tl.maximum(num_others, 1.0)
    scale = 1.0 / p2p_temperature * LOG2_E

    rows = start + tl.arange(0, BLOCK_C)
    # A single class has no pair: no row counts then, and the value is 0.
    in_rows = tl.load(seen_ptr + rows, mask=rows < tl.where(num_others > 0, C, 0), other=0) != 0
    total = tl.zeros([BLOCK_C], dtype=tl.float32)
    maximum = tl.full([BLOCK_C], float("-inf"), dtype=tl.float32)
    own = tl.zeros([BLOCK_C], dtype=tl.float32)
    for first in range(0, C, BLOCK_C):
        columns = first + tl.arange(0, BLOCK_C)
        in_columns = tl.load(seen_ptr + columns, mask=columns < C, other=0) != 0
        gram = similarity(
            0.0, 0.0, left_ptr, right_ptr, start, first, C, C,
            F, BLOCK_C, BLOCK_C, BLOCK_F, _RESIDENT, PRECISION,
        )  # fmt: skip
        same = rows[:, None] == columns[None, :]
        pairs = in_rows[:, None] & in_columns[None, :]
        if ETF:
            deviation = tl.where(pairs, gram - tl.where(same, 1.0, target), 0.0)
            total += tl.sum(deviation * deviation, 1)
        else:
            own += tl.sum(tl.where(same, gram, 0.0), 1)
            exponent = tl.where(pairs & (same == 0), gram * scale, float("-inf"))
            new_maximum = tl.maximum(maximum, tl.max(exponent, 1))
            origin = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
            total = total * tl.exp2(maximum - origin) + tl.sum(tl.exp2(exponent - origin[:, None]), 1)
            maximum = new_maximum

    if ETF:
        value = total / (num_seen * num_seen)
    else:
        lse = (tl.log2(total) + maximum) * LN_2
        own = tl.where(kind == 2, own, 0.0)
        value = (p2p_temperature * lse - own) / num_seen
    value = tl.where(in_rows, value, 0.0)
    tl.store(value_ptr + tl.cast(kind, tl.int64) * C + rows, value, mask=rows < C)


@triton.jit(do_not_specialize=["N", "C", "num_splits", "num_programs", "num_means"])
def all_around_fwd_kernel(
    z_ptr,
    mu_ptr,
    a_ptr,
    b_ptr,
    temperature_ptr,
    out_ptr,
    x_ptr,
    y_ptr,
    seen_ptr,
    value_ptr,
    N,
    C,
    num_means,
    num_splits,
    num_programs,
    p2p_temperature,
    D: tl.constexpr,
    HAS_MU: tl.constexpr,
    SHIFTED: tl.constexpr,
    TRIANGLE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    RESIDENT: tl.constexpr,
    F: tl.constexpr,
    ETF: tl.constexpr,
    P2P_PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    program = tl.program_id(0)
    if program < num_programs:
        forward_panel(
            program, z_ptr, mu_ptr, a_ptr, b_ptr, temperature_ptr, out_ptr, N, num_means, num_splits,
            D, HAS_MU, SHIFTED, TRIANGLE, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D, RESIDENT,
        )  # fmt: skip
    else:
        p2p_panel(
            program - num_programs, x_ptr, y_ptr, seen_ptr, value_ptr, C, p2p_temperature,
            F, ETF, P2P_PRECISION, BLOCK_C, BLOCK_F,
        )  # fmt: skip


def all_around_constants(
    dim: int,
    dtype: torch.dtype,
    features: int,
    p2p_dtype: torch.dtype,
    *,
    has_mu: bool,
    shifted: bool,
    triangle: bool,
    arch: int,
    target: Literal["etf", "softmax"],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Compile-time arguments and launch options of `all_around_fwd_kernel`.

    P2P's tiles are 64 x 64 over chunks of 16 columns: with the warps and stages of HyCon's tiles, whose launch it
    shares, they need no more registers and shared memory than those (chunks of 32 spill on sm_100).
    """
    constants, options = forward_constants(dim, dtype, has_mu=has_mu, shifted=shifted, triangle=triangle, arch=arch)
    constants |= {
        "F": features,
        "ETF": target == "etf",
        "P2P_PRECISION": matmul_precision(p2p_dtype),
        "BLOCK_C": 64,
        "BLOCK_F": 16,
    }
    return constants, options


def all_around_forward(
    z: Tensor,
    mu: Tensor | None,
    a: Tensor,
    b: Tensor | None,
    temperature: Tensor,
    x: Tensor,
    y: Tensor,
    seen: Tensor,
    *,
    shifted: bool,
    deterministic: bool,
    target: Literal["etf", "softmax"],
    p2p_temperature: float,
) -> tuple[Tensor, Tensor]:
    """lse [N] of HyCon and the row values [3, C] of P2P's blocks (x, x), (y, y), (x, y), in one launch.

    Args:
        z, mu, a, b, temperature, shifted, deterministic: as in `allnc.kernels.hycon.hycon_lse_forward`.
        x: [C, F] float16, bfloat16 or float32 centred unit rows of the means; zero rows for classes not
            seen.
        y: [C, F] the same of the classifier, in x's type.
        seen: [C] bool.
        target: "etf" for the squared distance to the simplex ETF, "softmax" for the separating form.
        p2p_temperature: τ_p > 0 of the separating form.

    Returns:
        lse [N] and the row values [3, C], both float32. A block's P2P is the sum of its row values, which are 0 for
        classes not seen, and all 0 with fewer than two classes seen.
    """
    z, a, x, y, seen = z.contiguous(), a.contiguous(), x.contiguous(), y.contiguous(), seen.contiguous()
    mu, b = (None, None) if mu is None or b is None else (mu.contiguous(), b.contiguous())
    num_rows, dim = z.shape
    num_classes, features = x.shape
    triangle = shifted and not deterministic
    constants, options = all_around_constants(
        dim,
        z.dtype,
        features,
        x.dtype,
        has_mu=mu is not None,
        shifted=shifted,
        triangle=triangle,
        arch=architecture(z.device),
        target=target,
    )
    num_panels = triton.cdiv(num_rows, constants["BLOCK_M"])
    splits = num_splits(num_panels, constants["BLOCK_M"] // constants["BLOCK_N"]) if triangle else 1
    num_programs = num_panels * splits
    grid = (num_programs + 3 * triton.cdiv(num_classes, constants["BLOCK_C"]),)
    lse = torch.zeros_like(a) if triangle else torch.empty_like(a)  # [N]
    values = torch.empty((3, num_classes), dtype=torch.float32, device=z.device)  # [3, C]
    with device_guard(z):
        all_around_fwd_kernel[grid](
            z, pointer(mu, z), a, pointer(b, a), temperature, lse, x, y, seen, values,
            num_rows, num_classes, 0 if mu is None else len(mu), splits, num_programs, p2p_temperature,
            **constants, **options,
        )  # fmt: skip
        if triangle:
            finish_triangle(lse, temperature)
    return lse, values
