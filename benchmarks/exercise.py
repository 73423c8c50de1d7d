"""Run the fused ops forward and backward and nothing else: `python benchmarks/exercise.py`.

For tools that watch kernels: compute-sanitizer and ncu slow every kernel down many times; this keeps to ours, at few
shapes. Results are not compared with anything here (the tests and run.py do that); they must only be finite.
"""

from __future__ import annotations

import argparse
from itertools import product

import torch
from cases import OPS, Shape, make_case

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", nargs="+", choices=OPS, default=["hycon", "supcon", "all_around", "class_mean_ema"])
    # Ragged for every tile size, more rows than one tile, and a row and a column alone.
    parser.add_argument("--n", nargs="+", type=int, default=[1, 130, 517])
    parser.add_argument("--d", nargs="+", type=int, default=[40, 128, 520])
    parser.add_argument("--classes", type=int, default=37)
    parser.add_argument("--features", type=int, default=72)
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=1, help="times each is run")
    parser.add_argument("--deterministic", action="store_true", help="with torch.use_deterministic_algorithms")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    torch.use_deterministic_algorithms(options.deterministic, warn_only=True)
    for op, dtype, d, n in product(options.ops, options.dtypes, options.d, options.n):
        if op == "class_mean_ema" and d != options.d[0]:
            continue  # it has no projection
        shape = Shape(N=n, D=d, C=options.classes, F=options.features, dtype=DTYPES[dtype])
        step = make_case(op, shape, device).step("fused", backward=True)
        for _ in range(options.rounds):
            value = step()
        if not bool(value.isfinite().all()):
            raise SystemExit(f"{op} {shape}: the value is not finite")
        print(op, dtype, f"N={n} D={d}", flush=True)


if __name__ == "__main__":
    main()
