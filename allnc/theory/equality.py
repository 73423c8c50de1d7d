"""Do all losses end at the same accuracy? Equivalence to one of them, in each cell of a grid of widths and lengths.

A difference that is not significant is no equality: two small samples never differ. A loss counts as equal to the
baseline where the whole 90 % interval of its difference lies within ± margin, which is two one-sided tests at 5 %.

The interval is from the analysis of variance of a cell, losses x seeds: runs of one seed share their first weights and
the order of their batches, and the rest, pooled over the losses, is what a difference is measured against. (Three seeds
of one pair of losses alone often have the very same difference, as an accuracy moves in steps of one image.)

The same analysis says how much losses differ beside seeds. Neither torch nor numpy is imported.

Legend: L losses, S seeds.

Sources: Schuirmann 1987 (two one-sided tests); Holm 1979; the grid of Zhou et al., Are All Losses Created Equal,
NeurIPS 2022.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, variance
from typing import Any, NamedTuple

from allnc.sweep.record import Result, epoch_of
from allnc.sweep.table import SCORE, check_images

LEVEL = 0.05  # of each one-sided test
_NO_SPREAD = 1e-9  # points: so few runs say nothing of how far others would be apart
EQUAL, DIFFERENT, OPEN = "equal", "different", "open"
COLLAPSE = ("train_accuracy", "nc1", "nc2_means", "nc2_weights", "nc3")

Cell = tuple[str, int | None, int | None]  # data set, width and epochs; None: the mean over all of them
Scores = Mapping[str, Mapping[int, float]]  # loss -> seed -> accuracy in percent; every loss has the same seeds


class Comparison(NamedTuple):
    """A loss in a cell, beside the baseline."""

    data: str
    width: int | None  # None, as for epochs: the mean over all cells
    epochs: int | None
    loss: str
    seeds: int
    accuracy: float  # mean over seeds, percent
    difference: float  # to the baseline, points
    half_width: float | None  # of its 90 % interval; None for the baseline, and where there is no spread to judge by
    p: float | None  # of "not equal within the margin": the larger one of both tests
    holm: float | None  # the same, adjusted for all comparisons in cells of this data set
    verdict: str | None  # equal, different (the interval lies outside of ± margin) or open
    train_accuracy: float | None  # this and those below: mean over seeds; None where a run has none
    nc1: float | None
    nc2_means: float | None
    nc2_weights: float | None
    nc3: float | None


class Spread(NamedTuple):
    """Variance components of the accuracies of a cell, as standard deviations in points."""

    data: str
    width: int | None
    epochs: int | None
    losses: float  # between losses; an estimate below 0 counts as 0
    seeds: float  # between the seeds of one loss
    residual: float  # of these, what is not common to all losses


class Grid(NamedTuple):
    """The runs of one data set."""

    cells: dict[Cell, dict[str, dict[int, dict[str, Any]]]]  # cell -> loss -> seed -> summary; in order, overall last
    left_out: int  # runs whose seed another loss of the cell lacks
    images: int  # on which accuracy was measured
    measured_on: str
    epoch: str  # of which the accuracy is


def read_grids(results: Sequence[Result], baseline: str) -> dict[str, Grid]:
    """Sort runs into data sets, cells, losses and seeds.

    Of a cell count the seeds that all of its losses have, so that an unfinished sweep is compared where it is complete;
    in the mean over cells, the losses and the seeds of all of them.

    Args:
        results: of sweeps over `model.width` and `train.epochs`; the last one of each data set, method and seed counts.
        baseline: the method that the others are compared with.

    Raises:
        ValueError: a run has no width, two data sets of a sweep are one cell, a cell has no run of the baseline, or
            runs of a data set were measured on different images.
    """
    sets: dict[str, dict[Cell, dict[str, dict[int, Result]]]] = {}
    for result in results:
        name, width = str(result.options["data.name"]), result.options.get("model.width")
        if width is None:
            raise ValueError(
                f"every run must have model.width, as ResNets for small images do; {result.data} {result.method} seed "
                f"{result.seed} has {result.options['model.name']}"
            )
        cell = (name, width, result.options["train.epochs"])
        runs = sets.setdefault(name, {}).setdefault(cell, {}).setdefault(result.method, {})
        other = next((run.data for losses in sets[name][cell].values() for run in losses.values()), result.data)
        if other != result.data:
            raise ValueError(
                f"a width and a number of epochs must be of one data set of the sweep; {other} and {result.data} both "
                f"have {name}, width {width} and {cell[2]} epochs"
            )
        runs[result.seed] = result
    return {name: _grid(name, cells, baseline) for name, cells in sets.items()}


def compare(grid: Grid, baseline: str, margin: float) -> tuple[list[Comparison], list[Spread]]:
    """Return every loss of every cell beside the baseline, and how accuracies spread in each cell.

    Args:
        grid: of `read_grids`.
        baseline: the loss that the others are compared with.
        margin: largest difference, in points, that counts as none, > 0.
    """
    rows, spreads = [], []
    for cell, losses in grid.cells.items():
        scores = {loss: {seed: run[SCORE] for seed, run in runs.items()} for loss, runs in losses.items()}
        spread = _spread(cell, scores)
        spreads += [] if spread is None else [spread]
        test = _test(scores, baseline, margin, None if spread is None else spread.residual)
        for loss, runs in losses.items():
            collapse = {name: _mean([run.get(name) for run in runs.values()]) for name in COLLAPSE}
            rows.append(Comparison(*cell, loss, len(runs), *test(loss), **collapse))
    tested = sorted((row.p, at) for at, row in enumerate(rows) if row.p is not None and row.width is not None)
    highest = 0.0
    for rank, (p, at) in enumerate(tested):
        highest = max(highest, min(1.0, (len(tested) - rank) * p))
        rows[at] = rows[at]._replace(holm=highest)
    return rows, spreads


def counted(rows: Sequence[Comparison]) -> dict[str, int]:
    """Return in how many cells losses are equal to the baseline (also by Holm), different, or it is open."""
    tested = [row for row in rows if row.verdict is not None and row.width is not None]
    counts = {verdict: sum(row.verdict == verdict for row in tested) for verdict in (EQUAL, DIFFERENT, OPEN)}
    return {**counts, "holm": sum(row.holm is not None and row.holm <= LEVEL for row in tested), "all": len(tested)}


def standard_error(accuracy: float, images: int) -> float:
    """Return the standard error, in points, of an accuracy in percent that was measured on so many images."""
    return (accuracy * (100 - accuracy) / images) ** 0.5


def _grid(name: str, cells: Mapping[Cell, Mapping[str, Mapping[int, Result]]], baseline: str) -> Grid:
    every = [run for losses in cells.values() for runs in losses.values() for run in runs.values()]
    check_images(name, every)
    kept: dict[Cell, dict[str, dict[int, dict[str, Any]]]] = {}
    for cell, losses in sorted(cells.items(), key=lambda item: item[0][1:]):
        if baseline not in losses:
            raise ValueError(
                f"every width and number of epochs must have a run of the baseline {baseline}; {name}, width "
                f"{cell[1]}, {cell[2]} epochs has {', '.join(losses)}"
            )
        seeds = sorted(set.intersection(*map(set, losses.values())))
        if seeds:
            kept[cell] = {loss: {seed: runs[seed].summary for seed in seeds} for loss, runs in losses.items()}
    if not kept:
        raise ValueError(f"losses must have a seed in common; those of {name} have none in any cell")
    used = [run for losses in kept.values() for runs in losses.values() for run in runs.values()]
    if len(kept) > 1:
        kept |= _overall(name, list(kept.values()))
    summary = every[0].summary
    measured_on = summary["measured_on"]
    images = int(summary["images"][measured_on].split(" ")[0].replace(",", ""))
    return Grid(kept, len(every) - len(used), images, measured_on, epoch_of(used))


def _overall(data: str, cells: Sequence[Mapping[str, Mapping[int, Any]]]) -> dict[Cell, Any]:
    """Return the mean over cells, of the losses and seeds that all of them have; nothing where there are none."""
    everywhere = [loss for loss in cells[0] if all(loss in losses for losses in cells)]
    seeds = sorted(set.intersection(*(set(runs) for losses in cells for runs in losses.values())))
    names = (SCORE, *COLLAPSE)
    means = {
        loss: {seed: {name: _mean([cell[loss][seed].get(name) for cell in cells]) for name in names} for seed in seeds}
        for loss in everywhere
    }
    return {(data, None, None): means} if seeds else {}


def _spread(cell: Cell, scores: Scores) -> Spread | None:
    """Return the variance components by a two-way analysis of variance; None for one loss or one seed."""
    seeds = list(next(iter(scores.values()), {}))
    L, S = len(scores), len(seeds)
    if L < 2 or S < 2:
        return None
    of_losses = {loss: fmean(runs.values()) for loss, runs in scores.items()}
    of_seeds = {seed: fmean(runs[seed] for runs in scores.values()) for seed in seeds}
    centre = fmean(of_losses.values())
    rest = [run[s] - of_losses[loss] - of_seeds[s] + centre for loss, run in scores.items() for s in seeds]
    residual = sum(r * r for r in rest) / ((L - 1) * (S - 1))
    between = max(0.0, variance(of_losses.values()) - residual / S)
    within = fmean(variance(runs.values()) for runs in scores.values())
    return Spread(*cell, between**0.5, within**0.5, residual**0.5)


def _test(
    scores: Scores, baseline: str, margin: float, residual: float | None
) -> Callable[[str], tuple[float, float, float | None, float | None, None, str | None]]:
    """Return the test of a loss: accuracy, difference, half of its interval, p, (Holm's comes later), verdict."""
    from scipy.stats import t  # where it is used: it takes a second

    def test(loss: str) -> tuple[float, float, float | None, float | None, None, str | None]:
        accuracy = fmean(scores[loss].values())
        difference = accuracy - fmean(scores[baseline].values())
        if loss == baseline or residual is None or residual < _NO_SPREAD:
            return accuracy, difference, None, None, None, None
        num_seeds = len(scores[loss])
        freedom = (len(scores) - 1) * (num_seeds - 1)
        error = residual * (2 / num_seeds) ** 0.5
        half = float(t.ppf(1 - LEVEL, freedom)) * error
        p = float(t.sf((margin - abs(difference)) / error, freedom))
        verdict = EQUAL if p <= LEVEL else DIFFERENT if abs(difference) - half > margin else OPEN
        return accuracy, difference, half, p, None, verdict

    return test


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known and len(known) == len(values) else None
