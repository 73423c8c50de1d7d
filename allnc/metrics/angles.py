"""Inter-class pairwise angles (ICPA) of class means or classifier vectors, and the simplex ETF's ideal.

Legend: C classes, F features.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from allnc.ops._common import check_floating, check_shape


def ideal_angle(num_classes: int) -> float:
    """Angle in degrees between any two of C vectors that form a simplex ETF, arccos(-1/(C-1)).

    Args:
        num_classes: C >= 2.

    Raises:
        ValueError: fewer than two classes.

    Example:
        >>> round(ideal_angle(10), 1)
        96.4
    """
    if num_classes < 2:
        raise ValueError(f"num_classes must be >= 2; got {num_classes}")
    return math.degrees(math.acos(-1 / (num_classes - 1)))


def pairwise_angles(vectors: Tensor, *, centre: bool) -> Tensor:
    """Angles in degrees between all pairs of rows.

    Args:
        vectors: [C, F] floating, of any size; a row of zeros stands for a class without a vector.
        centre: subtract the mean of the rows first (class means: yes; classifier vectors: no).

    Returns:
        [C, C] float64 in [0, 180], 0 on the diagonal; NaN in the rows and columns of absent classes, and of those that
        coincide with the centre to rounding.

    Raises:
        TypeError, ValueError: not a floating matrix, or entries that are not finite.

    Source: AllNC (arXiv 2408.07253), inter-class pairwise angles.
    """
    check_floating("vectors", vectors)
    check_shape("vectors", vectors, ("C", "F"))
    unit = directions(vectors, centre=centre)
    angles = _angles_of(unit @ unit.T)
    diagonal = angles.diagonal()
    diagonal.copy_(diagonal.where(diagonal.isnan(), 0))
    return angles


def check_finite(name: str, vectors: Tensor) -> None:
    """Raise ValueError if an entry is NaN or infinite."""
    if not bool(vectors.isfinite().all()):
        raise ValueError(f"{name} must be finite; got NaN or infinity. A class without a vector is a row of zeros")


class AngleMap(NamedTuple):
    """Angles in degrees of groups of classes, and mean and standard deviation over all pairs of classes."""

    cells: Tensor  # [G, G] mean over the pairs of two groups, NaN where there is none; of one class itself NaN
    mean: float
    std: float


def angle_map(vectors: Tensor, order: Tensor, num_groups: int, *, centre: bool, name: str = "vectors") -> AngleMap:
    """`pairwise_angles` in an order; of many classes by groups, with no more than a group's rows of C x C at a time.

    Angles of groups are those of float32 cosines, which are right to 0.03 degrees.

    Args:
        vectors, centre: as in `pairwise_angles`; `name` is what errors call them.
        order: [C] int64, the classes in the order in which they are grouped.
        num_groups: G >= 1; groups are of equal size, up to one class. Up to so many classes stand alone.

    Raises:
        TypeError, ValueError: as `pairwise_angles`.
    """
    if len(order) <= num_groups:
        angles = pairwise_angles(vectors, centre=centre)
        diagonal = torch.eye(len(angles), dtype=torch.bool)
        values = angles[~diagonal & ~angles.isnan()]
        cells = angles[order][:, order].masked_fill(diagonal, torch.nan)
        if not len(values):
            return AngleMap(cells, math.nan, math.nan)
        return AngleMap(cells, float(values.mean()), float(values.std(correction=0)))
    unit = directions(vectors, centre=centre, name=name).float()[order]
    num_classes = len(unit)
    there = ~unit[:, 0].isnan()
    unit = unit.where(there[:, None], 0)
    group = torch.arange(num_classes) * num_groups // num_classes  # [C]
    bounds = torch.searchsorted(group, torch.arange(num_groups + 1)).tolist()
    sums, counts = torch.zeros(2, num_groups, num_groups, dtype=torch.float64)
    squares = 0.0
    for g, (start, stop) in enumerate(pairwise(bounds)):
        pairs = (there[start:stop, None] & there[None, start:]).triu(1)  # each pair once
        # From a right angle, so that squares of small differences are not lost.
        angles = (_angles_of(unit[start:stop] @ unit[start:].T).double() - 90).where(pairs, 0)
        sums[g].index_add_(0, group[start:], angles.sum(0))
        counts[g].index_add_(0, group[start:], pairs.sum(0).double())
        squares += float(angles.square().sum())
    num_pairs = float(counts.sum())
    mean = float(sums.sum()) / num_pairs if num_pairs else math.nan
    std = math.sqrt(max(0.0, squares / num_pairs - mean**2)) if num_pairs else math.nan
    cells = 90 + sums / counts
    return AngleMap(torch.where(counts.T > 0, cells.T, cells), 90 + mean, std)


def directions(vectors: Tensor, *, centre: bool, name: str = "vectors") -> Tensor:
    """The rows, less their mean if `centre`, at unit length [C, F] float64; NaN where there is no direction."""
    check_finite(name, vectors)
    rows = vectors.detach().double().cpu()
    there = (rows != 0).any(1)
    if centre:
        rows = rows / rows.abs().amax().clamp(min=torch.finfo(rows.dtype).tiny)  # together; their mean may overflow
        lengths = torch.linalg.vector_norm(rows, dim=1)
        rows = (rows - rows[there].mean(0)) * there[:, None]
        noise = 8 * torch.finfo(rows.dtype).eps * lengths.amax()
        rows = rows * (torch.linalg.vector_norm(rows, dim=1, keepdim=True) > noise)
    rows = rows / rows.abs().amax(1, keepdim=True)  # squares neither overflow nor vanish; 0 / 0 is NaN
    return rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True)


def _angles_of(cosines: Tensor) -> Tensor:
    """Degrees, in the memory of the cosines."""
    return cosines.clamp_(-1, 1).arccos_().rad2deg_()
