"""Training from the first step to the summary, in the order in which it happens."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console

from allnc.config import Config
from allnc.data import load
from allnc.data.own import Index
from allnc.metrics.plots import MOST_CLASSES, ClassVectors, plot_angles, plot_confusion, plot_curves
from allnc.trainer import checkpoint, own
from allnc.trainer.board import finish_board
from allnc.trainer.folder import (
    ANGLES,
    CONFIG,
    CONFUSION,
    CURVES,
    INDEX,
    PLOTS,
    SUMMARY,
    Mode,
    RunFolder,
    write_json,
    write_whole,
)
from allnc.trainer.manifest import read_manifest
from allnc.trainer.mixing import batches
from allnc.trainer.optim import learning_rate
from allnc.trainer.options import to_dict
from allnc.trainer.processes import Processes, launched
from allnc.trainer.retrain import start_retraining
from allnc.trainer.run import DivergenceError, Run
from allnc.trainer.runlog import RunLog, final_table, finite, mean_of
from allnc.trainer.runtime import git_commit, pick_device, versions
from allnc.trainer.selection import SCORE
from allnc.trainer.step import train_step

LEAST_SCALE = 2.0**-14  # of a float16 loss, which begins with 2^16
CHECK_EVERY = 50  # steps between looks at the loss, each of which waits for a GPU


def train(
    config: Config, folder: Path, console: Console, *, mode: Mode = "new", index: Index | None = None
) -> dict[str, Any]:
    """Train, measure and leave a run folder.

    Args:
        config: the configuration.
        folder: run folder, made when it does not exist, and written by this process alone.
        console: where lines, the progress bar and the table go.
        mode: new, resume (continue from the folder's checkpoint) or overwrite (delete the run that is there, once
            data and model of the new one stand).
        index: table of the images of data.name own, where they were looked at already.

    Returns:
        What summary.json holds.

    Raises:
        ValueError: the configuration asks for what is not there, or the folder is not to be had; DivergenceError when
            loss or weights are not finite.
        KeyboardInterrupt: with a line that says what can be resumed.
    """
    with launched(pick_device(config.train)) as processes:
        files = processes.together(lambda: RunFolder(folder, mode) if processes.is_first else None)
        if files is None:  # another process writes, and says what there is to say
            return _train(config, folder, None, Console(quiet=True), mode, processes, index)
        with files:
            try:
                return _train(config, folder, files, console, mode, processes, index)
            except KeyboardInterrupt:
                raise KeyboardInterrupt(f"stopped; {_what_remains(files)}") from None
            except DivergenceError as error:
                raise DivergenceError(
                    f"{error}: lower train.lr, lengthen train.warmup_epochs, set train.grad_clip, or use "
                    f"train.precision fp32; {_what_remains(files)}"
                ) from error


def _train(
    config: Config,
    folder: Path,
    files: RunFolder | None,
    console: Console,
    mode: Mode,
    processes: Processes,
    index: Index | None,
) -> dict[str, Any]:
    """Train; only the process that has the files writes."""
    if config.data.name == "own" and mode != "resume":  # the first process has looked at the images, and chosen
        theirs, index = processes.gather((config, index))[0]
        config, index = own.as_here(theirs, index, config)
    config, index = processes.together(lambda: own.tabled(config, folder, index))
    run = processes.together(lambda: Run(config, index and load(config.data, index=index), processes=processes))
    run.connect()
    if mode == "resume":
        processes.together(lambda: files and checkpoint.roll_forward(folder))
        processes.together(lambda: run.restore(folder))
        processes.together(lambda: _check_goes_on(run))
    else:
        run.start_classifier()
    if files is not None:
        if mode != "resume":
            files.start()
        elif not run.done:
            files.drop_results()  # of fewer epochs: they would not be the weights' for long
        if index is not None:
            write_whole(files / INDEX, index.text())
        write_whole(files / CONFIG, _config_text(run).encode())
        for line in _headlines(run, files):
            console.print(line, soft_wrap=True, highlight=False, markup=False)

    with RunLog(folder if files else None, console, epochs=config.train.epochs, done=run.epoch) as log:
        while not run.done:
            started = time.perf_counter()
            record: dict[str, Any] = {"epoch": run.epoch + 1}
            record |= train_epoch(run, log)
            run.seconds["training"] += time.perf_counter() - started
            run.epoch += 1
            processes.together(run.check_weights)  # before they are measured and take the last checkpoint's place
            record |= _measurements(run)
            best = run.select(record)
            record["seconds"] = time.perf_counter() - started
            run.seconds["total"] += record["seconds"]
            log.note(run.loader.advice())
            log.epoch(record)  # before the checkpoint: a record too many is dropped on resuming, one too few is lost
            if files is not None:
                run.save(folder, best=best)
        records = log.records
    trained = run.epoch
    if config.train.patience is not None:
        _take_best(run, files, console)
    return _finish(run, files, records, console, trained=trained)


def _take_best(run: Run, files: RunFolder | None, console: Console) -> None:
    """Let a run that selects end with the weights of its best epoch, which the process that has the files reads."""
    best, config = run.selection, run.config.train
    if best.score is None:  # an older version trained it to the end
        return
    if run.epoch < config.epochs:
        console.print(
            f"stopped after epoch {run.epoch} of {config.epochs}: none was better than epoch {best.epoch} on the "
            f"validation images (mean over classes {best.score:.1f}) for {best.measured - best.epoch} epochs",
            soft_wrap=True,
            highlight=False,
            markup=False,
        )
    if run.epoch != best.epoch:
        found = run.processes.together(lambda: checkpoint.load_weights(files.path, "best")[1:] if files else None)
        epoch, weights = run.processes.gather(found)[0]
        run.load_model(weights, epoch)
        run.final = None
    run.weights = "best"


def _check_goes_on(run: Run) -> None:
    """Raise ValueError where a run that has stopped early would not go on, but options say that it should."""
    config = run.config.train
    changed = [c["option"] for c in run.changes if c["epoch"] == run.epoch and c["option"].startswith("train.")]
    idle = [name for name in changed if name not in ("train.device", "train.threads")]
    if idle and run.done and run.epoch < config.epochs:
        raise ValueError(
            f"the run has stopped after {run.epoch} epochs, {config.patience} of them without a better one: raise "
            f"train.patience (null: to the last epoch), or remove {', '.join(idle)}"
        )


def _what_remains(files: RunFolder) -> str:
    """Say what of a run that stopped early can be continued."""
    manifest = read_manifest(files.path)
    if manifest is None or not (files / CONFIG).is_file():
        return "there is no checkpoint yet: --overwrite starts the run again"
    last = f"epoch {manifest.epoch} of {manifest.config.train.epochs}"
    return f"--resume --out {files} continues after {last}, with other options of train.* if you give them"


def _measurements(run: Run) -> dict[str, Any]:
    """Measure what is due after the epochs done; everything after the last."""
    config = run.config.train
    if run.epoch == config.epochs:
        run.final = run.measure()
        return run.final[0]
    measured: dict[str, Any] = {}
    if run.epoch % config.eval_every == 0:
        measured |= run.measure_accuracy()
    if config.collapse_every and run.epoch % config.collapse_every == 0:
        measured |= run.measure_collapse()[0]
    return measured


def train_epoch(run: Run, log: RunLog) -> dict[str, float]:
    """Run one epoch and return the mean loss, the mean of its parts, and the last learning rate."""
    config, steps = run.config.train, len(run.loader)
    if run.epoch == config.feature_epochs:
        start_retraining(run)
    run.model.train()
    first = config.feature_epochs * steps  # step of a second stage
    sums: dict[str, torch.Tensor] = {}
    rate = 0.0
    log.start_epoch(run.epoch + 1, steps)
    run.processes.seed_others(run.config.seed, run.epoch)
    for index, batch in enumerate(batches(run)):
        step = run.epoch * steps + index
        rate = learning_rate(config, step, steps)
        for group in run.optimizer.param_groups:
            group["lr"] = rate
        for name, value in train_step(run, batch, progress=min(1.0, step / first)).items():
            sums[name] = sums.get(name, 0) + value
        if run.average is not None:
            run.average.update(run.model, step=step + 1 - (first if run.retrains else 0))  # each stage's own
        if (index + 1) % CHECK_EVERY == 0 or index + 1 == steps:
            run.processes.together(partial(_check_finite, run, sums, index + 1))
        log.step()
    means = {name: float(value) / steps for name, value in sums.items()}
    named = {n if n in ("loss", "eta") else f"loss_{n}": v for n, v in means.items()}
    return named | {"lr": rate, "loader_wait": run.loader.waiting.share}


def _check_finite(run: Run, sums: dict[str, torch.Tensor], step: int) -> None:
    epoch = run.epoch + 1
    if run.scaler.is_enabled() and run.scaler.get_scale() < LEAST_SCALE:  # halved at every overflow: no step was made
        raise DivergenceError(
            f"gradients must fit in float16; they overflow at every scale by epoch {epoch}, step {step}"
        )
    if torch.isfinite(sums["loss"]):
        return
    broken = [name for name, value in sums.items() if name != "loss" and not torch.isfinite(torch.as_tensor(value))]
    raise DivergenceError(
        f"the loss must stay finite; got {float(sums['loss'])} by epoch {epoch}, step {step}"
        f"{' in ' + ', '.join(broken) if broken else ''}"
    )


def _config_text(run: Run) -> str:
    """Return the text of config.yaml; what was changed on resuming stands in its head."""
    head = [f"# since epoch {c['epoch'] + 1}: {c['option']} {c['from']} -> {c['to']}" for c in run.changes]
    return "".join(f"{line}\n" for line in head) + yaml.safe_dump(to_dict(run.config), sort_keys=False)


def _headlines(run: Run, files: RunFolder) -> list[str]:
    config, counts = run.config, run.counts
    parameters = sum(p.numel() for p in run.model.parameters()) / 1e6
    number = str(run.dtype).removeprefix("torch.")
    lines = [
        f"{config.data.name}: {run.train_set.count_text} training images ({int(counts.max())} to {int(counts.min())} a "
        f"class), {len(run.measured_set)} {run.measured_on} images; {config.model.name}, {parameters:.2f} M "
        f"parameters; loss {config.loss.name}; {run.device.type}, {number}; {files}"
    ]
    if run.processes.size > 1:
        lines.append(f"{run.processes.size} processes share each batch of {config.train.batch_size} images")
    if run.passes > 1:
        most = -(-config.train.batch_size // run.processes.size // run.passes) * (2 if run.loader.two_batches else 1)
        lines.append(f"each batch passes the encoder in {run.passes} parts of at most {most} images")
    if config.train.retrain_epochs:
        lines.append(f"from epoch {config.train.feature_epochs + 1} on a new classifier trains alone")
    if config.model.tune != "full":
        sizes = [(p.numel(), p.requires_grad) for p in run.model.parameters()]
        tuned, whole = sum(n for n, trains in sizes if trains), sum(n for n, _ in sizes)
        lines.append(f"model.tune {config.model.tune}: {tuned:,} of {whole:,} parameters train")
    lines += [f"note: {note}" for part in (run.train_set, run.measured_set) for note in part.notes]
    if run.epoch:
        lines.append(f"continues after epoch {run.epoch} of {config.train.epochs}")
    lines += [
        f"changed: {c['option']} {c['from']} -> {c['to']}" for c in run.changes if run.epoch and c["epoch"] == run.epoch
    ]
    if not files.locked:
        lines.append(f"warning: the file system of {files} has no locks; do not start a second run in it")
    return lines


def _finish(
    run: Run, files: RunFolder | None, records: list[dict[str, Any]], console: Console, *, trained: int
) -> dict[str, Any]:
    """Write what was measured at the end, of `trained` epochs, then draw."""
    config, best = run.config, run.selection
    measured, means = run.final or run.measure()  # a finished run that is resumed has not measured yet
    images = trained * len(run.loader) * run.loader.batch_size
    summary = {
        **{name: finite(value) for name, value in measured.items()},
        "trained_epochs": trained,
        "stopped_early": trained < config.train.epochs,
        "best": None if best.score is None else {"epoch": best.epoch, SCORE: best.score},
        "seconds": run.seconds["total"],
        "images_per_second": images / run.seconds["training"],
        "loader_wait": mean_of(records, "loader_wait"),
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
    if files is None:
        return summary
    run.write_predictions(files.path)
    write_json(files / SUMMARY, summary)
    console.print(final_table(summary))
    (files / PLOTS).mkdir(exist_ok=True)
    weight, data = run.measured.predicting_vectors.detach(), config.data
    vectors = ClassVectors(means, weight, class_counts=run.counts, many=data.many, few=data.few)
    plot_angles([vectors], files / ANGLES)
    plot_curves(records, files / CURVES)
    if len(run.counts) <= MOST_CLASSES:
        told, names = run.predictions, run.measured_set.classes
        assert told is not None  # measured above
        plot_confusion(told.labels, told.predicted, files / CONFUSION, class_counts=run.counts, classes=names)
    finish_board(files.path, config, summary)
    console.print(
        f"{summary['seconds']:.1f} s, {summary['images_per_second']:.0f} images/s in training; all of it in {files}",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )
    return summary
