"""What `python -m allnc.theory losses` reads, prints and writes; torch is imported for the picture alone."""

from __future__ import annotations

import argparse

from rich.console import Console

from allnc._checks import check_interval
from allnc.sweep.record import RUNS, read
from allnc.theory.equality import Comparison, Grid, Spread, compare, counted, read_grids, standard_error
from allnc.theory.report import make_folder, number, print_table, write_results


def run_losses(options: argparse.Namespace) -> None:
    """Compare the losses of recorded sweeps with one of them, over widths and epochs."""
    check_interval("--margin", options.margin, 0, 100, open_low=True)
    results = []
    for folder in options.sweep:
        found = read(folder)
        if not found:
            raise ValueError(
                f"{folder} must be the folder of a sweep with finished runs; it has no {RUNS} that holds one: train "
                f"them by python -m allnc.sweep benchmarks/sweeps/losses.yaml --out {folder}"
            )
        results += found
    if options.methods is not None:
        known = dict.fromkeys(result.method for result in results)
        for method in options.methods:
            if method not in known:
                raise ValueError(f"--methods must be of the sweep ({', '.join(known)}); got {method}")
        results = [result for result in results if result.method in (*options.methods, options.baseline)]
    grids = read_grids(results, options.baseline)
    make_folder(options.out)
    console = Console(width=190)
    every: list[Comparison] = []
    spreads: list[Spread] = []
    for name, grid in grids.items():
        rows, spread = compare(grid, options.baseline, options.margin)
        _tell(console, name, grid, rows, spread, options.baseline, options.margin)
        every += rows
        spreads += spread
    if options.out is not None:
        write_results(options.out, {"equality": every, "spread": spreads})
        from allnc.theory.plot import plot_equality

        for ending in ("png", "svg"):
            plot_equality(every, options.baseline, options.margin, options.out / f"losses.{ending}")
        console.print(f"tables and pictures in {options.out}", soft_wrap=True, highlight=False)


def _tell(
    console: Console,
    name: str,
    grid: Grid,
    rows: list[Comparison],
    spreads: list[Spread],
    baseline: str,
    margin: float,
) -> None:
    best = max(row.accuracy for row in rows)
    error = standard_error(best, grid.images)
    lines = [
        f"{name}: the accuracy is the mean over classes on {grid.images:,} {grid.measured_on} images after "
        f"{grid.epoch}; where it is {best:.1f} %, these images alone give it a standard error of {error:.2f} points."
    ]
    if margin < error:
        lines.append(f"--margin {margin:g} is below that: such a difference is one of these images, not of the loss.")
    if grid.left_out:
        lines.append(f"{grid.left_out} runs are left out, whose seed another loss lacks in the same cell.")
    console.print("\n".join(lines), soft_wrap=True, highlight=False)
    print_table(
        console,
        f"Difference to {baseline}, ± half of its 90 % interval: equal where the whole interval is within ± {margin:g}",
        [
            ("width", lambda r: _whole(r.width)),
            ("epochs", lambda r: _whole(r.epochs)),
            ("loss", lambda r: r.loss),
            ("n", lambda r: str(r.seeds)),
            ("accuracy", lambda r: f"{r.accuracy:.2f}"),
            (f"to {baseline}", lambda r: _difference(r, baseline)),
            ("p", lambda r: number(r.p, 4)),
            ("Holm", lambda r: number(r.holm, 4)),
            ("", lambda r: r.verdict or "-"),
            ("training", lambda r: number(r.train_accuracy, 1)),
            ("NC1", lambda r: number(r.nc1)),
            ("NC2 means", lambda r: number(r.nc2_means, 3)),
            ("NC2 weights", lambda r: number(r.nc2_weights, 3)),
            ("NC3", lambda r: number(r.nc3, 3)),
        ],
        rows,
    )
    print_table(
        console,
        "Standard deviations of the accuracy, points",
        [
            ("width", lambda r: _whole(r.width)),
            ("epochs", lambda r: _whole(r.epochs)),
            ("between losses", lambda r: number(r.losses, 2)),
            ("between seeds", lambda r: number(r.seeds, 2)),
            ("of these not shared by losses", lambda r: number(r.residual, 2)),
        ],
        spreads,
    )
    found = counted(rows)
    console.print(
        f"Within ± {margin:g} points of {baseline}: {found['equal']} of {found['all']} comparisons ({found['holm']} "
        f"after Holm's correction for all of them); outside: {found['different']}; open: {found['open']}.\n",
        soft_wrap=True,
        highlight=False,
    )


def _whole(value: int | None) -> str:
    return "all" if value is None else str(value)


def _difference(row: Comparison, baseline: str) -> str:
    if row.loss == baseline:
        return "-"
    return f"{round(row.difference, 2) + 0.0:+.2f}" + ("" if row.half_width is None else f" ± {row.half_width:.2f}")
