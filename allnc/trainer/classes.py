"""Accuracy by class: classes.csv of a run folder, and the worst and the best classes as a table.

Legend: C classes.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor

from allnc.metrics import per_class
from allnc.trainer.folder import write_whole
from allnc.trainer.predictions import Predictions

SHOWN = 10  # of the worst, and of the best


class ClassScore(NamedTuple):
    """What classes.csv says of a class; None where it has no image to say it from.

    Attributes:
        name: of the class.
        training_images, measured_images: how many it has.
        accuracy: percent of its measured images that are predicted as it (recall).
        precision: percent of the images predicted as it that are of it.
        f1: harmonic mean of the two, percent.
        confidence: mean probability of the predicted class over its images, percent.
        taken_for: the wrong class that its images are predicted as most often.
        times: how many of them are.
    """

    name: str
    training_images: int
    measured_images: int
    accuracy: float | None
    precision: float | None
    f1: float | None
    confidence: float | None
    taken_for: str | None
    times: int


def class_scores(predictions: Predictions, class_counts: Tensor, names: Sequence[str]) -> list[ClassScore]:
    """Return the scores of all C classes, in their order.

    Args:
        predictions: of the measured images.
        class_counts: [C] training images of each class.
        names: of the C classes.
    """
    found = per_class(predictions.predicted, predictions.labels, len(names))
    sums = torch.bincount(predictions.labels, weights=predictions.confidence.double(), minlength=len(names))
    columns = [values.tolist() for values in (found.recall, found.precision, found.f1, sums / found.images)]
    rows = zip(
        names,
        class_counts.tolist(),
        found.images.tolist(),
        *[[None if value != value else 100 * value for value in column] for column in columns],  # NaN: none
        [None if other < 0 else names[other] for other in found.confused_with.tolist()],
        found.confused.tolist(),
        strict=True,
    )
    return [ClassScore(*row) for row in rows]


def write_classes(path: Path, scores: Sequence[ClassScore]) -> None:
    """Write classes.csv whole: a line for each class, in the order of the classes; what is not known is empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("class", *ClassScore._fields[1:]))
    for score in scores:
        writer.writerow([f"{v:.4f}" if isinstance(v, float) else v for v in score])
    write_whole(path, text.getvalue().encode(errors="surrogateescape"))


def class_table(scores: Sequence[ClassScore]) -> Table:
    """Return the ten worst and the ten best classes by accuracy; all, where they are twenty at most."""
    measured = sorted((s for s in scores if s.measured_images), key=lambda s: (s.accuracy or 0.0, s.f1 or 0.0))
    table = Table(title="classes, from the worst to the best", title_justify="left")
    for head in ("class", "training images", "images", "accuracy", "precision", "F1", "mostly taken for"):
        table.add_column(head, justify="left" if head in ("class", "mostly taken for") else "right")
    for place, score in enumerate(measured):
        if SHOWN <= place < len(measured) - SHOWN:
            if place == SHOWN:
                table.add_row(f"... {len(measured) - 2 * SHOWN} more", *[""] * 6)
            continue
        numbers = ["-" if v is None else f"{v:.1f}" for v in (score.accuracy, score.precision, score.f1)]
        other = "" if score.taken_for is None else f"{score.taken_for} ({score.times})"
        name, other = Text(score.name), Text(other)  # a name may hold what rich would take for markup
        table.add_row(name, f"{score.training_images:,}", f"{score.measured_images:,}", *numbers, other)
    return table
