"""How far class means have moved between two measurements of the same classes, in float64.

With M and M' the centred class means [C, F] before and after:

    drift           ‖M' - M‖ / ‖M‖
    drift_aligned   min ‖M' R - M‖ / ‖M‖ over orthogonal R, what is left of it once the best rotation is taken back

No measure of the features alone sees a rotation of them (NC3 does, unless the classifier turns as well). Means that
turn but keep their shape have an aligned drift of 0; means of two runs, which share no axes, are compared by it alone.

Legend: F features, C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from allnc.metrics.measures import check_measurable, ratio, triangle
from allnc.ops._common import check_floating, check_shape


def drift(before: Tensor, after: Tensor) -> dict[str, float]:
    """Relative distance between the centred class means of two measurements, as they are and best rotated.

    Args:
        before: [C, F] floating, class means, not centred, of C >= 2 classes that are all present.
        after: [C, F], those of the same classes later.

    Returns:
        "drift" >= 0, and "drift_aligned" in [0, drift]; infinite where the means before were one, up to rounding.

    Raises:
        TypeError, ValueError: not finite floating matrices of one shape, or fewer than two classes.

    Source: ours; the rotation is that of orthogonal Procrustes (Schönemann, Psychometrika 1966).

    Example:
        >>> square = torch.tensor([[1.0, 1.0], [-1.0, 1.0], [-1.0, -1.0], [1.0, -1.0]])
        >>> {name: round(value, 6) for name, value in drift(square, square.roll(1, 0)).items()}  # a quarter turn
        {'drift': 1.414214, 'drift_aligned': 0.0}
    """
    for name, means in (("before", before), ("after", after)):
        check_floating(name, means)
        check_shape(name, means, ("C", "F") if name == "before" else tuple(before.shape))
        check_measurable(name, means)
    if len(before) < 2:
        raise ValueError(f"before must have the means of at least two classes; got {len(before)}")
    M, moved = (means.detach().double().cpu() for means in (before, after))  # [C, F]
    rounding = torch.finfo(before.dtype).eps * float(torch.linalg.matrix_norm(M))
    M, moved = M - M.mean(0), moved - moved.mean(0)
    length = float(torch.linalg.matrix_norm(M))
    length = length if length > rounding else 0.0
    whole = float(torch.linalg.matrix_norm(moved - M))
    # In the coordinates of what the rows span, at most 2C of F: nothing outside has to be turned.
    M, moved = triangle(torch.cat((M, moved)).T).T.split(len(M))
    U, _, Vh = torch.linalg.svd(moved.T @ M)
    aligned = float(torch.linalg.matrix_norm(moved @ (U @ Vh) - M))
    return {"drift": ratio(whole, length), "drift_aligned": ratio(min(aligned, whole), length)}
