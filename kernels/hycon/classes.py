"""HyCon's work by classes, O(N D): what its kernels need to know of every row and every class, from the labels.

For a class c with rows j: n_c, s_c = Σ z_j, κ_c = mean_weight (0 where c has no mean), P_c = n_c - 1 + κ_c and

    μ_c = M_c / |M_c|                       b_c = 1 / (n_c + 1) (0 without a mean; balance "none": 1)
    a_j = 1 / (n_c + [c has a mean]) (balance "none": 1)
    q_j = 1 / (P_c τ), 0 unless P_c > 0     pos_j = q_j z_j·(s_c - z_j + κ_c μ_c)

and a = q = pos = 0 for rows that are ignored; a row takes part in the loss where q is not 0. Without a mean, and where
M_c is too short to have a direction, μ_c is 0 and |M_c| counts as infinite, which leaves M_c without gradient.

Legend: z [N, D] activations, M [C, D] class means, τ temperature; G is C, or N without means.

A class's program finds its rows, lists them, and adds them up; a second pass over them writes what each row needs.
Without sorted labels it compares all labels with its own, once to count (the labels below its own tell where its
list starts) and once to list; the lists come out as a stable sort would give them, so that sums are repeatable.
Without means a label may be any integer: program i then serves the class whose first row is i (in sorted order,
where sorted), if there is one. Programs at the grid's end clear the forward's sums and write the rows that are in no
class. Every element has one writer.

`state`, float32: the scalars τ and 1/W, then rows of N + C numbers, activations before means:
u, 0 for means | a and b | sum of exponentials and κ_c | q | pos and |M_c|
`rows`, z's type: z, 0 where rows are ignored, and behind it μ. What is ignored, or of a class without a mean, may hold
anything: times a weight of 0 a NaN would be a NaN, so that it must not reach the matrix products.
`index`, int32: class of each row, -1 for none [N]; counter of finished programs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from allnc.kernels._common import VECTOR_BLOCK, gather_tile, narrow, near_one, padded_dim

SCALARS = tl.constexpr(16)  # floats before the rows of `state`, so that they start 64 bytes in
STATE_ROWS = 5
_BELOW = tl.constexpr(False)
_UP_TO = tl.constexpr(True)


class Prepared(NamedTuple):
    """What the forward and the backward need to know; tensors at a launch, pointers in a kernel."""

    state: Any  # float32, laid out as the file's head says
    index: Any  # int32, likewise
    sums: Any  # [G, D] float32 class sums s_c
    rows: Any  # [N + C, D] in z's type; [N, D] without means


class Labels(NamedTuple):
    """Labels as they are, and what sorting made of them (unsorted: anything); at a launch, pointers in a kernel."""

    given: Any  # [N] int64
    ordered: Any  # [N] int64, in increasing order
    order: Any  # [N] int64, rows in that order


class StateRows(NamedTuple):
    """Pointers to the rows of `state`."""

    u: Any
    a: Any
    sum: Any
    q: Any
    pos: Any


@triton.jit
def state_rows(state_ptr, width):
    """The rows of `state`, each of N + C numbers."""
    first = state_ptr + SCALARS
    return StateRows(first, first + width, first + 2 * width, first + 3 * width, first + 4 * width)


@triton.jit
def mean_rows(prepared, N, D: tl.constexpr):
    """Pointer to μ, behind the N rows of z."""
    return prepared.rows + tl.cast(N, tl.int64) * D


@triton.jit
def unit_mean(means_ptr, offsets, mask):
    """M_c / |M_c| and |M_c|; 0 and infinity where M_c has no direction, or is masked."""
    mean = tl.load(means_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(mean), 0)
    factor, short = near_one(largest)
    scaled = mean * factor
    norm = tl.sqrt(tl.sum(scaled * scaled, 0))
    short = short & (norm == norm)  # the largest entry may have passed over a NaN
    return tl.where(short, 0.0, scaled / tl.where(short, 1.0, norm)), tl.where(short, float("inf"), norm / factor)


@triton.jit
def count_labels(ordered_ptr, label, N, UP_TO: tl.constexpr, BLOCK: tl.constexpr):
    """How many of the sorted labels [N] are < label (or <=): every round cuts the range to a BLOCK-th."""
    low = 0
    size = N
    while size > 0:
        stride = tl.cdiv(size, BLOCK)
        offsets = tl.arange(0, BLOCK) * stride + stride - 1
        probe = tl.load(ordered_ptr + low + offsets, mask=offsets < size, other=0)
        if UP_TO:
            below = probe <= label
        else:
            below = probe < label
        strides = tl.sum((below & (offsets < size)).to(tl.int32), 0)
        size = tl.minimum(stride - 1, size - strides * stride)
        low += strides * stride
    return low


@triton.jit
def find_class(program, labels, N, ignore_index, HAS_MU: tl.constexpr, SORTED: tl.constexpr, BLOCK: tl.constexpr):
    """Label, place of the first row in the list of all rows, and number of rows of this program's class."""
    label = tl.cast(program, tl.int64)
    first = 0
    if SORTED:
        if not HAS_MU:
            label = tl.load(labels.ordered + program)
        first = count_labels(labels.ordered, label, N, _BELOW, BLOCK)
        count = count_labels(labels.ordered, label, N, _UP_TO, BLOCK) - first
        if not HAS_MU:
            count = tl.where(first == program, count, 0)
    else:
        if not HAS_MU:
            label = tl.load(labels.given + program)
        smaller = tl.zeros([BLOCK], dtype=tl.int32)
        same = tl.zeros([BLOCK], dtype=tl.int32)
        earlier = tl.zeros([BLOCK], dtype=tl.int32)
        for start in range(0, N, BLOCK):
            rows = start + tl.arange(0, BLOCK)
            found = tl.load(labels.given + rows, mask=rows < N, other=0)
            used = (rows < N) & (found != ignore_index)
            smaller += (used & (found < label)).to(tl.int32)
            same += (used & (found == label)).to(tl.int32)
            if not HAS_MU:
                earlier += (used & (found == label) & (rows < program)).to(tl.int32)
        first = tl.sum(smaller, 0)
        count = tl.sum(same, 0)
        if not HAS_MU:
            count = tl.where(tl.sum(earlier, 0) == 0, count, 0)
    count = tl.where(label == ignore_index, 0, count)
    return label, first, count


@triton.jit
def list_rows(labels, order_ptr, label, first, count, N, SORTED: tl.constexpr, BLOCK: tl.constexpr):
    """Writes the rows of a class, in increasing order, to its places in the list of all rows."""
    if SORTED:
        for start in range(0, count, BLOCK):
            item = start + tl.arange(0, BLOCK)
            rows = tl.load(labels.order + first + item, mask=item < count, other=0)
            tl.store(order_ptr + first + item, rows.to(tl.int32), mask=item < count)
    else:
        place = first
        for start in range(0, tl.where(count > 0, N, 0), BLOCK):
            rows = start + tl.arange(0, BLOCK)
            found = tl.load(labels.given + rows, mask=rows < N, other=0)
            same = ((rows < N) & (found == label)).to(tl.int32)
            tl.store(order_ptr + place + tl.cumsum(same, 0) - 1, rows, mask=same != 0)
            place += tl.sum(same, 0)
    tl.debug_barrier()  # other threads of this program read the list


@triton.jit
def listed_rows(order_ptr, first, start, count, ROWS: tl.constexpr):
    """ROWS rows of a class from its `start`-th on, and which of them exist."""
    item = start + tl.arange(0, ROWS)
    valid = item < count
    return tl.load(order_ptr + first + item, mask=valid, other=0), valid


@triton.jit
def prepare_class(
    program,
    z_ptr,
    labels,
    means_ptr,
    seen_ptr,
    order_ptr,
    prepared,
    N,
    C,
    ignore_index,
    temperature,
    mean_weight,
    D: tl.constexpr,
    HAS_MU: tl.constexpr,
    HAS_SEEN: tl.constexpr,
    BALANCED: tl.constexpr,
    SORTED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One class: its sums, its mean, and its rows."""
    state = state_rows(prepared.state, N + C)
    label, first, count = find_class(program, labels, N, ignore_index, HAS_MU, SORTED, BLOCK)
    list_rows(labels, order_ptr, label, first, count, N, SORTED, BLOCK)

    size = count.to(tl.float32)
    has_mean = 0.0
    if HAS_MU:
        has_mean = 1.0
        if HAS_SEEN:
            has_mean = (tl.load(seen_ptr + program) != 0).to(tl.float32)
    kappa = mean_weight * has_mean
    num_positive = size - 1.0 + kappa
    q = tl.where(num_positive > 0, 1.0 / (num_positive * temperature), 0.0)

    columns = tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_R, BLOCK_D], dtype=tl.float32)
    for start in range(0, count, BLOCK_R):
        rows, valid = listed_rows(order_ptr, first, start, count, BLOCK_R)
        total += gather_tile(z_ptr, rows, valid, columns, D)
    positives = tl.sum(total, 0)  # [D]: s_c, and then s_c + κ_c μ_c
    own = tl.cast(program, tl.int64) * D + columns
    tl.store(prepared.sums + own, positives, mask=columns < D)

    a = 1.0
    if BALANCED:
        a = 1.0 / tl.maximum(size + has_mean, 1.0)
    if HAS_MU:
        width = D
        if HAS_SEEN:
            width = tl.where(has_mean > 0, D, 0)
        mu, norm = unit_mean(means_ptr, own, columns < width)
        of_mean = mean_rows(prepared, N, D) + own
        tl.store(of_mean, narrow(mu, prepared.rows.dtype.element_ty), mask=columns < D)
        positives += kappa * mu
        b = has_mean
        if BALANCED:
            b = has_mean / (size + 1.0)
        # To the backward a mean is a row with u = 0, which is no anchor.
        tl.store(state.u + N + program, 0.0)
        tl.store(state.a + N + program, b)
        tl.store(state.sum + N + program, kappa)
        tl.store(state.q + N + program, q)
        tl.store(state.pos + N + program, norm)

    for start in range(0, count, BLOCK_R):
        rows, valid = listed_rows(order_ptr, first, start, count, BLOCK_R)
        z = gather_tile(z_ptr, rows, valid, columns, D)
        pos = tl.sum(z * (tl.expand_dims(positives, 0) - z), 1) * q
        of_class = tl.zeros([BLOCK_R], dtype=tl.float32)
        places = rows.to(tl.int64)[:, None] * D + columns[None, :]
        copied = valid[:, None] & (columns < D)[None, :]
        tl.store(prepared.rows + places, narrow(z, prepared.rows.dtype.element_ty), mask=copied)
        tl.store(prepared.index + rows, program, mask=valid)
        tl.store(state.a + rows, of_class + a, mask=valid)
        tl.store(state.q + rows, of_class + q, mask=valid)
        tl.store(state.pos + rows, pos, mask=valid)


@triton.jit
def prepare_rows(
    start,
    labels,
    prepared,
    N,
    C,
    ignore_index,
    D: tl.constexpr,
    HAS_MU: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Clears the sums of BLOCK rows from `start`, and writes those that are in no class."""
    rows = start + tl.arange(0, BLOCK)
    state = state_rows(prepared.state, N + C)
    label = tl.load(labels.given + rows, mask=rows < N, other=0)
    no_class = label == ignore_index
    if HAS_MU:
        in_range = (label >= 0) & (label < C)
        tl.device_assert(in_range | no_class | (rows >= N), "labels must be in [0, C) or ignore_index")
        no_class = no_class | (in_range == 0)
    no_class = no_class & (rows < N)
    zero = tl.zeros([BLOCK], dtype=tl.float32)
    tl.store(state.sum + rows, zero, mask=rows < N)
    tl.store(prepared.index + rows, -1, mask=no_class)
    tl.store(state.a + rows, zero, mask=no_class)
    tl.store(state.q + rows, zero, mask=no_class)
    tl.store(state.pos + rows, zero, mask=no_class)
    if tl.max(no_class.to(tl.int32), 0) != 0:
        columns = tl.arange(0, BLOCK_D)
        for first in range(start, tl.minimum(start + BLOCK, N), BLOCK_R):
            rows = first + tl.arange(0, BLOCK_R)
            label = tl.load(labels.given + rows, mask=rows < N, other=0)
            no_class = label == ignore_index
            if HAS_MU:
                no_class = no_class | (label < 0) | (label >= C)
            places = rows.to(tl.int64)[:, None] * D + columns[None, :]
            cleared = (no_class & (rows < N))[:, None] & (columns < D)[None, :]
            zeros = tl.zeros([BLOCK_R, BLOCK_D], dtype=tl.float32)
            tl.store(prepared.rows + places, zeros.to(prepared.rows.dtype.element_ty), mask=cleared)


@triton.jit(do_not_specialize=["N", "C", "num_classes", "ignore_index"])
def hycon_prepare_kernel(
    z_ptr,
    labels,
    means_ptr,
    seen_ptr,
    order_ptr,
    prepared,
    N,
    C,
    num_classes,
    ignore_index,
    temperature,
    mean_weight,
    D: tl.constexpr,
    HAS_MU: tl.constexpr,
    HAS_SEEN: tl.constexpr,
    BALANCED: tl.constexpr,
    SORTED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    if program < num_classes:
        prepare_class(
            program, z_ptr, labels, means_ptr, seen_ptr, order_ptr, prepared, N, C, ignore_index, temperature,
            mean_weight, D, HAS_MU, HAS_SEEN, BALANCED, SORTED, BLOCK_R, BLOCK_D, BLOCK,
        )  # fmt: skip
    else:
        start = (program - num_classes) * BLOCK
        prepare_rows(start, labels, prepared, N, C, ignore_index, D, HAS_MU, BLOCK_R, BLOCK_D, BLOCK)
        if program == num_classes:
            tl.store(prepared.state, temperature)
            tl.store(prepared.index + N, 0)


_CLASS_TILE = 4096  # elements of z a class's program adds up at once: 32 registers a thread


def prepare_constants(
    dim: int, *, has_mu: bool, has_seen: bool, balanced: bool, sorted_labels: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Compile-time arguments and launch options of `hycon_prepare_kernel`."""
    width = padded_dim(dim)
    constants = {
        "D": dim,
        "HAS_MU": has_mu,
        "HAS_SEEN": has_seen,
        "BALANCED": balanced,
        "SORTED": sorted_labels,
        "BLOCK_R": _CLASS_TILE // width,
        "BLOCK_D": width,
        "BLOCK": VECTOR_BLOCK,
    }
    # With debug a label out of range stops the program; checks of integer overflow are not wanted with it.
    # Four blocks a multiprocessor: for the sake of more, the assembler would spill.
    return constants, {"num_warps": 4, "maxnreg": 128, "debug": True, "sanitize_overflow": False}
