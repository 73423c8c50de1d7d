"""Whether a probability means what it says: expected calibration error, over bins of equal width or of equal mass.

Legend: N images, M bins.
"""

from __future__ import annotations

import torch
from torch import Tensor

BINS = 15


def calibration_error(
    confidence: Tensor, right: Tensor, *, bins: int = BINS, equal_mass: bool = False, weight: Tensor | None = None
) -> float:
    """Return the expected calibration error in percent: the mean, over images, of |accuracy - confidence| of their bin.

    Bins of equal width are (0, 1/M], (1/M, 2/M] ... of the confidence; most images of a trained network lie in the last
    one, which bins of equal mass (the images in the order of their confidence, cut into M parts of the same weight)
    divide. There, images of one confidence count as right as they are on average, so that the order of the images does
    not matter.

    Args:
        confidence: [N] float, the probability of the predicted class, in [0, 1].
        right: [N] bool, whether the prediction is the label.
        bins: M >= 1.
        equal_mass: bins of equal mass instead of equal width.
        weight: [N] float, >= 0 and not all zero: what each image counts; None: all alike.

    Raises:
        ValueError: shapes that differ, no image, or a confidence out of [0, 1].

    Source: Guo et al., On Calibration of Modern Neural Networks, ICML 2017 (equal width, M = 15); Nixon et al.,
        Measuring Calibration in Deep Learning, CVPR workshops 2019 (equal mass), here of the predicted class alone.

    Example:
        >>> import torch
        >>> calibration_error(torch.tensor([0.75, 0.75]), torch.tensor([True, False]))  # half are right, not 3 of 4
        25.0
    """
    weight = torch.ones_like(confidence, dtype=torch.float64) if weight is None else weight
    if confidence.dim() != 1 or not len(confidence) or confidence.shape != right.shape or right.shape != weight.shape:
        raise ValueError(
            f"confidence, right and weight must have the same shape [N] with N >= 1; got {list(confidence.shape)}, "
            f"{list(right.shape)}, {list(weight.shape)}"
        )
    if bins < 1:
        raise ValueError(f"bins must be at least 1; got {bins}")
    confidence, right, weight = (values.cpu().double() for values in (confidence, right, weight))
    if not bool(((confidence >= 0) & (confidence <= 1)).all()):
        raise ValueError(f"confidence must be in [0, 1]; got {float(confidence.min())} to {float(confidence.max())}")
    if not (bool((weight >= 0).all()) and float(weight.sum()) > 0):
        raise ValueError("weight must be >= 0 and not all zero")
    if equal_mass:
        gap = _gap_of_equal_mass(confidence, right, weight, bins)
    else:
        place = ((confidence * bins).ceil().long() - 1).clamp(0, bins - 1)  # [N]
        gap = _gap(place, confidence - right, weight, bins)
    return 100 * float(gap) / float(weight.sum())


def _gap(place: Tensor, difference: Tensor, weight: Tensor, bins: int) -> Tensor:
    return torch.zeros(bins, dtype=torch.float64).index_add_(0, place, weight * difference).abs().sum()


def _gap_of_equal_mass(confidence: Tensor, right: Tensor, weight: Tensor, bins: int) -> Tensor:
    """Return the sum over bins of |confidence - accuracy|, weighted; a group of equal confidences may span bins."""
    values, group = confidence.unique(return_inverse=True)  # ascending
    mass = torch.zeros_like(values).index_add_(0, group, weight)
    difference = values * mass - torch.zeros_like(values).index_add_(0, group, weight * right)
    # The running sum of the difference over the running mass, a line within a group, read at the bins' borders.
    running_mass = torch.cat([mass.new_zeros(1), mass.cumsum(0)])
    running_difference = torch.cat([mass.new_zeros(1), difference.cumsum(0)])
    borders = torch.arange(bins + 1, dtype=torch.float64) * running_mass[-1] / bins
    after = torch.searchsorted(running_mass, borders).clamp(1, len(mass))  # [M + 1]
    share = (borders - running_mass[after - 1]) / mass[after - 1].clamp(min=torch.finfo(torch.float64).tiny)
    at_border = running_difference[after - 1] + share.clamp(0, 1) * difference[after - 1]
    return at_border.diff().abs().sum()
