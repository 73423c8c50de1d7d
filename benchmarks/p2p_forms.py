"""Which way to compute P2P's squared form is the fastest, by shape: the measurement behind `pair_form`.

    OMP_NUM_THREADS=1 python benchmarks/p2p_forms.py --out benchmarks/results/p2p-forms-cpu.csv

Forward and backward, centring included, every form on the same inputs, in turn, in one process. Forms: eager
(C x C matrices and autograd), pairwise (C x C matrices, gradient by hand), closed (F x F matrices); on a CPU cpp (as
pairwise, in C++) and on a GPU triton. `flops` are those of the form's own matrix products.

Legend: C classes, F columns; blocks own (X, X), cross (X, Y), all (X, X), (Y, Y), (X, Y).
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from measure import time_interleaved
from torch import Tensor

from allnc import _extension
from allnc.ops.p2p import Blocks, centred_units, p2p_blocks
from allnc.ops.p2p.p2p import values_in_cpp

COLUMNS: list[str] = ["device", "threads", "blocks", "C", "F", "form", "median_ms", "p20_ms", "p80_ms", "runs", "flops"]
FORMS = ("eager", "pairwise", "closed", "cpp", "triton")
PAIRS: dict[str, tuple[tuple[int, int], ...]] = {
    "own": ((0, 0),),
    "cross": ((0, 1),),
    "all": ((0, 0), (1, 1), (0, 1)),
}


def eager_values(x: Tensor, y: Tensor | None, blocks: Blocks) -> Tensor:
    """The squared form as it is written, of rows that are centred and of unit length already."""
    sides, num_classes = (x, x if y is None else y), len(x)
    own = torch.eye(num_classes, dtype=torch.bool, device=x.device)
    rho = torch.full((num_classes, num_classes), -1 / (num_classes - 1), device=x.device).masked_fill(own, 1)
    return torch.stack([(sides[i] @ sides[j].T - rho).square().mean() for i, j in PAIRS[blocks]])


def matrix_flops(form: str, blocks: Blocks, num_classes: int, dim: int) -> float:
    """Operations of a form's matrix products, forward and backward."""
    if form == "closed":  # forward: the Gram matrix of each side; backward: one product a side
        return {"own": 4.0, "cross": 8.0, "all": 8.0}[blocks] * num_classes * dim**2
    if form == "pairwise":  # G; one product with it a side
        return {"own": 4.0, "cross": 6.0, "all": 14.0}[blocks] * num_classes**2 * dim
    if form == "cpp":  # one triangle of a side with itself
        return {"own": 3.0, "cross": 6.0, "all": 12.0}[blocks] * num_classes**2 * dim
    if form == "eager":
        return 6.0 * len(PAIRS[blocks]) * num_classes**2 * dim
    chunks = -(-dim // 512)  # triton: symmetric forward; backward 2 products a side and block, G again for each chunk
    forward, products = {"own": (1, 1), "cross": (2, 2), "all": (4, 4)}[blocks]
    return (forward + 2.0 * products * (chunks + 1)) * num_classes**2 * dim


def steps(
    blocks: Blocks, num_classes: int, dim: int, device: torch.device
) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """Each form's forward and backward, from rows that are not centred: the gradients of the sides."""
    seen = torch.ones(num_classes, dtype=torch.bool, device=device)
    x, other = (torch.randn(num_classes, dim, device=device, requires_grad=True) for _ in range(2))
    y = None if blocks == "own" else other
    leaves = [x] if y is None else [x, y]

    def step(form: str, backend: str = "eager") -> Callable[[], tuple[Tensor, ...]]:
        def run() -> tuple[Tensor, ...]:
            if form == "cpp":
                value = values_in_cpp(x, y, seen, blocks=blocks, form="pairwise", temperature=0.1)
            else:
                u, v = centred_units(x, y, seen, backend=backend)
                rest = {"blocks": blocks, "form": form, "temperature": 0.1, "backend": backend}
                value = eager_values(u, v, blocks) if form == "eager" else p2p_blocks(u, v, seen, **rest)
            return torch.autograd.grad(value.sum(), leaves)

        return run

    found = {form: step(form) for form in ("eager", "pairwise", "closed")}
    if device.type == "cuda":
        return found | {"triton": step("pairwise", "triton")}
    return found | ({"cpp": step("cpp")} if _extension.has_cpp() else {})


def measure(arguments: argparse.Namespace) -> Iterator[dict[str, object]]:
    """One row of the results for every shape, blocks and form."""
    device = torch.device(arguments.device)
    for num_classes, dim, blocks in itertools.product(arguments.classes, arguments.features, arguments.blocks):
        torch.manual_seed(0)
        found = steps(blocks, num_classes, dim, device)
        chosen = {form: [run] for form, run in found.items() if form in arguments.forms}
        timings = time_interleaved(chosen, device, seconds=arguments.seconds, min_runs=arguments.runs)
        for form, timing in timings.items():
            values = (arguments.name or device.type, torch.get_num_threads(), blocks, num_classes, dim, form)
            times = (f"{timing.median:.4g}", f"{timing.p20:.4g}", f"{timing.p80:.4g}", timing.runs)
            flops = f"{matrix_flops(form, blocks, num_classes, dim):.3g}"
            yield dict(zip(COLUMNS, (*values, *times, flops), strict=True))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Times the forms of P2P's squared loss.")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--name", help="what to call the device in the results")
    parser.add_argument("--classes", type=int, nargs="+", default=[10, 100, 1000, 8142])
    parser.add_argument("--features", type=int, nargs="+", default=[64, 512, 2048])
    parser.add_argument("--blocks", nargs="+", default=list(PAIRS), choices=list(PAIRS))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=list(FORMS))
    parser.add_argument("--out", type=Path, help="CSV to write; rows are added to one that exists")
    arguments = parser.parse_args(argv)
    new = arguments.out and not arguments.out.exists()
    with arguments.out.open("a", newline="") if arguments.out else contextlib.nullcontext(sys.stdout) as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        for row in measure(arguments):
            writer.writerow(row)
            file.flush()
            print(*row.values(), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
