"""What a report shows of a run: what its folder holds, and what its weights say where it holds too little."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from allnc.config import Config
from allnc.plot.runs import measured
from allnc.report.numbers import Answers
from allnc.report.thumbnails import Thumbnails
from allnc.trainer.folder import CONFIG, METRICS, PREDICTIONS, SUMMARY
from allnc.trainer.options import from_dict
from allnc.trainer.places import placed
from allnc.trainer.predictions import class_names, read_predictions
from allnc.trainer.runlog import Record, read_lines

if TYPE_CHECKING:
    from allnc.metrics.plots import ClassVectors
    from allnc.trainer.run import Run


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ReportedRun:
    """A run as a report shows it.

    Args:
        label: its name on the page.
        folder: where it is.
        config: its configuration.
        summary: what summary.json holds; empty where there is none.
        records: of its epochs.
        told: the predictions for every measured image; None where there are none.
        vectors: class means and classifier; None where they were not measured.
        thumbnails: its measured images; None where they cannot be read.
        notes: sentences on what is missing.
    """

    label: str
    folder: Path
    config: Config
    summary: dict[str, Any]
    records: list[Record]
    told: Answers | None
    vectors: ClassVectors | None
    thumbnails: Thumbnails | None
    notes: tuple[str, ...]


def measured_on(told: Answers) -> tuple[tuple[str, ...], bytes]:
    """Return what two runs that are compared have in common: names of the classes, labels of the measured images."""
    return told.classes, np.asarray(told.labels).astype(np.int32).tobytes()


def limits_of(run: ReportedRun) -> tuple[int, int]:
    """Return from how many training images on a class is many-shot, and below how many few-shot."""
    return run.config.data.many, run.config.data.few


def read_run(
    folder: Path, label: str, *, measure: bool, root: str | None, device: str | None, say: Callable[[str], None]
) -> ReportedRun:
    """Read a run folder, and measure what it does not hold.

    Args:
        folder: of the run.
        label: its name on the page.
        measure: let its images pass the network for the angles between classes, and for predictions where there are
            none.
        root: folder of its images; None for the run's own.
        device: auto, cpu or cuda; None for the run's own.
        say: takes a line about what takes a while.

    Raises:
        ValueError: a file of the run is damaged, or there is nothing to show.
    """
    config, notes = _config(folder), []
    summary = _summary(folder / SUMMARY)
    records = [line.record for line in read_lines(folder / METRICS) if line.record is not None]
    if not summary:
        notes.append(f"{SUMMARY} is missing: the run has not finished, and what is shown is as far as it came")
    if not records:
        notes.append(f"{METRICS} has no record of an epoch: there are no curves")
    told = stored_answers(folder / PREDICTIONS) if (folder / PREDICTIONS).is_file() else None
    vectors, run = None, None
    if measure:
        say(f"{label}: measuring the training images{'' if told else f' and {_measured_on(config)} images'}")
        try:
            found = measured(folder, label, root=root, device=device)
        except ValueError as error:
            notes.append(
                f"the angles between classes{'' if told else ' and all of the predictions'} are missing: {error}"
            )
        else:
            run, vectors = found.run, found.vectors
            told = told or measured_answers(run)
    elif told is None:
        notes.append(f"{PREDICTIONS} is missing: without --stored the report measures the run by itself")
    if not (summary or records or told):
        raise ValueError(f"RUN must hold something to report; {folder} has a configuration alone")
    thumbnails = None
    if told is not None:
        notes += _contradictions(told, summary)
        try:
            thumbnails = Thumbnails(config, told, root, None if run is None else run.measured_set)
        except ValueError as error:
            notes.append(f"the images of mistakes are missing: {error}")
    return ReportedRun(
        label=label,
        folder=folder,
        config=config,
        summary=summary,
        records=records,
        told=told,
        vectors=vectors,
        thumbnails=thumbnails,
        notes=tuple(notes),
    )


def stored_answers(path: Path) -> Answers:
    """Read predictions.npz.

    Raises:
        ValueError: it is damaged, or holds other arrays.
    """
    held = read_predictions(path)
    if not len(held["labels"]) or int(held["positions"].min()) < 0 or not bool(np.isfinite(held["confidence"]).all()):
        raise ValueError(f"{path} must hold the predictions of a run; got no image, or impossible numbers: damaged")
    return Answers(
        labels=held["labels"].astype(np.int64),
        predicted=held["predicted"].astype(np.int64),
        confidence=held["confidence"],
        true_confidence=held["true_confidence"],
        positions=held["positions"].astype(np.int64),
        paths=held.get("paths"),
        classes=tuple(map(str, held["classes"])),
        class_counts=held["class_counts"].astype(np.int64),
        measured_on=str(held["measured_on"]),
    )


def measured_answers(run: Run) -> Answers:
    """Let the measured images pass the network."""
    run.measure_accuracy()
    found = run.predictions
    assert found is not None  # measured just now
    return Answers(
        labels=found.labels.numpy(),
        predicted=found.predicted.numpy(),
        confidence=found.confidence.numpy(),
        true_confidence=found.true_confidence.numpy(),
        positions=np.arange(len(found.labels)),
        paths=None,
        classes=tuple(class_names(run.measured_set)),
        class_counts=run.counts.numpy(),
        measured_on=run.measured_on,
    )


def _config(folder: Path) -> Config:
    path = folder / CONFIG
    try:
        return placed(from_dict(yaml.safe_load(path.read_text(encoding="utf-8"))), folder)
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} must hold the configuration of a run; it cannot be read: {error}") from error


def _summary(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        summary = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} must hold the summary of a run; it cannot be read: {error}") from error
    if not isinstance(summary, dict):
        raise ValueError(f"{path} must hold the summary of a run; got no object")
    return summary


def _measured_on(config: Config) -> str:
    return "validation" if config.data.validation else "test"


def _contradictions(told: Answers, summary: dict[str, Any]) -> list[str]:
    """Say where predictions and summary cannot be of the same weights."""
    own, noted = 100 * float((told.labels == told.predicted).mean()), summary.get("accuracy")
    if noted is None or abs(own - noted) < 0.01 or summary.get("measured_on", told.measured_on) != told.measured_on:
        return []
    return [
        f"the predictions have an accuracy of {own:.2f} %, and {SUMMARY} has {noted:.2f} %: they are of other weights "
        "or images"
    ]
