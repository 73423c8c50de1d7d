"""Compare methods: `python -m allnc.sweep SWEEP.yaml --out DIR [--jobs N]`; run again to go on after a stop."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from allnc._command import Parser, answer

if TYPE_CHECKING:
    from allnc.sweep.plan import Job, Sweep
    from allnc.sweep.record import Result
    from allnc.sweep.table import Row


def main(arguments: Sequence[str] | None = None) -> int:
    """Train what is missing, write tables and the plot; return 0, 2 for a mistake, 130 after Ctrl-C."""
    parser = Parser("allnc.sweep", __doc__)
    parser.add_argument("sweep", metavar="SWEEP.yaml", type=Path, help="methods, data sets and seeds")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="folder of runs.jsonl, tables and runs/")
    parser.add_argument(
        "--jobs", type=int, default=len(os.sched_getaffinity(0)), help="runs at a time; default one a core"
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="list the commands of the runs that are missing and stop"
    )
    options = parser.parse_args(arguments)
    return answer("allnc.sweep", lambda: _sweep(options))


def _sweep(options: argparse.Namespace) -> None:
    from allnc.sweep.plan import read_sweep
    from allnc.sweep.record import read
    from allnc.trainer.folder import RunFolder, check_place

    if options.jobs < 1:
        raise ValueError(f"--jobs must be >= 1; got {options.jobs}")
    sweep = read_sweep(options.sweep)
    check_place(options.out)
    recorded = read(options.out)
    found = {job: next((r for r in reversed(recorded) if r.is_of(job)), None) for job in sweep.jobs}
    missing = [job for job, result in found.items() if result is None]
    if options.dry_run:
        for job in missing:
            print(f"python -m allnc.train {shlex.join(job.words)}")
        return
    with RunFolder(options.out, check=lambda place, _: check_place(place)):
        _train(options, sweep, found, missing)


def _train(options: argparse.Namespace, sweep: Sweep, found: dict[Job, Result | None], missing: list[Job]) -> None:
    from allnc.sweep.execute import Clock, execute
    from allnc.sweep.record import epoch_of
    from allnc.sweep.table import as_csv, markdown, rows_of
    from allnc.trainer.folder import write_whole
    from allnc.trainer.selection import SCORE

    def write_tables() -> list[Row]:
        results = [result for result in found.values() if result is not None]
        if not results:
            return []
        rows = rows_of(results, sweep.baseline, sweep.data, sweep.methods)
        measured_on = " or ".join(sorted({result.summary["measured_on"] for result in results}))
        epoch = epoch_of(result.summary for result in results)
        table = markdown(rows, sweep.baseline, measured_on, epoch=epoch)
        text = f"{len(results)} of {len(sweep.jobs)} runs are done. {table}"
        made = {f"{r.summary['commit']} with torch {r.summary['torch']}, {r.summary['precision']}" for r in results}
        if len(made) > 1:
            text += f"\nThe runs are not of one version: {'; '.join(sorted(made))}.\n"
        write_whole(options.out / "table.md", text.encode())
        write_whole(options.out / "table.csv", as_csv(rows).encode())
        return rows

    def finished(job: Job, result: Result | None) -> None:
        found[job] = result
        score = "failed" if result is None else f"{result.summary[SCORE]:.2f} ({result.summary['seconds']:.0f} s)"
        print(f"{clock.tick()} {job.name}: {score}", flush=True)
        with contextlib.suppress(ValueError):  # runs that cannot be compared: said once all are trained
            write_tables()

    print(f"{len(sweep.jobs)} runs, {len(missing)} to train, {options.jobs} at a time", flush=True)
    clock = Clock(len(missing))
    try:
        failed = execute(missing, options.out, processes=options.jobs, finished=finished)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("stopped; the same command continues") from None
    from allnc.sweep.plot import plot_geometry  # last: it imports much

    plot_geometry(write_tables(), options.out / "geometry.png")
    if failed:
        job, log = failed[0]
        raise ValueError(f"{len(failed)} of {len(missing)} runs failed: {job.name} says why in {log}, and so on")


if __name__ == "__main__":
    sys.exit(main())
