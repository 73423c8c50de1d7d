"""The numbers that other programs report for the same features, in float64.

Everyone's NC1 to NC4 have the same ideal value and other numbers on the way there. Each convention here has the
quantities that its program prints, under our names for them:

    papyan       notebook of github.com/neuralcollapse/neuralcollapse (Papyan, Han & Donoho); μ_G mean of class means;
                 NC1 without the 1/K that the paper has; NC3 squared; standard deviations over K - 1
    zhu          validate_NC.py of github.com/tding1/Neural-Collapse (Zhu et al., NeurIPS 2021); μ_G mean of samples;
                 NC2 of the classifier alone; NC3 of the product W Mᵀ; ‖W μ_G + b‖
    nc_loss      evaluate.py of github.com/jinxinzhou/nc_loss (Zhou et al., NeurIPS 2022); as zhu, W less its mean row
    rhubarbwu    github.com/rhubarbwu/neural-collapse; μ_G mean of class means; NC4 is agreement, of W f without bias

All of them pool Σ_W over samples, so that classes of many samples decide on it.

Legend: F features, C classes, K of them present.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from allnc.metrics.measures import (
    Moments,
    check_weight,
    collapse_from_moments,
    distance_to_etf,
    global_mean,
    normalised,
    triangle,
)

Convention = Literal["allnc", "papyan", "zhu", "nc_loss", "rhubarbwu"]
CONVENTIONS: tuple[Convention, ...] = ("allnc", "papyan", "zhu", "nc_loss", "rhubarbwu")


def by_convention(
    convention: Convention,
    moments: Moments,
    pooled_covariance: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    disagreement: float,
) -> dict[str, float]:
    """The quantities of another program from a data set's moments.

    Args:
        convention: of another program, not "allnc".
        moments: of the features.
        pooled_covariance: [F, F] Σ_W, pooled over samples.
        weight: [C, F] classifier weight.
        bias: [C] or None.
        disagreement: share of samples whose prediction is not the nearest class mean; for rhubarbwu predictions are
            those without bias.

    Returns:
        As `collapse` with this convention.
    """
    check_weight(weight, moments.means)
    present = moments.counts > 0
    center = "samples" if convention in ("zhu", "nc_loss") else "class"
    ours = collapse_from_moments(*moments, pooled_covariance, weight, center=center, within="pooled")
    counts, means = moments.counts[present], moments.means[present]
    W = weight.detach().to(means)[present]  # [K, F]
    origin = global_mean(counts, means, center)  # [F]
    M = means - origin
    num = len(M)
    if convention == "papyan":
        return {
            "nc1": num * ours["nc1"],
            **{f"equinorm_{of}": ours[f"equinorm_{of}"] * math.sqrt(num / (num - 1)) for of in ("means", "weights")},
            **{f"equiangular_{of}": ours[f"equiangular_{of}"] for of in ("means", "weights")},
            "nc3": float(torch.linalg.matrix_norm(normalised(W) - normalised(M)) ** 2),
            "nc4": disagreement,
        }
    if convention == "rhubarbwu":
        names = ("nc1", "trace_ratio", "cdnv", "nc2_means", "nc3_product")
        return {**{name: ours[name] for name in names}, "nc4_agreement": 1 - disagreement}
    offsets = W @ origin if bias is None else W @ origin + bias.detach().to(W)[present]
    if convention == "nc_loss":
        W = W - W.mean(0)
    R_W, R_M = triangle(W), triangle(M)
    return {
        "nc1": ours["nc1"],
        "nc2_weights": distance_to_etf(W, W, R_W @ R_W.T),
        "nc3_product": distance_to_etf(W, M, R_W @ R_M.T),
        "bias": float(torch.linalg.vector_norm(offsets)),
    }
