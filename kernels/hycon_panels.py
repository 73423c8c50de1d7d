"""HyCon's panels: what one program of the forward and of the backward computes, with N x N work.

Formulas, legend and tiling: the head of allnc.kernels.hycon, whose kernels, like those of hycon_loss and all_around,
are made of these functions.
"""

from __future__ import annotations

import triton
import triton.language as tl

from allnc.kernels._common import LOG2_E, load_tile, matmul, narrow, similarity


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
def forward_sums(
    program,
    z_ptr,
    mu_ptr,
    a_ptr,
    b_ptr,
    temperature_ptr,
    out_ptr,
    N,
    C,
    num_splits,
    part,
    parts,
    D: tl.constexpr,
    HAS_MU: tl.constexpr,
    SHIFTED: tl.constexpr,
    TRIANGLE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    RESIDENT: tl.constexpr,
):
    """One split of one panel of one part: its row sums [BLOCK_M], relative to the maximum (unshifted) or to 1/τ.

    TRIANGLE: the column sums of its tiles are added to out_ptr.
    """
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
        earlier = panel * (((num_others + 1) * TILES + mean_tiles) % parts) + tl.minimum(panel, num_longer) * TILES
        num_others += tl.where(panel < num_longer, 1, 0)
    else:
        num_others = num_panels - 1
        earlier = panel * ((num_panels * TILES + mean_tiles) % parts)
    # Tiles are dealt out to the parts one by one, on from panel to panel (`earlier` counts, mod parts, those of the
    # panels before), and a part's tiles of a panel to its splits.
    step = parts * num_splits
    residue = first_item(part, earlier, parts) + program % num_splits * parts

    scale = LOG2_E / tl.load(temperature_ptr)
    start = panel * BLOCK_M
    rows = start + tl.arange(0, BLOCK_M)
    a_rows = tl.load(a_ptr + rows, mask=rows < N, other=0.0)
    x = 0.0
    if RESIDENT:
        x = load_tile(z_ptr, start, N, 0, D, BLOCK_M, BLOCK_D)
    maximum = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)

    for item in range(residue, TILES, step):
        first = start + item * BLOCK_N
        columns = first + tl.arange(0, BLOCK_N)
        y = 0.0
        if RESIDENT:
            y = load_tile(z_ptr, first, N, 0, D, BLOCK_N, BLOCK_D)
        s = similarity(x, y, z_ptr, z_ptr, start, first, N, N, D, BLOCK_M, BLOCK_N, BLOCK_D, RESIDENT, PRECISION)
        s = tl.where(rows[:, None] != columns[None, :], s, float("-inf"))
        a_columns = tl.load(a_ptr + columns, mask=columns < N, other=0.0)
        maximum, total, _ = add_tile(maximum, total, s, a_columns, scale, SHIFTED)

    for item in range(first_item(residue, TILES, step), num_others * TILES, step):
        first = start + BLOCK_M + item * BLOCK_N
        first = tl.where(first >= num_panels * BLOCK_M, first - num_panels * BLOCK_M, first)
        columns = first + tl.arange(0, BLOCK_N)
        y = 0.0
        if RESIDENT:
            y = load_tile(z_ptr, first, N, 0, D, BLOCK_N, BLOCK_D)
        s = similarity(x, y, z_ptr, z_ptr, start, first, N, N, D, BLOCK_M, BLOCK_N, BLOCK_D, RESIDENT, PRECISION)
        a_columns = tl.load(a_ptr + columns, mask=columns < N, other=0.0)
        maximum, total, e = add_tile(maximum, total, s, a_columns, scale, SHIFTED)
        if TRIANGLE:
            tl.atomic_add(out_ptr + columns, tl.sum(e * a_rows[:, None], 0), mask=columns < N, sem="relaxed")

    if HAS_MU:
        for item in range(first_item(residue, (num_others + 1) * TILES, step), mean_tiles, step):
            first = item * BLOCK_N
            columns = first + tl.arange(0, BLOCK_N)
            y = 0.0
            if RESIDENT:
                y = load_tile(mu_ptr, first, C, 0, D, BLOCK_N, BLOCK_D)
            s = similarity(x, y, z_ptr, mu_ptr, start, first, N, C, D, BLOCK_M, BLOCK_N, BLOCK_D, RESIDENT, PRECISION)
            b_columns = tl.load(b_ptr + columns, mask=columns < C, other=0.0)
            maximum, total, _ = add_tile(maximum, total, s, b_columns, scale, SHIFTED)
    return rows, maximum, total


@triton.jit
def pair_terms(u_ptr, term_ptr, index, valid, num_terms, SHIFTED: tl.constexpr):
    """The terms of rows or columns; those past the end bring nothing."""
    u = tl.load(u_ptr + index, mask=valid, other=0.0)
    if SHIFTED:
        a = tl.load(term_ptr + num_terms + index, mask=valid, other=0.0)
        lse = u
    else:
        a = tl.load(term_ptr + num_terms + index, mask=valid, other=float("-inf"))
        lse = tl.load(term_ptr + 2 * num_terms + index, mask=valid, other=float("inf"))
    return u, a, lse


@triton.jit
def pair_coefficient(
    s, inverse_temperature, row_u, row_a, row_lse, column_u, column_a, column_lse, SHIFTED: tl.constexpr
):
    """K [BLOCK_M, BLOCK_N] = exp(S)(u_i a_j + u_j a_i)."""
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
    u_ptr,
    term_ptr,
    z_ptr,
    mu_ptr,
    temperature_ptr,
    N,
    C,
    own,
    D: tl.constexpr,
    HAS_MU: tl.constexpr,
    SHIFTED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_G: tl.constexpr,
    RESIDENT: tl.constexpr,
):
    """Σ_j K_ij y_j [BLOCK_M, BLOCK_G] of a panel of the own rows or, counted on from those, of μ."""
    num_own = tl.cdiv(own, BLOCK_M)
    # A panel's diagonal is in TILES tiles, the ones from `base` on; the sizes divide each other.
    UNIT: tl.constexpr = BLOCK_M if BLOCK_M > BLOCK_N else BLOCK_N
    TILES: tl.constexpr = UNIT // BLOCK_N
    of_mean = panel >= num_own
    x_ptr = z_ptr
    num_x = own
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
            num_y = own
            num_means = 0
            panel -= num_own
            num_diagonal = 0
            x_first = N

    inverse_temperature = 1.0 / tl.load(temperature_ptr)
    start = panel * BLOCK_M
    base = start
    if BLOCK_N > BLOCK_M:
        base = start // UNIT * UNIT
    rows = start + tl.arange(0, BLOCK_M)
    row_u, row_a, row_lse = pair_terms(u_ptr, term_ptr, x_first + rows, rows < num_x, num_terms, SHIFTED)
    x = 0.0
    if RESIDENT:
        x = load_tile(x_ptr, start, num_x, 0, D, BLOCK_M, BLOCK_D)
    dx = tl.zeros([BLOCK_M, BLOCK_G], dtype=tl.float32)

    for tile in range(num_diagonal):
        first = base + tile * BLOCK_N
        columns = first + tl.arange(0, BLOCK_N)
        y = load_tile(z_ptr, first, N, 0, D, BLOCK_N, BLOCK_G)
        s = similarity(x, y, x_ptr, z_ptr, start, first, num_x, N, D, BLOCK_M, BLOCK_N, BLOCK_D, RESIDENT, PRECISION)
        s = tl.where(rows[:, None] != columns[None, :], s, float("-inf"))
        u, a, lse = pair_terms(u_ptr, term_ptr, columns, columns < N, num_terms, SHIFTED)
        k = pair_coefficient(s, inverse_temperature, row_u, row_a, row_lse, u, a, lse, SHIFTED)
        dx = matmul(narrow(k, y.dtype), y, dx, PRECISION)

    # A panel of z starts behind its diagonal; a panel of μ visits all of its z from the first.
    origin = tl.where(of_mean, 0, base + UNIT)
    num_units = tl.cdiv(num_y, UNIT)
    num_others = num_units - tl.where(of_mean, 0, 1)
    for item in range(num_others * TILES):
        first = origin + item * BLOCK_N
        first = tl.where(first >= num_units * UNIT, first - num_units * UNIT, first)
        columns = first + tl.arange(0, BLOCK_N)
        y = load_tile(z_ptr, first, num_y, 0, D, BLOCK_N, BLOCK_G)
        s = similarity(
            x, y, x_ptr, z_ptr, start, first, num_x, num_y,
            D, BLOCK_M, BLOCK_N, BLOCK_D, RESIDENT, PRECISION,
        )  # fmt: skip
        u, a, lse = pair_terms(u_ptr, term_ptr, columns, columns < num_y, num_terms, SHIFTED)
        k = pair_coefficient(s, inverse_temperature, row_u, row_a, row_lse, u, a, lse, SHIFTED)
        dx = matmul(narrow(k, y.dtype), y, dx, PRECISION)

    if HAS_MU:
        for first in range(0, num_means, BLOCK_N):
            columns = first + tl.arange(0, BLOCK_N)
            y = load_tile(mu_ptr, first, C, 0, D, BLOCK_N, BLOCK_G)
            s = similarity(x, y, z_ptr, mu_ptr, start, first, N, C, D, BLOCK_M, BLOCK_N, BLOCK_D, RESIDENT, PRECISION)
            u, b, lse = pair_terms(u_ptr, term_ptr, N + columns, columns < C, num_terms, SHIFTED)
            k = pair_coefficient(s, inverse_temperature, row_u, row_a, row_lse, u, b, lse, SHIFTED)
            dx = matmul(narrow(k, y.dtype), y, dx, PRECISION)
    return dx, start, num_x, of_mean


@triton.jit
def store_tile(pointer, x, start, num_rows, column, D: tl.constexpr):
    """Writes x [ROWS, COLUMNS], narrowed, to rows from `start` and columns from `column` of a [num_rows, D] matrix."""
    rows = tl.arange(0, x.shape[0])
    columns = column + tl.arange(0, x.shape[1])
    mask = (start + rows < num_rows)[:, None] & (columns < D)[None, :]
    origin = pointer + tl.cast(start, tl.int64) * D
    tl.store(origin + (rows[:, None] * D + columns[None, :]), narrow(x, pointer.dtype.element_ty), mask=mask)
