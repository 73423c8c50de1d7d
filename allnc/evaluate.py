"""Measure a trained run again: `python -m allnc.evaluate RUN_DIR`."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from allnc._command import answer


def main(arguments: Sequence[str] | None = None) -> int:
    """Print accuracy by shot and collapse of a checkpoint; return 0, or 2 for a mistake of the user."""
    parser = argparse.ArgumentParser(prog="python -m allnc.evaluate", description=__doc__)
    parser.add_argument("run", metavar="RUN_DIR", type=Path, help="folder of a run, with last.safetensors")
    parser.add_argument("--data.root", dest="root", help="folder of the images, where it is not the run's")
    parser.add_argument("--train.device", dest="device", choices=("auto", "cpu", "cuda"), default="auto")
    options = parser.parse_args(arguments)
    return answer("allnc.evaluate", lambda: _evaluate(options.run, options.root, options.device))


def _evaluate(folder: Path, root: str | None, device: str) -> None:
    from rich.console import Console

    from allnc.trainer.checkpoint import load_weights
    from allnc.trainer.launcher import world_size
    from allnc.trainer.run import Run
    from allnc.trainer.runlog import final_table, finite

    if world_size() > 1:
        raise ValueError("allnc.evaluate runs as one process: start it without a launcher such as torchrun")
    config, epoch, weights = load_weights(folder)
    run = Run(
        dataclasses.replace(
            config,
            data=dataclasses.replace(config.data, root=root or config.data.root),
            model=dataclasses.replace(config.model, pretrained=False),  # the checkpoint has every weight
            train=dataclasses.replace(config.train, device=device),
        )
    )
    run.load_model(weights, epoch)
    measured, _ = run.measure()
    Console().print(final_table({**{k: finite(v) for k, v in measured.items()}, **run.conventions()}))


if __name__ == "__main__":
    sys.exit(main())
