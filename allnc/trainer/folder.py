"""The run folder: which files are a run's own, which process may write them, and how a file is written whole.

    config.yaml         the resolved configuration          checkpoint.json     which two files make the checkpoint
    metrics.jsonl       a record an epoch                   last.safetensors    the model, for everyone
    events.out.tfevents.*  the same for TensorBoard         state.pt            what only `--resume` needs
    summary.json        what was measured at the end        plots/              angles.png, curves.png
    .lock               held by the process that writes     collapse.json       of `allnc.evaluate --collapse`
    best.safetensors    the model of the best epoch, where  predictions.npz     of the measured images at the end:
                        validation images are held out      classes.csv         image by image, class by class
    images.tsv          which image of data.name own is     model.*             of `allnc.export`
                        for what

Neither torch nor numpy is imported: the command line answers mistakes before they are.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import yaml

from allnc.config import SECTIONS

CONFIG, METRICS, SUMMARY = "config.yaml", "metrics.jsonl", "summary.json"
CHECKPOINT, WEIGHTS, STATE, BEST = "checkpoint.json", "last.safetensors", "state.pt", "best.safetensors"
PREDICTIONS, CLASSES, REPORT = "predictions.npz", "classes.csv", "report.html"
PLOTS, ANGLES, CURVES, CONFUSION = "plots", "plots/angles.png", "plots/curves.png", "plots/confusion.png"
EVENTS, LOCK, COLLAPSE, INDEX = "events.out.tfevents.*", ".lock", "collapse.json", "images.tsv"
EXPORTS = ("model.safetensors", "model.json", "model.pt2", "model.onnx")  # of `allnc.export`
# Written beside their place, then moved there.
_WHOLE = (
    *(CONFIG, METRICS, SUMMARY, CHECKPOINT, WEIGHTS, STATE, BEST, COLLAPSE, INDEX),
    *(PREDICTIONS, CLASSES, REPORT, *EXPORTS),
)

_RESULTS = (SUMMARY, PREDICTIONS, CLASSES, REPORT, ANGLES, CURVES, CONFUSION)  # of a run that has come to its end

Mode = Literal["new", "resume", "overwrite"]


class RunFolder:
    """A run folder that this process alone may write, until it is released; a context manager.

    A process that is killed leaves no lock behind, because the lock is the kernel's. Only where the file system has
    no locks (`locked` is False) can a second run in the same folder go unnoticed.

    Args:
        path: the folder; made, with its parents, where it does not exist.
        mode: `new` wants a folder without a run, `resume` one with a run, `overwrite` either.
        check: what says whether the folder suits the mode; another one for what is not a run.

    Raises:
        ValueError: the folder does not suit the mode, or another process has it.
        OSError: it cannot be made or written.
    """

    def __init__(self, path: Path, mode: Mode = "new", check: Callable[[Path, Mode], None] | None = None) -> None:
        check = check or check_folder
        check(path, mode)
        if not path.exists():
            _made.add(path)
        path.mkdir(parents=True, exist_ok=True)
        self.path, self.mode = path, mode
        self._lock: int | None
        self._lock, self.locked = _acquire(path)
        try:
            check(path, mode)  # again: another run may have come and gone since
        except ValueError:
            self.release()
            raise

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def __str__(self) -> str:
        return str(self.path)

    def start(self) -> None:
        """Delete the files of an earlier run, if any, and nothing else. The last moment for it is the best one."""
        for path in own_files(self.path):
            if path.name != LOCK:
                path.unlink()

    def drop_results(self) -> None:
        """Delete what a run has left at its end: a longer one will have other results."""
        for name in _RESULTS:
            (self.path / name).unlink(missing_ok=True)

    def release(self) -> None:
        """Let others write the folder; a folder that was made for this run and has stayed empty goes."""
        if self._lock is not None:
            (self.path / LOCK).unlink(missing_ok=True)  # before the lock goes: nobody else can be holding it
            _held.discard(self._lock)
            os.close(self._lock)
            self._lock = None
            if self.path in _made:
                with contextlib.suppress(OSError):  # it holds something, as it should
                    self.path.rmdir()


def check_folder(path: Path, mode: Mode) -> None:
    """Raise ValueError unless the folder suits the mode; nothing is written."""
    check_place(path)
    if mode == "resume":
        if not is_run(path):
            raise ValueError(f"--out must be a run folder to resume; {path} has no {CONFIG} of a run")
    elif is_run(path):
        if mode == "new":
            raise ValueError(
                f"--out must be a new folder; {path} holds a run: give --resume to continue it, "
                "--overwrite to replace it"
            )
    elif path.exists() and set(path.iterdir()) - set(own_files(path, leftovers=True)):
        raise ValueError(f"--out must be a new or an empty folder, or one of a run; {path} holds other files")


def check_place(path: Path) -> None:
    """Raise ValueError unless there is a folder that can be written, or can be one."""
    if path.is_symlink() and not path.exists():
        raise ValueError(f"--out must be a folder; got {path}, a link to {os.readlink(path)}, which is missing")
    if path.exists() and not path.is_dir():
        raise ValueError(f"--out must be a folder; got the file {path}")
    above = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not os.access(above, os.W_OK | os.X_OK):
        raise ValueError(f"--out must be a folder that can be written; got {path}, but {above} cannot be")


def is_run(path: Path) -> bool:
    """Whether a folder holds a run: its config.yaml has the sections of a configuration and no others."""
    try:
        values = yaml.safe_load((path / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return False
    return isinstance(values, dict) and {*SECTIONS} <= {*values} <= {*SECTIONS, "seed", "out"}


def check_trained(path: Path) -> None:
    """Raise ValueError unless a folder holds a trained model: a checkpoint, or last.safetensors alone."""
    if not (path / CHECKPOINT).is_file() and not (path / WEIGHTS).is_file():
        why = "" if path.is_dir() else f"which is {'no folder' if path.exists() else 'missing'}"
        why = why or f"which has no {WEIGHTS}{' yet: its first epoch was not finished' if is_run(path) else ''}"
        raise ValueError(f"RUN_DIR must be a run folder with {WEIGHTS}; got {path}, {why}")


def own_files(path: Path, *, leftovers: bool = False) -> list[Path]:
    """Return the files in a folder that a run has written there; of a killed run's leftovers alone if asked."""
    names = [LOCK, *(f".{name}.tmp" for name in _WHOLE)]
    if not leftovers:
        names += [*_WHOLE, ANGLES, CURVES, CONFUSION]
    files = [path / name for name in names] + ([] if leftovers else sorted(path.glob(EVENTS)))
    return [file for file in files if file.is_file() or file.is_symlink()]


def new_folder(stem: str) -> Path:
    """Make and return runs/STEM, or runs/STEM-2, -3 ...: the first that no other process has."""
    parent = Path("runs")
    parent.mkdir(exist_ok=True)
    names = (stem if number == 1 else f"{stem}-{number}" for number in range(1, 10_000))
    for name in names:
        try:
            (parent / name).mkdir()
        except FileExistsError:
            continue
        _made.add(parent / name)
        return parent / name
    raise ValueError(f"--out must be given: runs/ holds 10,000 folders {stem}")


def write_whole(path: Path, data: bytes) -> None:
    """Put a file in the place of `path` in one step, on the disk for good."""
    temporary = write_temporary(path, data)
    try:
        temporary.replace(path)
    except OSError:  # a folder has its name
        temporary.unlink()
        raise
    sync(path.parent)


def write_temporary(path: Path, data: bytes) -> Path:
    """Write the file that is to take the place of `path`; return it, on the disk and still beside it."""
    temporary = temporary_of(path)
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def temporary_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def sync(path: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, values: Any) -> None:
    """Write JSON that a reader never sees half of."""
    write_whole(path, (json.dumps(values, indent=2) + "\n").encode())


_made: set[Path] = set()  # folders that this process has made
_held: set[int] = set()  # descriptors of locks; a forked worker of a loader must not keep its parent's


def _close_in_child() -> None:
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)


def _acquire(path: Path) -> tuple[int, bool]:
    """Return the descriptor of the folder's lock, and whether the file system really locked it."""
    lock = path / LOCK
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(descriptor, 200).decode(errors="replace") or "another process"
            os.close(descriptor)
            raise ValueError(
                f"--out must be a folder that no other run is writing; {path} is in use by {owner}: wait for it, "
                "stop it, or give another --out"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
                os.close(descriptor)
                raise
            _held.add(descriptor)
            return descriptor, False
        if os.fstat(descriptor).st_nlink:  # else its owner has just deleted it, and another may hold the next one
            break
        os.close(descriptor)
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
    _held.add(descriptor)
    return descriptor, True
