"""Which classes are taken for which, with the images, and how sure the network is of what it says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from allnc.report import numbers
from allnc.report.charts import Axis, Figure, Key, Line, lines
from allnc.report.heatmaps import BLUE, RED, borders_of, confusion_colours, heat_map, row_names, scale_bar
from allnc.report.runs import ReportedRun, limits_of

MOST_PAIRS, MOST_IMAGES = 12, 5  # worst pairs of a run, and images of each


class Mistake(NamedTuple):
    uri: str
    text: str


class WorstPair(NamedTuple):
    label: str
    predicted: str
    images: int
    tested: int
    shown: list[Mistake]


class Confusions(NamedTuple):
    run: str
    figure: Figure
    pairs: list[WorstPair]
    num_pairs: int
    unread: int


def confusions(run: ReportedRun) -> Confusions | None:
    """Return the confusion matrix of a run and its worst pairs with their images."""
    told = run.told
    if told is None:
        return None
    found = numbers.confusion_map(told, numbers.by_size(told.class_counts))
    names = row_names(found.groups, told.classes, told.class_counts)
    masks = numbers.shot_masks(told.class_counts, *limits_of(run))
    if found.errors_only:
        note = (
            f"{len(told.classes):,} classes in {len(names)} groups of similar size: a cell is the share of the row's "
            "images that were taken for another class, one of the column's group. Right answers are left out."
        )
        scale = scale_bar(_fade(RED), ["no image", f"{np.nanmax(found.cells, initial=0):.1f} % of the row's images"])
        axes = "true class, by training images", "predicted class, by training images"
        sentence = "{row} training images, taken for another class of {column}: {value} % of the images"
    else:
        note = "Classes from many to few training images; blue is right, red is a mistake."
        right, wrong = (
            scale_bar(_fade(BLUE), ["0 %", "right", "100 %"]),
            scale_bar(_fade(RED), ["0 %", "mistaken", "100 %"]),
        )
        scale = right + wrong
        axes = "true class", "predicted class"
        sentence = "{row} predicted as {column}: {value} % of its images"
    figure = heat_map(
        f"Confusions of {run.label}",
        found.cells,
        confusion_colours(found.cells, errors_only=found.errors_only),
        rows=names,
        borders=borders_of(found.groups, masks),
        sentence=sentence,
        axes=axes,
        note=note,
        scale=scale,
    )
    every = numbers.pairs(told)
    tested = np.bincount(told.labels, minlength=len(told.classes))
    worst = [
        WorstPair(
            told.classes[pair.label],
            told.classes[pair.predicted],
            pair.images,
            int(tested[pair.label]),
            _mistakes(run, pair),
        )
        for pair in every[:MOST_PAIRS]
    ]
    return Confusions(run.label, figure, worst, len(every), 0 if run.thumbnails is None else run.thumbnails.unread)


def _mistakes(run: ReportedRun, pair: numbers.Pair) -> list[Mistake]:
    told, shown = run.told, []
    if run.thumbnails is None or told is None:
        return []
    for row in pair.rows[:MOST_IMAGES]:
        uri = run.thumbnails.uri(int(row))
        if uri is not None:
            file = f"{told.paths[row]}: " if told.paths is not None else ""
            names = told.classes[pair.label], told.classes[pair.predicted]
            text = f"{file}{names[0]}, taken for {names[1]} with {100 * told.confidence[row]:.0f} %"
            shown.append(Mistake(uri, text))
    return shown


def _fade(colour: tuple[int, int, int]) -> str:
    return f"transparent,rgb{colour}"


def calibrations(runs: Sequence[ReportedRun]) -> list[Figure]:
    """Return a reliability diagram of each run that has predictions: all images, and the shot groups."""
    figures = []
    for run in runs:
        if run.told is None:
            continue
        found = {"all": numbers.calibration(run.told)}
        for name, mask in numbers.shot_masks(run.told.class_counts, *limits_of(run)).items():
            if mask[run.told.labels].any():
                found[name] = numbers.calibration(run.told, mask)
        keys = {name: Key(f"{name}: ECE {c.error:.1f} %", name) for name, c in found.items()}
        drawn = [Line(keys["all"], 100 * found["all"].confidence, 100 * found["all"].accuracy)]
        for name, c in found.items():  # bins of few images say little: they are small
            radii = 1.5 + 6 * np.sqrt(c.images / max(1, c.images.sum()))
            drawn.append(Line(keys[name], 100 * c.confidence, 100 * c.accuracy, True, radii))
        figures.append(
            lines(
                run.label,
                drawn,
                x_label="confidence, %",
                y_label="accuracy, %",
                x=Axis([], low=0, high=100),
                y=Axis([], low=0, high=100),
                diagonal=True,
            )
        )
    return figures
