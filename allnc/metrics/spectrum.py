"""Measures of the spectra of within-class and between-class covariance and of the classifier, in float64.

With Σ_W the within-class covariance, Σ_B = MᵀM/K, Σ_T = Σ_W + Σ_B, and G(X) the Gram matrix of the unit rows of X:

    effective rank of A   exp H(σ / Σσ), σ the singular values of A, H(p) = -Σ p log p
    VCI                   1 - tr(Σ_T⁺ Σ_B) / rank Σ_B
    matrix entropy H(G)   that of the eigenvalues of G / tr G
    MIR                   (H(G_W) + H(G_M) - H(G_W ⊙ G_M)) / min(H(G_W), H(G_M))
    HDR                   |H(G_W) - H(G_M)| / max(H(G_W), H(G_M))

Legend: F features, C classes, K of them present; m_c centred class means, M = [m_1 ... m_K]ᵀ.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from allnc.metrics.measures import (
    Center,
    check_enough_classes,
    check_measurable,
    check_weight,
    global_mean,
    rank_between,
    triangle,
    unit,
)
from allnc.ops._common import check_floating, check_shape

MOST_CLASSES_OF_MIR = 2048  # its K x K matrix has no factor of F columns; 8,142 classes would take minutes


def effective_rank(matrix: Tensor) -> float:
    """Effective rank: the exponential of the entropy of the singular values, as shares of their sum.

    Args:
        matrix: [m, n] floating.

    Returns:
        In [1, rank]: equal to the rank if all singular values that are not 0 are the same; 0 for a matrix of zeros.

    Raises:
        TypeError, ValueError: not a finite floating matrix.

    Source: Roy & Vetterli, The effective rank, EUSIPCO 2007.

    Example:
        >>> round(effective_rank(torch.diag(torch.tensor([3.0, 3.0, 0.0]))), 6)
        2.0
    """
    check_floating("matrix", matrix)
    check_shape("matrix", matrix, ("m", "n"))
    check_measurable("matrix", matrix)
    return _exp_entropy(torch.linalg.svdvals(matrix.detach().double()))


def ideal_mir(num_classes: int) -> float:
    """MIR of a simplex ETF with itself: 1/(C-1) + (C-2) log(C-2) / ((C-1) log(C-1)).

    Args:
        num_classes: C >= 3.

    Raises:
        ValueError: fewer than three classes.

    Source: Song et al., ICML 2024.
    """
    if num_classes < 3:
        raise ValueError(f"num_classes must be >= 3, two opposite vectors have no entropy; got {num_classes}")
    n = num_classes - 1
    return 1 / n + (n - 1) * math.log(n - 1) / (n * math.log(n))


def spectral_measures(
    counts: Tensor, means: Tensor, within_covariance: Tensor, weight: Tensor | None, *, center: Center = "class"
) -> dict[str, float]:
    """Effective ranks, variability collapse index, and mutual information of classifier and class means.

    Args:
        counts: [C] samples of each class.
        means: [C, F] class means.
        within_covariance: [F, F] Σ_W.
        weight: [C, F] classifier weight, or None.
        center: global mean, "class" (mean of the class means) or "samples".

    Returns:
        effective_rank_within, effective_rank_between: of the matrices Σ_W and Σ_B; at collapse the latter is K - 1.
        vci: variability collapse index in [0, 1], 0 at collapse, 1 where the class means coincide.
        With weight also effective_rank_weights, of W itself (K - 1 for a simplex ETF), and, for 3 to 2048 classes, mir
        and hdr, `ideal_mir` and 0 at collapse. They are left out where means or weights lie on one line, whose entropy
        is 0.

    Raises:
        ValueError: fewer than two classes present, or a wrong weight, or entries that are not finite.

    Source: Roy & Vetterli, EUSIPCO 2007 (effective rank); Xu & Liu, Quantifying the Variability Collapse of Neural
        Networks, ICML 2023 (VCI); Song et al., Unveiling the Dynamics of Information Interplay in Supervised
        Learning, ICML 2024 (MIR, HDR).
    """
    check_measurable("means", means)
    if weight is not None:
        check_weight(weight, means)
    present = counts > 0
    check_enough_classes(present)
    counts, means = counts[present].double(), means[present].double()
    covariance = within_covariance.to(means)
    M = means - global_mean(counts, means, center)  # [K, F]
    R_M = triangle(M)
    s = torch.linalg.svdvals(R_M)
    measures = {
        "effective_rank_within": _exp_entropy(torch.linalg.eigvalsh(covariance).clamp(min=0)),
        "effective_rank_between": _exp_entropy(s.square()),
        "vci": _vci(covariance, R_M, len(M), rank_between(s, *M.shape)),
    }
    if weight is not None:
        W = weight.detach().to(means)[present]  # [K, F]
        measures["effective_rank_weights"] = _exp_entropy(torch.linalg.svdvals(triangle(W)))
        if len(M) <= MOST_CLASSES_OF_MIR:
            measures |= _information(unit(W), unit(M))
    return measures


def _vci(covariance: Tensor, R_M: Tensor, num_classes: int, rank: int) -> float:
    """1 - tr(Σ_T⁺ Σ_B)/rank: with Σ_T = Σ_k λ_k q_k q_kᵀ the trace is Σ_k ‖M q_k‖² / (K λ_k)."""
    if rank == 0:
        return 1.0
    values, vectors = torch.linalg.eigh(covariance + R_M.T @ R_M / num_classes)
    kept = values > len(values) * torch.finfo(values.dtype).eps * values[-1]
    between = (R_M @ vectors[:, kept]).square().sum(0) / num_classes
    return min(1.0, max(0.0, 1 - float((between / values[kept]).sum()) / rank))


def _information(W: Tensor, M: Tensor) -> dict[str, float]:
    """MIR and HDR of unit rows [K, F]."""
    of_weights, of_means = (_entropy(torch.linalg.svdvals(triangle(x)).square()) for x in (W, M))
    if min(of_weights, of_means) < 1e-9:
        return {}
    together = _entropy(torch.linalg.eigvalsh((W @ W.T) * (M @ M.T)).clamp(min=0))
    return {
        "mir": (of_weights + of_means - together) / min(of_weights, of_means),
        "hdr": abs(of_weights - of_means) / max(of_weights, of_means),
    }


def _exp_entropy(values: Tensor) -> float:
    return math.exp(_entropy(values)) if bool((values > 0).any()) else 0.0


def _entropy(values: Tensor) -> float:
    """-Σ p log p of values >= 0 as shares of their sum."""
    shares = values / values.sum()
    return float(-torch.special.xlogy(shares, shares).sum())
