"""What one program of HyCon's forward and backward computes: a panel of rows, with N x N work over all programs.

Formulas and tiling: the head of allnc.kernels.hycon.lse. Its kernels, like those of `loss` and
allnc.kernels.all_around, are made of these functions.

Legend: z [N, D] activations and mu [C, D] class means, unit rows; a panel is BLOCK_M rows of z or of mu, a tile its
product with BLOCK_N other rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from allnc.kernels._common import LOG2_E, Matrix, load_tile, matmul, narrow, similarity


class Contrast(NamedTuple):
    """What anchors are contrasted with; tensors at a launch, pointers in a kernel."""

    z: Any  # [N, D]
    mu: Any  # [C, D]
    a: Any  # [N] weights of the activations
    b: Any  # [C] weights of the means


@triton.jit
def add_tile(maximum, total, s, weight, scale, SHIFTED: tl.constexpr):
    """Adds a tile to the row sums [BLOCK_M]; returns maximum, sum and the tile's unweighted exponentials."""
    if SHIFTED:
        e = tl.exp2(s * scale - scale)
        total += tl.sum(e * weight[None, :], 1)
    else:
        # Columns of weight 0 must not set the maximum: they could hide all others.
        s += tl.where(weight > 0, 0.0, float("-inf"))[None, :]
        new_maximum = tl.maximum(maximum, tl.max(s, 1))
        # A row that has met no positive weight yet has maximum -inf: subtract 0 and not -inf - -inf = NaN.
        origin = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        e = tl.exp2((s - origin[:, None]) * scale)
        total = total * tl.exp2((maximum - origin) * scale) + tl.sum(e * weight[None, :], 1)
        maximum = new_maximum
    return maximum, total, e


@triton.jit
def first_item(residue, offset, step):
    """The least k >= 0 for which (offset + k) mod step = residue."""
    return (residue + step - offset % step) % step


@triton.jit
def forward_panel(
    program,
    contrast,
    sum_ptr,
    inverse_temperature,
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
    """One split of one panel of one part: its rows, and their sums relative to the maximum (unshifted) or to 1/τ.

    TRIANGLE: the column sums of its tiles are added to sum_ptr.
    """
    D: tl.constexpr = blocks.dim
    BLOCK_M: tl.constexpr = blocks.block_m
    BLOCK_N: tl.constexpr = blocks.block_n
    BLOCK_D: tl.constexpr = blocks.block_d
    panel = program // num_splits
    num_panels = tl.cdiv(N, BLOCK_M)
    TILES: tl.constexpr = BLOCK_M // BLOCK_N  # a panel is this many tiles wide
    mean_tiles = 0
    if HAS_MU:
        mean_tiles = tl.cdiv(C, BLOCK_N)
    if TRIANGLE:
        # With T even, the pairs at distance T/2 would be met from both ends: only the lower half visits them.
        num_longer = tl.where(num_panels % 2 == 0, num_panels // 2, 0)
        num_others = (num_panels - 1) // 2
        earlier = panel * (((num_others + 1) * TILES + mean_tiles) % num_parts) + tl.minimum(panel, num_longer) * TILES
        num_others += tl.where(panel < num_longer, 1, 0)
    else:
        num_others = num_panels - 1
        earlier = panel * ((num_panels * TILES + mean_tiles) % num_parts)
    # Tiles are dealt out to the parts one by one, on from panel to panel (`earlier` counts, mod num_parts, those of
    # the panels before), and a part's tiles of a panel to its splits.
    step = num_parts * num_splits
    residue = first_item(part, earlier, num_parts) + program % num_splits * num_parts

    z = Matrix(contrast.z, N)
    scale = inverse_temperature * LOG2_E
    start = panel * BLOCK_M
    rows = start + tl.arange(0, BLOCK_M)
    a_rows = tl.load(contrast.a + rows, mask=rows < N, other=0.0)
    x = 0.0
    if blocks.resident:
        x = load_tile(z, start, 0, D, BLOCK_M, BLOCK_D)
    maximum = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)

    for item in range(residue, TILES, step):
        first = start + item * BLOCK_N
        columns = first + tl.arange(0, BLOCK_N)
        y = 0.0
        if blocks.resident:
            y = load_tile(z, first, 0, D, BLOCK_N, BLOCK_D)
        s = similarity(z, z, start, first, x, y, blocks)
        s = tl.where(rows[:, None] != columns[None, :], s, float("-inf"))
        a_columns = tl.load(contrast.a + columns, mask=columns < N, other=0.0)
        maximum, total, _ = add_tile(maximum, total, s, a_columns, scale, SHIFTED)

    for item in range(first_item(residue, TILES, step), num_others * TILES, step):
        first = start + BLOCK_M + item * BLOCK_N
        first = tl.where(first >= num_panels * BLOCK_M, first - num_panels * BLOCK_M, first)
        columns = first + tl.arange(0, BLOCK_N)
        y = 0.0
        if blocks.resident:
            y = load_tile(z, first, 0, D, BLOCK_N, BLOCK_D)
        s = similarity(z, z, start, first, x, y, blocks)
        a_columns = tl.load(contrast.a + columns, mask=columns < N, other=0.0)
        maximum, total, e = add_tile(maximum, total, s, a_columns, scale, SHIFTED)
        if TRIANGLE:
            tl.atomic_add(sum_ptr + columns, tl.sum(e * a_rows[:, None], 0), mask=columns < N, sem="relaxed")

    if HAS_MU:
        mu = Matrix(contrast.mu, C)
        for item in range(first_item(residue, (num_others + 1) * TILES, step), mean_tiles, step):
            first = item * BLOCK_N
            columns = first + tl.arange(0, BLOCK_N)
            y = 0.0
            if blocks.resident:
                y = load_tile(mu, first, 0, D, BLOCK_N, BLOCK_D)
            s = similarity(z, mu, start, first, x, y, blocks)
            b_columns = tl.load(contrast.b + columns, mask=columns < C, other=0.0)
            maximum, total, _ = add_tile(maximum, total, s, b_columns, scale, SHIFTED)
    return rows, maximum, total


@triton.jit
def pair_terms(term_ptr, index, valid, num_terms, SHIFTED: tl.constexpr):
    """The terms of rows or columns; those past the end bring nothing."""
    u = tl.load(term_ptr + index, mask=valid, other=0.0)
    if SHIFTED:
        a = tl.load(term_ptr + num_terms + index, mask=valid, other=0.0)
        lse = u
    else:
        a = tl.load(term_ptr + num_terms + index, mask=valid, other=float("-inf"))
        lse = tl.load(term_ptr + 2 * num_terms + index, mask=valid, other=float("inf"))
    return u, a, lse


@triton.jit
def pair_coefficient(s, inverse_temperature, row_terms, column_terms, SHIFTED: tl.constexpr):
    """K = exp(S)(u_i a_j + u_j a_i).  # [BLOCK_M, BLOCK_N]"""
    row_u, row_a, row_lse = row_terms
    column_u, column_a, column_lse = column_terms
    if SHIFTED:
        scale = inverse_temperature * LOG2_E
        pair = row_u[:, None] * column_a[None, :] + column_u[None, :] * row_a[:, None]
        return tl.exp2(s * scale - scale) * pair
    # S - lse first, one rounding of a small number; and the weight in the exponent, because exp(S - lse)
    # alone may overflow where the weight is 0.
    of_row = (s * inverse_temperature - row_lse[:, None]) * LOG2_E + column_a[None, :]
    of_column = (s * inverse_temperature - column_lse[None, :]) * LOG2_E + row_a[:, None]
    return tl.exp2(of_row) * row_u[:, None] + tl.exp2(of_column) * column_u[None, :]


@triton.jit
def backward_panel(
    panel,
    term_ptr,
    z_ptr,
    mu_ptr,
    inverse_temperature,
    N,
    C,
    num_own,
    HAS_MU: tl.constexpr,
    SHIFTED: tl.constexpr,
    blocks: tl.constexpr,
):
    """Σ_j K_ij y_j [BLOCK_M, BLOCK_G] of a panel of the first num_own rows of z or, counted on from those, of μ.

    Returns it with the panel's first row, the number of rows of its side, and whether that side is μ.
    """
    D: tl.constexpr = blocks.dim
    BLOCK_M: tl.constexpr = blocks.block_m
    BLOCK_N: tl.constexpr = blocks.block_n
    BLOCK_D: tl.constexpr = blocks.block_d
    BLOCK_G: tl.constexpr = blocks.block_g
    PRECISION: tl.constexpr = blocks.precision
    own_panels = tl.cdiv(num_own, BLOCK_M)
    # A panel's diagonal is in TILES tiles, the ones from `base` on; the sizes divide each other.
    UNIT: tl.constexpr = BLOCK_M if BLOCK_M > BLOCK_N else BLOCK_N
    TILES: tl.constexpr = UNIT // BLOCK_N
    of_mean = panel >= own_panels
    x_ptr = z_ptr
    num_x = num_own
    num_y = N
    num_means = C
    num_diagonal = TILES
    num_terms = N
    x_first = 0
    if HAS_MU:
        num_terms = N + C
        if of_mean:  # a panel of μ: against the own rows of z, no diagonal, no other means
            x_ptr = mu_ptr
            num_x = C
            num_y = num_own
            num_means = 0
            panel -= own_panels
            num_diagonal = 0
            x_first = N
    x = Matrix(x_ptr, num_x)
    z = Matrix(z_ptr, N)
    y = Matrix(z_ptr, num_y)

    start = panel * BLOCK_M
    base = start
    if BLOCK_N > BLOCK_M:
        base = start // UNIT * UNIT
    rows = start + tl.arange(0, BLOCK_M)
    row_terms = pair_terms(term_ptr, x_first + rows, rows < num_x, num_terms, SHIFTED)
    x_panel = 0.0
    if blocks.resident:
        x_panel = load_tile(x, start, 0, D, BLOCK_M, BLOCK_D)
    dx = tl.zeros([BLOCK_M, BLOCK_G], dtype=tl.float32)

    for tile in range(num_diagonal):
        first = base + tile * BLOCK_N
        columns = first + tl.arange(0, BLOCK_N)
        y_tile = load_tile(z, first, 0, D, BLOCK_N, BLOCK_G)
        s = similarity(x, z, start, first, x_panel, y_tile, blocks)
        s = tl.where(rows[:, None] != columns[None, :], s, float("-inf"))
        column_terms = pair_terms(term_ptr, columns, columns < N, num_terms, SHIFTED)
        k = pair_coefficient(s, inverse_temperature, row_terms, column_terms, SHIFTED)
        dx = matmul(narrow(k, y_tile.dtype), y_tile, dx, PRECISION)

    # A panel of z starts behind its diagonal; a panel of μ visits all of its z from the first.
    origin = tl.where(of_mean, 0, base + UNIT)
    num_units = tl.cdiv(num_y, UNIT)
    num_others = num_units - tl.where(of_mean, 0, 1)
    for item in range(num_others * TILES):
        first = origin + item * BLOCK_N
        first = tl.where(first >= num_units * UNIT, first - num_units * UNIT, first)
        columns = first + tl.arange(0, BLOCK_N)
        y_tile = load_tile(y, first, 0, D, BLOCK_N, BLOCK_G)
        s = similarity(x, y, start, first, x_panel, y_tile, blocks)
        column_terms = pair_terms(term_ptr, columns, columns < num_y, num_terms, SHIFTED)
        k = pair_coefficient(s, inverse_temperature, row_terms, column_terms, SHIFTED)
        dx = matmul(narrow(k, y_tile.dtype), y_tile, dx, PRECISION)

    if HAS_MU:
        mu = Matrix(mu_ptr, C)
        for first in range(0, num_means, BLOCK_N):
            columns = first + tl.arange(0, BLOCK_N)
            y_tile = load_tile(mu, first, 0, D, BLOCK_N, BLOCK_G)
            s = similarity(z, mu, start, first, x_panel, y_tile, blocks)
            column_terms = pair_terms(term_ptr, N + columns, columns < C, num_terms, SHIFTED)
            k = pair_coefficient(s, inverse_temperature, row_terms, column_terms, SHIFTED)
            dx = matmul(narrow(k, y_tile.dtype), y_tile, dx, PRECISION)
    return dx, start, num_x, of_mean
