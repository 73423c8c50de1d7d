"""Compiles what test_compile.py checks, in a process where Triton does not interpret; prints JSON lines."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "machine_code"))  # scripts, not a package
aot = importlib.import_module("aot")

ARCHS = (80, 90, 100)


def subset() -> list[Any]:
    """The main kernels on every architecture, and the sizes nearest to the limits; a minute on one core."""
    both = ("hycon_lse_fwd", "hycon_lse_bwd")
    common = aot.variants(ARCHS, [128], [torch.bfloat16], "high", both)
    losses = aot.variants([80, 90], [128], [torch.bfloat16], "high", ("hycon_loss_fwd", "hycon_loss_bwd"))
    widest = aot.variants(ARCHS, [256], [torch.float16], "high", ("hycon_lse_bwd",))
    panels = aot.variants([80], [256], [torch.bfloat16], "high", ("hycon_lse_fwd",))
    chunks = aot.variants([80, 90], [1024], [torch.bfloat16], "high", ("hycon_lse_fwd",))
    waves = aot.variants(ARCHS, [1024], [torch.bfloat16], "high", ("hycon_wave",))
    exact = aot.variants([90], [128], [torch.float32], "highest", both)
    small = ("hycon_lse_finish", "hycon_lse_terms", "all_around_fwd")
    others = aot.variants([90], [64], [torch.bfloat16], "high", small)
    pairs = aot.variants([80, 100], [64], [torch.bfloat16], "high", ("all_around_fwd", "p2p_fwd"))
    wanted = ("triangle", "shifted", "square")
    chosen = [*waves, *(v for v in itertools.chain(common, losses, widest) if v.mode in wanted)]
    chosen += [v for v in itertools.chain(panels, chunks, exact) if v.mode in ("triangle", "shifted")]
    chosen += [v for v in pairs if v.mode in ("triangle, etf", "etf, all", "softmax, all")]
    return chosen + [v for v in others if v.mode.startswith(("triangle", "shifted"))]


if __name__ == "__main__":
    for variant, used in aot.resources_of_all(subset()):
        row = dataclasses.asdict(variant) | dataclasses.asdict(used)
        row |= {"tile": variant.blocks[1:3], "blocks": aot.blocks_per_multiprocessor(variant, used)}
        if variant.kernel in aot.PREDICTED:
            row["predicted"] = dataclasses.asdict(aot.predicted(variant))
        print(json.dumps(row), flush=True)
