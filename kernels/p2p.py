"""P2P's Gram work: values and gradients of its three blocks, without a C x C matrix.

P2P compares classes pair by pair. For X and Y, the centred unit rows of the K classes seen (zero rows for the
others), and each of the blocks (X, X), (Y, Y), (X, Y) with G the product of the left side and the right side's
transpose,

    etf:      (1/K²) Σ_{c,c'} (G_cc' - ρ_cc')²,  ρ_cc = 1, ρ_cc' = -1/(K-1)
    softmax:  (τ/K) Σ_c (l_c - [X, Y only] G_cc / τ),  l_c = log Σ_{c'≠c} exp(G_cc' / τ)

and with g dL/dvalue of a block,

    dX = A X + B Y,  dY = A' Y + Bᵀ X
    etf:      A = (4g/K²) (G - ρ) of block (X, X), A' the same of (Y, Y), B = (2g/K²) (G - ρ) of (X, Y)
    softmax:  A_cc' = (g/K) (exp(G_cc'/τ - l_c) + exp(G_cc'/τ - l_c')), A_cc = 0,
              B_cc' = (g/K) exp(G_cc'/τ - l_c), B_cc = -g/K.

With K < 2 there is no pair: values and gradients are 0.

Legend: C classes, F columns; a panel is BLOCK_C consecutive classes of the left side, T panels, a tile is a panel's
product with the rows of a panel of the other side, summed over chunks of columns.

Forward grid, etf: one program a tile, which writes the tile's sum. (X, X) and (Y, Y) are symmetric: panel p meets
panels p, p + 1, ..., p + T/2, round the end, and tiles off the diagonal count twice: T (T + 1) tiles for both
and T² for (X, Y), 4 C²F operations instead of 6 C²F. Softmax: one program a panel and block, all tiles. Using the
symmetry there means column sums in memory by atomics and one more launch to take their logarithm, to save a third
of the forward, which is a sixth of forward and backward together: it does not pay. Either way no atomics: a second
launch of one program a block adds what the programs wrote in a fixed order.

Backward grid: (panels of X, then of Y; chunks of BLOCK_G columns). A program forms BLOCK_G columns of the gradient of
one panel of one side: the rows of its own block times its own matrix, and of (X, Y) times the other. G is computed
again for every chunk: 8 C²F (F / BLOCK_G + 1) operations. Which block gives what is a scale read from g, so that the
host never waits.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from allnc.kernels._common import (
    LN_2,
    LOG2_E,
    Blocks,
    Matrix,
    device_guard,
    exact_float32,
    launch_options,
    load_tile,
    matmul,
    matmul_precision,
    padded_dim,
    pointer,
    similarity,
    store_tile,
)

PairBlocks = Literal["own", "cross", "all"]

_SEEN_BLOCK = tl.constexpr(1024)
_PARTIAL_BLOCK = 1024


class Classes(NamedTuple):
    """Both sides and the classes seen; tensors at a launch, pointers in a kernel."""

    x: Any  # [C, F] float32
    y: Any  # [C, F] float32
    seen: Any  # [C] bool


@triton.jit
def count_seen(seen_ptr, C):
    """K as float32."""
    count = tl.zeros([_SEEN_BLOCK], dtype=tl.float32)
    for first in range(0, C, _SEEN_BLOCK):
        index = first + tl.arange(0, _SEEN_BLOCK)
        count += tl.load(seen_ptr + index, mask=index < C, other=0).to(tl.float32)
    return tl.sum(count, 0)


@triton.jit
def etf_tile(tile, kind, left, right, seen_ptr, C, blocks: tl.constexpr):
    """Σ (G - ρ)² over one tile, twice where its mirror image is not visited."""
    BLOCK_C: tl.constexpr = blocks.block_m
    num_panels = tl.cdiv(C, BLOCK_C)
    panel = tile % num_panels
    distance = tile // num_panels
    start = panel * BLOCK_C
    first = (panel + distance) % num_panels * BLOCK_C
    rows = start + tl.arange(0, BLOCK_C)
    columns = first + tl.arange(0, BLOCK_C)
    num_seen = count_seen(seen_ptr, C)
    # A single class has no pair: no row counts then.
    in_rows = tl.load(seen_ptr + rows, mask=rows < tl.where(num_seen >= 2, C, 0), other=0) != 0
    in_columns = tl.load(seen_ptr + columns, mask=columns < C, other=0) != 0
    gram = similarity(left, right, start, first, 0.0, 0.0, blocks)
    rho = tl.where(rows[:, None] == columns[None, :], 1.0, -1.0 / tl.maximum(num_seen - 1.0, 1.0))
    deviation = tl.where(in_rows[:, None] & in_columns[None, :], gram - rho, 0.0)
    mirrored = (kind < 2) & (distance > 0)
    # At once: summed axis by axis, Triton 3.6 fails to compile it for sm_100.
    return tl.sum(deviation * deviation) * tl.where(mirrored, 2.0, 1.0)


@triton.jit
def softmax_panel(panel, kind, left, right, seen_ptr, lse_ptr, C, temperature, blocks: tl.constexpr):
    """Σ (τ l_c - [X, Y only] G_cc) over one panel; writes its l, and inf for classes without a share in the value."""
    BLOCK_C: tl.constexpr = blocks.block_m
    start = panel * BLOCK_C
    rows = start + tl.arange(0, BLOCK_C)
    num_seen = count_seen(seen_ptr, C)
    in_rows = tl.load(seen_ptr + rows, mask=rows < tl.where(num_seen >= 2, C, 0), other=0) != 0
    scale = 1.0 / temperature * LOG2_E
    total = tl.zeros([BLOCK_C], dtype=tl.float32)
    maximum = tl.full([BLOCK_C], float("-inf"), dtype=tl.float32)
    own = tl.zeros([BLOCK_C], dtype=tl.float32)
    for first in range(0, C, BLOCK_C):
        columns = first + tl.arange(0, BLOCK_C)
        in_columns = tl.load(seen_ptr + columns, mask=columns < C, other=0) != 0
        gram = similarity(left, right, start, first, 0.0, 0.0, blocks)
        same = rows[:, None] == columns[None, :]
        own += tl.sum(tl.where(same, gram, 0.0), 1)
        pairs = in_rows[:, None] & in_columns[None, :] & (same == 0)
        exponent = tl.where(pairs, gram * scale, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(exponent, 1))
        origin = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        total = total * tl.exp2(maximum - origin) + tl.sum(tl.exp2(exponent - origin[:, None]), 1)
        maximum = new_maximum
    lse = tl.where(in_rows, (tl.log2(total) + maximum) * LN_2, float("inf"))
    tl.store(lse_ptr + rows, lse, mask=rows < C)
    value = temperature * lse - tl.where(kind == 2, own, 0.0)
    return tl.sum(tl.where(in_rows, value, 0.0), 0)


@triton.jit
def p2p_forward_program(
    program,
    classes,
    partial_ptr,
    lse_ptr,
    C,
    temperature,
    ETF: tl.constexpr,
    FIRST_KIND: tl.constexpr,
    blocks: tl.constexpr,
):
    """One tile (etf) or panel (softmax) of the blocks from FIRST_KIND on: 0 is (X, X), 1 is (Y, Y), 2 is (X, Y)."""
    BLOCK_C: tl.constexpr = blocks.block_m
    num_panels = tl.cdiv(C, BLOCK_C)
    num_own = num_panels  # programs of (X, X)
    if ETF:
        num_own = num_panels * (num_panels + 1) // 2
    index = program + FIRST_KIND * num_own
    kind = tl.minimum(index // num_own, 2)
    item = index - kind * num_own
    left_ptr = classes.x
    if kind == 1:
        left_ptr = classes.y
    right_ptr = classes.y
    if kind == 0:
        right_ptr = classes.x
    left = Matrix(left_ptr, C)
    right = Matrix(right_ptr, C)
    if ETF:
        value = etf_tile(item, kind, left, right, classes.seen, C, blocks)
    else:
        of_kind_ptr = lse_ptr + (kind - FIRST_KIND) * C
        value = softmax_panel(item, kind, left, right, classes.seen, of_kind_ptr, C, temperature, blocks)
    tl.store(partial_ptr + program, value)


@triton.jit
def p2p_finish_program(
    program,
    seen_ptr,
    partial_ptr,
    value_ptr,
    C,
    num_own,
    num_cross,
    ETF: tl.constexpr,
    FIRST_KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The value of one block: what its programs wrote, added in order, over K² (etf) or K (softmax)."""
    kind = program + FIRST_KIND
    count = tl.where(kind == 2, num_cross, num_own)
    block_ptr = partial_ptr + program * num_own  # the blocks before this one are (X, X) and (Y, Y)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for first in range(0, count, BLOCK):
        index = first + tl.arange(0, BLOCK)
        # Where other programs of this launch wrote it, it is read past the first-level cache.
        total += tl.load(block_ptr + index, mask=index < count, other=0.0, cache_modifier=".cg")
    divisor = tl.maximum(count_seen(seen_ptr, C), 1.0)
    if ETF:
        divisor *= divisor
    tl.store(value_ptr + program, tl.sum(total, 0) / divisor)


@triton.jit(do_not_specialize=["C", "temperature"])
def p2p_fwd_kernel(
    classes,
    partial_ptr,
    lse_ptr,
    C,
    temperature,
    ETF: tl.constexpr,
    FIRST_KIND: tl.constexpr,
    blocks: tl.constexpr,
):
    p2p_forward_program(tl.program_id(0), classes, partial_ptr, lse_ptr, C, temperature, ETF, FIRST_KIND, blocks)


@triton.jit(do_not_specialize=["C", "num_own", "num_cross"])
def p2p_finish_kernel(
    seen_ptr,
    partial_ptr,
    value_ptr,
    C,
    num_own,
    num_cross,
    ETF: tl.constexpr,
    FIRST_KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    p2p_finish_program(
        tl.program_id(0), seen_ptr, partial_ptr, value_ptr, C, num_own, num_cross, ETF, FIRST_KIND, BLOCK
    )


@triton.jit
def add_block(
    dx,
    left,
    right,
    lse_ptr,
    grad,
    temperature,
    start,
    column,
    of_right,
    num_seen,
    C,
    ETF: tl.constexpr,
    OWN: tl.constexpr,
    blocks: tl.constexpr,
):
    """dx [BLOCK_C, BLOCK_G] plus the rows of A or A' (OWN), B or, if of_right, Bᵀ, times the right side's rows."""
    F: tl.constexpr = blocks.dim
    BLOCK_C: tl.constexpr = blocks.block_m
    BLOCK_N: tl.constexpr = blocks.block_n
    BLOCK_G: tl.constexpr = blocks.block_g
    PRECISION: tl.constexpr = blocks.precision
    rows = start + tl.arange(0, BLOCK_C)
    weight = grad / num_seen
    if ETF:
        weight *= 2.0 / num_seen
        if OWN:
            weight *= 2.0
        row_lse = 0.0
    else:
        row_lse = tl.load(lse_ptr + rows, mask=rows < C, other=float("inf"))
    rho = -1.0 / tl.maximum(num_seen - 1.0, 1.0)
    inverse_temperature = 1.0 / temperature
    for first in range(0, C, BLOCK_N):
        columns = first + tl.arange(0, BLOCK_N)
        gram = similarity(left, right, start, first, 0.0, 0.0, blocks)
        same = rows[:, None] == columns[None, :]
        if ETF:
            k = gram - tl.where(same, 1.0, rho)  # columns of classes not seen meet zero rows below
        else:
            lse = tl.load(lse_ptr + columns, mask=columns < C, other=float("inf"))
            # exp(0 - l) of a class not seen may overflow, and inf times its zero row is NaN.
            exponent = gram * inverse_temperature + tl.where(lse < float("inf"), 0.0, float("-inf"))[None, :]
            if OWN:
                of_row = tl.exp2((exponent - row_lse[:, None]) * LOG2_E)
                of_column = tl.exp2((exponent - lse[None, :]) * LOG2_E)
                k = tl.where(same, 0.0, of_row + of_column)
            else:
                origin = tl.where(of_right, lse[None, :], row_lse[:, None])
                k = tl.where(same, -1.0, tl.exp2((exponent - origin) * LOG2_E))
        y = load_tile(right, first, column, F, BLOCK_N, BLOCK_G)
        dx = matmul(k * weight, y, dx, PRECISION)
    return dx


@triton.jit(do_not_specialize=["C", "temperature"])
def p2p_bwd_kernel(
    grad_ptr,
    lse_ptr,
    classes,
    dx_ptr,
    dy_ptr,
    C,
    temperature,
    ETF: tl.constexpr,
    OWN: tl.constexpr,
    CROSS: tl.constexpr,
    blocks: tl.constexpr,
):
    F: tl.constexpr = blocks.dim
    BLOCK_C: tl.constexpr = blocks.block_m
    BLOCK_G: tl.constexpr = blocks.block_g
    num_panels = tl.cdiv(C, BLOCK_C)
    side = tl.program_id(0) // num_panels  # 0 is X, 1 is Y
    start = tl.program_id(0) % num_panels * BLOCK_C
    column = tl.program_id(1) * BLOCK_G
    left_ptr = classes.x
    right_ptr = classes.y
    out_ptr = dx_ptr
    if side == 1:
        left_ptr = classes.y
        right_ptr = classes.x
        out_ptr = dy_ptr
    left = Matrix(left_ptr, C)
    right = Matrix(right_ptr, C)

    num_seen = count_seen(classes.seen, C)
    divisor = tl.maximum(num_seen, 1.0)
    dx = tl.zeros([BLOCK_C, BLOCK_G], dtype=tl.float32)
    if OWN:
        dx = add_block(
            dx, left, left, lse_ptr + side * C, tl.load(grad_ptr + side), temperature,
            start, column, False, divisor, C, ETF, True, blocks,
        )  # fmt: skip
    if CROSS:
        kind = 2 if OWN else 0  # the only one there, without the others
        dx = add_block(
            dx, left, right, lse_ptr + kind * C, tl.load(grad_ptr + kind), temperature,
            start, column, side == 1, divisor, C, ETF, False, blocks,
        )  # fmt: skip

    rows = tl.arange(0, BLOCK_C)
    in_rows = tl.load(classes.seen + start + rows, mask=rows < tl.where(num_seen >= 2, C - start, 0), other=0) != 0
    store_tile(Matrix(out_ptr, C), tl.where(in_rows[:, None], dx, 0.0), start, column, F)


def panel_rows(num_classes: int) -> int:
    """BLOCK_C of the forward: 64 fill the tensor cores; fewer while there would be fewer than four panels."""
    return min(64, max(16, triton.next_power_of_2(num_classes) // 4))


def p2p_forward_constants(
    num_classes: int, features: int, dtype: torch.dtype, *, target: str, blocks: PairBlocks
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Compile-time arguments and launch options of `p2p_fwd_kernel`.

    Exact products unroll into one FMA each: longer chunks would spill. The assembler is told not to spill for the
    sake of more programs an SM; two softmax programs have room all the same.
    """
    exact = exact_float32(dtype)
    constants = {
        "ETF": target == "etf",
        "FIRST_KIND": 2 if blocks == "cross" else 0,
        "blocks": forward_tiles(features, dtype, panel_rows(num_classes), 16 if exact else 32),
    }
    options = launch_options(num_warps=8, num_stages=3, alone=exact)
    if target == "softmax" and not exact:
        options["maxnreg"] = 128
    return constants, options


def forward_tiles(features: int, dtype: torch.dtype, rows: int, chunk: int) -> Blocks:
    """Square tiles of G, summed over chunks of at most `chunk` columns."""
    block_d = min(chunk, padded_dim(features))
    return Blocks(features, rows, rows, block_d, 0, resident=False, precision=matmul_precision(dtype))


def p2p_finish_constants(forward: dict[str, Any]) -> dict[str, Any]:
    """Compile-time arguments of `p2p_finish_kernel`, from those of the forward it ends."""
    return {name: forward[name] for name in ("ETF", "FIRST_KIND")} | {"BLOCK": _PARTIAL_BLOCK}


def p2p_backward_constants(
    num_classes: int, features: int, dtype: torch.dtype, *, target: str, blocks: PairBlocks
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Compile-time arguments and launch options of `p2p_bwd_kernel`.

    The accumulator BLOCK_C x BLOCK_G decides. 32 x 512 takes 64 registers of a thread and computes G once up to
    F = 512, where 64 x 256 in the same registers would compute it twice. Columns that need a mask take more
    registers and leave room for 256, and rows that 16 bytes do not divide for 128. The assembler
    is told not to spill a few registers for the sake of one more program an SM, as it would.
    """
    tiles = Blocks(
        features,
        block_m=min(32, panel_rows(num_classes)),
        block_n=32,
        block_d=min(32, padded_dim(features)),
        block_g=512 if features % 512 == 0 else min(256 if features % 4 == 0 else 128, padded_dim(features)),
        resident=False,
        precision=matmul_precision(dtype),
    )
    constants = {"ETF": target == "etf", "OWN": blocks != "cross", "CROSS": blocks != "own", "blocks": tiles}
    return constants, launch_options(num_warps=8, num_stages=2, alone=True)


def num_programs(num_classes: int, blocks: Blocks, *, etf: bool) -> tuple[int, int]:
    """Programs of the forward for (X, X) or (Y, Y), and for (X, Y)."""
    panels = triton.cdiv(num_classes, blocks.block_m)
    return (panels * (panels + 1) // 2, panels**2) if etf else (panels, panels)


def p2p_forward(
    x: Tensor,
    y: Tensor | None,
    seen: Tensor,
    *,
    target: Literal["etf", "softmax"],
    temperature: float,
    blocks: PairBlocks,
) -> tuple[Tensor, Tensor]:
    """Values of P2P's blocks and, for the softmax form, l of every class, in two launches.

    Args:
        x: [C, F] float32 centred unit rows; zero rows for classes not seen.
        y: [C, F], the same of the other side; None, with blocks="own" only, for x with itself.
        seen: [C] bool.
        target: "etf" for the squared distance to the simplex ETF, "softmax" for the separating form.
        temperature: τ > 0 of the separating form.
        blocks: "own" for (x, x), "cross" for (x, y), "all" for (x, x), (y, y), (x, y).

    Returns:
        values [B] of the B = 1 or 3 blocks, 0 with fewer than two classes seen, and l: [B, C], inf for classes not
        seen ("softmax"), or [B, 0] ("etf"). Both float32; equal calls are equal bit for bit.
    """
    x, y, seen = x.contiguous(), x if y is None else y.contiguous(), seen.contiguous()
    num_classes, features = x.shape
    constants, options = p2p_forward_constants(num_classes, features, x.dtype, target=target, blocks=blocks)
    num_own, num_cross = num_programs(num_classes, constants["blocks"], etf=constants["ETF"])
    programs = {"own": num_own, "cross": num_cross, "all": 2 * num_own + num_cross}[blocks]
    num_blocks = 3 if blocks == "all" else 1
    partial, values, lse = p2p_outputs(x, programs, num_blocks, target)
    with device_guard(x):
        p2p_fwd_kernel[(programs,)](Classes(x, y, seen), partial, lse, num_classes, temperature, **constants, **options)
        p2p_finish_kernel[(num_blocks,)](
            seen, partial, values, num_classes, num_own, num_cross, **p2p_finish_constants(constants)
        )
    return values, lse


def p2p_outputs(x: Tensor, programs: int, num_blocks: int, target: str) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for what a forward's programs write, for the values and for l, all float32."""
    options = {"dtype": torch.float32, "device": x.device}
    lse = torch.empty((num_blocks, len(x) if target == "softmax" else 0), **options)
    return torch.empty(programs, **options), torch.empty(num_blocks, **options), lse


def p2p_backward(
    grad: Tensor,
    lse: Tensor,
    x: Tensor,
    y: Tensor | None,
    seen: Tensor,
    *,
    target: Literal["etf", "softmax"],
    temperature: float,
    blocks: PairBlocks,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of `p2p_forward`'s values with respect to x and y in one launch, without atomics.

    Args:
        grad: [B] float32, the gradient of each block's value; read by the kernel, never by the host.
        lse: the forward's l.
        x, y, seen, target, temperature, blocks: as in the forward.

    Returns:
        dx and dy [C, F] float32, zero rows for classes not seen; dy is None where y is.
    """
    x, seen, grad = x.contiguous(), seen.contiguous(), grad.contiguous()
    other = x if y is None else y.contiguous()
    num_classes, features = x.shape
    constants, options = p2p_backward_constants(num_classes, features, x.dtype, target=target, blocks=blocks)
    dx, dy = torch.empty_like(x), None if y is None else torch.empty_like(other)
    tiles = constants["blocks"]
    panels = triton.cdiv(num_classes, tiles.block_m)
    grid = ((1 if dy is None else 2) * panels, triton.cdiv(features, tiles.block_g))
    with device_guard(x):
        p2p_bwd_kernel[grid](
            grad, lse, Classes(x, other, seen), dx, pointer(dy, dx), num_classes, temperature, **constants, **options
        )
    return dx, dy
