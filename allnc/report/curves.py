"""What is drawn over the epochs: accuracy, loss, learning rate, η, and neural collapse."""

from __future__ import annotations

import math
from collections.abc import Sequence

from allnc.report.charts import Axis, Figure, Key, Line, lines
from allnc.report.runs import ReportedRun
from allnc.trainer.runlog import PARTS, SHOTS, Record

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
    names = [name for _, labels in PARTS for name in labels]
    for run in runs:
        parts = sorted(
            {key for record in run.records for key in record if key.startswith("loss_")},
            key=lambda part: (names.index(part) if part in names else len(names), part),
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
    if max((len(line.x) for line in found), default=0) < 2:  # one number, which the summary has
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
