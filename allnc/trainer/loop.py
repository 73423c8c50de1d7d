"""Training from the first step to the last, in the order in which it happens; what follows is in ending.py."""

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
from allnc.trainer import checkpoint, own, state
from allnc.trainer.divergence import DivergenceError, check_loss, check_weights
from allnc.trainer.ending import finish
from allnc.trainer.folder import CONFIG, INDEX, Mode, RunFolder, write_whole
from allnc.trainer.manifest import read_manifest
from allnc.trainer.mixing import batches
from allnc.trainer.optim import learning_rate
from allnc.trainer.options import to_dict
from allnc.trainer.processes import Processes, launched
from allnc.trainer.retrain import start_retraining
from allnc.trainer.run import Run
from allnc.trainer.runlog import RunLog, headlines, say
from allnc.trainer.runtime import pick_device
from allnc.trainer.step import train_step

CHECK_EVERY = 50  # steps between looks at the loss, each of which waits for a GPU


def train(
    config: Config,
    folder: Path,
    console: Console,
    *,
    mode: Mode = "new",
    index: Index | None = None,
    recipe: str | None = None,
) -> dict[str, Any]:
    """Train, measure and leave a run folder.

    Args:
        config: the configuration.
        folder: run folder, made when it does not exist, and written by this process alone.
        console: where lines, the progress bar and the table go.
        mode: new, resume (continue from the folder's checkpoint) or overwrite (delete the run that is there, once
            data and model of the new one stand).
        index: table of the images of data.name own, where they were looked at already.
        recipe: what summary.json calls the recipe of a new run; None where there is none.

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
            run, _ = _begun(config, folder, mode, index, processes)
            return _trained(run, None, Console(quiet=True))
        with files:
            try:
                run, index = _begun(config, folder, mode, index, processes)
                run.recipe = run.recipe or recipe
                _open(run, files, index)
                for line in headlines(run, files):
                    say(console, line)
                return _trained(run, files, console)
            except KeyboardInterrupt:
                raise KeyboardInterrupt(f"stopped; {_what_remains(files)}") from None
            except DivergenceError as error:
                raise DivergenceError(
                    f"{error}: lower train.lr, lengthen train.warmup_epochs, set train.grad_clip, or use "
                    f"train.precision fp32; {_what_remains(files)}"
                ) from error


def _begun(
    config: Config, folder: Path, mode: Mode, index: Index | None, processes: Processes
) -> tuple[Run, Index | None]:
    """Return the run before its next epoch, and the table of one's own images; nothing is written yet."""
    if config.data.name == "own" and mode != "resume":  # the first process has looked at the images, and chosen
        theirs, index = processes.gather((config, index))[0]
        config, index = own.as_here(theirs, index, config)
    config, index = processes.together(lambda: own.tabled(config, folder, index))
    run = processes.together(lambda: Run(config, index and load(config.data, index=index), processes=processes))
    run.connect()
    if mode == "resume":
        processes.together(lambda: processes.is_first and checkpoint.roll_forward(folder))
        processes.together(lambda: state.restore(run, folder))
        processes.together(lambda: _check_goes_on(run))
    else:
        run.start_classifier()
    return run, index


def _open(run: Run, files: RunFolder, index: Index | None) -> None:
    """Let the folder be that of this run, in the place of what was there."""
    if files.mode != "resume":
        files.start()
    elif not run.done:
        files.drop_results()  # of fewer epochs: they would not be the weights' for long
    if index is not None:
        write_whole(files / INDEX, index.text())
    write_whole(files / CONFIG, _config_text(run).encode())


def _trained(run: Run, files: RunFolder | None, console: Console) -> dict[str, Any]:
    """Train and measure; only the process that has the files writes. Return what summary.json holds."""
    config, final = run.config.train, None
    with RunLog(files and files.path, console, epochs=config.epochs, done=run.epoch) as log:
        with log.progress:
            while not run.done:
                started = time.perf_counter()
                record: dict[str, Any] = {"epoch": run.epoch + 1}
                record |= train_epoch(run, log)
                run.seconds["training"] += time.perf_counter() - started
                run.epoch += 1
                run.processes.together(partial(check_weights, run))  # before they are measured, and saved over the last
                final = run.measure() if run.epoch == config.epochs else None
                record |= _due(run, final)
                best = run.select(record)
                record["seconds"] = time.perf_counter() - started
                run.seconds["total"] += record["seconds"]
                log.note(run.loader.advice())
                log.epoch(
                    record
                )  # before the checkpoint: a record too many is dropped on resuming, one too few is lost
                if files is not None:
                    state.save(run, files.path, best=best)
        return finish(run, files, log, final)


def _due(run: Run, final: tuple[dict[str, Any], torch.Tensor] | None) -> dict[str, Any]:
    """Measure what is due after the epochs done; of the last one, all was measured already."""
    config = run.config.train
    of_collapse = config.collapse_every > 0 and run.epoch % config.collapse_every == 0
    if final is None:
        measured: dict[str, Any] = dict(run.measure_accuracy()) if run.epoch % config.eval_every == 0 else {}
        collapse, means = run.measure_collapse() if of_collapse else ({}, None)
        measured |= collapse
    else:
        measured, means = dict(final[0]), final[1]
    if of_collapse and means is not None:  # not after the last epoch alone: moves are of equally many epochs
        measured |= run.moved(means)
    if config.collapse_layers and means is not None:
        measured["layers"] = run.measure_layers()
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
            run.processes.together(partial(check_loss, run, sums, index + 1))
        log.step()
    means = {name: float(value) / steps for name, value in sums.items()}
    named = {n if n in ("loss", "eta") else f"loss_{n}": v for n, v in means.items()}
    return named | {"lr": rate, "loader_wait": run.loader.waiting.share}


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


def _config_text(run: Run) -> str:
    """Return the text of config.yaml; what was changed on resuming stands in its head."""
    head = [f"# since epoch {c['epoch'] + 1}: {c['option']} {c['from']} -> {c['to']}" for c in run.changes]
    return "".join(f"{line}\n" for line in head) + yaml.safe_dump(to_dict(run.config), sort_keys=False)
