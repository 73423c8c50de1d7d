"""Train what is not recorded yet, as many processes at a time as asked for."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from allnc.config import Config
from allnc.sweep.plan import Job, read_options
from allnc.sweep.record import Result, append, result_of
from allnc.trainer.folder import SUMMARY, is_run
from allnc.trainer.manifest import read_manifest
from allnc.trainer.options import OF_A_MACHINE, dotted


def execute(
    jobs: Sequence[Job], folder: Path, *, processes: int, finished: Callable[[Job, Result | None], None]
) -> list[tuple[Job, Path]]:
    """Train every job and record it.

    A job whose run folder holds a checkpoint of the same options continues from there.

    Args:
        jobs: what is to be trained, in this order.
        folder: of the sweep; a run has runs/DATA/METHOD/seedN in it, and its output beside it in seedN.log.
        processes: how many run at a time, >= 1.
        finished: called after each job, with None where it failed.

    Returns:
        The jobs that failed, each with its log.

    Raises:
        KeyboardInterrupt: after all processes have stopped.
    """
    running: list[subprocess.Popen[bytes]] = []
    failed = []

    def one(job: Job) -> Result | None:
        place = run_folder(folder, job)
        place.parent.mkdir(parents=True, exist_ok=True)
        if (done := _summary(place, job)) is None:
            with log_of(place).open("wb") as log:
                command = [sys.executable, "-m", "allnc.train", *_words(job, place)]
                process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
                running.append(process)
                process.wait()
                running.remove(process)
            done = _summary(place, job) if process.returncode == 0 else None
        return None if done is None else result_of(job, done)

    with ThreadPoolExecutor(processes) as pool:
        waiting = {pool.submit(one, job): job for job in jobs}
        try:
            for future in as_completed(waiting):
                job, result = waiting[future], future.result()
                if result is None:
                    failed.append((job, log_of(run_folder(folder, job))))
                else:
                    append(folder, result)
                finished(job, result)
        except BaseException:  # Ctrl-C, or a full disk: no run is left behind
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(running):
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal(signal.SIGINT)  # each saves what it can
            raise
    return failed


def run_folder(folder: Path, job: Job) -> Path:
    """Return the run folder of a job."""
    return folder / "runs" / job.data / job.method / f"seed{job.seed}"


def log_of(place: Path) -> Path:
    """Return the file with the output of a run."""
    return place.with_name(f"{place.name}.log")


def _words(job: Job, place: Path) -> list[str]:
    """Return the command line that trains a job: from its last checkpoint where there is one."""
    if not is_run(place):
        return [*job.words, "--out", str(place)]
    with contextlib.suppress(ValueError):  # a damaged checkpoint is as good as none
        manifest = read_manifest(place)
        if manifest is not None and _same(manifest.config, job):
            return ["--resume", *_places(manifest.config, job), "--out", str(place)]
    return [*job.words, "--overwrite", "--out", str(place)]


def _summary(place: Path, job: Job) -> dict[str, Any] | None:
    """Return the summary of a finished run of these options, if the folder holds one."""
    try:
        summary = json.loads((place / SUMMARY).read_text())
        manifest = read_manifest(place)
    except (OSError, ValueError):
        return None
    if manifest is None or not _same(manifest.config, job):
        return None
    if any(change["option"] not in OF_A_MACHINE for change in manifest.changes):  # somebody has changed it on the way
        return None
    trained = summary.get("trained_epochs", summary["epochs"])  # of older runs, all of which trained to the end
    ended = summary.get("stopped_early", False) or trained == job.config.train.epochs
    return summary if ended and manifest.epoch == trained else None


def _same(config: Config, job: Job) -> bool:
    """Whether a run folder has the options of a job; data.root and other places of a machine may differ."""
    if job.config.data.mean is None:  # a run notes those of its pretrained weights
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, mean=None, std=None))
    return config.seed == job.seed and read_options(config) == read_options(job.config)


def _places(config: Config, job: Job) -> list[str]:
    """Return the options by which a job's files lie elsewhere than those of its run folder."""
    before, now = dotted(config), dotted(job.config)
    changed = [name for name in OF_A_MACHINE if name != "out" and before[name] != now[name]]
    return [f"--{name}={now[name] if isinstance(now[name], str) else json.dumps(now[name])}" for name in changed]


class Clock:
    """How long the rest takes, by the mean of what was done.

    Args:
        total: jobs to do.
    """

    def __init__(self, total: int) -> None:
        self.total, self.done, self.started = total, 0, time.monotonic()

    def tick(self) -> str:
        """Count a job; return `[3/10, 12 min left]`."""
        self.done += 1
        left = (time.monotonic() - self.started) / self.done * (self.total - self.done)
        return f"[{self.done}/{self.total}, {left / 60:.0f} min left]"
