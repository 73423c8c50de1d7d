"""The measures of neural collapse as formulas of a data set's moments, in float64.

With class means μ_c over the K classes present, m_c = μ_c - μ_G, M = [m_1 ... m_K]ᵀ, W the classifier
vectors of these classes and E = (I - J/K)/sqrt(K-1) the normalised Gram matrix of a simplex ETF:

    NC1   tr(Σ_W Σ_B⁺)/K through the SVD of M, since Σ_B = MᵀM/K; no pseudo-inverse of an F x F matrix
    NC2   ‖MMᵀ/‖MMᵀ‖ - E‖, the same for W
    NC3   ‖W/‖W‖ - M/‖M‖‖

Two conventions are open in the literature and are arguments here: μ_G is the mean of the class means
("class") or of the samples ("samples"); Σ_W averages the covariances of the classes ("classes") or pools the
samples ("pooled").

When two classes' means move together (minority collapse), Σ_B loses a direction, and NC1, which divides by
it, grows without bound although no class has spread. tr Σ_W / tr Σ_B ("trace_ratio") does not: read the two
side by side.

Legend: N samples, F features, C classes, K of them present.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from allnc.ops._common import check_choice, check_floating, check_shape

Center = Literal["class", "samples"]
Within = Literal["classes", "pooled"]

LARGEST = 1e60  # of what is measured: fourth powers, and sums of them, stay within float64
_FAR = 1e-3  # a difference of this size has lost three digits of sixteen
_BLOCK_ENTRIES = 1 << 22  # of a matrix of pairs of classes, 32 MB at a time: whole, it may have 66 million


class Moments(NamedTuple):
    """What one pass over a data set leaves of its features, float64."""

    counts: Tensor  # [C] samples of each class
    means: Tensor  # [C, F] class means, 0 for an absent class
    traces: Tensor  # [C] sum over the samples of a class of the squared distance to their mean


def check_measurable(name: str, x: Tensor) -> None:
    """Raise ValueError unless all entries are finite and at most LARGEST in size: no measure can be made of others."""
    largest = min(LARGEST, torch.finfo(x.dtype).max)  # as a float32, LARGEST would be infinite
    wrong = ~(x.detach().abs() <= largest)
    if bool(wrong.any()):
        got = f"{float(x.detach()[wrong][0]):g} ({int(wrong.sum())} of {x.numel()} entries)"
        raise ValueError(f"{name} must be finite, at most {LARGEST:g} in size; got {got}. Has the training diverged?")


def collapse_from_moments(
    counts: Tensor,
    means: Tensor,
    traces: Tensor,
    within_covariance: Tensor,
    weight: Tensor | None,
    *,
    center: Center,
    within: Within,
) -> dict[str, float]:
    """The measures (all but NC4) from a data set's moments.

    Args:
        counts: [C] samples of each class.
        means: [C, F] class means μ_c.
        traces: [C] Σ_{i in c} ‖f_i - μ_c‖².
        within_covariance: [F, F] Σ_W by the convention of `within`.
        weight: [C, F] classifier weight; None for features that no classifier reads: its measures are left out.
        center, within: as in `collapse`.

    Returns:
        As `collapse`, without "nc4".

    Raises:
        ValueError: fewer than two classes present, or a wrong weight, or entries that are not finite.
    """
    check_choice("center", center, ("class", "samples"))
    check_measurable("means", means)
    if weight is not None:
        check_weight(weight, means)
    present = counts > 0
    check_enough_classes(present)
    counts, means, traces = (t[present].double() for t in (counts, means, traces))
    num_present = len(counts)
    M = means - global_mean(counts, means, center)  # [K, F]
    R_M = triangle(M)
    variance = traces / counts  # [K]
    total_within = variance.mean() if within == "classes" else traces.sum() / counts.sum()
    total_between = M.square().sum() / num_present
    measures = {
        "classes": float(num_present),
        "nc1": nc1(R_M, num_present, within_covariance.to(means)),
        "trace_ratio": ratio(float(total_within), float(total_between)),
        "cdnv": _cdnv(means, variance),
        **{f"{name}_means": value for name, value in _geometry(M, R_M).items()},
    }
    if weight is not None:
        W = weight.detach().to(means)[present]  # [K, F]
        R_W = triangle(W)
        measures |= {f"{name}_weights": value for name, value in _geometry(W, R_W).items()}
        measures |= {
            "nc3": float(torch.linalg.matrix_norm(normalised(W) - normalised(M))),
            "nc3_product": distance_to_etf(W, M, R_W @ R_M.T),
            "nc3_cosine": float(1 - (unit(W) * unit(M)).sum(1).mean()),
        }
    if M.shape[1] < num_present - 1:
        dim = M.shape[1]
        measures["tight_frame_floor"] = math.sqrt((num_present - dim) / (dim * (num_present - 1)))
    return measures


def check_weight(weight: Tensor, means: Tensor) -> None:
    """Raise unless `weight` is a finite floating matrix of the shape of the class means."""
    check_floating("weight", weight)
    check_shape("weight", weight, tuple(means.shape))
    check_measurable("weight", weight)


def check_enough_classes(present: Tensor) -> None:
    """Raise ValueError unless at least two classes have samples."""
    num_present = int(present.sum())
    if num_present < 2:
        raise ValueError(f"labels must hold at least two classes to measure collapse; got {num_present}")


def global_mean(counts: Tensor, means: Tensor, center: Center) -> Tensor:
    """Mean of the class means [K, F], or of the samples, of whose classes there are `counts` [K]."""
    share = counts / counts.sum() if center == "samples" else torch.full_like(counts, 1 / len(counts))
    return share @ means


def triangle(vectors: Tensor) -> Tensor:
    """R of V = QR: ‖VVᵀ‖ = ‖RRᵀ‖, and R has the singular values of V."""
    return torch.linalg.qr(vectors, mode="r").R


def nc1(R: Tensor, num_classes: int, within_covariance: Tensor) -> float:
    """tr(Σ_W Σ_B⁺)/K: Σ_B = V diag(s²) Vᵀ with M/sqrt(K) = U diag(s) Vᵀ, of which U is not wanted: M = QR."""
    _, s, Vh = torch.linalg.svd(R / math.sqrt(num_classes), full_matrices=False)
    rank = rank_between(s, num_classes, R.shape[1])
    if rank == 0:
        return math.inf
    along = (Vh[:rank] @ within_covariance * Vh[:rank]).sum(1)  # [rank], v_kᵀ Σ_W v_k
    return float((along / s[:rank].square()).sum() / num_classes)


def rank_between(singular_values: Tensor, num_classes: int, dim: int) -> int:
    """Rank of Σ_B from the singular values of M, of which centring leaves at most K - 1."""
    tolerance = max(num_classes, dim) * torch.finfo(singular_values.dtype).eps * singular_values[0]
    return min(int((singular_values > tolerance).sum()), num_classes - 1)


def _cdnv(means: Tensor, variance: Tensor) -> float:
    """Mean over pairs of (var_c + var_c') / (2 ‖μ_c - μ_c'‖²), infinite where means coincide."""
    centred = means - means.mean(0)  # of which products lose less
    total = 0.0
    for rows, columns, pairs in blocks_of_pairs(len(means), means.device):
        total += float(cdnv_terms(centred, variance, rows, columns, pairs).sum())
    return total / (len(means) * (len(means) - 1) / 2)


def cdnv_terms(centred: Tensor, variance: Tensor, rows: slice, columns: slice, pairs: Tensor) -> Tensor:
    """(var_c + var_c') / (2 ‖μ_c - μ_c'‖²) of a block of pairs [rows, columns], 0 where there is no pair.

    Args:
        centred: [K, F] class means less a vector near them all.
        variance: [K].
        rows, columns, pairs: of `blocks_of_pairs`.
    """
    squares = centred.square().sum(1)  # [K]
    sizes = squares[rows, None] + squares[None, columns]  # [rows, columns]
    distances = sizes - 2 * centred[rows] @ centred[columns].T
    _measure_close_pairs(distances, pairs & (distances < 1e-6 * sizes), centred[rows], centred[columns])
    terms = (variance[rows, None] + variance[None, columns]) / (2 * distances)
    return terms.where(distances > 0, torch.inf).where(pairs, 0)


def _measure_close_pairs(distances: Tensor, close: Tensor, x: Tensor, y: Tensor) -> None:
    """Sets distances [rows, columns] to the exact ‖x_i - y_j‖² where close: products would leave rounding errors."""
    for pairs in close.nonzero().split(max(1, _BLOCK_ENTRIES // x.shape[1])):
        first, second = pairs.unbind(1)
        distances[first, second] = (x[first] - y[second]).square().sum(1)


def blocks_of_pairs(num: int, device: torch.device) -> Iterator[tuple[slice, slice, Tensor]]:
    """Rows, columns and mask of all pairs of different classes, each once, some rows at a time."""
    step = max(1, _BLOCK_ENTRIES // num)
    for start in range(0, num, step):
        stop = min(start + step, num)
        all_pairs = torch.ones(stop - start, num - start, dtype=torch.bool, device=device)
        yield slice(start, stop), slice(start, num), all_pairs.triu(1)


def _geometry(vectors: Tensor, R: Tensor) -> dict[str, float]:
    """NC2 and its companions of [K, F] vectors = QR; where no simplex ETF exists (F < K - 1), also how they crowd."""
    num, dim = vectors.shape
    lengths = torch.linalg.vector_norm(vectors, dim=1)
    directions = unit(vectors)
    num_pairs = num * (num - 1) / 2
    # Deviations from the mean, which is known beforehand: all cosines may be nearly the same.
    mean = float((directions.sum(0).square().sum() - directions.square().sum()) / (2 * num_pairs))
    deviation = squares = from_etf = crowded = energy = 0.0
    largest = -1.0
    for rows, columns, pairs in blocks_of_pairs(num, vectors.device):
        cosines = (directions[rows] @ directions[columns].T).clamp(-1, 1)  # [rows, columns]
        from_mean = (cosines - mean).where(pairs, 0)
        deviation += float(from_mean.sum())
        squares += float(from_mean.square().sum())
        from_etf += float((cosines + 1 / (num - 1)).where(pairs, 0).abs().sum())
        if dim < num - 1:
            largest = max(largest, float(cosines.where(pairs, -1).max()))
            crowded += float(cosines.where(pairs, 0).square().sum())
            energy += float((2 - 2 * cosines).clamp(min=0).rsqrt().where(pairs, 0).sum())
    deviation /= num_pairs
    measures = {
        "nc2": distance_to_etf(vectors, vectors, R @ R.T),
        "equinorm": ratio(float(lengths.std(correction=0)), float(lengths.mean())),
        "cosine_mean": mean + deviation,
        "cosine_std": math.sqrt(max(0.0, squares / num_pairs - deviation**2)),
        "equiangular": from_etf / num_pairs,
    }
    if dim < num - 1:
        crowding = {"max": largest, "rms": math.sqrt(crowded / num_pairs)}
        measures |= {f"cosine_{name}": value for name, value in crowding.items()} | {"energy": energy / num_pairs}
    return measures


def unit(vectors: Tensor) -> Tensor:
    """Rows at unit length; a row of zeros stays."""
    lengths = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    return vectors / lengths.where(lengths > 0, 1)


def distance_to_etf(x: Tensor, y: Tensor, of_same_norm: Tensor) -> float:
    """‖XYᵀ/‖XYᵀ‖ - E‖, E = (I - J/K)/sqrt(K-1), with another matrix of the norm of XYᵀ.

    Both terms have norm 1, so that the square is 2 - 2 <XYᵀ, E>/‖XYᵀ‖, which takes K F products instead of K² F. Near
    0, where the difference would leave rounding errors, it is summed entry by entry, some rows at a time.
    """
    num = len(x)
    norm = torch.linalg.matrix_norm(of_same_norm)
    scale = 1 / norm.where(norm > 0, 1)
    along_etf = ((x * y).sum() - x.sum(0) @ y.sum(0) / num) / math.sqrt(num - 1)  # <XYᵀ, E>
    square = 1 + float(norm > 0) - 2 * float(along_etf * scale)
    if square > _FAR:
        return math.sqrt(square)
    step = max(1, _BLOCK_ENTRIES // num)
    total = 0.0
    for start in range(0, num, step):
        rows = slice(start, min(start + step, num))
        difference = (x[rows] * scale @ y.T).add_(1 / (num * math.sqrt(num - 1)))  # [rows, K]
        difference[:, rows].diagonal().sub_(1 / math.sqrt(num - 1))
        total += float(difference.square().sum())
    return math.sqrt(total)


def normalised(matrix: Tensor) -> Tensor:
    norm = torch.linalg.matrix_norm(matrix)
    return matrix / norm.where(norm > 0, 1)


def ratio(top: float, bottom: float) -> float:
    return top / bottom if bottom > 0 else math.inf
