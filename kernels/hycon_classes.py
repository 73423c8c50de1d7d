"""HyCon's work by classes, O(N D): what its kernels need to know of every row and every class, from the labels.

For a class c with rows j: n_c, s_c = Σ z_j, κ_c = mean_weight (0 where c has no mean), P_c = n_c - 1 + κ_c and

    μ_c = M_c / max(|M_c|, 1e-12),  b_c = 1 / (n_c + 1) (0 without a mean; balance "none": 1),  t_c = Σ q_j z_j
    a_j = 1 / (n_c + [c has a mean]) (balance "none": 1),     w_j = anchor weight, 0 unless P_c > 0
    q_j = w_j / (P_c τ),                                      pos_j = z_j·(s_c - z_j + κ_c μ_c) / (P_c τ)

and a = w = q = pos = 0 for rows that are ignored. Legend: z [N, D] activations, M [C, D] class means, τ temperature.

A class's program finds its rows, lists them, and adds them up; a second pass over them writes what each row needs.
Without sorted labels it compares all labels with its own, once to count (the labels below its own tell where its
list starts) and once to list; the lists come out as a stable sort would give them, so that sums are repeatable.
Without means a label may be any integer: program i then serves the class whose first row is i (in sorted order,
where sorted), if there is one. Programs at the grid's end clear the forward's accumulators and write the rows that
are in no class. Every element has one writer.

`state`, float32: the scalars τ, 1/W and scale of u; then rows of N + C numbers, activations before means:
u | a or, unshifted, log2 a | sum of exponentials or, unshifted, lse | q | w and κ_c | pos and |M_c| | unshifted: a
`index`, int32: class of each row, -1 for none [N]; each class's first place in `order` and number of rows [G], [G];
counter of finished programs. G is C, or N without means. `order`, int32: the rows class by class [N].
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from allnc.kernels._common import LEAST_SCALED, VECTOR_BLOCK, narrow, padded_dim

SCALARS = tl.constexpr(16)  # floats before the rows of `state`, so that they start 64 bytes in
LEAST_NORM = tl.constexpr(1e-12)  # as torch.nn.functional.normalize
_BELOW = tl.constexpr(False)
_UP_TO = tl.constexpr(True)


@triton.jit
def state_rows(state_ptr, width):
    """The rows of `state`, in the order of the file's head."""
    u_ptr = state_ptr + SCALARS
    term_ptr = u_ptr + width
    sum_ptr = term_ptr + width
    q_ptr = sum_ptr + width
    weight_ptr = q_ptr + width
    pos_ptr = weight_ptr + width
    return u_ptr, term_ptr, sum_ptr, q_ptr, weight_ptr, pos_ptr, pos_ptr + width


@triton.jit
def count_labels(sorted_ptr, label, N, UP_TO: tl.constexpr, BLOCK: tl.constexpr):
    """How many of the sorted labels [N] are < label (or <=): every round cuts the range to a BLOCK-th."""
    low = 0
    size = N
    while size > 0:
        stride = tl.cdiv(size, BLOCK)
        offsets = tl.arange(0, BLOCK) * stride + stride - 1
        probe = tl.load(sorted_ptr + low + offsets, mask=offsets < size, other=0)
        if UP_TO:
            below = probe <= label
        else:
            below = probe < label
        strides = tl.sum((below & (offsets < size)).to(tl.int32), 0)
        size = tl.minimum(stride - 1, size - strides * stride)
        low += strides * stride
    return low


@triton.jit
def find_class(
    program,
    labels_ptr,
    sorted_ptr,
    N,
    ignore_index,
    HAS_MU: tl.constexpr,
    SORTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Label, place of the first row in the list of all rows, and number of rows of this program's class."""
    label = tl.cast(program, tl.int64)
    first = 0
    if SORTED:
        if not HAS_MU:
            label = tl.load(sorted_ptr + program)
        first = count_labels(sorted_ptr, label, N, _BELOW, BLOCK)
        count = count_labels(sorted_ptr, label, N, _UP_TO, BLOCK) - first
        if not HAS_MU:
            count = tl.where(first == program, count, 0)
    else:
        if not HAS_MU:
            label = tl.load(labels_ptr + program)
        smaller = tl.zeros([BLOCK], dtype=tl.int32)
        same = tl.zeros([BLOCK], dtype=tl.int32)
        earlier = tl.zeros([BLOCK], dtype=tl.int32)
        for start in range(0, N, BLOCK):
            rows = start + tl.arange(0, BLOCK)
            found = tl.load(labels_ptr + rows, mask=rows < N, other=0)
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
def list_rows(
    labels_ptr, sorted_order_ptr, order_ptr, label, first, count, N, SORTED: tl.constexpr, BLOCK: tl.constexpr
):
    """Writes the rows of a class, in increasing order, to its places in the list of all rows."""
    if SORTED:
        for start in range(0, count, BLOCK):
            item = start + tl.arange(0, BLOCK)
            rows = tl.load(sorted_order_ptr + first + item, mask=item < count, other=0)
            tl.store(order_ptr + first + item, rows.to(tl.int32), mask=item < count)
    else:
        place = first
        for start in range(0, tl.where(count > 0, N, 0), BLOCK):
            rows = start + tl.arange(0, BLOCK)
            found = tl.load(labels_ptr + rows, mask=rows < N, other=0)
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
def gather_tile(pointer, rows, valid, columns, D: tl.constexpr):
    """Those rows and columns of a [., D] matrix in float32; zeros where not valid."""
    mask = valid[:, None] & (columns < D)[None, :]
    return tl.load(pointer + rows.to(tl.int64)[:, None] * D + columns[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def prepare_class(
    program,
    tau,
    z_ptr,
    labels_ptr,
    sorted_ptr,
    sorted_order_ptr,
    means_ptr,
    seen_ptr,
    anchor_weight_ptr,
    mu_ptr,
    sums_ptr,
    state_ptr,
    index_ptr,
    order_ptr,
    N,
    C,
    num_classes,
    ignore_index,
    mean_weight,
    D: tl.constexpr,
    HAS_MU: tl.constexpr,
    HAS_SEEN: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_PULL: tl.constexpr,
    BALANCED: tl.constexpr,
    SHIFTED: tl.constexpr,
    SORTED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One class: its sums, its mean, and its rows."""
    u_ptr, term_ptr, sum_ptr, q_ptr, weight_ptr, pos_ptr, a_ptr = state_rows(state_ptr, N + C)
    first_ptr = index_ptr + N
    label, first, count = find_class(program, labels_ptr, sorted_ptr, N, ignore_index, HAS_MU, SORTED, BLOCK)
    tl.store(first_ptr + program, first)
    tl.store(first_ptr + num_classes + program, count)
    list_rows(labels_ptr, sorted_order_ptr, order_ptr, label, first, count, N, SORTED, BLOCK)

    size = count.to(tl.float32)
    has_mean = 0.0
    if HAS_MU:
        has_mean = 1.0
        if HAS_SEEN:
            has_mean = (tl.load(seen_ptr + program) != 0).to(tl.float32)
    kappa = mean_weight * has_mean
    num_positive = size - 1.0 + kappa
    in_loss = tl.where(num_positive > 0, 1.0, 0.0)
    per_positive = tl.where(num_positive > 0, 1.0 / (num_positive * tau), 0.0)

    columns = tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_R, BLOCK_D], dtype=tl.float32)
    pull = tl.zeros([BLOCK_R, BLOCK_D], dtype=tl.float32)
    for start in range(0, count, BLOCK_R):
        rows, valid = listed_rows(order_ptr, first, start, count, BLOCK_R)
        z = gather_tile(z_ptr, rows, valid, columns, D)
        total += z
        if HAS_PULL:
            weight = tl.load(anchor_weight_ptr + rows, mask=valid, other=0.0).to(tl.float32)
            pull += z * (weight * in_loss * per_positive)[:, None]
    target = tl.sum(total, 0)  # [D], s_c
    own = tl.cast(program, tl.int64) * D + columns
    tl.store(sums_ptr + own, target, mask=columns < D)
    if HAS_PULL:
        tl.store(sums_ptr + tl.cast(num_classes, tl.int64) * D + own, tl.sum(pull, 0), mask=columns < D)

    a = 1.0
    if BALANCED:
        a = 1.0 / tl.maximum(size + has_mean, 1.0)
    if HAS_MU:
        mean = tl.load(means_ptr + own, mask=columns < D, other=0.0).to(tl.float32)
        norm = tl.sqrt(tl.sum(mean * mean, 0))
        mu = mean / tl.maximum(norm, LEAST_NORM)
        tl.store(mu_ptr + own, narrow(mu, mu_ptr.dtype.element_ty), mask=columns < D)
        target += kappa * mu
        b = has_mean
        if BALANCED:
            b = has_mean / (size + 1.0)
        # To the backward a mean is a row with u = 0 that is no anchor.
        tl.store(u_ptr + N + program, 0.0)
        tl.store(sum_ptr + N + program, float("inf"))
        tl.store(q_ptr + N + program, per_positive)
        tl.store(weight_ptr + N + program, kappa)
        tl.store(pos_ptr + N + program, norm)
        if SHIFTED:
            tl.store(term_ptr + N + program, b)
        else:
            tl.store(term_ptr + N + program, tl.log2(b))
            tl.store(a_ptr + N + program, b)

    for start in range(0, count, BLOCK_R):
        rows, valid = listed_rows(order_ptr, first, start, count, BLOCK_R)
        z = gather_tile(z_ptr, rows, valid, columns, D)
        pos = tl.sum(z * (tl.expand_dims(target, 0) - z), 1) * per_positive
        weight = tl.zeros([BLOCK_R], dtype=tl.float32) + in_loss
        if HAS_WEIGHT:
            weight *= tl.load(anchor_weight_ptr + rows, mask=valid, other=0.0).to(tl.float32)
        tl.store(index_ptr + rows, program, mask=valid)
        tl.store(q_ptr + rows, weight * per_positive, mask=valid)
        tl.store(weight_ptr + rows, weight, mask=valid)
        tl.store(pos_ptr + rows, pos, mask=valid)
        weights = tl.zeros([BLOCK_R], dtype=tl.float32) + a
        if SHIFTED:
            tl.store(term_ptr + rows, weights, mask=valid)
        else:
            tl.store(term_ptr + rows, tl.log2(weights), mask=valid)
            tl.store(a_ptr + rows, weights, mask=valid)


@triton.jit
def prepare_rows(
    rows,
    labels_ptr,
    state_ptr,
    index_ptr,
    N,
    C,
    ignore_index,
    HAS_MU: tl.constexpr,
    SHIFTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rows [BLOCK] as the forward expects them, and those of no class as its backward does."""
    u_ptr, term_ptr, sum_ptr, q_ptr, weight_ptr, pos_ptr, a_ptr = state_rows(state_ptr, N + C)
    label = tl.load(labels_ptr + rows, mask=rows < N, other=0)
    no_class = label == ignore_index
    if HAS_MU:
        in_range = (label >= 0) & (label < C)
        tl.device_assert(in_range | no_class | (rows >= N), "labels must be in [0, C) or ignore_index")
        no_class = no_class | (in_range == 0)
    zero = tl.zeros([BLOCK], dtype=tl.float32)
    tl.store(u_ptr + rows, zero, mask=rows < N)
    tl.store(sum_ptr + rows, zero, mask=rows < N)
    no_class = no_class & (rows < N)
    tl.store(index_ptr + rows, -1, mask=no_class)
    tl.store(q_ptr + rows, zero, mask=no_class)
    tl.store(weight_ptr + rows, zero, mask=no_class)
    tl.store(pos_ptr + rows, zero, mask=no_class)
    if SHIFTED:
        tl.store(term_ptr + rows, zero, mask=no_class)
    else:
        tl.store(term_ptr + rows, zero + float("-inf"), mask=no_class)
        tl.store(a_ptr + rows, zero, mask=no_class)


@triton.jit(do_not_specialize=["N", "C", "num_classes", "ignore_index"])
def hycon_prepare_kernel(
    z_ptr,
    labels_ptr,
    sorted_ptr,
    sorted_order_ptr,
    means_ptr,
    seen_ptr,
    anchor_weight_ptr,
    temperature_ptr,
    mu_ptr,
    sums_ptr,
    state_ptr,
    index_ptr,
    order_ptr,
    N,
    C,
    num_classes,
    ignore_index,
    temperature,
    mean_weight,
    D: tl.constexpr,
    HAS_MU: tl.constexpr,
    HAS_SEEN: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_PULL: tl.constexpr,
    HAS_TAU: tl.constexpr,
    BALANCED: tl.constexpr,
    SHIFTED: tl.constexpr,
    SORTED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    tau = temperature
    if HAS_TAU:
        tau = tl.load(temperature_ptr).to(tl.float32)
    if program < num_classes:
        prepare_class(
            program, tau, z_ptr, labels_ptr, sorted_ptr, sorted_order_ptr, means_ptr, seen_ptr, anchor_weight_ptr,
            mu_ptr, sums_ptr, state_ptr, index_ptr, order_ptr, N, C, num_classes, ignore_index, mean_weight,
            D, HAS_MU, HAS_SEEN, HAS_WEIGHT, HAS_PULL, BALANCED, SHIFTED, SORTED, BLOCK_R, BLOCK_D, BLOCK,
        )  # fmt: skip
    else:
        rows = (program - num_classes) * BLOCK + tl.arange(0, BLOCK)
        prepare_rows(rows, labels_ptr, state_ptr, index_ptr, N, C, ignore_index, HAS_MU, SHIFTED, BLOCK)
        if program == num_classes:
            scalar = tl.arange(0, SCALARS)
            tl.store(state_ptr + scalar, tl.where(scalar == 0, tau, 0.0))
            tl.store(index_ptr + N + 2 * num_classes, 0)


@triton.jit(do_not_specialize=["N", "C", "num_classes", "grad_stride"])
def hycon_weigh_kernel(
    grad_ptr,
    grad_max_ptr,
    z_ptr,
    state_ptr,
    index_ptr,
    order_ptr,
    weighted_ptr,
    pull_ptr,
    N,
    C,
    num_classes,
    grad_stride,
    D: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """u and q times the gradient of each row, [2, N + C], and t_c [G, D], for a loss that was not reduced."""
    program = tl.program_id(0)
    width = N + C
    u_ptr = state_ptr + SCALARS
    q_ptr = u_ptr + 3 * width
    scale = 1.0
    if SCALED:
        scale = 1.0 / tl.maximum(tl.load(grad_max_ptr), LEAST_SCALED)
    if program < num_classes:
        first = tl.load(index_ptr + N + program)
        count = tl.load(index_ptr + N + num_classes + program)
        columns = tl.arange(0, BLOCK_D)
        pull = tl.zeros([BLOCK_R, BLOCK_D], dtype=tl.float32)
        for start in range(0, count, BLOCK_R):
            rows, valid = listed_rows(order_ptr, first, start, count, BLOCK_R)
            z = gather_tile(z_ptr, rows, valid, columns, D)
            grad = tl.load(grad_ptr + rows.to(tl.int64) * grad_stride, mask=valid, other=0.0)
            pull += z * (grad * tl.load(q_ptr + rows, mask=valid, other=0.0))[:, None]
        tl.store(pull_ptr + tl.cast(program, tl.int64) * D + columns, tl.sum(pull, 0), mask=columns < D)
    else:
        rows = (program - num_classes) * BLOCK + tl.arange(0, BLOCK)
        grad = tl.load(grad_ptr + rows.to(tl.int64) * grad_stride, mask=rows < N, other=0.0)
        u = tl.load(u_ptr + rows, mask=rows < width, other=0.0)
        q = tl.load(q_ptr + rows, mask=rows < width, other=0.0)
        tl.store(weighted_ptr + rows, u * grad * scale, mask=rows < width)
        tl.store(weighted_ptr + width + rows, q * grad, mask=rows < width)


_CLASS_TILE = 4096  # elements of z a class's program adds up at once: 32 registers a thread


def prepare_constants(
    dim: int,
    *,
    has_mu: bool,
    has_seen: bool,
    has_weight: bool,
    has_pull: bool,
    has_tau: bool,
    balanced: bool,
    shifted: bool,
    sorted_labels: bool,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Compile-time arguments and launch options of `hycon_prepare_kernel`."""
    constants = {
        "D": dim,
        "HAS_MU": has_mu,
        "HAS_SEEN": has_seen,
        "HAS_WEIGHT": has_weight,
        "HAS_PULL": has_pull,
        "HAS_TAU": has_tau,
        "BALANCED": balanced,
        "SHIFTED": shifted,
        "SORTED": sorted_labels,
        **_class_blocks(dim),
    }
    # With debug a label out of range stops the program; checks of integer overflow are not wanted with it.
    return constants, {"num_warps": 4, "debug": True, "sanitize_overflow": False}


def weigh_constants(dim: int, dtype: torch.dtype) -> tuple[dict[str, Any], dict[str, Any]]:
    """Compile-time arguments and launch options of `hycon_weigh_kernel`."""
    return {"D": dim, "SCALED": dtype == torch.float16, **_class_blocks(dim)}, {"num_warps": 4}


def _class_blocks(dim: int) -> dict[str, int]:
    width = padded_dim(dim)
    return {"BLOCK_R": _CLASS_TILE // width, "BLOCK_D": width, "BLOCK": VECTOR_BLOCK}
