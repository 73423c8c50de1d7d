"""Measure a trained run again: `python -m allnc.evaluate RUN_DIR`."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console


def main(arguments: Sequence[str] | None = None) -> int:
    """Print accuracy by shot and collapse of a checkpoint; return 0, or 2 for a mistake of the user."""
    parser = argparse.ArgumentParser(prog="python -m allnc.evaluate", description=__doc__)
    parser.add_argument("run", metavar="RUN_DIR", type=Path, help="folder of a run, with last.safetensors")
    parser.add_argument("--data.root", dest="root", help="folder of the images, where it is not the run's")
    parser.add_argument("--train.device", dest="device", choices=("auto", "cpu", "cuda"), default="auto")
    options = parser.parse_args(arguments)
    from allnc.trainer.checkpoint import load_weights
    from allnc.trainer.loop import Run
    from allnc.trainer.runlog import final_table, finite

    try:
        config, epoch, weights = load_weights(options.run)
        root = options.root or config.data.root
        config = dataclasses.replace(
            config,
            data=dataclasses.replace(config.data, root=root),
            model=dataclasses.replace(config.model, pretrained=False),  # the checkpoint has every weight
            train=dataclasses.replace(config.train, device=options.device),
        )
        run = Run(config)
        run.model.load_state_dict(weights)
        run.epoch = epoch
        measured, _ = run.measure()
    except ValueError as error:
        message = f"allnc.evaluate: error: {error}"
        Console(stderr=True).print(message, style="red", soft_wrap=True, markup=False, highlight=False)
        return 2
    Console().print(final_table({**{k: finite(v) for k, v in measured.items()}, **run.conventions()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
