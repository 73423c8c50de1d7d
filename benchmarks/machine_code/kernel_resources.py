"""Registers, shared memory, spills and instructions of every kernel variant, compiled for GPUs not there.

    python benchmarks/machine_code/kernel_resources.py --arch 80 90 100 --dim 64 128 256 --dtype bfloat16 --csv FILE

prints a markdown table, and writes the same as CSV under a line with the command. The variants are the launchers' own,
with class means.

Counts are static: instructions in the code, not executed. `tensor_core`, `ex2`, ... are of the whole code, which has
a loop over tiles three times (diagonal, activations, class means; a loop of one trip is no loop in the code), and more
often where the compiler peels trips, as on sm_100. What the formulas predict is one trip: `products` and `loop_ex2`
are what the fullest loop holds (all code, where everything was unrolled), `products_ratio` and `ex2_ratio` that over
the prediction: 1, but a whole number in rows of many columns where the compiler unrolled that many chunks of columns,
slightly more than 1 exponential where a running maximum rescales the sums, and less than 1 on sm_100 where the compiler
split a trip into several loops. On sm_80 and sm_90 products are multiply-adds a warp or a group of four, by the shapes
in the instructions; on sm_100, where the shape is in a register, they are instructions. `blocks` is how many run on a
multiprocessor at once, by registers, shared and tensor memory.
"""

from __future__ import annotations

import argparse
import csv
import os
import shlex
import sys
import time

# Before Triton is imported: an interpreted kernel has no code to look at.
os.environ.pop("TRITON_INTERPRET", None)

import triton
from aot import (
    PREDICTED,
    SHARED_LIMIT,
    Resources,
    Variant,
    add_arguments,
    blocks_per_multiprocessor,
    chosen_variants,
    multiplies_by_warp,
    predicted,
    resources_of_all,
)
from sass import TENSOR_CORES

COLUMNS = (
    "kernel", "mode", "arch", "dtype", "precision", "D", "block_m", "block_n", "block_d", "block_g",
    "warps", "stages", "registers", "spill_bytes", "shared_bytes", "shared_limit", "blocks", "instructions",
    "tensor_core", "ex2", "products", "products_predicted", "products_ratio", "loop_ex2", "loop_ex2_predicted",
    "ex2_ratio", "ffma", "shuffles", "async_copies", "atomics",
)  # fmt: skip


def against_prediction(variant: Variant, used: Resources) -> list[object]:
    """Products and exponentials of the fullest loop, what is predicted for them, and their ratios."""
    if variant.kernel not in PREDICTED:
        return [""] * 6
    want = predicted(variant)
    products: list[object] = ["", "", ""]  # float32 without tensor cores
    if any(used.counts[kind] for kind in TENSOR_CORES):
        issued = variant.arch == 100 and not multiplies_by_warp(variant)
        found = used.fullest(lambda loop: loop.counts["UTCHMMA"] if issued else loop.products)
        most = max(want.issued if issued else want.products)
        products = [found, most, round(found / most, 2)]
    exponentials = used.fullest(lambda loop: loop.counts["MUFU.EX2"])
    return [*products, exponentials, want.exponentials, round(exponentials / want.exponentials, 2)]


def row(variant: Variant, used: Resources) -> dict[str, object]:
    """One line of the table."""
    counts = used.counts
    blocks = [size or "" for size in variant.blocks[1:5]]
    launch = [variant.options.get(name, "") for name in ("num_warps", "num_stages")]
    values = [
        variant.kernel, variant.mode, variant.arch, variant.dtype, variant.precision, variant.dim, *blocks,
        *launch,
        used.registers, used.stack, used.shared, SHARED_LIMIT[variant.arch], blocks_per_multiprocessor(variant, used),
        used.instructions, sum(counts[kind] for kind in TENSOR_CORES), counts["MUFU.EX2"],
        *against_prediction(variant, used), counts["FFMA"], counts["SHFL"], counts["LDGSTS"], counts["RED"],
    ]  # fmt: skip
    return dict(zip(COLUMNS, values, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--csv", help="file to write the table to as well")
    arguments = parser.parse_args()
    start, rows = time.perf_counter(), []
    print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|")
    for variant, used in resources_of_all(chosen_variants(arguments), arguments.workers):
        rows.append(row(variant, used))
        print("| " + " | ".join(str(value) for value in rows[-1].values()) + " |", flush=True)
    if arguments.csv:
        with open(arguments.csv, "w", newline="") as file:
            file.write(f"# python {shlex.join(sys.argv)}; triton {triton.__version__}\n")
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
    spilling = sum(bool(one["spill_bytes"]) for one in rows)
    print(f"{len(rows)} variants, {spilling} spill, {time.perf_counter() - start:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
