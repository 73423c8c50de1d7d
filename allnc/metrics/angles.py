"""Inter-class pairwise angles (ICPA) of class means or classifier vectors, and the simplex ETF's ideal.

Legend: C classes, F features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from allnc.metrics.accuracy import shot_groups
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
        vectors: [C, F] floating; a row of zeros stands for a class without a vector.
        centre: subtract the mean of the rows first (class means: yes; classifier vectors: no).

    Returns:
        [C, C] float64 in [0, 180], NaN in the rows and columns of absent classes, 0 on the diagonal.

    Raises:
        TypeError, ValueError: not a floating matrix.

    Source: AllNC (arXiv 2408.07253), inter-class pairwise angles.
    """
    check_floating("vectors", vectors)
    check_shape("vectors", vectors, ("C", "F"))
    rows = vectors.detach().double().cpu()
    there = (rows != 0).any(1)
    if centre:
        rows = (rows - rows[there].mean(0)) * there[:, None]
    lengths = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    unit = rows / lengths.where(lengths > 0, torch.nan)
    angles = torch.rad2deg(torch.arccos((unit @ unit.T).clamp(-1, 1)))
    same = torch.eye(len(angles), dtype=torch.bool) & ~angles.isnan()
    return angles.masked_fill(same, 0)


def angle_blocks(
    angles: Tensor, class_counts: Tensor | Sequence[int], *, many: int = 100, few: int = 20
) -> dict[str, float | None]:
    """Mean angle between the classes of each pair of shot groups.

    Args:
        angles: [C, C] degrees, as `pairwise_angles` returns them; NaN entries are left out.
        class_counts: [C] training images of each class.
        many: classes with more training images than this are many-shot.
        few: classes with fewer training images than this are few-shot.

    Returns:
        {"many-many", "many-medium", ..., "few-few"} in degrees; None for a block without a pair.

    Raises:
        ValueError: shapes that do not fit.
    """
    groups = shot_groups(class_counts, many=many, few=few)
    num_classes = len(groups["many"])
    check_shape("angles", angles, (num_classes, num_classes))
    names = list(groups)
    usable = ~torch.eye(num_classes, dtype=torch.bool) & ~angles.isnan()
    blocks: dict[str, float | None] = {}
    for first in range(3):
        for second in range(first, 3):
            pairs = groups[names[first]][:, None] & groups[names[second]][None, :] & usable
            mean = float(angles[pairs].mean()) if bool(pairs.any()) else None
            blocks[f"{names[first]}-{names[second]}"] = mean
    return blocks
