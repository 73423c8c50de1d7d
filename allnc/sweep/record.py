"""runs.jsonl: a line for every finished run, all that a table needs; run folders may be deleted.

Neither torch nor numpy is imported.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from allnc.sweep.plan import Job, read_options, same_options

RUNS = "runs.jsonl"
_NOT_KEPT = ("class_counts", "changes", "versions", "seed", "recipe")


class Result(NamedTuple):
    """A finished run: its options, and what its summary.json said."""

    data: str
    method: str
    seed: int
    options: dict[str, Any]
    summary: dict[str, Any]

    def is_of(self, job: Job) -> bool:
        """Whether this is what a job would give."""
        return (self.data, self.method, self.seed) == (job.data, job.method, job.seed) and same_options(
            self.options, job.config
        )


def result_of(job: Job, summary: dict[str, Any]) -> Result:
    """Return what is kept of a finished run."""
    kept = {name: value for name, value in summary.items() if name not in _NOT_KEPT}
    kept |= {"torch": summary["versions"]["torch"], "allnc": summary["versions"]["allnc"]}
    return Result(job.data, job.method, job.seed, read_options(job.config), kept)


def epoch_of(summaries: Iterable[Mapping[str, Any]]) -> str:
    """Say of which epoch the measures of runs are: the last one, or the best one where train.patience chose it."""
    names = {"best": "the best epoch on validation images", "last": "the last epoch"}
    return " or ".join(sorted({names[summary.get("weights", "last")] for summary in summaries}))


def append(folder: Path, result: Result) -> None:
    """Add a finished run; the line is on the disk when this returns."""
    with (folder / RUNS).open("a+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        half = size > 0 and file.read(1) != b"\n"  # of a writer that was killed: a line of its own, left out in reading
        file.write(b"\n" * half + json.dumps(result._asdict()).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def read(folder: Path) -> list[Result]:
    """Return all finished runs, without lines that an interruption has cut in half.

    Raises:
        ValueError: a whole line is not a run's.
    """
    path = folder / RUNS
    data = path.read_bytes() if path.is_file() else b""
    results = []
    for number, line in enumerate(data.splitlines(), 1):
        if not line.endswith(b"}"):
            continue
        try:
            results.append(Result(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} must hold a finished run in each line; line {number} does not: {error}") from None
    return results
