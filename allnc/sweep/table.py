"""Tables of finished runs: mean and deviation over seeds, and the paired difference to one method.

A difference is paired by seed (same images, same order of batches) and has the 95 % interval of Student's t over the
seeds that both methods have. The training set is the same for all seeds: intervals speak of training, not of other
images.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any, NamedTuple

from allnc.sweep.record import Result
from allnc.trainer.selection import SCORE

MEASURES = (SCORE, "many", "medium", "few", "nc1", "nc2_means", "nc2_weights", "nc3", "seconds")
HEADS = ("accuracy", "many", "medium", "few", "NC1", "NC2 means", "NC2 weights", "NC3", "s")
OVERALL = "all"


class Row(NamedTuple):
    """A method on a data set, or on all of them (the mean over data sets, seed by seed)."""

    data: str
    method: str
    seeds: int
    mean: dict[str, float | None]
    std: float | None  # of the accuracy over seeds
    difference: float | None  # to the baseline, over the seeds that both have
    half_width: float | None  # of its 95 % interval
    pairs: int  # seeds of the difference


def rows_of(results: Sequence[Result], baseline: str, data: Sequence[str], methods: Sequence[str]) -> list[Row]:
    """Return the rows of each data set and of all together, in the order of `data` and `methods`.

    Args:
        results: one for each data set, method and seed at most; those of other data sets and methods are left out.
        baseline: method to which differences are taken.
        data: names of the data sets.
        methods: names of the methods.

    Raises:
        ValueError: runs of a data set were measured on different images.
    """
    cells = {(r.data, r.method, r.seed): r.summary for r in results}
    for name in data:
        check_images(name, [r for r in results if r.data == name])
    rows = []
    for name in data:
        by_method = {m: {s: c for (d, of, s), c in cells.items() if (d, of) == (name, m)} for m in methods}
        rows += _rows(name, by_method, baseline)
    if len(data) > 1:
        by_method = {m: _over_data(cells, data, m) for m in methods}
        rows += _rows(OVERALL, by_method, baseline)
    return rows


def markdown(rows: Sequence[Row], baseline: str, measured_on: str, *, epoch: str = "the last epoch") -> str:
    """Return the rows as a table for each data set."""
    text = (
        f"Accuracy is the mean over classes on the {measured_on} images after {epoch}, in percent: mean ± "
        f"standard deviation over n seeds. The difference is to {baseline}, paired by seed, with its 95 % interval.\n"
    )
    for data in dict.fromkeys(row.data for row in rows):
        heads = ["method", "n", "accuracy", f"difference to {baseline}", *HEADS[1:]]
        title = "Mean over all data sets, over the seeds that a method has on every one" if data == OVERALL else data
        text += f"\n**{title}**\n\n| {' | '.join(heads)} |\n|---|{'---:|' * (len(heads) - 1)}\n"
        for row in (row for row in rows if row.data == data):
            cells = [row.method, str(row.seeds), _with_spread(row), _difference(row)]
            cells += [_number(name, row.mean[name]) for name in MEASURES[1:]]
            text += f"| {' | '.join(cells)} |\n"
    return text


def as_csv(rows: Sequence[Row]) -> str:
    """Return the rows as CSV; what is not known is empty."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["data", "method", "seeds", *MEASURES, "std", "difference", "half_width_95", "pairs"])
    for row in rows:
        numbers = [*(row.mean[name] for name in MEASURES), row.std, row.difference, row.half_width, row.pairs]
        cells = ["" if value is None else f"{value:.6g}" for value in numbers]
        writer.writerow([row.data, row.method, row.seeds, *cells])
    return file.getvalue()


def _rows(data: str, by_method: dict[str, dict[int, dict[str, Any]]], baseline: str) -> list[Row]:
    base = by_method[baseline]
    rows = []
    for method, runs in by_method.items():
        if not runs:
            continue
        mean = {name: _mean([run[name] for run in runs.values()]) for name in MEASURES}
        scores = [run[SCORE] for run in runs.values()]
        pairs = [run[SCORE] - base[seed][SCORE] for seed, run in runs.items() if seed in base]
        paired = method != baseline and bool(pairs)
        rows.append(
            Row(
                data,
                method,
                len(runs),
                mean,
                stdev(scores) if len(scores) > 1 else None,
                fmean(pairs) if paired else None,
                _half_width(pairs) if paired else None,
                len(pairs) if paired else 0,
            )
        )
    return rows


def _over_data(cells: dict[tuple[str, str, int], dict[str, Any]], data: Sequence[str], method: str) -> dict[int, Any]:
    """Return, for each seed that every data set has, the mean over data sets; seconds are added."""
    seeds = [seed for name, of, seed in cells if (name, of) == (data[0], method)]
    merged = {}
    for seed in seeds:
        runs = [cells.get((name, method, seed)) for name in data]
        whole = [run for run in runs if run is not None]
        if len(whole) == len(data):
            merged[seed] = {name: _mean([run[name] for run in whole]) for name in MEASURES}
            merged[seed]["seconds"] = sum(run["seconds"] for run in whole)
    return merged


def check_images(data: str, results: Sequence[Result]) -> None:
    """Raise ValueError unless all runs of a data set were trained and measured on the same images."""
    seen = {str(r.summary["images"]): r for r in results}
    if len(seen) > 1:
        one, other = list(seen.values())[:2]
        raise ValueError(
            f"runs of {data} must be trained and measured on the same images; {one.method} seed {one.seed} and "
            f"{other.method} seed {other.seed} were not: remove the lines of one of them from runs.jsonl"
        )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known and len(known) == len(values) else None


def _half_width(differences: Sequence[float]) -> float | None:
    """Half the width of the 95 % interval of a mean; None for one or two values, whose spread says nothing."""
    number = len(differences)
    if number < 3:
        return None
    from scipy.stats import t  # where it is used: it takes a second

    return float(t.ppf(0.975, number - 1)) * stdev(differences) / number**0.5


def _with_spread(row: Row) -> str:
    mean = row.mean[SCORE]
    return "-" if mean is None else f"{mean:.2f}" + ("" if row.std is None else f" ± {row.std:.2f}")


def _difference(row: Row) -> str:
    if row.difference is None:
        return "-"
    spread = "" if row.half_width is None else f" ± {row.half_width:.2f}"
    return f"{row.difference:+.2f}{spread}" + (f" (n = {row.pairs})" if row.pairs != row.seeds else "")


def _number(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if name == "seconds" else f"{value:.3f}" if name.startswith("nc") else f"{value:.1f}"
