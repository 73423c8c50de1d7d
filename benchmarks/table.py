"""Rows of the results: their columns, the table on the terminal, the CSV file of an op.

`python benchmarks/table.py FILE...` prints the forward-and-backward rows of CSV files, a short line each.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable
from pathlib import Path

from cases import Case
from measure import Timing
from peaks import Peaks
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from work import Work

# What each column means is in docs/benchmarks.md.
COLUMNS = (
    "op", "N", "D", "C", "F", "dtype", "pass", "provider", "status", "note",
    "median_ms", "p20_ms", "p80_ms", "runs", "x_eager", "peak_mib",
    "flops", "exps", "bytes", "limit_ms", "fraction_of_limit", "effective_gflops", "gb_per_s",
)  # fmt: skip
PLACE = (
    "machine", "threads", "peak_gflops", "peak_gexps", "copy_gb_per_s", "peaks_from",
    "python", "torch", "triton", "cuda", "allnc", "commit", "date", "command",
)  # fmt: skip
Row = dict[str, object]


def row(
    case: Case,
    provider: str,
    dtype: str,
    peaks: Peaks,
    *,
    backward: bool,
    status: str,
    timing: Timing | None = None,
    eager: Timing | None = None,
    peak_mib: float | None = None,
) -> Row:
    """One line. Without a timing only what is known without one; figures that do not apply are empty."""
    shape, chosen = case.shape, case.providers[provider]
    work = Work() if chosen.work is None else chosen.work(backward)
    best = case.best(backward)
    limit = peaks.limit_ms(best)
    line: Row = dict.fromkeys(COLUMNS, "")
    line |= {
        "op": case.op, "N": shape.N or "", "D": shape.D or "", "C": shape.C or "", "F": shape.F or "",
        "dtype": dtype, "pass": "forward+backward" if backward else "forward",
        "provider": provider, "status": status, "note": chosen.note,
        "flops": f"{work.flops:.6g}" if work.flops else "", "exps": f"{work.exps:.6g}" if work.exps else "",
        "bytes": f"{work.bytes:.6g}" if work.bytes else "", "limit_ms": f"{limit:.4g}",
    }  # fmt: skip
    if timing is None:
        return line
    effective = case.effective_flops * (1.0 if backward else 1 / 3)
    line |= {
        "median_ms": round(timing.median, 4), "p20_ms": round(timing.p20, 4), "p80_ms": round(timing.p80, 4),
        "runs": timing.runs,
        "x_eager": "" if eager is None else round(eager.median / timing.median, 2),
        "peak_mib": "" if peak_mib is None else round(peak_mib, 1),
        "fraction_of_limit": round(limit / timing.median, 3),
        "effective_gflops": "" if best.bytes else round(effective / timing.median / 1e6, 1),
        "gb_per_s": round(work.bytes / timing.median / 1e6, 1) if work.bytes else "",
    }  # fmt: skip
    return line


def describe(peaks: Peaks) -> Row:
    """The columns of PLACE that hold what the limits were computed from."""
    return {
        "peak_gflops": round(peaks.flops / 1e9, 1),
        "peak_gexps": "" if peaks.exps is None else round(peaks.exps / 1e9, 2),
        "copy_gb_per_s": round(peaks.copy / 1e9, 1),
        "peaks_from": peaks.source,
    }


def write_csv(path: Path, rows: Iterable[Row], place: Row) -> None:
    """Rows with where and how they were taken in every one, so that a row can be read by itself."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=[*COLUMNS, *PLACE])
        writer.writeheader()
        writer.writerows({**line, **place} for line in rows)


def print_table(console: Console, rows: Iterable[Row], place: Row) -> None:
    """One section a case and pass, eager first."""
    title = " · ".join(f"{key} {place[key]}" for key in ("machine", "threads", "torch", "allnc", "commit", "date"))
    limits = (
        f"limits: {place['peak_gflops']} GFLOP/s, {place['peak_gexps'] or '?'} Gexp/s, "
        f"{place['copy_gb_per_s']} GB/s ({place['peaks_from']})"
    )
    table = Table(title=title, caption=limits, title_style="dim", caption_style="dim", box=SIMPLE)
    names = ("op", "shape", "pass", "provider")
    for column in (*names, "median ms", "p20–p80", "runs", "× eager", "peak MiB", "limit ms", "of limit", "GFLOP/s"):
        table.add_column(column, justify="left" if column in names else "right")
    table.add_column("status")
    previous = None
    for line in rows:
        group = tuple(line[key] for key in ("op", "N", "D", "C", "F", "pass"))
        if previous not in (None, group):
            table.add_section()
        sizes = " ".join(f"{key}={line[key]}" for key in ("N", "D", "C", "F") if line[key] != "")
        first = [str(line["op"]), sizes, str(line["pass"])] if group != previous else ["", "", ""]
        timed = line["median_ms"] != ""
        rate = line["effective_gflops"] if line["effective_gflops"] != "" else f"{line['gb_per_s']} GB/s"
        figures = [f"{line['median_ms']:.4g}", f"{line['p20_ms']:.4g}–{line['p80_ms']:.4g}"] if timed else ["-", ""]
        table.add_row(
            *first, str(line["provider"]), *figures, str(line["runs"]), str(line["x_eager"]), str(line["peak_mib"]),
            str(line["limit_ms"]), str(line["fraction_of_limit"]), str(rate) if timed else "", str(line["status"]),
        )  # fmt: skip
        previous = group
    console.print(table)


def main() -> None:
    """Print CSV files for people."""
    for path in sys.argv[1:]:
        with open(path, newline="") as file:
            for line in csv.DictReader(file):
                if line["pass"] != "forward+backward":
                    continue
                sizes = " ".join(f"{key}={line[key]}" for key in ("N", "D", "C", "F") if line[key])
                name = f"{line['op']} {sizes} {line['dtype']} {line['provider']}: "
                if line["status"] == "ok":
                    times = f", {line['x_eager']}x eager" if line["x_eager"] else ""
                    print(f"{name}{line['median_ms']} ms{times}, {line['fraction_of_limit']} of the limit")
                else:
                    print(name + line["status"])


if __name__ == "__main__":
    main()
