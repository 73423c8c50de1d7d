"""Measures the tiles the tables of allnc.kernels._common could hold for a shape, on the GPU that is there.

    python benchmarks/machine_code/tune.py --n 16384 --dim 128 --dtype bfloat16

times the forward and the backward (one triangle, shifted) with the table's tile and a few others, and prints the rows
to paste. Nothing is kept: the tables are what the launchers use. A tile wins over the table's by more than the noise of
a measurement or not at all. After a change of the tables run tests/kernels/test_compile.py, which finds spills in other
modes and types of the same row.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from allnc.kernels import _common
from allnc.kernels._common import CHUNKED, Tile, row_class, table_arch, uses_waves
from allnc.kernels.hycon.lse import hycon_lse_forward
from allnc.kernels.hycon.waves import hycon_lse_backward

NOISE = 0.03  # of the time: less is no reason to change a row
Table = dict[int, dict[int, Tile]]


def candidates(table: Table, arch: int, row: int) -> list[Tile]:
    """The row's tile and the few others worth a measurement."""
    current = table[arch][row]
    if table is _common.BACKWARD:
        # The gradient's sums fill the registers: one block of 8 warps, or smaller ones that overlap each other.
        others = [Tile(128, 64, 8, 2), Tile(128, 64, 8, 3), Tile(64, 64, 4, 2), Tile(64, 64, 4, 3), Tile(64, 64, 8, 2)]
    elif row == CHUNKED:
        # Large tiles load less for a product; more stages hide more of the loads.
        others = [Tile(128, 128, 8, stages) for stages in (2, 3, 4)]
        others += [Tile(128, 256, 8, 3), Tile(128, 64, 8, 3), Tile(128, 64, 8, 4)]
    else:
        # Two blocks a multiprocessor with 64 columns of sums, or one with 128; a third stage where there is room.
        others = [Tile(128, 64, 8, 2), Tile(128, 64, 8, 3), Tile(128, 128, 8, 2), Tile(128, 64, 4, 2)]
        if row == 512:
            others.append(Tile(128, 32, 8, 2))  # fits twice
    return [current, *(tile for tile in dict.fromkeys(others) if tile != current)]


@contextlib.contextmanager
def using(table: Table, arch: int, row: int, tile: Tile) -> Iterator[None]:
    """The table with this tile in one row."""
    before = table[arch][row]
    table[arch][row] = tile
    try:
        yield
    finally:
        table[arch][row] = before


def measure(
    table: Table, arch: int, row: int, run: Callable[[], object], timer: Callable[[Callable[[], object]], float]
) -> dict[Tile, float]:
    """Milliseconds of each candidate, the current tile first; those that do not fit the GPU are left out."""
    times = {}
    for tile in candidates(table, arch, row):
        with using(table, arch, row, tile), contextlib.suppress(OutOfResources):
            times[tile] = timer(run)
    return times


def choose(times: dict[Tile, float]) -> Tile:
    """The fastest tile, or the first where no other beats it by more than the noise."""
    first, best = next(iter(times)), min(times, key=times.__getitem__)
    return best if times[best] < (1 - NOISE) * times[first] else first


def report(name: str, arch: int, row: int, times: dict[Tile, float]) -> list[str]:
    """The measurements as comments, and the row to paste into table `name`."""
    chosen, current = choose(times), next(iter(times))
    lines = [f"# {name}[{arch}]: {time:.3f} ms  {tuple(tile)}" for tile, time in times.items()]
    state = "as it is" if chosen == current else f"was {tuple(current)}"
    key = "CHUNKED" if row == CHUNKED else str(row)
    return [*lines, f"{key}: Tile{tuple(chosen)},  # {state}"]


def tune(
    num_rows: int,
    dim: int,
    dtype: torch.dtype,
    *,
    device: str = "cuda",
    arch: int,
    timer: Callable[[Callable[[], object]], float],
) -> list[str]:
    """Rows for the forward's table and the backward's, from `timer`'s milliseconds of a call, with 100 class means.

    Args:
        num_rows, dim, dtype: of the activations, random unit rows.
        device: where they are.
        arch: compute capability as 80, 90, ...
        timer: milliseconds of a call of its argument.
    """
    arch, row = table_arch(arch), row_class(dim, dtype)
    z, mu = (F.normalize(torch.randn(n, dim, device=device), dim=1).to(dtype) for n in (num_rows, 100))
    a, b = torch.ones(num_rows, device=device), torch.ones(100, device=device)
    inputs: tuple[Tensor, ...] = (z, mu, a, b, torch.full((), 0.1, device=device))
    lse, grad = torch.full_like(a, 10.0), torch.full_like(a, 1 / num_rows)

    def forward() -> object:
        return hycon_lse_forward(*inputs, shifted=True, deterministic=False)

    def backward() -> object:
        return hycon_lse_backward(grad, lse, *inputs, shifted=True)

    lines = report("FORWARD", arch, row, measure(_common.FORWARD, arch, row, forward, timer))
    name, table = ("WAVES", _common.WAVES) if uses_waves(dim, dtype) else ("BACKWARD", _common.BACKWARD)
    return lines + report(name, arch, row, measure(table, arch, row, backward, timer))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=16384, help="N, activations")
    parser.add_argument("--dim", type=int, default=128, help="D, columns")
    parser.add_argument("--dtype", default="bfloat16", choices=["float16", "bfloat16", "float32"])
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(1, "tune measures on a GPU; torch sees no CUDA device here. Run it on the GPU to tune for\n")
    torch.set_float32_matmul_precision("high")  # the tables' float32 rows are TF32's
    major, minor = torch.cuda.get_device_capability()

    def timer(run: Callable[[], object]) -> float:
        return float(triton.testing.do_bench(run, return_mode="median"))  # pyright: ignore[reportArgumentType]

    print(f"# {torch.cuda.get_device_name()}, N = {arguments.n}, D = {arguments.dim}, {arguments.dtype}")
    dtype = getattr(torch, arguments.dtype)
    for line in tune(arguments.n, arguments.dim, dtype, arch=10 * major + minor, timer=timer):
        print(line)


if __name__ == "__main__":
    main()
