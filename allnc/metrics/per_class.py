"""Recall, precision and F1 of every class, and which other class its images are taken for.

Legend: N images, C classes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class PerClass(NamedTuple):
    """Measures of every class; NaN where a class has no image to measure them on.

    Attributes:
        images: [C] int64, images of the class.
        recall: [C] float64 in [0, 1], share of its images that are predicted as it; NaN without an image.
        precision: [C] float64 in [0, 1], share of what is predicted as it that is of it; NaN where nothing is.
        f1: [C] float64 in [0, 1], 2 TP / (2 TP + FP + FN); NaN without an image.
        confused_with: [C] int64, the wrong class that its images are predicted as most often, the first one of several;
            -1 where none is.
        confused: [C] int64, how many of its images are.
    """

    images: Tensor
    recall: Tensor
    precision: Tensor
    f1: Tensor
    confused_with: Tensor
    confused: Tensor

    @property
    def macro_f1(self) -> float:
        """Mean F1, in [0, 1], of the classes that have an image, as those of balanced accuracy."""
        return float(self.f1[self.images > 0].mean())


def per_class(predictions: Tensor, labels: Tensor, num_classes: int, weight: Tensor | None = None) -> PerClass:
    """Return the measures of every class.

    Args:
        predictions: [N] int64 predicted classes, in [0, C).
        labels: [N] int64 true classes, in [0, C).
        num_classes: C.
        weight: [N] float, >= 0: what each image counts in precision and F1, under another class prior than that of the
            images; None: all alike.

    Raises:
        ValueError: shapes that differ, no image, or a class out of range.

    Source: macro-F1 is the mean of the classes' F1, as in scikit-learn (Opitz & Burst, Macro F1 and Macro F1, 2019,
        tell the two definitions apart).

    Example:
        >>> import torch
        >>> per_class(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1]), 2).recall.tolist()
        [1.0, 0.5]
    """
    if labels.dim() != 1 or not len(labels) or predictions.shape != labels.shape:
        raise ValueError(
            f"predictions and labels must have the same shape [N] with N >= 1; got {list(predictions.shape)} and "
            f"{list(labels.shape)}"
        )
    predictions, labels = predictions.cpu(), labels.cpu()
    least, most = (int(f(torch.cat([predictions, labels]))) for f in (torch.min, torch.max))
    if least < 0 or most >= num_classes:
        raise ValueError(f"predictions and labels must be in [0, {num_classes}); got {least if least < 0 else most}")
    weight = torch.ones(len(labels), dtype=torch.float64) if weight is None else weight.cpu().double()

    def total(classes: Tensor, of: Tensor) -> Tensor:
        return torch.bincount(classes, weights=of, minlength=num_classes)  # [C]

    hit = (predictions == labels).double()
    images, hits = torch.bincount(labels, minlength=num_classes), total(labels, hit)
    true, predicted, both = total(labels, weight), total(predictions, weight), total(labels, hit * weight)
    f1 = torch.where(images > 0, 2 * both / (true + predicted), torch.nan)
    f1 = torch.where((images > 0) & (true + predicted == 0), 0.0, f1)  # a class that counts nothing
    confused_with, confused = _confused(predictions, labels, num_classes)
    return PerClass(images, hits / images, both / predicted, f1, confused_with, confused)


def _confused(predictions: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Return for every class the most frequent wrong prediction and its number, without a C x C matrix."""
    wrong = predictions != labels
    pairs, number = (labels[wrong] * num_classes + predictions[wrong]).unique(return_counts=True)  # ascending
    order = np.lexsort((-number.numpy(), (pairs // num_classes).numpy()))  # by class, then from the most frequent
    classes, first = np.unique((pairs // num_classes).numpy()[order], return_index=True)
    chosen = torch.from_numpy(order[first])
    other = torch.full((num_classes,), -1)
    most = torch.zeros(num_classes, dtype=torch.int64)
    other[classes], most[classes] = pairs[chosen] % num_classes, number[chosen]
    return other, most
