"""Collapse within and between the many-, medium- and few-shot classes, from the moments of one pass.

Minority collapse shows in the pairs of few-shot classes: their class vectors, and with them their means, turn into one
direction, and the mean angle of the block falls.

Legend: F features, C classes, K of them present; m_c centred class means, w_c class vectors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from allnc.metrics.accuracy import shot_groups
from allnc.metrics.measures import (
    Center,
    Moments,
    blocks_of_pairs,
    cdnv_terms,
    check_enough_classes,
    check_measurable,
    check_weight,
    global_mean,
    unit,
)
from allnc.ops._common import check_choice, check_shape

ShotMeasures = dict[str, dict[str, float | None]]


def by_shot(
    moments: Moments,
    class_counts: Tensor | Sequence[int],
    *,
    weight: Tensor | None = None,
    center: Center = "class",
    many: int = 100,
    few: int = 20,
) -> ShotMeasures:
    """Measures of collapse within and between the many-, medium- and few-shot classes.

    Args:
        moments: of one pass (`CollapseAccumulator.moments`, `LayerCollapse.moments`).
        class_counts: [C] training images of each class, which decide on its group.
        weight: [C, F] class vectors, or None.
        center: global mean, "class" (mean of the class means) or "samples", of all classes.
        many: classes with more training images than this are many-shot.
        few: classes with fewer training images than this are few-shot.

    Returns:
        For "many", "medium", "few": classes; norm_means and norm_std_means, mean and standard deviation of ‖m_c‖; with
        weight norm_weights, norm_std_weights and nc3_cosine, the mean of 1 - cos(w_c, m_c).
        For "many-many", "many-medium", ..., "few-few", over the pairs of different classes of the two groups: pairs;
        cdnv; cosine_means and angle_means (degrees; of m_c); with weight cosine_weights and angle_weights; and
        trace_ratio, mean of (var_c + var_c')/2 over mean of ‖μ_c - μ_c'‖²/2, in which a group's own block counts a
        class with itself too and is thereby tr Σ_W / tr Σ_B of the group alone.
        None where there is no class or no pair.

    Raises:
        ValueError: shapes that do not fit, fewer than two classes present, or entries that are not finite.

    Source: ours; groups as in Liu et al., CVPR 2019; minority collapse: Fang et al., PNAS 2021.
    """
    check_choice("center", center, ("class", "samples"))
    groups = shot_groups(class_counts, many=many, few=few)
    check_shape("moments.means", moments.means, (len(groups["many"]), "F"))
    check_measurable("means", moments.means)
    if weight is not None:
        check_weight(weight, moments.means)
    present = moments.counts > 0
    check_enough_classes(present)
    counts, means, traces = (tensor[present].double() for tensor in moments)
    variance = traces / counts  # [K]
    M = means - global_mean(counts, means, center)  # [K, F]
    vectors = {"means": M}
    if weight is not None:
        vectors["weights"] = weight.detach().to(means)[present]
    member = torch.stack(list(groups.values()), 1).to(means)[present]  # [K, 3], 1 in the column of a class's group
    result: ShotMeasures = {name: _of_group(vectors, member[:, g] > 0) for g, name in enumerate(groups)}
    names = list(groups)
    of_pairs = {"pairs": _pairs(member), "trace_ratio": _trace_ratios(M, variance, member)}
    of_pairs |= _means_over_pairs(vectors, variance, member)
    for first in range(3):
        for second in range(first, 3):
            block = {name: float(table[first, second]) for name, table in of_pairs.items()}
            there = block["pairs"] > 0
            result[f"{names[first]}-{names[second]}"] = {
                name: value if name == "pairs" or (there and value == value) else None for name, value in block.items()
            }
    return result


def _of_group(vectors: dict[str, Tensor], inside: Tensor) -> dict[str, float | None]:
    measures: dict[str, float | None] = {"classes": float(inside.sum())}
    for of, rows in vectors.items():
        lengths = torch.linalg.vector_norm(rows[inside], dim=1)
        measures[f"norm_{of}"] = float(lengths.mean()) if len(lengths) else None
        measures[f"norm_std_{of}"] = float(lengths.std(correction=0)) if len(lengths) else None
    if "weights" in vectors:
        cosines = (unit(vectors["means"][inside]) * unit(vectors["weights"][inside])).sum(1)
        measures["nc3_cosine"] = float(1 - cosines.mean()) if len(cosines) else None
    return measures


def _pairs(member: Tensor) -> Tensor:
    """[3, 3] pairs of different classes of two groups, whose classes `member` [K, 3] has."""
    sizes = member.sum(0)
    return sizes[:, None] * sizes - torch.diag(sizes * (sizes + 1) / 2)


def _trace_ratios(M: Tensor, variance: Tensor, member: Tensor) -> Tensor:
    """[3, 3]; Σ_c Σ_c' ‖m_c - m_c'‖² of two groups is n_b Σ_c ‖m_c‖² + n_a Σ_c' ‖m_c'‖² - 2 <Σ_c m_c, Σ_c' m_c'>."""
    centres = member.T @ M / member.sum(0).clamp(min=1)[:, None]  # [3, F]
    own = member.T @ (M - member @ centres).square().sum(1) / member.sum(0)  # [3], mean square around a group's centre
    apart = (centres[:, None] - centres[None]).square().sum(2)  # [3, 3]
    between = (own[:, None] + own + apart) / 2
    within = member.T @ variance / member.sum(0)  # [3]
    top = (within[:, None] + within) / 2
    return (top / between).where(between > 0, torch.inf)


def _means_over_pairs(vectors: dict[str, Tensor], variance: Tensor, member: Tensor) -> dict[str, Tensor]:
    """CDNV, cosines and angles [3, 3], their means over the pairs of two groups; NaN where there is none."""
    M = vectors["means"]
    units = {of: unit(rows) for of, rows in vectors.items()}
    members = {of: member * (rows != 0).any(1, keepdim=True) for of, rows in vectors.items()}  # those with a direction
    names = ["cdnv", *(f"{name}_{of}" for of in vectors for name in ("cosine", "angle"))]
    sums = {name: torch.zeros(3, 3, dtype=M.dtype, device=M.device) for name in names}
    for rows, columns, pairs in blocks_of_pairs(len(M), M.device):
        terms = cdnv_terms(M, variance, rows, columns, pairs)
        sums["cdnv"] += _by_group(terms, member, rows, columns)
        for of, directions in units.items():
            cosines = (directions[rows] @ directions[columns].T).clamp(-1, 1)
            sums[f"cosine_{of}"] += _by_group(cosines.where(pairs, 0), members[of], rows, columns)
            angles = cosines.arccos().rad2deg().where(pairs, 0)
            sums[f"angle_{of}"] += _by_group(angles, members[of], rows, columns)
    means = {}
    for name, table in sums.items():
        both = table + table.T - torch.diag(table.diagonal())  # a pair of two groups stands on one side or the other
        means[name] = both / _pairs(member if name == "cdnv" else members[name.rpartition("_")[2]])
    return means


def _by_group(terms: Tensor, member: Tensor, rows: slice, columns: slice) -> Tensor:
    """[3, 3] sums of terms [rows, columns] by the groups of their classes; inf stays where it is."""
    row_groups, column_groups = member[rows].bool(), member[columns].bool()
    by_column = torch.stack([terms[:, inside].sum(1) for inside in column_groups.T], 1)  # [rows, 3]
    return torch.stack([by_column[inside].sum(0) for inside in row_groups.T])
