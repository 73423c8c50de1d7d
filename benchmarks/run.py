"""Compare the fused losses with eager ones on this machine: `python benchmarks/run.py`.

For each op and shape, every provider is first checked against the float64 reference, then timed (forward, and forward
with backward), then its peak memory is taken. A table is printed; `--out` also writes a CSV whose rows carry machine,
versions and commit.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

import torch
from cases import OPS, PROVIDERS, Case, Shape, make_case
from measure import peak_memory, time_interleaved
from rich.console import Console
from rich.table import Table

import allnc

CHECKED_ROWS = 1024  # rows of the inputs on which providers are compared with float64
# Largest difference from float64, relative to the largest entry: the types' rounding times the depth of the sums.
ALLOWED = {torch.float32: 2e-4, torch.bfloat16: 4e-2, torch.float16: 1e-2, torch.float64: 1e-10}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS))
    parser.add_argument("--n", nargs="+", type=int, default=[4096, 8192], help="activations in the batch")
    parser.add_argument("--d", nargs="+", type=int, default=[128], help="columns of the projection")
    parser.add_argument("--classes", nargs="+", type=int, default=[1000])
    parser.add_argument("--features", type=int, default=512, help="columns of the class means and the classifier")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=list(PROVIDERS), help="eager always runs")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=10.0, help="time for each op, shape and direction")
    parser.add_argument("--min-runs", type=int, default=5, help="runs of each provider in any case")
    parser.add_argument("--out", type=Path, default=None, help="CSV file to write")
    return parser.parse_args(arguments)


def machine(device: torch.device) -> dict[str, str]:
    """Where the figures were taken: processor, threads, versions, commit."""
    if device.type == "cuda":
        processor = torch.cuda.get_device_name(device)
    else:
        names = [line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")]
        processor = f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads"
    return {
        "machine": processor,
        "torch": torch.__version__,
        "allnc": allnc.__version__,
        "commit": _commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def _commit() -> str:
    root = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True, check=False)
        return done.stdout.strip()

    commit = git("rev-parse", "--short", "HEAD") or "unknown"
    return commit + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")


def verify(case: Case, providers: list[str], device: torch.device) -> None:
    """Stop with a message if a provider differs from the float64 reference, on a case of at most 1024 rows."""
    shape = case.shape
    small = Shape(N=min(shape.N, CHECKED_ROWS), D=shape.D, C=min(shape.C, CHECKED_ROWS), F=shape.F, dtype=shape.dtype)
    check = make_case(case.op, small, device)
    exact = check.value_and_gradients("eager", torch.float64)
    for provider in providers:
        for index, (got, want) in enumerate(zip(check.value_and_gradients(provider), exact, strict=True)):
            difference = float((got.double() - want).abs().max() / want.abs().max().clamp(min=1e-30))
            if not difference <= ALLOWED[shape.dtype]:
                what = "value" if index == 0 else f"gradient of {list(check.leaves)[index - 1]}"
                raise SystemExit(
                    f"{case.op} {provider}: the {what} differs from float64 by {difference:.2e} of its largest "
                    f"entry; at most {ALLOWED[shape.dtype]:.0e} is allowed for {shape.dtype}. Nothing was timed"
                )


def measure(case: Case, providers: list[str], device: torch.device, options: argparse.Namespace) -> list[dict]:
    """Rows of the table for one case: verified, timed, peak memory taken."""
    verify(case, providers, device)
    rows = []
    for backward in (False, True):
        sets = range(_sets(case, device))
        steps = {provider: [case.step(provider, backward=backward) for _ in sets] for provider in providers}
        timings = time_interleaved(steps, device, seconds=options.seconds, min_runs=options.min_runs)
        for provider in providers:
            timing = timings[provider]
            memory = peak_memory(steps[provider][0], device)
            effective = case.effective_flops * (1.0 if backward else 1 / 3)
            rows.append(
                {
                    "op": case.op,
                    "N": case.shape.N,
                    "D": case.shape.D,
                    "C": case.shape.C,
                    "F": case.shape.F,
                    "dtype": str(case.shape.dtype).removeprefix("torch."),
                    "pass": "forward+backward" if backward else "forward",
                    "provider": provider,
                    "median_ms": round(timing.median, 3),
                    "p20_ms": round(timing.p20, 3),
                    "p80_ms": round(timing.p80, 3),
                    "runs": timing.runs,
                    "speedup": round(timings["eager"].median / timing.median, 2),
                    "peak_mib": None if memory is None else round(memory, 1),
                    "effective_gflops": round(effective / timing.median / 1e6, 1),
                }
            )
    return rows


def _sets(case: Case, device: torch.device) -> int:
    """How many copies of the inputs to rotate through: twice the L2 cache of a GPU, one set on a CPU."""
    if device.type != "cuda":
        return 1
    size = sum(leaf.numel() * leaf.element_size() for leaf in case.leaves.values())
    return min(16, 1 + 2 * torch.cuda.get_device_properties(device).L2_cache_size // size)


def print_table(console: Console, rows: list[dict], where: dict[str, str]) -> None:
    """One table a case and pass, eager first."""
    table = Table(title=" · ".join(f"{key} {value}" for key, value in where.items()), title_style="dim")
    for column in ("op", "shape", "pass", "provider", "median ms", "p20–p80", "runs", "× eager", "peak MiB", "GFLOP/s"):
        table.add_column(column, justify="left" if column in ("op", "shape", "pass", "provider") else "right")
    previous = None
    for row in rows:
        group = (row["op"], row["N"], row["D"], row["C"], row["pass"])
        if previous not in (None, group):
            table.add_section()
        shape = f"{row['C']}x{row['F']}" if row["op"] == "p2p" else f"N={row['N']} D={row['D']} C={row['C']}"
        first = [row["op"], shape, row["pass"]] if group != previous else ["", "", ""]
        table.add_row(
            *first,
            row["provider"],
            f"{row['median_ms']:.2f}",
            f"{row['p20_ms']:.2f}–{row['p80_ms']:.2f}",
            str(row["runs"]),
            f"{row['speedup']:.2f}",
            "?" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}",
            f"{row['effective_gflops']:.0f}",
        )
        previous = group
    console.print(table)


def shapes_of(op: str, options: argparse.Namespace) -> list[Shape]:
    """The shapes an op is measured at; p2p has no activations and class_mean_ema no projection."""
    dtype = DTYPES[options.dtype]
    return [
        Shape(N=n, D=d, C=c, F=options.features, dtype=dtype)
        for n in (options.n[:1] if op == "p2p" else options.n)
        for d in (options.d[:1] if op in ("p2p", "class_mean_ema") else options.d)
        for c in options.classes
    ]


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    device = torch.device(options.device)
    torch.set_flush_denormal(True)
    console = Console(width=None if sys.stdout.isatty() else 150)
    where, rows = machine(device), []
    for op in options.ops:
        for shape in shapes_of(op, options):
            case = make_case(op, shape, device)
            providers = [p for p in PROVIDERS if p in case.providers and p in ("eager", *options.providers)]
            console.print(f"[dim]{op} {shape}[/dim]", highlight=False)
            rows += measure(case, providers, device, options)
    print_table(console, rows, where)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with options.out.open("w", newline="") as file:
            command = "python benchmarks/run.py " + " ".join(sys.argv[1:] if arguments is None else arguments)
            table = [{**row, **where, "command": command} for row in rows]
            writer = csv.DictWriter(file, fieldnames=list(table[0]))
            writer.writeheader()
            writer.writerows(table)
        console.print(f"wrote {os.path.relpath(options.out)}")


if __name__ == "__main__":
    main()
