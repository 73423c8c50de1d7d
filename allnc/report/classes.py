"""What the page says of every class: accuracy against size, and the difference between runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from allnc.report import numbers
from allnc.report.charts import WIDE, Axis, Figure, Key, Line, lines
from allnc.report.runs import ReportedRun, measured_on


class ClassRow(NamedTuple):
    name: str
    sizes: list[int]
    tested: int
    accuracies: list[float]
    mistakes: list[str]
    differences: list[float]


class ClassGroup(NamedTuple):
    """Runs with the same classes, measured on the same images, and what is said of each class."""

    keys: list[Key]
    names: list[str]
    figures: list[Figure]
    same_sizes: bool
    rows: list[ClassRow]
    id: str


def class_groups(runs: Sequence[ReportedRun], keys: Sequence[Key]) -> list[ClassGroup]:
    """Return what is said of the classes, for each set of runs that have the same, and were measured on the same."""
    by_images: dict[tuple[tuple[str, ...], bytes], list[int]] = {}
    for number, run in enumerate(runs):
        if run.told is not None:
            by_images.setdefault(measured_on(run.told), []).append(number)
    return [
        _class_group([runs[n] for n in members], [keys[n] for n in members], f"names{number}")
        for number, members in enumerate(by_images.values())
    ]


def _class_group(runs: Sequence[ReportedRun], keys: list[Key], id: str) -> ClassGroup:
    told = [run.told for run in runs if run.told is not None]
    found = [numbers.of_classes(t) for t in told]
    names, sizes = list(told[0].classes), [t.class_counts for t in told]
    every = np.concatenate(sizes)
    size_axis = Axis(every.tolist(), log=True)

    def drawn(
        title: str, values: Sequence[np.ndarray], which: range, y_label: str, y: Axis, note: str, **mark
    ) -> Figure:
        dots = [Line(keys[r], sizes[r], values[r], True) for r in which]
        means = []
        for r in which:
            if steps := numbers.trend(sizes[r], values[r]):
                means.append(Line(keys[r], [s[0] for s in steps], [s[1] for s in steps]))
        return lines(
            title,
            [*dots, *means],
            x_label="training images of the class",
            y_label=y_label,
            x=size_axis,
            y=y,
            names=id,
            note=note,
            keys=[keys[r] for r in which],
            width=WIDE,
            **mark,
        )

    accuracies = [f.accuracy for f in found]
    title = "Accuracy of each class against its size"
    note = "A point is a class; lines are means over classes of similar size."
    figures = [drawn(title, accuracies, range(len(runs)), "accuracy, %", Axis([], low=0, high=100), note)]
    differences = [values - accuracies[0] for values in accuracies]
    if len(runs) > 1:
        most = max(5.0, *(float(np.nanmax(np.abs(d), initial=0)) for d in differences))
        figures.append(
            drawn(
                f"Difference to {keys[0].label}",
                differences,
                range(1, len(runs)),
                "difference, percentage points",
                Axis([-most, most]),
                "Above the dotted line a class is more accurate than in the first run.",
                marks=(0.0,),
            )
        )
    same = all(np.array_equal(sizes[0], other) for other in sizes[1:])
    rows = []
    for c in numbers.by_size(sizes[0]):
        mistakes = ["" if f.mistaken_for[c] < 0 else names[f.mistaken_for[c]] for f in found]
        rows.append(
            ClassRow(
                names[c],
                [int(s[c]) for s in (sizes[:1] if same else sizes)],
                int(found[0].tested[c]),
                [float(a[c]) for a in accuracies],
                mistakes,
                [float(d[c]) for d in differences],
            )
        )
    return ClassGroup(keys, names, figures, same, rows, id)
