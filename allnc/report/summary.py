"""The head of the page: what was trained, what was measured, and in which options runs differ."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from allnc.report import numbers
from allnc.report.runs import ReportedRun, limits_of, measured_on
from allnc.trainer.options import OF_A_MACHINE, dotted
from allnc.trainer.runlog import COLLAPSE


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
        "Recipe": [_recipe(run.summary) for run in runs],
        "Loss": [run.config.loss.name for run in runs],
        "Network": [run.config.model.name + (", pretrained" if run.config.model.pretrained else "") for run in runs],
        "Epochs": [_epochs(run) for run in runs],
        "Seed": [str(run.config.seed) for run in runs],
        "Time": [_time(run.summary) for run in runs],
        "Trained with": [_versions(run.summary) for run in runs],
    }
    return [Row(name, [Cell(text) for text in texts]) for name, texts in rows.items() if set(texts) != {"–"}]


def _data(run: ReportedRun) -> str:
    root = run.config.data.root
    return run.config.data.name + (f", {os.path.basename(root)}" if root else "")


def _recipe(summary: dict[str, Any]) -> str:
    names = str(summary.get("recipe") or "–").split(" + ")
    return " + ".join(os.path.basename(name) if os.path.isabs(name) else name for name in names)


def _counts(run: ReportedRun) -> np.ndarray | None:
    counts = run.summary.get("class_counts") if run.told is None else run.told.class_counts
    return None if counts is None else np.asarray(counts)


def _training_images(run: ReportedRun) -> str:
    counts = _counts(run)
    return "–" if counts is None else f"{int(counts.sum()):,} ({int(counts.max()):,} to {int(counts.min()):,} a class)"


def _measured_images(run: ReportedRun) -> str:
    return "–" if run.told is None else f"{len(run.told.labels):,} ({run.told.measured_on})"


def _epochs(run: ReportedRun) -> str:
    summary, config = run.summary, run.config.train
    trained = summary.get("trained_epochs", summary.get("epochs", len(run.records)))
    text = f"{trained:,}" if trained == config.epochs else f"{trained:,} of {config.epochs:,}"
    return text if summary.get("epochs", trained) == trained else f"{text}; weights of epoch {summary['epochs']:,}"


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
    """What was measured at the end, of the epoch that `trained` says, with the differences to the first run."""
    found = [measures(run) for run in runs]
    alike = [are_comparable(runs[0], run) for run in runs]
    rows = []
    for name, (label, digits, higher, inner, note) in MEASURES.items():
        values = [of_run.get(name) for of_run in found]
        if any(value is not None for value in values):
            rows.append(Row(label, _compared(values, digits, alike, higher=higher), inner, note))
    return rows


# Name -> how it is called, digits, whether more is better, whether it is part of what stands above, what it is.
MEASURES: dict[str, tuple[str, int, bool, bool, str]] = {
    "accuracy": ("Accuracy, %", 1, True, False, "of all measured images"),
    "balanced": ("Balanced accuracy, %", 1, True, False, "mean over the classes"),
    "many": ("many-shot", 1, True, True, ""),
    "medium": ("medium-shot", 1, True, True, ""),
    "few": ("few-shot", 1, True, True, ""),
    "macro_f1": ("Macro-F1, %", 1, True, False, "mean over the classes"),
    "top5": ("Top-5 accuracy, %", 1, True, False, "of all measured images"),
    "ece": ("Calibration error (ECE), %", 1, False, False, "0 is ideal"),
    "nll": ("Negative log-likelihood", 3, False, False, "0 is ideal"),
    **{name: (label, 3, False, False, "0 is ideal") for name, label in COLLAPSE.items()},
}


def measures(run: ReportedRun) -> dict[str, float | None]:
    """Return the measures of a run: of its summary, of its predictions, or of its last record."""
    last = {name: value for record in run.records for name, value in record.items() if value is not None}
    found: dict[str, float | None] = {name: last.get(name) for name in MEASURES}
    if run.told is not None:
        told, of_classes = run.told, numbers.of_classes(run.told)
        accuracies = of_classes.accuracy
        found["accuracy"] = 100 * float((told.labels == told.predicted).mean())
        found["balanced"] = float(np.nanmean(accuracies))
        for name, mask in numbers.shot_masks(told.class_counts, *limits_of(run)).items():
            if np.isfinite(accuracies[mask]).any():
                found[name] = float(np.nanmean(accuracies[mask]))
        found["macro_f1"] = of_classes.macro_f1
        found["ece"] = numbers.calibration(told).error
        found["nll"] = float(-np.log(np.maximum(told.true_confidence, np.finfo(np.float32).tiny)).mean())
    stored = {name: run.summary[name] for name in MEASURES if run.summary.get(name) is not None}
    if run.told is not None and run.summary.get("measured_on") not in (None, run.told.measured_on):
        stored = {name: value for name, value in stored.items() if name in COLLAPSE}  # the rest is of other images
    return found | stored


def are_comparable(one: ReportedRun, other: ReportedRun) -> bool:
    """Whether two runs were measured on the same images, as far as the folders tell."""
    if one.told is None or other.told is None:
        images = [run.summary.get("images", {}).get(run.summary.get("measured_on")) for run in (one, other)]
        return None in images or images[0] == images[1]
    return measured_on(one.told) == measured_on(other.told)


def _compared(values: Sequence[float | None], digits: int, comparable: Sequence[bool], *, higher: bool) -> list[Cell]:
    cells = []
    for number, value in enumerate(values):
        text = "–" if value is None else f"{value:.{digits}f}"
        first = values[0]
        if number == 0 or value is None or first is None or not comparable[number]:
            cells.append(Cell(text))
            continue
        away = value - first
        same = f"{abs(away):.{digits}f}" == f"{0:.{digits}f}"
        cells.append(Cell(text, _signed(away, digits), None if same else (away > 0) == higher))
    return cells


def _signed(value: float, digits: int) -> str:
    text = f"{abs(value):.{digits}f}"
    return f"±{text}" if float(text) == 0 else f"{'+' if value > 0 else '−'}{text}"


def options_of(run: ReportedRun) -> dict[str, str]:
    """Return every option of a run as text."""
    shown = dict[str, str]()
    for name, value in dotted(run.config).items():
        # Of files their names: a page may be mailed, and where they lie is nobody else's business.
        shown[name] = os.path.basename(value) if name in OF_A_MACHINE and isinstance(value, str) else str(value)
    return shown


def option_differences(runs: Sequence[ReportedRun]) -> list[tuple[str, list[str]]]:
    """Return the options in which runs differ, with the value of each."""
    found = [options_of(run) for run in runs]
    return [
        (name, [o[name] for o in found]) for name in found[0] if name != "out" and len({o[name] for o in found}) > 1
    ]
