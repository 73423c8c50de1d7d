"""Compare the fused losses with eager ones and with other packages on this machine: `python benchmarks/run.py`.

For each op and shape, every provider is first checked against its float64 reference, then timed (forward, and forward
with backward), then its peak memory is taken. A table is printed, and each op's rows go to a CSV file, with the
machine, versions, commit and command in every row. docs/benchmarks.md explains the columns.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib.metadata
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch
from cases import OPS, PROVIDERS, Case, Shape, make_case
from grid import PRESETS, shapes_of
from measure import Step, available_memory, peak_memory, time_interleaved, warm_up
from peaks import Peaks, peaks
from rich.console import Console
from table import Row, describe, print_table, row, write_csv

import allnc

ROOT = Path(__file__).resolve().parent.parent
CHECKED_ROWS = 1024  # rows of the inputs on which providers are compared with float64
# Largest difference from float64, relative to the largest entry: the types' rounding times the depth of the sums.
ALLOWED = {torch.float32: 2e-4, torch.bfloat16: 4e-2, torch.float16: 1e-2, torch.float64: 1e-10}
# tf32: float32 inputs, which CUDA multiplies with float16's mantissa.
DTYPES = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
OK, NO_MEMORY = "ok", "out of memory"
USABLE_MEMORY = 0.9  # of what is free: the rest is for what the formula leaves out


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(PRESETS), default="gpu" if cuda else "cpu", help="shapes to measure")
    parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS))
    parser.add_argument("--n", nargs="+", type=int, help="activations in the batch, in place of the preset's")
    parser.add_argument("--d", nargs="+", type=int, help="columns of the projection, likewise")
    parser.add_argument("--classes", nargs="+", type=int, help="classes, likewise")
    parser.add_argument("--features", nargs="+", type=int, help="columns of means, classifier and features, likewise")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16" if cuda else "float32")
    parser.add_argument(
        "--providers", nargs="+", choices=PROVIDERS, help="default: all this device can have, and rivals"
    )
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--seconds", type=float, default=2.0, help="time for each op, shape and direction")
    parser.add_argument("--min-runs", type=int, default=5, help="runs of each provider in any case")
    parser.add_argument("--out", type=Path, help="folder of the CSV files; default: benchmarks/results/<machine>")
    return parser.parse_args(arguments)


def processor(device: torch.device) -> str:
    """The machine's name in the results."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def folder_name(device: torch.device) -> str:
    """The machine as a folder: nvidia-h200, amd-epyc-2-threads."""
    name = processor(device) + ("" if device.type == "cuda" else f" {torch.get_num_threads()} threads")
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def place(device: torch.device, limits: Peaks, command: str) -> Row:
    """Where and how the figures were taken: the same in every row."""
    return {
        "machine": processor(device),
        "threads": "" if device.type == "cuda" else torch.get_num_threads(),
        **describe(limits),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda or "",
        "allnc": allnc.__version__,
        "commit": _commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "command": command,
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _commit() -> str:
    def git(*arguments: str) -> str:
        try:
            done = subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True, check=False)
        except OSError:  # no git on this machine
            return ""
        return done.stdout.strip()

    commit = git("rev-parse", "--short", "HEAD") or "unknown"
    return commit + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")


def allowed(case: Case, provider: str, dtype_name: str) -> float:
    """How far a provider may be from the reference, relative to the largest entry."""
    types = [torch.float16 if dtype_name == "tf32" else case.shape.dtype]
    check_as = case.providers[provider].check_as
    return max(ALLOWED[dtype] for dtype in types + ([] if check_as is None else [check_as]))


def difference(case: Case, provider: str, dtype_name: str) -> str:
    """The status "wrong: ..." if a provider's value or a gradient is not its float64 reference's; "" if it is."""
    most = allowed(case, provider, dtype_name)
    exact = case.value_and_gradients(provider, torch.float64, reference=True)
    for index, (got, want) in enumerate(zip(case.value_and_gradients(provider), exact, strict=True)):
        found = float((got.double() - want).abs().max() / want.abs().max().clamp(min=1e-30))
        if not found <= most:
            what = "value" if index == 0 else f"gradient of {list(case.leaves)[index - 1]}"
            return f"wrong: the {what} differs from float64 by {found:.1e} of its largest entry, allowed {most:.0e}"
    return ""


def failure(error: Exception) -> str:
    """The status of a provider that raised."""
    if isinstance(error, torch.OutOfMemoryError):
        return NO_MEMORY
    text = str(error).strip().splitlines()
    return f"failed: {type(error).__name__}: {text[0][:200] if text else ''}"


def checked_shape(shape: Shape) -> Shape:
    """The shape at which a case's providers are compared with float64: the same with at most 1024 rows and classes."""
    return Shape(N=min(shape.N, CHECKED_ROWS), D=shape.D, C=min(shape.C, CHECKED_ROWS), F=shape.F, dtype=shape.dtype)


@functools.cache
def checked(op: str, shape: Shape, provider: str, dtype_name: str, device: torch.device) -> str:
    """`difference` at a shape of at most 1024 rows, or how the provider failed; once in a run."""
    case = make_case(op, shape, device)
    if case.providers[provider].unusable:
        return ""  # it is this shape it cannot take; the larger one is judged by itself
    try:
        return difference(case, provider, dtype_name)
    except Exception as error:
        return failure(error)


def too_large(case: Case, provider: str, device: torch.device, *, backward: bool) -> str:
    """The status of a provider whose matrices main memory cannot hold; on a GPU it is tried, and fails cleanly."""
    free = available_memory() if device.type == "cpu" else None
    needed = case.predicted_bytes(provider, backward=backward)
    if free is None or needed <= USABLE_MEMORY * free:
        return ""
    return f"skipped: would need {needed / 2**30:.1f} GiB of {free / 2**30:.1f}"


def prepared(
    case: Case, provider: str, device: torch.device, *, backward: bool
) -> tuple[Step | None, str, torch.Tensor | None]:
    """A provider's step after its first runs, its status and value; None where it could not run."""
    status = case.providers[provider].unusable or too_large(case, provider, device, backward=backward)
    if status:
        return None, status, None
    try:
        step = case.step(provider, backward=backward)
        return step, OK, warm_up([step], device)
    except Exception as error:  # one provider's failure is a row of the table, not the end of the run
        return None, failure(error), None


def disagreement(case: Case, provider: str, value: torch.Tensor, eager: torch.Tensor, dtype_name: str) -> str:
    """The status "wrong: ..." if a value at full size is not eager's; "" if it is, or if it is another loss."""
    chosen = case.providers[provider]
    if value.ndim or chosen.reference is not case.providers["eager"].reference:
        return ""
    found, most = abs(float(value) / float(eager) - 1), allowed(case, provider, dtype_name)
    if found <= most:
        return ""
    return f"wrong: the value differs from eager's by {found:.1e} of it, allowed {most:.0e}"


def measure(
    case: Case, providers: list[str], dtype_name: str, device: torch.device, options: argparse.Namespace, limits: Peaks
) -> list[Row]:
    """Rows of the table for one case: verified, timed, peak memory taken."""
    rows = []
    wrong = {
        provider: checked(case.op, checked_shape(case.shape), provider, dtype_name, device)
        for provider in providers
        if not case.providers[provider].unusable
    }
    for backward in (False, True):
        statuses: dict[str, str] = {}
        steps: dict[str, Step] = {}
        eager: torch.Tensor | None = None
        for provider in providers:  # eager is the first
            if wrong.get(provider):
                statuses[provider] = wrong[provider]
                continue
            step, statuses[provider], value = prepared(case, provider, device, backward=backward)
            if step is None or value is None:
                if statuses[provider] == NO_MEMORY:
                    release_memory(device)
                continue
            eager = value if provider == "eager" else eager
            other = "" if eager is None else disagreement(case, provider, value, eager, dtype_name)
            if other:
                statuses[provider] = other
            else:
                steps[provider] = step
        timings = time_interleaved(
            {provider: [step] for provider, step in steps.items()},
            device,
            seconds=options.seconds,
            min_runs=options.min_runs,
            warmed=True,
        )
        for provider in providers:
            step = None if case.providers[provider].graph else steps.get(provider)  # a graph's memory was taken before
            rows.append(
                row(
                    case,
                    provider,
                    dtype_name,
                    limits,
                    backward=backward,
                    status=statuses[provider],
                    timing=timings.get(provider),
                    eager=timings.get("eager"),
                    peak_mib=None if step is None else peak_memory(step, device),
                )
            )
        del steps
        release_memory(device)
    return rows


def release_memory(device: torch.device) -> None:
    """Give back what a failed or finished provider held, its traceback's tensors included."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def chosen_providers(case: Case, wanted: Sequence[str] | None, device: torch.device) -> list[str]:
    """Those of a case that were asked for, eager always; by default all but a GPU's variants on a CPU."""
    if wanted is None:
        wanted = [p for p in PROVIDERS if device.type == "cuda" or p != "fused-graph"]
    return [p for p in PROVIDERS if p in case.providers and p in ("eager", *wanted)]


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    device = torch.device(options.device)
    torch.set_flush_denormal(True)
    if options.dtype == "tf32":
        torch.set_float32_matmul_precision("high")
    console = Console(width=None if sys.stdout.isatty() else 190)
    folder = options.out or ROOT / "benchmarks" / "results" / folder_name(device)
    command = shlex.join(["python", "benchmarks/run.py", *(sys.argv[1:] if arguments is None else arguments)])
    limits = peaks(device, options.dtype)
    where = place(device, limits, command)
    checked.cache_clear()
    everything: list[Row] = []
    sizes = {"n": options.n, "d": options.d, "c": options.classes, "f": options.features}
    for op in options.ops:
        rows: list[Row] = []
        path = folder / f"{op}-{options.dtype}.csv"
        for shape in shapes_of(op, options.preset, DTYPES[options.dtype], **sizes):
            console.print(f"[dim]{op} {shape}[/dim]", highlight=False)
            case = make_case(op, shape, device)
            rows += measure(
                case, chosen_providers(case, options.providers, device), options.dtype, device, options, limits
            )
            write_csv(path, rows, where)  # after each case: a run that is stopped keeps what it has
        print_table(console, rows, where)
        console.print(f"wrote {path}", soft_wrap=True)
        everything += rows
    bad = [line for line in everything if str(line["status"]).startswith(("wrong", "failed"))]
    for line in bad:
        console.print(f"[red]{line['op']} {line['provider']}[/red]: {line['status']}", soft_wrap=True)
    if bad:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
