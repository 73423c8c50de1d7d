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
from typing import Literal

import torch
from torch import Tensor

from allnc.ops._common import check_choice, check_floating, check_shape

Center = Literal["class", "samples"]
Within = Literal["classes", "pooled"]


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
        ValueError: fewer than two classes present, or a wrong weight.
    """
    check_choice("center", center, ("class", "samples"))
    check_floating("weight", weight)
    check_shape("weight", weight, tuple(means.shape))
    present = counts > 0
    num_present = int(present.sum())
    if num_present < 2:
        raise ValueError(f"labels must hold at least two classes to measure collapse; got {num_present}")
    counts, means, traces = (t[present].double() for t in (counts, means, traces))
    W = weight.detach().to(means)[present]  # [K, F]
    share = counts / counts.sum() if center == "samples" else torch.full_like(counts, 1 / num_present)
    M = means - share @ means  # [K, F]

    variance = traces / counts  # [K]
    total_within = variance.mean() if within == "classes" else traces.sum() / counts.sum()
    total_between = M.square().sum() / num_present
    measures = {
        "classes": float(num_present),
        "nc1": _nc1(M, within_covariance.to(means)),
        "trace_ratio": _ratio(float(total_within), float(total_between)),
        "cdnv": _cdnv(means, variance),
        **{f"{name}_means": value for name, value in _geometry(M).items()},
        **{f"{name}_weights": value for name, value in _geometry(W).items()},
        "nc3": float(torch.linalg.matrix_norm(_normalised(W) - _normalised(M))),
        "nc3_product": float(torch.linalg.matrix_norm(_normalised(W @ M.T) - _etf(num_present).to(M))),
        "nc3_cosine": float(1 - torch.nn.functional.cosine_similarity(W, M, dim=1).mean()),
    }
    if M.shape[1] < num_present - 1:
        dim = M.shape[1]
        measures["tight_frame_floor"] = math.sqrt((num_present - dim) / (dim * (num_present - 1)))
        for name, vectors in (("means", M), ("weights", W)):
            measures.update({f"{key}_{name}": value for key, value in _crowding(vectors).items()})
    return measures


def _nc1(M: Tensor, within_covariance: Tensor) -> float:
    """tr(Σ_W Σ_B⁺)/K: Σ_B = V diag(s²) Vᵀ with M/sqrt(K) = U diag(s) Vᵀ."""
    num_classes = len(M)
    _, s, Vh = torch.linalg.svd(M / math.sqrt(num_classes), full_matrices=False)
    tolerance = max(M.shape) * torch.finfo(M.dtype).eps * s[0]
    rank = min(int((s > tolerance).sum()), num_classes - 1)  # centring leaves at most K - 1 directions
    if rank == 0:
        return math.inf
    along = (Vh[:rank] @ within_covariance * Vh[:rank]).sum(1)  # [rank], v_kᵀ Σ_W v_k
    return float((along / s[:rank].square()).sum() / num_classes)


def _cdnv(means: Tensor, variance: Tensor) -> float:
    squared = torch.pdist(means).square()  # [K (K-1) / 2]
    first, second = torch.triu_indices(len(means), len(means), 1, device=means.device)
    return float(((variance[first] + variance[second]) / (2 * squared)).where(squared > 0, torch.inf).mean())


def _geometry(vectors: Tensor) -> dict[str, float]:
    """NC2 and its companions of [K, F] vectors."""
    num = len(vectors)
    lengths = torch.linalg.vector_norm(vectors, dim=1)
    cosines = _pair_cosines(vectors)
    return {
        "nc2": float(torch.linalg.matrix_norm(_normalised(vectors @ vectors.T) - _etf(num).to(vectors))),
        "equinorm": _ratio(float(lengths.std(correction=0)), float(lengths.mean())),
        "cosine_mean": float(cosines.mean()),
        "cosine_std": float(cosines.std(correction=0)),
        "equiangular": float((cosines + 1 / (num - 1)).abs().mean()),
    }


def _crowding(vectors: Tensor) -> dict[str, float]:
    cosines = _pair_cosines(vectors)
    distance = (2 - 2 * cosines).clamp(min=0).sqrt()
    return {
        "cosine_max": float(cosines.max()),
        "cosine_rms": float(cosines.square().mean().sqrt()),
        "energy": float(distance.reciprocal().mean()),
    }


def _pair_cosines(vectors: Tensor) -> Tensor:
    """Cosines of all pairs, each once.  [K (K-1) / 2]"""
    unit = torch.nn.functional.normalize(vectors, dim=1)
    first, second = torch.triu_indices(len(vectors), len(vectors), 1, device=vectors.device)
    return (unit @ unit.T)[first, second].clamp(-1, 1)


def _etf(num: int) -> Tensor:
    """E = (I - J/K)/sqrt(K-1), of Frobenius norm 1.  [K, K]"""
    return (torch.eye(num, dtype=torch.float64) - 1 / num) / math.sqrt(num - 1)


def _normalised(matrix: Tensor) -> Tensor:
    norm = torch.linalg.matrix_norm(matrix)
    return matrix / norm.where(norm > 0, 1)


def _ratio(top: float, bottom: float) -> float:
    return top / bottom if bottom > 0 else math.inf
