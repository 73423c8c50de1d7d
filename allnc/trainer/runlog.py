"""What a run tells: first lines, a line an epoch on the console, metrics.jsonl, TensorBoard events, a final table."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch.utils.tensorboard import SummaryWriter

from allnc.trainer.folder import METRICS, write_whole

if TYPE_CHECKING:
    from allnc.trainer.folder import RunFolder
    from allnc.trainer.run import Run

Record = dict[str, Any]
PARTS = (  # short labels on the console, under a common name; the files have the whole names
    ("", {"loss_cls": "cls", "loss_uniform": "uniform", "loss_rebalance": "rebalance"}),
    ("", {"loss_hycon": "hycon"}),
    ("p2p ", {"loss_p2p_means": "mm", "loss_p2p_weights": "ww", "loss_p2p_duality": "mw"}),
)
SHOTS = ("many", "medium", "few")
QUALITY = {
    "macro_f1": "macro-F1",
    "top5": "top-5 accuracy",
    "nll": "negative log-likelihood",
    "ece": "ECE, 15 bins of equal width",
    "ece_equal_mass": "ECE, 15 bins of equal mass",
    "ece_many": "  ECE of many",
    "ece_medium": "  ECE of medium",
    "ece_few": "  ECE of few",
}
COLLAPSE = {
    "nc1": "NC1 within-class variability",
    "nc2_means": "NC2 class means to simplex",
    "nc2_weights": "NC2 classifier to simplex",
    "nc3": "NC3 classifier to means",
    "nc4": "NC4 disagreement with nearest mean",
}


def say(console: Console, line: str) -> None:
    """Print a line as it is, however long, and whatever rich would make of what stands in it."""
    console.print(line, soft_wrap=True, highlight=False, markup=False)


class RunLog:
    """Writes the records of a run; use it as a context manager.

    Attributes:
        records: of all epochs done.
        board: TensorBoard's writer, until the end; None without a folder.
        progress: the bar of the steps, a context manager: it is shown within.

    Args:
        folder: run folder; None for a process that keeps its records to itself.
        console: where lines and the progress bar go.
        epochs: epochs of the whole run.
        done: epochs that an earlier process finished; later records in metrics.jsonl are dropped.
    """

    def __init__(self, folder: Path | None, console: Console, *, epochs: int, done: int = 0) -> None:
        self.console, self.epochs, self.noted = console, epochs, False
        self.path = None if folder is None else folder / METRICS
        self.records = [] if self.path is None else self._continue(self.path, done)
        self.board = None if folder is None else SummaryWriter(str(folder), purge_step=done + 1 if done else None)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self.task = self.progress.add_task("training", total=None)

    def _continue(self, path: Path, done: int) -> list[Record]:
        """Keep what the file has of the epochs done, line by line; return the records among it."""
        lines = read_lines(path)
        kept = [line for line in lines if line.record is None or line.record["epoch"] <= done]
        damaged = [str(line.number) for line in kept if line.record is None]
        if damaged:
            say(
                self.console,
                f"warning: {path} has no record of an epoch in line {', '.join(damaged)}; kept as it is",
            )
        write_whole(path, b"".join(line.text + b"\n" for line in kept))
        return [line.record for line in kept if line.record is not None]

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        if self.board is not None:
            self.board.close()

    def start_epoch(self, epoch: int, steps: int) -> None:
        """Reset the bar for an epoch (1-based)."""
        self.progress.reset(self.task, total=steps, description=f"epoch {epoch}/{self.epochs}")

    def step(self) -> None:
        """Move the bar by a step."""
        self.progress.advance(self.task)

    def note(self, text: str | None) -> None:
        """Print a remark on an epoch, of which one is enough for the run; None is no remark."""
        if text is not None and not self.noted:
            self.noted = True
            say(self.console, f"note: {text}")

    def epoch(self, record: Record) -> None:
        """Write the record of an epoch everywhere; what is not finite becomes null, which JSON can hold."""
        record = finite(record)
        self.records.append(record)
        if self.path is not None and self.board is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(record) + "\n")
            for name, value in _flat(record).items():
                if name != "epoch" and value is not None:
                    self.board.add_scalar(name.replace("loss_", "loss/"), value, record["epoch"])
        say(self.console, epoch_line(record, self.epochs))


def headlines(run: Run, files: RunFolder) -> list[str]:
    """Return what is said of a run before its first epoch, or before it goes on."""
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


class Line(NamedTuple):
    """A line of metrics.jsonl: its number from 1, its bytes, and the record, or None where it holds none."""

    number: int
    text: bytes
    record: Record | None


def read_lines(path: Path) -> list[Line]:
    """Return the lines of metrics.jsonl, without a last one that an interruption has cut in half."""
    data = path.read_bytes() if path.is_file() else b""
    whole, _, half = data.rpartition(b"\n")
    lines = [Line(number, text, _record(text)) for number, text in enumerate(whole.split(b"\n") if whole else [], 1)]
    last = _record(half)
    return lines if last is None else [*lines, Line(len(lines) + 1, half, last)]


def _record(text: bytes) -> Record | None:
    try:
        record = json.loads(text)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("epoch"), int) else None


def epoch_line(record: Record, epochs: int) -> str:
    """Format one epoch: loss and its parts, eta, lr, accuracy by shot."""
    # AllNC has exactly 0 for a pairing of P2P that it does not compute.
    known = {name for name, value in record.items() if value is not None and (value or "p2p" not in name)}
    groups = []
    for common, labels in PARTS:
        if told := [f"{label} {record[name]:.3f}" for name, label in labels.items() if name in known]:
            groups.append(common + " ".join(told))
    parts = "; ".join(groups)
    line = f"{record['epoch']:>3}/{epochs} loss {record['loss']:.3f} ({parts})"
    if record.get("eta") is not None:
        line += f" η {record['eta']:.2f}"
    line += f" lr {record['lr']:.4f}"
    if "accuracy" in record:
        shots = " ".join(f"{name} {_percent(record[name])}" for name in SHOTS)
        line += f" acc {_percent(record['accuracy'])} ({shots})"
    return f"{line} {record['seconds']:.1f} s"


def final_table(summary: Record) -> Table:
    """Return accuracy by shot and the collapse metrics as a table."""
    which = "the best one on validation images" if summary.get("weights") == "best" else "the last one"
    table = Table(title=f"epoch {summary['epochs']}, {which}", title_justify="left")
    table.add_column("measure")
    table.add_column("value", justify="right")
    table.add_row(f"accuracy ({summary['measured_on']})", _percent(summary["accuracy"]))
    if _percent(summary["balanced"]) != _percent(summary["accuracy"]):  # else the images are as many in each class
        table.add_row("  mean over classes", _percent(summary["balanced"]))
    limits = {"many": f"> {summary['many_above']}", "few": f"< {summary['few_below']}"}
    for name in SHOTS:
        limit = limits.get(name, f"{summary['few_below']}-{summary['many_above']}")
        table.add_row(f"  {name} ({limit} training images)", _percent(summary[name]))
    for name, meaning in QUALITY.items():
        if summary[name] is not None:
            table.add_row(meaning, f"{summary[name]:.3f}" if name == "nll" else _percent(summary[name]))
    for name, meaning in COLLAPSE.items():
        if name not in summary:  # of images without the training images
            continue
        table.add_row(meaning, "-" if summary[name] is None else f"{summary[name]:.4f}")
    return table


def finite(value: Any) -> Any:
    """Return None for a number that is not finite (a ratio whose denominator vanished), else the value; so in dicts."""
    if isinstance(value, dict):
        return {name: finite(own) for name, own in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _flat(record: Record, path: str = "") -> Record:
    """Return the numbers of nested records by their path, with slashes."""
    found: Record = {}
    for name, value in record.items():
        found |= _flat(value, f"{path}{name}/") if isinstance(value, dict) else {f"{path}{name}": value}
    return found


def mean_of(records: Sequence[Record], name: str) -> float | None:
    """Return the mean of a measure over the epochs that have it; None where none has."""
    values = [record[name] for record in records if record.get(name) is not None]
    return sum(values) / len(values) if values else None


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
