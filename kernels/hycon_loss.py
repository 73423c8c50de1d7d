"""HyCon from labels to loss and gradients in three launches: prepare, forward, backward.

    lse_i = log( Σ_{j≠i} a_j exp(z_i·z_j / τ) + Σ_c b_c exp(z_i·μ_c / τ) ),  μ_c = M_c / max(|M_c|, 1e-12)
    pos_i = z_i·(s_c - z_i + κ_c μ_c) / (P_c τ),  c the class of i,  s_c = Σ_{j in c} z_j,  P_c = n_c - 1 + κ_c
    L     = Σ_i w_i (lse_i - pos_i) / W,  W = Σ w_i (mean) or 1 (sum, none)

and for q_i = w_i / (P_c τ) and t_c = Σ_{j in c} q_j z_j, with the lse gradients of allnc.kernels.hycon for
u_i = w_i exp(-lse_i),

    W dL/dz_i = (gradient of lse) - q_i (s_c + κ_c μ_c - 2 z_i) - t_c
    W dL/dμ_c = (gradient of lse) - κ_c t_c,        dL/dM_c = (dL/dμ_c - μ_c μ_c·dL/dμ_c) / |M_c|

Legend: z [N, D] activations, M [C, D] class means; n_c activations of class c; κ_c the weight of its mean among
the positives, 0 where it has none; a, b column weights; w_i anchor weight, 0 where P_c = 0 or the row is ignored.

Prepare. A class's program finds its rows, lists them, and adds them up; a second pass over them writes what each
row needs. Without sorted labels it compares all labels with its own, once to count (the labels below its own
tell where its list starts) and once to list; the lists come out as a stable sort would give them, so that sums
are repeatable. Without means a label may be any integer: program i then serves the class whose first row is i,
if there is one. Programs at the grid's end clear the forward's accumulators and write the rows that are in no
class, so that every element has one writer.

Forward. The panels of allnc.kernels.hycon. Every program counts itself when its sums are in memory; the last one
forms the loss from all of them, in a fixed order, and leaves u for the backward.

Backward. The panels of allnc.kernels.hycon; the positive term is added before a panel's gradient is stored, and a
panel of μ goes on to the raw means. With one gradient a row (reduction "none") u, q and t are weighted with it
first, by a launch of its own.

`state`, float32: the scalars (τ, 1/W, scale of u), then rows of N + C numbers, activations before means:
u | a or log2 a | sum of exponentials, or lse | q | w and κ_c | pos and |M_c| | unshifted only: a
`index`, int32: class of each row, -1 for none [N]; rows class by class [N]; first place and number of rows of
each class [G], [G]; counter. G is C, or N without means.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from allnc.kernels import hycon
from allnc.kernels._common import (
    LN_2,
    LOG2_E,
    architecture,
    device_guard,
    load_tile,
    narrow,
    padded_dim,
    pointer,
)
from allnc.kernels.hycon import HALF_SCALE, backward_panel, forward_sums, store_tile

_SCALARS = tl.constexpr(16)  # floats before the rows of `state`, so that they start 64 bytes in
_LEAST_NORM = tl.constexpr(1e-12)  # as torch.nn.functional.normalize
_LEAST_WEIGHT = tl.constexpr(1e-30)  # keeps the scale finite where all weights are 0


@triton.jit
def count_below(sorted_ptr, label, N, EQUAL_TOO: tl.constexpr, BLOCK: tl.constexpr):
    """How many of the sorted labels [N] are < label (or <=): every round cuts the range to a BLOCK-th."""
    low = 0
    size = N
    while size > 0:
        stride = tl.cdiv(size, BLOCK)
        offsets = tl.arange(0, BLOCK) * stride + stride - 1
        probe = tl.load(sorted_ptr + low + offsets, mask=offsets < size, other=0)
        if EQUAL_TOO:
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
        first = count_below(sorted_ptr, label, N, False, BLOCK)
        count = count_below(sorted_ptr, label, N, True, BLOCK) - first
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
    width = N + C
    u_ptr = state_ptr + _SCALARS
    term_a_ptr = u_ptr + width
    sum_ptr = term_a_ptr + width
    q_ptr = sum_ptr + width
    weight_ptr = q_ptr + width
    pos_ptr = weight_ptr + width
    a_ptr = pos_ptr + width
    class_ptr = index_ptr
    order_ptr = class_ptr + N
    first_ptr = order_ptr + N
    count_ptr = first_ptr + num_classes

    if program < num_classes:
        label, first, count = find_class(program, labels_ptr, sorted_ptr, N, ignore_index, HAS_MU, SORTED, BLOCK)
        tl.store(first_ptr + program, first)
        tl.store(count_ptr + program, count)
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
            mu = mean / tl.maximum(norm, _LEAST_NORM)
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
                tl.store(term_a_ptr + N + program, b)
            else:
                tl.store(term_a_ptr + N + program, tl.log2(b))
                tl.store(a_ptr + N + program, b)

        for start in range(0, count, BLOCK_R):
            rows, valid = listed_rows(order_ptr, first, start, count, BLOCK_R)
            z = gather_tile(z_ptr, rows, valid, columns, D)
            pos = tl.sum(z * (target[None, :] - z), 1) * per_positive
            weight = tl.zeros([BLOCK_R], dtype=tl.float32) + in_loss
            if HAS_WEIGHT:
                weight *= tl.load(anchor_weight_ptr + rows, mask=valid, other=0.0).to(tl.float32)
            tl.store(class_ptr + rows, program, mask=valid)
            tl.store(q_ptr + rows, weight * per_positive, mask=valid)
            tl.store(weight_ptr + rows, weight, mask=valid)
            tl.store(pos_ptr + rows, pos, mask=valid)
            weights = tl.zeros([BLOCK_R], dtype=tl.float32) + a
            if SHIFTED:
                tl.store(term_a_ptr + rows, weights, mask=valid)
            else:
                tl.store(term_a_ptr + rows, tl.log2(weights), mask=valid)
                tl.store(a_ptr + rows, weights, mask=valid)
    else:
        rows = (program - num_classes) * BLOCK + tl.arange(0, BLOCK)
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
        tl.store(class_ptr + rows, -1, mask=no_class)
        tl.store(q_ptr + rows, zero, mask=no_class)
        tl.store(weight_ptr + rows, zero, mask=no_class)
        tl.store(pos_ptr + rows, zero, mask=no_class)
        if SHIFTED:
            tl.store(term_a_ptr + rows, zero, mask=no_class)
        else:
            tl.store(term_a_ptr + rows, zero + float("-inf"), mask=no_class)
            tl.store(a_ptr + rows, zero, mask=no_class)
        if program == num_classes:
            tl.store(state_ptr, tau)
            tl.store(count_ptr + num_classes, 0)


@triton.jit
def finish_loss(
    state_ptr,
    partial_ptr,
    loss_ptr,
    N,
    C,
    num_splits,
    MEAN: tl.constexpr,
    NONE: tl.constexpr,
    SHIFTED: tl.constexpr,
    TRIANGLE: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The loss, 1/W and the scale of u, and each row's u and sum or lse, from all programs' sums."""
    width = N + C
    u_ptr = state_ptr + _SCALARS
    sum_ptr = u_ptr + 2 * width
    weight_ptr = u_ptr + 4 * width
    pos_ptr = u_ptr + 5 * width
    inverse_temperature = 1.0 / tl.load(state_ptr)

    weights = tl.zeros([BLOCK], dtype=tl.float32)
    largest = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, N, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        weight = tl.load(weight_ptr + rows, mask=rows < N, other=0.0)
        weights += weight
        largest = tl.maximum(largest, tl.abs(weight))
    per_weight = 1.0
    if MEAN:
        total_weight = tl.sum(weights, 0)
        per_weight = 1.0 / tl.where(total_weight > 0, total_weight, 1.0)
    scale = 1.0
    if SCALED:
        scale = HALF_SCALE / tl.maximum(tl.max(largest, 0), _LEAST_WEIGHT)
    tl.store(state_ptr + 1, per_weight)
    tl.store(state_ptr + 2, scale)

    losses = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, N, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        weight = tl.load(weight_ptr + rows, mask=rows < N, other=0.0)
        pos = tl.load(pos_ptr + rows, mask=rows < N, other=0.0)
        # What other programs wrote in this launch is read past the first-level cache.
        shift = inverse_temperature
        if TRIANGLE:
            total = tl.load(sum_ptr + rows, mask=rows < N, other=1.0, cache_modifier=".cg")
        else:
            total = tl.zeros([BLOCK], dtype=tl.float32)
            maximum = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
            if not SHIFTED:
                for split in range(num_splits):
                    of_split = tl.load(
                        partial_ptr + (num_splits + split) * N + rows, mask=rows < N, other=0.0, cache_modifier=".cg"
                    )
                    maximum = tl.maximum(maximum, of_split)
            origin = tl.where(maximum == float("-inf"), 0.0, maximum)
            for split in range(num_splits):
                of_split = tl.load(partial_ptr + split * N + rows, mask=rows < N, other=1.0, cache_modifier=".cg")
                if not SHIFTED:
                    part_maximum = tl.load(
                        partial_ptr + (num_splits + split) * N + rows, mask=rows < N, other=0.0, cache_modifier=".cg"
                    )
                    of_split *= tl.exp2((part_maximum - origin) * (inverse_temperature * LOG2_E))
                total += of_split
            if not SHIFTED:
                shift *= maximum
        lse = tl.log2(total) * LN_2 + shift
        # A row that takes no part counts 0 even where nothing is contrasted with it (lse = -inf).
        used = weight != 0
        loss = weight * (tl.where(used, lse, 0.0) - pos)
        if NONE:
            tl.store(loss_ptr + rows, loss, mask=rows < N)
        losses += loss
        used = used & (total != 0)
        if SHIFTED:
            tl.store(u_ptr + rows, tl.where(used, weight * scale / total, 0.0), mask=rows < N)
            if not TRIANGLE:
                tl.store(sum_ptr + rows, total, mask=rows < N)
        else:
            tl.store(u_ptr + rows, weight * scale, mask=rows < N)
            tl.store(sum_ptr + rows, tl.where(used, lse, float("inf")), mask=rows < N)
    if not NONE:
        tl.store(loss_ptr, tl.sum(losses, 0) * per_weight)


@triton.jit(do_not_specialize=["N", "C", "num_classes", "num_splits"])
def hycon_loss_fwd_kernel(
    z_ptr,
    mu_ptr,
    state_ptr,
    index_ptr,
    partial_ptr,
    loss_ptr,
    N,
    C,
    num_classes,
    num_splits,
    D: tl.constexpr,
    HAS_MU: tl.constexpr,
    SHIFTED: tl.constexpr,
    TRIANGLE: tl.constexpr,
    SCALED: tl.constexpr,
    MEAN: tl.constexpr,
    NONE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    RESIDENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    width = N + C
    sum_ptr = state_ptr + _SCALARS + 2 * width
    a_ptr = state_ptr + _SCALARS + (1 if SHIFTED else 6) * width
    rows, maximum, total = forward_sums(
        program, z_ptr, mu_ptr, a_ptr, a_ptr + N, state_ptr, sum_ptr, N, C, num_splits, 0, 1,
        D, HAS_MU, SHIFTED, TRIANGLE, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D, RESIDENT,
    )  # fmt: skip
    if TRIANGLE:
        tl.atomic_add(sum_ptr + rows, total, mask=rows < N, sem="relaxed")
    else:
        split = program % num_splits
        tl.store(partial_ptr + split * N + rows, total, mask=rows < N)
        if not SHIFTED:
            tl.store(partial_ptr + (num_splits + split) * N + rows, maximum, mask=rows < N)
    # All threads' sums are issued before the barrier; the release of the one thread that counts covers them, and
    # its acquire lets the last program see those of all others.
    tl.debug_barrier()
    counter_ptr = index_ptr + 2 * N + 2 * num_classes
    arrived = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")
    if arrived == tl.num_programs(0) - 1:
        finish_loss(
            state_ptr, partial_ptr, loss_ptr, N, C, num_splits, MEAN, NONE, SHIFTED, TRIANGLE, SCALED, BLOCK
        )


@triton.jit(do_not_specialize=["N", "C", "num_classes", "grad_stride"])
def hycon_weigh_kernel(
    grad_ptr,
    grad_max_ptr,
    z_ptr,
    state_ptr,
    index_ptr,
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
    u_ptr = state_ptr + _SCALARS
    q_ptr = u_ptr + 3 * width
    scale = 1.0
    if SCALED:
        scale = 1.0 / tl.maximum(tl.load(grad_max_ptr), _LEAST_WEIGHT)
    if program < num_classes:
        order_ptr = index_ptr + N
        first = tl.load(order_ptr + N + program)
        count = tl.load(order_ptr + N + num_classes + program)
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


@triton.jit(do_not_specialize=["N", "C"])
def hycon_loss_bwd_kernel(
    grad_ptr,
    z_ptr,
    mu_ptr,
    means_ptr,
    sums_ptr,
    pull_ptr,
    state_ptr,
    weighted_ptr,
    index_ptr,
    dz_ptr,
    dmeans_ptr,
    dots_ptr,
    N,
    C,
    D: tl.constexpr,
    HAS_MU: tl.constexpr,
    HAS_PULL: tl.constexpr,
    HAS_TAU: tl.constexpr,
    NONE: tl.constexpr,
    SCALED: tl.constexpr,
    SHIFTED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_G: tl.constexpr,
    RESIDENT: tl.constexpr,
):
    width = N + C
    term_ptr = state_ptr + _SCALARS
    u_ptr = term_ptr
    q_ptr = term_ptr + 3 * width
    kappa_ptr = term_ptr + 4 * width + N
    norm_ptr = term_ptr + 5 * width + N
    tau = tl.load(state_ptr)
    factor = tl.load(state_ptr + 1)  # of the positive term
    if NONE:
        u_ptr = weighted_ptr
        q_ptr = weighted_ptr + width
    else:
        factor *= tl.load(grad_ptr)
    of_lse = factor / (tau * tl.load(state_ptr + 2))
    if NONE and SCALED:
        of_lse *= tl.maximum(tl.load(grad_ptr), _LEAST_WEIGHT)  # the largest gradient of a row, left out of u

    dx, start, num_x, of_mean = backward_panel(
        tl.program_id(0), 0, u_ptr, term_ptr, z_ptr, mu_ptr, state_ptr, N, C, N,
        D, HAS_MU, SHIFTED, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_G, RESIDENT,
    )  # fmt: skip
    dx *= of_lse
    rows = start + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_G)
    if of_mean:
        if HAS_MU:
            kappa = tl.load(kappa_ptr + rows, mask=rows < C, other=0.0) * factor
            if HAS_PULL:
                pull = gather_tile(pull_ptr, rows, rows < C, columns, D)
            else:
                kappa *= tl.load(q_ptr + N + rows, mask=rows < C, other=0.0)
                pull = gather_tile(sums_ptr, rows, rows < C, columns, D)
            dx -= kappa[:, None] * pull
            norm = tl.load(norm_ptr + rows, mask=rows < C, other=1.0)
            inverse = 1.0 / tl.maximum(norm, _LEAST_NORM)
            mu = load_tile(means_ptr, start, C, 0, D, BLOCK_M, BLOCK_G).to(tl.float32) * inverse[:, None]
            dot = tl.sum(mu * dx, 1)
            if HAS_TAU:
                tl.store(dots_ptr + N + rows, dot / (-2.0 * tau), mask=rows < C)
            # A mean shorter than the least norm is only multiplied, by a constant.
            dot = tl.where(norm >= _LEAST_NORM, dot, 0.0)
            store_tile(dmeans_ptr, (dx - mu * dot[:, None]) * inverse[:, None], start, C, 0, D)
    else:
        of_class = tl.load(index_ptr + rows, mask=rows < N, other=-1)
        valid = of_class >= 0
        q = tl.load(q_ptr + rows, mask=rows < N, other=0.0) * factor
        z = load_tile(z_ptr, start, N, 0, D, BLOCK_M, BLOCK_G).to(tl.float32)
        dx += 2.0 * q[:, None] * z
        of_sum = q
        if HAS_PULL:
            dx -= factor * gather_tile(pull_ptr, of_class, valid, columns, D)
        else:
            of_sum = 2.0 * q  # t_c = q s_c: the rows of a class have one weight
        dx -= of_sum[:, None] * gather_tile(sums_ptr, of_class, valid, columns, D)
        if HAS_MU:
            kappa = tl.load(kappa_ptr + of_class, mask=valid, other=0.0) * q
            dx -= kappa[:, None] * gather_tile(mu_ptr, of_class, valid, columns, D)
        if HAS_TAU:
            tl.store(dots_ptr + rows, tl.sum(z * dx, 1) / (-2.0 * tau), mask=rows < N)
        store_tile(dz_ptr, dx, start, N, 0, D)


_BLOCK = 1024  # labels or rows a step of the loops over all of them
_CLASS_TILE = 4096  # elements of z a class's program adds up at once: 32 registers a thread

# Comparing every label with every class reads 8 N G bytes from the second-level cache: up to here a few times ten
# microseconds by its bandwidth, about what sorting takes in launches alone.
_SCAN_LIMIT = 2**25


class Prepared(NamedTuple):
    """What the backward needs of the forward; `state` and `index` are laid out as the file's head says."""

    state: Tensor  # float32
    index: Tensor  # int32
    sums: Tensor  # [G, D] float32 class sums s_c; [2, G, D] with t_c behind them for rows of unequal weight
    mu: Tensor  # [C, D] unit rows in z's type; [0, D] without means


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
    return {"BLOCK_R": _CLASS_TILE // width, "BLOCK_D": width, "BLOCK": _BLOCK}


def loss_forward_constants(
    dim: int, dtype: torch.dtype, *, has_mu: bool, shifted: bool, triangle: bool, reduction: str, arch: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Compile-time arguments and launch options of `hycon_loss_fwd_kernel`."""
    constants, options = hycon.forward_constants(
        dim, dtype, has_mu=has_mu, shifted=shifted, triangle=triangle, arch=arch
    )
    constants |= {
        "SCALED": dtype == torch.float16,
        "MEAN": reduction == "mean",
        "NONE": reduction == "none",
        "BLOCK": _BLOCK,
    }
    return constants, options


def loss_backward_constants(
    dim: int,
    dtype: torch.dtype,
    *,
    has_mu: bool,
    has_pull: bool,
    has_tau: bool,
    none: bool,
    shifted: bool,
    arch: int,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Compile-time arguments and launch options of `hycon_loss_bwd_kernel`."""
    constants, options = hycon.backward_constants(dim, dtype, has_mu=has_mu, shifted=shifted, arch=arch)
    return constants | {"HAS_PULL": has_pull, "HAS_TAU": has_tau, "NONE": none}, options


def fits(dim: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether one program of the backward forms whole rows of the gradient, which these kernels rely on."""
    constants, _ = hycon.backward_constants(dim, dtype, has_mu=True, shifted=True, arch=architecture(device))
    return constants["BLOCK_G"] >= dim


def _num_splits(num_rows: int, num_means: int, constants: dict[str, Any]) -> int:
    """Programs that share a panel: enough for the device, at most one a tile."""
    num_panels = triton.cdiv(num_rows, constants["BLOCK_M"])
    tiles_per_panel = constants["BLOCK_M"] // constants["BLOCK_N"]
    if constants["TRIANGLE"]:
        return hycon.num_splits(num_panels, tiles_per_panel)
    tiles = num_panels * tiles_per_panel + triton.cdiv(num_means, constants["BLOCK_N"])
    return max(1, min(hycon.PROGRAMS // num_panels, tiles))


def hycon_loss_forward(
    z: Tensor,
    labels: Tensor,
    means: Tensor | None,
    seen: Tensor | None,
    anchor_weight: Tensor | None,
    temperature: Tensor | float,
    *,
    mean_weight: float,
    balance: str,
    reduction: str,
    ignore_index: int,
    shifted: bool,
    deterministic: bool,
) -> tuple[Tensor, Prepared]:
    """HyCon's loss by the formula at the head, in two launches (a few more, to sort, for many labels and classes).

    Args:
        z: [N, D] float16, bfloat16 or float32 unit rows, for which `fits` holds.
        labels: [N] int64 in [0, C) or ignore_index; without means, any. Others stop the program on a GPU.
        means: [C, D] floating, any length; or None.
        seen: [C] bool, classes that have a mean; None for all.
        anchor_weight: [N] floating >= 0; None for 1.
        temperature: τ > 0, or a 0-dim floating tensor, never read by the host.
        mean_weight: κ >= 0.
        balance: "class" or "none".
        reduction: "mean", "sum" or "none".
        ignore_index: label of rows that take no part.
        shifted: the caller guarantees 2/τ <= 64. One triangle of S is computed, unless `deterministic`.
        deterministic: no atomics on data: repeated calls are equal bit for bit.

    Returns:
        The loss, 0-dim or [N], float32; and what the backward needs.
    """
    z, labels = z.contiguous(), labels.contiguous()
    means = None if means is None else means.contiguous()
    seen = None if seen is None else seen.contiguous()
    anchor_weight = None if anchor_weight is None else anchor_weight.contiguous()
    num_rows, dim = z.shape
    num_means = 0 if means is None else len(means)
    num_classes = num_rows if means is None else num_means
    has_tau = isinstance(temperature, Tensor)
    has_pull = anchor_weight is not None and reduction != "none"
    sorted_labels = num_rows * num_classes > _SCAN_LIMIT
    triangle = shifted and not deterministic
    prepare, prepare_options = prepare_constants(
        dim,
        has_mu=means is not None,
        has_seen=seen is not None,
        has_weight=anchor_weight is not None,
        has_pull=has_pull,
        has_tau=has_tau,
        balanced=balance == "class",
        shifted=shifted,
        sorted_labels=sorted_labels,
    )
    constants, options = loss_forward_constants(
        dim,
        z.dtype,
        has_mu=means is not None,
        shifted=shifted,
        triangle=triangle,
        reduction=reduction,
        arch=architecture(z.device),
    )
    ordered, order = labels.sort(stable=True) if sorted_labels else (labels, labels)
    num_panels = triton.cdiv(num_rows, constants["BLOCK_M"])
    splits = _num_splits(num_rows, num_means, constants)

    def floats(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=z.device)

    state = floats(_SCALARS.value + (6 if shifted else 7) * (num_rows + num_means))
    index = torch.empty(2 * num_rows + 2 * num_classes + 1, dtype=torch.int32, device=z.device)
    sums = floats(2, num_classes, dim) if has_pull else floats(num_classes, dim)
    mu = torch.empty((num_means, dim), dtype=z.dtype, device=z.device)
    partial = state if triangle else floats((1 if shifted else 2) * splits * num_rows)
    loss = floats(num_rows) if reduction == "none" else floats()
    with device_guard(z):
        hycon_prepare_kernel[(num_classes + triton.cdiv(num_rows, _BLOCK),)](
            z, labels, ordered, order, pointer(means, z), pointer(seen, z), pointer(anchor_weight, z),
            temperature if has_tau else state, mu, sums, state, index,
            num_rows, num_means, num_classes, ignore_index, 0.0 if has_tau else temperature, mean_weight,
            **prepare, **prepare_options,
        )  # fmt: skip
        hycon_loss_fwd_kernel[(num_panels * splits,)](
            z, mu, state, index, partial, loss, num_rows, num_means, num_classes, splits, **constants, **options,
        )  # fmt: skip
    return loss, Prepared(state, index, sums, mu)


def hycon_loss_backward(
    grad: Tensor,
    z: Tensor,
    means: Tensor | None,
    prepared: Prepared,
    *,
    reduction: str,
    shifted: bool,
    tau_gradient: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of `hycon_loss_forward`, in one launch (two or three for reduction "none"); no atomics.

    Args:
        grad: 0-dim or, for reduction "none", [N] float32: gradient of the loss.
        z, means, reduction, shifted: as in the forward.
        prepared: the forward's.
        tau_gradient: whether the temperature's gradient is asked for.

    Returns:
        dz [N, D] in z's type; dmeans [C, D] in means' or None; terms [N + C] float32 whose sum is dL/dτ, or None.
    """
    z, means = z.contiguous(), None if means is None else means.contiguous()
    state, index, sums, mu = prepared
    num_rows, dim = z.shape
    num_means = len(mu)
    none = reduction == "none"
    num_classes = sums.shape[-2]
    has_pull = none or sums.dim() == 3
    constants, options = loss_backward_constants(
        dim,
        z.dtype,
        has_mu=means is not None,
        has_pull=has_pull,
        has_tau=tau_gradient,
        none=none,
        shifted=shifted,
        arch=architecture(z.device),
    )
    width = num_rows + num_means
    dz, dmeans = torch.empty_like(z), None if means is None else torch.empty_like(means)
    dots = torch.empty(width, dtype=torch.float32, device=z.device) if tau_gradient else None
    weighted, pull = state, sums[-1] if sums.dim() == 3 else sums
    with device_guard(z):
        if none:
            weighted = torch.empty((2, width), dtype=torch.float32, device=z.device)
            pull = torch.empty_like(sums)
            weigh, weigh_options = weigh_constants(dim, z.dtype)
            grad_max = torch.linalg.vector_norm(grad, torch.inf) if constants["SCALED"] else state
            hycon_weigh_kernel[(num_classes + triton.cdiv(width, _BLOCK),)](
                grad, grad_max, z, state, index, weighted, pull, num_rows, num_means, num_classes, grad.stride(0),
                **weigh, **weigh_options,
            )  # fmt: skip
            grad = grad_max
        num_panels = triton.cdiv(num_rows, constants["BLOCK_M"]) + triton.cdiv(num_means, constants["BLOCK_M"])
        hycon_loss_bwd_kernel[(num_panels,)](
            grad, z, mu, pointer(means, z), sums, pull, state, weighted, index, dz, pointer(dmeans, dz),
            pointer(dots, state), num_rows, num_means, **constants, **options,
        )  # fmt: skip
    return dz, dmeans, dots
