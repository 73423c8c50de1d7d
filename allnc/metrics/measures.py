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
from typing import Literal

import torch
from torch import Tensor

from allnc.ops._common import check_choice, check_floating, check_shape

Center = Literal["class", "samples"]
Within = Literal["classes", "pooled"]

LARGEST = 1e60  # of what is measured: fourth powers, and sums of them, stay within float64
_BLOCK_ENTRIES = 1 << 22  # of a matrix of pairs of classes, 32 MB at a time: whole, it may have 66 million


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
    weight: Tensor,
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
        weight: [C, F] classifier weight.
        center, within: as in `collapse`.

    Returns:
        As `collapse`, without "nc4".

    Raises:
        ValueError: fewer than two classes present, or a wrong weight, or entries that are not finite.
    """
    check_choice("center", center, ("class", "samples"))
    check_floating("weight", weight)
    check_shape("weight", weight, tuple(means.shape))
    check_measurable("means", means)
    check_measurable("weight", weight)
    present = counts > 0
    num_present = int(present.sum())
    if num_present < 2:
        raise ValueError(f"labels must hold at least two classes to measure collapse; got {num_present}")
    counts, means, traces = (t[present].double() for t in (counts, means, traces))
    W = weight.detach().to(means)[present]  # [K, F]
    share = counts / counts.sum() if center == "samples" else torch.full_like(counts, 1 / num_present)
    M = means - share @ means  # [K, F]

    R_M, R_W = (torch.linalg.qr(vectors, mode="r").R for vectors in (M, W))  # as V = QR, ‖VVᵀ‖ = ‖RRᵀ‖
    variance = traces / counts  # [K]
    total_within = variance.mean() if within == "classes" else traces.sum() / counts.sum()
    total_between = M.square().sum() / num_present
    measures = {
        "classes": float(num_present),
        "nc1": _nc1(R_M, num_present, within_covariance.to(means)),
        "trace_ratio": _ratio(float(total_within), float(total_between)),
        "cdnv": _cdnv(means, variance),
        **{f"{name}_means": value for name, value in _geometry(M, R_M).items()},
        **{f"{name}_weights": value for name, value in _geometry(W, R_W).items()},
        "nc3": float(torch.linalg.matrix_norm(_normalised(W) - _normalised(M))),
        "nc3_product": _distance_to_etf(W, M, R_W @ R_M.T),
        "nc3_cosine": float(1 - (_unit(W) * _unit(M)).sum(1).mean()),
    }
    if M.shape[1] < num_present - 1:
        dim = M.shape[1]
        measures["tight_frame_floor"] = math.sqrt((num_present - dim) / (dim * (num_present - 1)))
    return measures


def _nc1(R: Tensor, num_classes: int, within_covariance: Tensor) -> float:
    """tr(Σ_W Σ_B⁺)/K: Σ_B = V diag(s²) Vᵀ with M/sqrt(K) = U diag(s) Vᵀ, of which U is not wanted: M = QR."""
    _, s, Vh = torch.linalg.svd(R / math.sqrt(num_classes), full_matrices=False)
    tolerance = max(num_classes, R.shape[1]) * torch.finfo(R.dtype).eps * s[0]
    rank = min(int((s > tolerance).sum()), num_classes - 1)  # centring leaves at most K - 1 directions
    if rank == 0:
        return math.inf
    along = (Vh[:rank] @ within_covariance * Vh[:rank]).sum(1)  # [rank], v_kᵀ Σ_W v_k
    return float((along / s[:rank].square()).sum() / num_classes)


def _cdnv(means: Tensor, variance: Tensor) -> float:
    """Mean over pairs of (var_c + var_c') / (2 ‖μ_c - μ_c'‖²), infinite where means coincide."""
    centred = means - means.mean(0)  # of which products lose less
    squares = centred.square().sum(1)  # [K]
    total = 0.0
    for rows, columns, pairs in _blocks_of_pairs(len(means), means.device):
        sizes = squares[rows, None] + squares[None, columns]  # [rows, columns]
        distances = sizes - 2 * centred[rows] @ centred[columns].T
        _measure_close_pairs(distances, pairs & (distances < 1e-6 * sizes), centred[rows], centred[columns])
        terms = (variance[rows, None] + variance[None, columns]) / (2 * distances)
        total += float(terms.where(distances > 0, torch.inf).where(pairs, 0).sum())
    return total / (len(means) * (len(means) - 1) / 2)


def _measure_close_pairs(distances: Tensor, close: Tensor, x: Tensor, y: Tensor) -> None:
    """Sets distances [rows, columns] to the exact ‖x_i - y_j‖² where close: products would leave rounding errors."""
    for pairs in close.nonzero().split(max(1, _BLOCK_ENTRIES // x.shape[1])):
        first, second = pairs.unbind(1)
        distances[first, second] = (x[first] - y[second]).square().sum(1)


def _blocks_of_pairs(num: int, device: torch.device) -> Iterator[tuple[slice, slice, Tensor]]:
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
    unit = _unit(vectors)
    num_pairs = num * (num - 1) / 2
    # Deviations from the mean, which is known beforehand: all cosines may be nearly the same.
    mean = float((unit.sum(0).square().sum() - unit.square().sum()) / (2 * num_pairs))
    deviation = squares = from_etf = crowded = energy = 0.0
    largest = -1.0
    for rows, columns, pairs in _blocks_of_pairs(num, unit.device):
        cosines = (unit[rows] @ unit[columns].T).clamp(-1, 1)  # [rows, columns]
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
        "nc2": _distance_to_etf(vectors, vectors, R @ R.T),
        "equinorm": _ratio(float(lengths.std(correction=0)), float(lengths.mean())),
        "cosine_mean": mean + deviation,
        "cosine_std": math.sqrt(max(0.0, squares / num_pairs - deviation**2)),
        "equiangular": from_etf / num_pairs,
    }
    if dim < num - 1:
        crowding = {"max": largest, "rms": math.sqrt(crowded / num_pairs)}
        measures |= {f"cosine_{name}": value for name, value in crowding.items()} | {"energy": energy / num_pairs}
    return measures


def _unit(vectors: Tensor) -> Tensor:
    """Rows at unit length; a row of zeros stays."""
    lengths = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    return vectors / lengths.where(lengths > 0, 1)


def _distance_to_etf(x: Tensor, y: Tensor, of_same_norm: Tensor) -> float:
    """‖XYᵀ/‖XYᵀ‖ - E‖, E = (I - J/K)/sqrt(K-1), with another matrix of the norm of XYᵀ; some rows at a time."""
    num = len(x)
    norm = torch.linalg.matrix_norm(of_same_norm)
    scale = 1 / norm.where(norm > 0, 1)
    step = max(1, _BLOCK_ENTRIES // num)
    total = 0.0
    for start in range(0, num, step):
        rows = slice(start, min(start + step, num))
        difference = (x[rows] * scale @ y.T).add_(1 / (num * math.sqrt(num - 1)))  # [rows, K]
        difference[:, rows].diagonal().sub_(1 / math.sqrt(num - 1))
        total += float(difference.square().sum())
    return math.sqrt(total)


def _normalised(matrix: Tensor) -> Tensor:
    norm = torch.linalg.matrix_norm(matrix)
    return matrix / norm.where(norm > 0, 1)


def _ratio(top: float, bottom: float) -> float:
    return top / bottom if bottom > 0 else math.inf
