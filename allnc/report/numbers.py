"""What the predictions of a run say: accuracy of each class, confusions, calibration.

Legend: n measured images, C classes, G groups of classes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from allnc.metrics import per_class, shot_groups
from allnc.metrics.calibration import BINS

MOST_CLASSES = 100  # up to so many a confusion matrix has a row for each class
GROUPS = 40  # of more classes, rows are groups of classes of similar size


class Answers(NamedTuple):
    """What a network said of every measured image."""

    labels: np.ndarray  # [n] int, the true classes
    predicted: np.ndarray  # [n] int
    confidence: np.ndarray  # [n] float, softmax probability of the predicted class
    true_confidence: np.ndarray  # [n] float, softmax probability of the true class
    positions: np.ndarray  # [n] int, places of the images in the measured set
    paths: np.ndarray | None  # [n] str, files of the images relative to data.root; None for images in memory
    classes: tuple[str, ...]  # [C] names
    class_counts: np.ndarray  # [C] int, training images
    measured_on: str  # test or validation


class OfClasses(NamedTuple):
    """Measures of every class; NaN where a class has no measured image."""

    tested: np.ndarray  # [C] int, measured images
    accuracy: np.ndarray  # [C] float, percent
    mistaken_for: np.ndarray  # [C] int, the class it is most often mistaken for; -1: never mistaken
    macro_f1: float  # mean F1 of the classes that have a measured image, percent


class Pair(NamedTuple):
    """A class that is mistaken for another one."""

    label: int
    predicted: int
    images: int  # of `label` that were called `predicted`
    rows: np.ndarray  # [images] their places in the predictions, the most confident first


class ConfusionMap(NamedTuple):
    """A confusion matrix by classes or groups of classes, which have an order."""

    cells: np.ndarray  # [G, G] float, percent of the row's images; NaN in rows without an image
    groups: list[np.ndarray]  # the classes of each row
    errors_only: bool  # whether right answers are left out (of the diagonal, where rows are groups)


class Calibration(NamedTuple):
    """Confidence against accuracy in bins of equal width."""

    confidence: np.ndarray  # [bins] mean confidence, NaN in empty bins
    accuracy: np.ndarray  # [bins] share of right answers
    images: np.ndarray  # [bins] int
    error: float  # expected calibration error, in percent


def of_classes(told: Answers) -> OfClasses:
    """Return accuracy and the most frequent mistake of every class."""
    found = per_class(torch.from_numpy(told.predicted), torch.from_numpy(told.labels), len(told.classes))
    return OfClasses(
        found.images.numpy(), 100 * found.recall.numpy(), found.confused_with.numpy(), 100 * found.macro_f1
    )


def pairs(told: Answers) -> list[Pair]:
    """Return every pair of a class and one it was mistaken for, by number of images, then by mean confidence.

    No C x C matrix is made: of thousands of classes nearly all pairs never occur.
    """
    wrong = np.flatnonzero(told.labels != told.predicted)
    if not len(wrong):
        return []
    keys = told.labels[wrong].astype(np.int64) * len(told.classes) + told.predicted[wrong]
    order = np.lexsort((-told.confidence[wrong], keys))
    wrong, keys = wrong[order], keys[order]
    starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
    sizes = np.diff(np.append(starts, len(keys)))
    means = np.add.reduceat(told.confidence[wrong].astype(np.float64), starts) / sizes
    found = []
    for number in np.lexsort((-means, -sizes)):
        rows = wrong[starts[number] : starts[number] + sizes[number]]
        found.append(Pair(int(told.labels[rows[0]]), int(told.predicted[rows[0]]), len(rows), rows))
    return found


def by_size(class_counts: np.ndarray) -> np.ndarray:
    """Return the classes from many to few training images, [C]."""
    return np.argsort(-class_counts, kind="stable")


def confusion_map(told: Answers, order: np.ndarray) -> ConfusionMap:
    """Return the confusion matrix with classes in an order; of more than `MOST_CLASSES`, by groups of neighbours.

    Of groups only errors are counted: a cell is the share of the row's images that were taken for *another* class, one
    of the column's group.
    """
    num_classes = len(order)
    errors_only = num_classes > MOST_CLASSES
    groups = np.array_split(order, GROUPS if errors_only else num_classes)
    group_of = np.empty(num_classes, np.int64)
    for number, members in enumerate(groups):
        group_of[members] = number
    rows, columns = group_of[told.labels], group_of[told.predicted]
    tested = np.bincount(rows, minlength=len(groups))
    counted = told.labels != told.predicted if errors_only else np.ones(len(rows), bool)
    cells = np.bincount(rows[counted] * len(groups) + columns[counted], minlength=len(groups) ** 2)
    cells = cells.reshape(len(groups), len(groups)) / np.maximum(tested, 1)[:, None] * 100
    cells[tested == 0] = np.nan
    return ConfusionMap(cells, groups, errors_only)


def calibration(told: Answers, classes: np.ndarray | None = None) -> Calibration:
    """Return confidence against accuracy in 15 bins of equal width, of the images of some classes.

    Args:
        told: the predictions.
        classes: [C] bool, of which true classes the images are; None takes all images.

    Source: Guo et al., On Calibration of Modern Neural Networks, ICML 2017.
    """
    chosen = slice(None) if classes is None else classes[told.labels]
    confidence = told.confidence[chosen].astype(np.float64)
    right = (told.labels == told.predicted)[chosen]
    # A bin holds its upper end, as in the paper.
    bins = np.clip(np.ceil(confidence * BINS).astype(np.int64) - 1, 0, BINS - 1)
    images = np.bincount(bins, minlength=BINS)
    there = np.where(images > 0, images, np.nan)
    mean = np.bincount(bins, confidence, BINS) / there
    share = np.bincount(bins, right, BINS) / there
    error = float(np.nansum(np.abs(mean - share) * images) / max(1, len(right))) * 100 if len(right) else float("nan")
    return Calibration(mean, share, images, error)


def shot_masks(class_counts: np.ndarray, many: int, few: int) -> dict[str, np.ndarray]:
    """Return which classes are many-, medium- and few-shot, [C] bool each; those groups that have a class."""
    groups = shot_groups(torch.from_numpy(class_counts), many=many, few=few)
    return {name: mask.numpy() for name, mask in groups.items() if bool(mask.any())}


def trend(sizes: np.ndarray, values: np.ndarray, steps: int = 8) -> list[tuple[float, float, int]]:
    """Return (class size, mean value, classes) of groups of classes of similar size, for a line through many points.

    Args:
        sizes: [C] training images of the classes.
        values: [C] float; NaN is left out.
        steps: groups on the logarithmic axis at most.
    """
    known = np.isfinite(values) & (sizes > 0)
    if known.sum() < 2 or len(np.unique(sizes[known])) < 2:
        return []
    logs = np.log(sizes[known])
    edges = np.linspace(logs.min(), logs.max(), steps + 1)
    place = np.clip(np.searchsorted(edges, logs, side="right") - 1, 0, steps - 1)
    return [
        (
            float(np.exp(logs[place == step].mean())),
            float(values[known][place == step].mean()),
            int((place == step).sum()),
        )
        for step in range(steps)
        if (place == step).any()
    ]
