"""How far a network has collapsed: NC1 to NC4 of a data set's features and a classifier.

The formulas are in `allnc.metrics.measures`; NC4, the share of samples whose predicted class is not that of
the nearest class mean, needs the samples themselves.

Legend: N samples, F features, C classes, K of them present.
"""

from __future__ import annotations

import torch
from torch import Tensor

from allnc.metrics.accumulate import CollapseAccumulator, predictions_of
from allnc.metrics.conventions import CONVENTIONS, Convention, by_convention
from allnc.metrics.measures import Center, Within, check_measurable
from allnc.ops._common import check_choice, check_floating, check_labels, check_shape

_CHUNK_ENTRIES = 1 << 24  # 128 MB in float64: the part of the features or of the logits converted at a time


def collapse(
    features: Tensor,
    labels: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    logits: Tensor | None = None,
    *,
    center: Center = "class",
    within: Within = "classes",
    spectral: bool = False,
    convention: Convention = "allnc",
) -> dict[str, float]:
    """All measures of neural collapse of a data set's features and a classifier.

    Classes without a sample have no mean: they are left out everywhere, and "classes" says how many were
    measured. Class means are centred; classifier vectors are taken as they are.

    Args:
        features: [N, F] floating, the classifier's input, without augmentation.
        labels: [N] int64 in [0, C).
        weight: [C, F] floating, classifier weight.
        bias: [C] or None; only for NC4, when logits are not given.
        logits: [N, C] the network's own, bias included; default: features weightᵀ + bias.
        center: global mean, "class" (mean of the class means) or "samples".
        within: within-class covariance, averaged over "classes" or "pooled" over samples.
        spectral: also effective ranks, VCI, MIR and HDR, see `allnc.metrics.spectrum`.
        convention: "allnc", or the program whose numbers to reproduce instead: "papyan", "zhu", "nc_loss",
            "rhubarbwu" (`allnc.metrics.conventions`). They bring their own center and within, and no more than they
            report: nc1, and of nc2_means, nc2_weights, equinorm_*, equiangular_*, trace_ratio, cdnv, nc3, nc3_product,
            nc4 what they have; bias, ‖W μ_G + b‖; nc4_agreement, 1 - nc4 of logits without bias.

    Returns:
        Python floats by name; lower is nearer to collapse unless said otherwise:
        classes: K, number of classes present.
        nc1, trace_ratio, cdnv: tr(Σ_W Σ_B⁺)/K, tr Σ_W / tr Σ_B, and the mean over pairs of classes of
            (var_c + var_c') / (2 ‖μ_c - μ_c'‖²). Infinite where means coincide.
        nc2_means, nc2_weights: distance of the normalised Gram matrix to the simplex ETF's.
        equinorm_means, equinorm_weights: std/mean of the vectors' lengths.
        cosine_mean_*, cosine_std_*: of the cosines of all pairs; ideal -1/(K-1) and 0.
        equiangular_means, equiangular_weights: mean of abs(cos + 1/(K-1)).
        nc3, nc3_product, nc3_cosine: ‖W/‖W‖ - M/‖M‖‖, ‖WMᵀ/‖WMᵀ‖ - E‖, mean of 1 - cos(w_c, m_c).
        nc4: share in [0, 1].
        Only if F < K - 1, where no simplex ETF exists: cosine_max_*, the largest cosine of a pair (at least 0 where
        K > F + 1, which the 2F directions of orthogonal axes reach); cosine_rms_* against its least value
        tight_frame_floor = sqrt((K-F)/(F(K-1))), that of a tight frame of unit vectors; energy_*, the mean inverse
        distance of the unit vectors (hyperspherical energy).

    Raises:
        TypeError, ValueError: wrong types, shapes or labels, fewer than two classes present, a convention with
            arguments that it would ignore, or NaN, infinity or a number beyond 1e60 anywhere (logits may be infinite):
            there is no such measure of a run that has diverged.

    Source: Papyan, Han & Donoho, PNAS 2020 (NC1-NC4); Zhu et al., NeurIPS 2021 (normalised Gram); Galanti
        et al., ICLR 2022 (CDNV); Jiang et al., ICML 2024 (F < C - 1); Liu et al., NeurIPS 2018 (energy).
    """
    check_choice("convention", convention, CONVENTIONS)
    own = convention == "allnc"
    if not own and (center != "class" or within != "classes" or spectral):
        raise ValueError(f"center, within and spectral would be ignored with convention {convention!r}; remove them")
    if convention == "rhubarbwu" and logits is not None:
        raise ValueError("logits would be ignored with convention 'rhubarbwu', whose NC4 is of W f; remove them")
    check_floating("features", features)
    check_shape("features", features, ("N", "F"))
    check_labels(labels, features.shape[0])
    check_floating("weight", weight)
    check_shape("weight", weight, ("C", features.shape[1]))
    num_classes, num_rows = weight.shape[0], features.shape[0]
    if bias is not None:
        check_floating("bias", bias)
        check_shape("bias", bias, (num_classes,))
    if logits is not None:
        check_shape("logits", logits, (num_rows, num_classes))
    for name, x in (("weight", weight), ("bias", bias)):
        if x is not None:
            check_measurable(name, x)  # those of features and logits are looked at piece by piece
    inside = (labels >= 0) & (labels < num_classes)
    if not bool(inside.all()):
        raise ValueError(f"labels must be in [0, {num_classes}); got {int(labels[~inside][0])}")
    accumulator = CollapseAccumulator(
        num_classes,
        features.shape[1],
        class_counts=torch.bincount(labels, minlength=num_classes),
        within=within if own else "pooled",
        device=features.device,
    )
    step = max(1, _CHUNK_ENTRIES // max(weight.shape))
    chunks = [slice(start, start + step) for start in range(0, num_rows, step)]
    for rows in chunks:
        accumulator.update(features[rows], labels[rows])
    read_bias = None if convention == "rhubarbwu" else bias
    for rows in chunks:
        of_rows = _logits(features[rows], weight, read_bias) if logits is None else logits[rows]
        accumulator.count_disagreement(features[rows], predictions_of(of_rows))
    if own:
        return accumulator.compute(weight, bias, center=center, spectral=spectral)
    disagreement = float(accumulator.nearest[0] / accumulator.nearest[1])
    return by_convention(convention, accumulator.moments, accumulator.within_covariance(), weight, bias, disagreement)


def _logits(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    logits = features.detach().double() @ weight.detach().double().T
    return logits if bias is None else logits + bias.detach()
