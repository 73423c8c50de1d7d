"""The parts of the page as values and figures, which page.html lays out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from allnc.metrics.angles import AngleMap, angle_map, ideal_angle, pairwise_angles
from allnc.report import numbers
from allnc.report.charts import (
    BLUE,
    ORANGE,
    PURPLE,
    RED,
    WIDE,
    Axis,
    Figure,
    Key,
    Line,
    angle_colours,
    confusion_colours,
    heat_map,
    lines,
    scale_bar,
)
from allnc.report.runs import ReportedRun
from allnc.trainer.options import dotted
from allnc.trainer.runlog import COLLAPSE, PARTS, SHOTS, Record

MOST_PAIRS, MOST_IMAGES = 12, 6  # worst pairs of a run, and images of each
ANGLE_CELLS = 60  # of a row of an angle map; of more classes cells are means over groups


class Cell(NamedTuple):
    """A number of the summary, its difference to the first run, and whether that is for the better."""

    text: str
    difference: str = ""
    better: bool | None = None


class Row(NamedTuple):
    name: str
    cells: list[Cell]
    inner: bool = False  # part of the row before
    note: str = ""


def trained(runs: Sequence[ReportedRun]) -> list[Row]:
    """What was trained: data, classes, network, loss, seed, versions."""
    rows = {
        "Data": [_data(run) for run in runs],
        "Classes": [f"{len(counts):,}" if (counts := _counts(run)) is not None else "–" for run in runs],
        "Training images": [_training_images(run) for run in runs],
        "Measured images": [_measured_images(run) for run in runs],
        "Recipe": [str(run.summary.get("recipe") or "–") for run in runs],
        "Loss": [run.config.loss.name for run in runs],
        "Network": [run.config.model.name + (", pretrained" if run.config.model.pretrained else "") for run in runs],
        "Epochs": [f"{run.summary.get('epochs', len(run.records)):,}" for run in runs],
        "Seed": [str(run.config.seed) for run in runs],
        "Time": [_time(run.summary) for run in runs],
        "Trained with": [_versions(run.summary) for run in runs],
    }
    return [Row(name, [Cell(text) for text in texts]) for name, texts in rows.items() if set(texts) != {"–"}]


def _data(run: ReportedRun) -> str:
    root = run.config.data.root
    return run.config.data.name + (f", {root}" if root else "")


def _counts(run: ReportedRun) -> np.ndarray | None:
    counts = run.summary.get("class_counts") if run.told is None else run.told.class_counts
    return None if counts is None else np.asarray(counts)


def _training_images(run: ReportedRun) -> str:
    counts = _counts(run)
    return "–" if counts is None else f"{int(counts.sum()):,} ({int(counts.max()):,} to {int(counts.min()):,} a class)"


def _measured_images(run: ReportedRun) -> str:
    return "–" if run.told is None else f"{len(run.told.labels):,} ({run.told.measured_on})"


def _time(summary: dict[str, Any]) -> str:
    seconds = summary.get("seconds")
    if seconds is None:
        return "–"
    minutes, hours = seconds / 60, seconds / 3600
    spent = f"{seconds:.1f} s" if seconds < 120 else f"{minutes:.1f} min" if minutes < 120 else f"{hours:.1f} h"
    return f"{spent} on {summary.get('device', 'an unknown device')}, {summary.get('precision', 'unknown precision')}"


def _versions(summary: dict[str, Any]) -> str:
    found = summary.get("versions")
    if not isinstance(found, dict):
        return "–"
    commit = summary.get("commit")
    text = ", ".join(f"{name} {version}" for name, version in found.items())
    return text + (f", commit {str(commit)[:10]}" if commit else "")


def results(runs: Sequence[ReportedRun]) -> list[Row]:
    """What was measured after the last epoch, with the differences to the first run."""
    found = [measures(run) for run in runs]
    rows = []
    for name, (label, digits, higher, inner, note) in MEASURES.items():
        values = [of_run.get(name) for of_run in found]
        if any(value is not None for value in values):
            rows.append(Row(label, _compared(values, digits, higher=higher), inner, note))
    return rows


# Name -> how it is called, digits, whether more is better, whether it is part of what stands above, what it is.
MEASURES: dict[str, tuple[str, int, bool, bool, str]] = {
    "accuracy": ("Accuracy, %", 1, True, False, "of all measured images"),
    "balanced": ("Balanced accuracy, %", 1, True, False, "mean over the classes"),
    "many": ("many-shot", 1, True, True, ""),
    "medium": ("medium-shot", 1, True, True, ""),
    "few": ("few-shot", 1, True, True, ""),
    "macro_f1": ("Macro-F1, %", 1, True, False, "mean over the classes"),
    "ece": ("Calibration error (ECE), %", 1, False, False, "0 is ideal"),
    "nll": ("Negative log-likelihood", 3, False, False, "0 is ideal"),
    **{name: (label, 3, False, False, "0 is ideal") for name, label in COLLAPSE.items()},
}


def measures(run: ReportedRun) -> dict[str, float | None]:
    """Return the measures of a run: of its summary, of its predictions, or of its last record."""
    last = {name: value for record in run.records for name, value in record.items() if value is not None}
    found: dict[str, float | None] = {name: last.get(name) for name in MEASURES}
    if run.told is not None:
        told, accuracies = run.told, numbers.of_classes(run.told).accuracy
        found["accuracy"] = 100 * float((told.labels == told.predicted).mean())
        found["balanced"] = float(np.nanmean(accuracies))
        for name, mask in numbers.shot_masks(told.class_counts, *_limits(run)).items():
            if np.isfinite(accuracies[mask]).any():
                found[name] = float(np.nanmean(accuracies[mask]))
        found["macro_f1"] = numbers.macro_f1(told)
        found["ece"] = numbers.calibration(told).error
        found["nll"] = float(-np.log(np.maximum(told.true_confidence, np.finfo(np.float32).tiny)).mean())
    return found | {name: run.summary[name] for name in MEASURES if run.summary.get(name) is not None}


def _limits(run: ReportedRun) -> tuple[int, int]:
    return run.config.data.many, run.config.data.few


def _compared(values: Sequence[float | None], digits: int, *, higher: bool) -> list[Cell]:
    cells = []
    for number, value in enumerate(values):
        text = "–" if value is None else f"{value:.{digits}f}"
        first = values[0]
        if number == 0 or value is None or first is None:
            cells.append(Cell(text))
            continue
        away = value - first
        same = f"{abs(away):.{digits}f}" == f"{0:.{digits}f}"
        cells.append(Cell(text, _signed(away, digits), None if same else (away > 0) == higher))
    return cells


def _signed(value: float, digits: int) -> str:
    text = f"{abs(value):.{digits}f}"
    return f"±{text}" if float(text) == 0 else f"{'+' if value > 0 else '−'}{text}"


class ClassRow(NamedTuple):
    name: str
    sizes: list[int]
    tested: int
    accuracies: list[float]
    mistakes: list[str]
    differences: list[float]


class ClassGroup(NamedTuple):
    """Runs with the same classes, and what is said of each class."""

    keys: list[Key]
    names: list[str]
    figures: list[Figure]
    same_sizes: bool
    rows: list[ClassRow]
    id: str


def class_groups(runs: Sequence[ReportedRun], keys: Sequence[Key]) -> list[ClassGroup]:
    """Return what is said of the classes, for each set of runs that have the same."""
    by_names: dict[tuple[str, ...], list[int]] = {}
    for number, run in enumerate(runs):
        if run.told is not None:
            by_names.setdefault(run.told.classes, []).append(number)
    return [
        _class_group([runs[n] for n in members], [keys[n] for n in members], f"names{number}")
        for number, members in enumerate(by_names.values())
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
    names = _row_names(found.groups, told.classes, told.class_counts)
    masks = numbers.shot_masks(told.class_counts, *_limits(run))
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
        borders=_borders(found.groups, masks),
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


def _row_names(groups: Sequence[np.ndarray], classes: Sequence[str], counts: np.ndarray) -> list[str]:
    """Names of the classes, or the sizes of the classes of a group."""
    if all(len(members) == 1 for members in groups):
        return [classes[members[0]] for members in groups]
    names = []
    for members in groups:
        most, least = int(counts[members].max()), int(counts[members].min())
        names.append(f"{most:,}" if most == least else f"{most:,}–{least:,}")
    return names


def _borders(groups: Sequence[np.ndarray], masks: dict[str, np.ndarray]) -> list[tuple[str, int]]:
    """How many rows many-, medium- and few-shot classes have; a group belongs to its first class."""
    first = np.array([members[0] for members in groups])
    return [(name, int(mask[first].sum())) for name, mask in masks.items()]


def _fade(colour: tuple[int, int, int]) -> str:
    return f"transparent,rgb{colour}"


def calibrations(runs: Sequence[ReportedRun]) -> list[Figure]:
    """Return a reliability diagram of each run that has predictions: all images, and the shot groups."""
    figures = []
    for run in runs:
        if run.told is None:
            continue
        found = {"all": numbers.calibration(run.told)}
        for name, mask in numbers.shot_masks(run.told.class_counts, *_limits(run)).items():
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


LOSS_COLOURS = ("run0", "run1", "run2", "run3", "run4", "run5", "run6")


def curves(runs: Sequence[ReportedRun], keys: Sequence[Key]) -> list[Figure]:
    """Return accuracy, loss with its parts, learning rate and η over the epochs, each on an axis of its own."""
    figures = []
    if len(runs) == 1:
        shots = {"all": "accuracy", **{name: name for name in SHOTS}}
        found = [Line(Key(name, name), *_series(runs[0].records, key)) for name, key in shots.items()]
        figures.append(_over_epochs("Accuracy", found, "accuracy, %"))
    else:
        for key, title in (("accuracy", "Accuracy"), *((name, f"Accuracy, {name}-shot classes") for name in SHOTS)):
            figures.append(_of_runs(runs, keys, key, title, "accuracy, %"))
    figures.append(_of_runs(runs, keys, "loss", "Training loss", "mean over the epoch"))
    names = {key: label for group in PARTS for key, label in group.items()}
    for run in runs:
        parts = sorted(
            {key for record in run.records for key in record if key.startswith("loss_")},
            key=lambda part: (list(names).index(part) if part in names else len(names), part),
        )
        if len(parts) > 1 or (parts and len(runs) == 1):
            found = [
                Line(Key(part.removeprefix("loss_").replace("_", " "), colour), *_series(run.records, part))
                for part, colour in zip(parts, LOSS_COLOURS * math.ceil(len(parts) / 7), strict=False)
            ]
            title = "Parts of the loss" + (f", {run.label}" if len(runs) > 1 else "")
            figures.append(_over_epochs(title, found, "mean over the epoch"))
    figures.append(_of_runs(runs, keys, "lr", "Learning rate", "after the epoch"))
    figures.append(_of_runs(runs, keys, "eta", "η, weight of the uniform branch", "mean over the epoch"))
    return [figure for figure in figures if figure is not None]


NC_TITLES = {
    "cdnv": ("NC1: CDNV", "ratio", True),
    "nc1": ("NC1: within-class variability", "ratio", True),
    "nc2_means": ("NC2: class means to simplex ETF", "Frobenius norm", False),
    "nc2_weights": ("NC2: classifier to simplex ETF", "Frobenius norm", False),
    "nc3": ("NC3: classifier to class means", "Frobenius norm", False),
    "nc4": ("NC4: not the nearest class mean", "share of training images", False),
}


def collapse_curves(runs: Sequence[ReportedRun], keys: Sequence[Key]) -> list[Figure]:
    """Return NC1 to NC4 over the epochs."""
    found = [
        _of_runs(runs, keys, key, title, unit, log=log, zero=not log) for key, (title, unit, log) in NC_TITLES.items()
    ]
    return [figure for figure in found if figure is not None]


def _of_runs(
    runs: Sequence[ReportedRun], keys: Sequence[Key], key: str, title: str, unit: str, **axis: bool
) -> Figure | None:
    found = [Line(of_run, *_series(run.records, key)) for run, of_run in zip(runs, keys, strict=True)]
    return _over_epochs(title, found, unit, **axis)


def _over_epochs(
    title: str, found: Sequence[Line], unit: str, *, log: bool = False, zero: bool = False
) -> Figure | None:
    found = [line for line in found if len(line.x)]
    if not found:
        return None
    epochs = [x for line in found for x in line.x]
    values = [y for line in found for y in line.y]
    return lines(
        title,
        found,
        x_label="epoch",
        y_label=unit,
        x=Axis([min(epochs), max(epochs)], whole=True),
        y=Axis(values, log=log, low=0.0 if zero else None),
    )


def _series(records: Sequence[Record], key: str) -> tuple[list[float], list[float]]:
    """Epochs and values at which a key has a number."""
    points = [(r["epoch"], r[key]) for r in records if r.get(key) is not None and math.isfinite(r[key])]
    return [float(e) for e, _ in points], [float(v) for _, v in points]


def angle_maps(runs: Sequence[ReportedRun]) -> list[Figure]:
    """Return heat maps of the angles between classes, all on one scale: class means and classifier of each run.

    No colour is the ideal angle of a simplex ETF; classes are in the order of the run with the largest imbalance.
    """
    found = [(run, run.vectors) for run in runs if run.vectors is not None]
    if not found:
        return []
    maps: list[tuple[ReportedRun, str, AngleMap, float, list[np.ndarray]]] = []
    for run, vectors in found:
        same = [v for _, v in found if len(v.means) == len(vectors.means)]
        counts = max(same, key=lambda v: v.imbalance).counts
        assert counts is not None  # a measured run has them
        order = numbers.by_size(counts.numpy())
        ideal = ideal_angle(int(vectors.there.sum()))
        for what, rows, centre in (
            ("class means, centred", vectors.means, True),
            ("classifier vectors", vectors.weight, False),
        ):
            maps.append((run, what, _angle_map(rows, order, centre=centre), ideal, _groups(order)))
    far = max(5.0, *(float((m.cells - ideal).abs().nan_to_num(0).max()) for _, _, m, ideal, _ in maps))
    figures = []
    for run, what, panel, ideal, groups in maps:
        vectors = run.vectors
        assert vectors is not None and vectors.counts is not None
        counts = vectors.counts.numpy()
        classes = run.told.classes if run.told is not None else tuple(map(str, range(len(counts))))
        cells = panel.cells.numpy()
        grouped = len(groups) < len(counts)
        labels = [f"{ideal - far:.0f}°", f"ideal {ideal:.1f}°", f"{ideal + far:.0f}°"]
        figures.append(
            heat_map(
                f"{run.label}: {what}",
                cells,
                angle_colours(cells, ideal, far),
                rows=_row_names(groups, classes, counts),
                borders=_borders(groups, numbers.shot_masks(counts, *_limits(run))),
                sentence="{row} and {column}: {value}°" + (" on average" if grouped else ""),
                axes=("classes by training images" if grouped else "class",) * 2,
                note=f"Mean {panel.mean:.1f}°, standard deviation {panel.std:.1f}° over all pairs."
                + (
                    f" Cells are means over groups of about {len(counts) / len(groups):.0f} classes." if grouped else ""
                ),
                scale=scale_bar(f"rgb{PURPLE},transparent,rgb{ORANGE}", labels),
            )
        )
    return figures


def _groups(order: np.ndarray) -> list[np.ndarray]:
    """The classes of each row of an angle map; `angle_map` cuts them so."""
    num_groups = min(len(order), ANGLE_CELLS)
    group = np.arange(len(order)) * num_groups // len(order)
    return [order[group == number] for number in range(num_groups)]


def _angle_map(rows: Any, order: np.ndarray, *, centre: bool) -> AngleMap:
    import torch

    index = torch.from_numpy(order)
    if len(order) > ANGLE_CELLS:
        return angle_map(rows, index, ANGLE_CELLS, centre=centre)
    angles = pairwise_angles(rows, centre=centre)
    diagonal = torch.eye(len(angles), dtype=torch.bool)
    values = angles[~diagonal & ~angles.isnan()]
    cells = angles[index][:, index].masked_fill(diagonal, torch.nan)
    mean, std = (float(values.mean()), float(values.std(correction=0))) if len(values) else (math.nan, math.nan)
    return AngleMap(cells, mean, std)


def options_of(run: ReportedRun) -> dict[str, str]:
    """Return every option of a run as text."""
    return {name: str(value) for name, value in dotted(run.config).items()}


def option_differences(runs: Sequence[ReportedRun]) -> list[tuple[str, list[str]]]:
    """Return the options in which runs differ, with the value of each."""
    found = [options_of(run) for run in runs]
    return [
        (name, [o[name] for o in found]) for name in found[0] if name != "out" and len({o[name] for o in found}) > 1
    ]
