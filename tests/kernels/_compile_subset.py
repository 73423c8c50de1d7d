"""Compiles what test_compile.py checks, in a process where Triton does not interpret; prints JSON lines."""

from __future__ import annotations

import dataclasses
import itertools
import json

import torch

from allnc.kernels.aot import PREDICTED, Variant, blocks_per_multiprocessor, predicted, resources_of_all, variants

ARCHS = (80, 90, 100)


def subset() -> list[Variant]:
    """The main kernels on every architecture, and the sizes nearest to the limits; a minute on one core."""
    both = ("hycon_fwd", "hycon_bwd")
    common = variants(ARCHS, [128], [torch.bfloat16], "high", both)
    losses = variants([80, 90], [128], [torch.bfloat16], "high", ("hycon_loss_fwd", "hycon_loss_bwd"))
    widest = variants(ARCHS, [256], [torch.float16], "high", ("hycon_bwd",))
    panels = variants([80], [256], [torch.bfloat16], "high", ("hycon_fwd",))
    chunks = variants([80, 90], [1024], [torch.bfloat16], "high", ("hycon_fwd",))
    waves = variants(ARCHS, [1024], [torch.bfloat16], "high", ("hycon_wave",))
    exact = variants([90], [128], [torch.float32], "highest", both)
    small = ("hycon_finish", "hycon_bwd_terms", "all_around_fwd")
    others = variants([90], [64], [torch.bfloat16], "high", small)
    wanted = ("triangle", "shifted", "square")
    chosen = [*waves, *(v for v in itertools.chain(common, losses, widest) if v.mode in wanted)]
    chosen += [v for v in itertools.chain(panels, chunks, exact) if v.mode in ("triangle", "shifted")]
    return chosen + [v for v in others if v.mode.startswith(("triangle", "shifted"))]


if __name__ == "__main__":
    for variant, used in resources_of_all(subset()):
        row = dataclasses.asdict(variant) | dataclasses.asdict(used)
        row["blocks"] = blocks_per_multiprocessor(variant, used)
        if variant.kernel in PREDICTED:
            row["predicted"] = dataclasses.asdict(predicted(variant))
        print(json.dumps(row), flush=True)
