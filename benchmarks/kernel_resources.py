"""Registers, shared memory, spills and instructions of every kernel variant, compiled for GPUs not there.

    python benchmarks/kernel_resources.py --arch 80 90 100 --dim 64 128 256 --dtype bfloat16 --csv FILE

prints a markdown table, and writes the same as CSV. The variants are the launchers' own, with class means. Counts
are static: instructions in the code, not executed. A loop over tiles is in the code three times, for the
diagonal, the activations and the class means, and more often where the compiler peels iterations.
exp_per_element is MUFU.EX2 over the elements a thread has in these three loops: 1 is one an element.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
import time

# Before Triton is imported: an interpreted kernel has no code to look at.
os.environ.pop("TRITON_INTERPRET", None)

from allnc.kernels.aot import (
    SHARED_LIMIT,
    Resources,
    Variant,
    add_arguments,
    chosen_variants,
    resources_of_all,
)

TENSOR_CORES = ("HMMA", "HGMMA", "UTCHMMA")
COLUMNS = (
    "kernel", "mode", "arch", "dtype", "precision", "D", "block_m", "block_n", "block_d", "block_g",
    "warps", "stages", "registers", "spill_bytes", "shared_bytes", "shared_limit", "instructions", "tensor_core", "ex2",
    "exp_per_element", "ffma", "shuffles", "async_copies", "atomics",
)  # fmt: skip


def row(variant: Variant, used: Resources) -> dict[str, object]:
    """One line of the table."""
    constants, counts = variant.constants, used.counts
    per_element: object = ""
    if variant.kernel in ("hycon_fwd", "hycon_bwd"):
        threads = 32 * variant.options["num_warps"]
        elements = 3 * constants["BLOCK_M"] * constants["BLOCK_N"] / threads
        per_element = round(counts["MUFU.EX2"] / elements, 2)
    blocks = [constants.get(f"BLOCK_{name}", "") for name in "MNDG"]
    launch = [variant.options.get(name, "") for name in ("num_warps", "num_stages")]
    values = [
        variant.kernel, variant.mode, variant.arch, variant.dtype, variant.precision, variant.dim, *blocks,
        *launch,
        used.registers, used.stack, used.shared, SHARED_LIMIT[variant.arch], used.instructions,
        sum(counts[kind] for kind in TENSOR_CORES), counts["MUFU.EX2"], per_element,
        counts["FFMA"], counts["SHFL"], counts["LDGSTS"], counts["RED"],
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
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
    spilling = sum(bool(one["spill_bytes"]) for one in rows)
    print(f"{len(rows)} variants, {spilling} spill, {time.perf_counter() - start:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
