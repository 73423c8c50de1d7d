"""The end of a run: which epoch's weights it is left with, what was measured of them, and the pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from torch import Tensor

from allnc.metrics.plots import MOST_CLASSES, ClassVectors, plot_angles, plot_confusion, plot_curves
from allnc.trainer import checkpoint
from allnc.trainer.board import finish_board
from allnc.trainer.folder import ANGLES, CONFUSION, CURVES, PLOTS, SUMMARY, RunFolder, write_json
from allnc.trainer.run import Run
from allnc.trainer.runlog import Record, RunLog, final_table, finite, mean_of, say
from allnc.trainer.runtime import git_commit, versions
from allnc.trainer.selection import SCORE


def finish(
    run: Run, files: RunFolder | None, log: RunLog, final: tuple[dict[str, Any], Tensor] | None
) -> dict[str, Any]:
    """Measure the run, and leave summary, predictions and pictures in its folder; return what summary.json holds.

    Args:
        run: after its last epoch.
        files: its folder; None for a process that writes nothing.
        log: of all its epochs.
        final: what `Run.measure` has returned after the last epoch; None where nothing was measured then.
    """
    trained = run.epoch
    if run.config.train.patience is not None and _take_best(run, files, log.console):
        final = None
    measured, means = final or run.measure()  # a finished run that is resumed has not measured yet
    summary = _summary(run, measured, log.records, trained)
    if files is None:
        return summary
    run.write_predictions(files.path)
    write_json(files / SUMMARY, summary)
    log.console.print(final_table(summary))
    _draw(run, files, means, log.records)
    if log.board is not None:
        finish_board(log.board, files.path, run.config, summary)
    seconds, speed = summary["seconds"], summary["images_per_second"]
    say(log.console, f"{seconds:.1f} s, {speed:.0f} images/s in training; all of it in {files}")
    return summary


def _take_best(run: Run, files: RunFolder | None, console: Console) -> bool:
    """Let a run that selects end with the weights of its best epoch, which the process that has the files reads.

    Returns:
        Whether they are others than those of its last epoch.
    """
    best, config = run.selection, run.config.train
    if best.score is None:  # an older version trained it to the end
        return False
    if run.epoch < config.epochs:
        say(
            console,
            f"stopped after epoch {run.epoch} of {config.epochs}: none was better than epoch {best.epoch} on the "
            f"validation images (mean over classes {best.score:.1f}) for {best.measured - best.epoch} epochs",
        )
    goes_back = run.epoch != best.epoch
    if goes_back:
        found = run.processes.together(lambda: checkpoint.load_weights(files.path, "best")[1:] if files else None)
        epoch, weights = run.processes.gather(found)[0]
        run.load_model(weights, epoch)
    run.weights = "best"
    return goes_back


def _summary(run: Run, measured: dict[str, Any], records: Sequence[Record], trained: int) -> dict[str, Any]:
    """Return what summary.json holds, of `trained` epochs."""
    config, best = run.config, run.selection
    images = trained * len(run.loader) * run.loader.batch_size
    return {
        **{name: finite(value) for name, value in measured.items()},
        "trained_epochs": trained,
        "stopped_early": trained < config.train.epochs,
        "best": None if best.score is None else {"epoch": best.epoch, SCORE: best.score},
        "seconds": run.seconds["total"],
        "images_per_second": images / run.seconds["training"],
        "loader_wait": mean_of(records, "loader_wait"),
        "recipe": run.recipe,
        "data": config.data.name,
        "model": config.model.name,
        "loss": config.loss.name,
        "seed": config.seed,
        **run.conventions(),
        "images": run.images(),
        "class_counts": run.counts.tolist(),
        "changes": list(run.changes),
        "device": run.device.type,
        "processes": run.processes.size,
        "precision": str(run.dtype).removeprefix("torch."),
        "versions": versions(),
        "commit": git_commit(),
    }


def _draw(run: Run, files: RunFolder, means: Tensor, records: Sequence[Record]) -> None:
    """Draw angles, curves and, of few classes, the confusion matrix."""
    (files / PLOTS).mkdir(exist_ok=True)
    weight, data = run.measured.predicting_vectors.detach(), run.config.data
    vectors = ClassVectors(means, weight, class_counts=run.counts, many=data.many, few=data.few)
    plot_angles([vectors], files / ANGLES)
    plot_curves(records, files / CURVES)
    if len(run.counts) <= MOST_CLASSES:
        told, names = run.predictions, run.measured_set.classes
        assert told is not None  # measured above
        plot_confusion(told.labels, told.predicted, files / CONFUSION, class_counts=run.counts, classes=names)
