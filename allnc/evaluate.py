"""Measure a trained run again: `python -m allnc.evaluate RUN_DIR`."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from allnc._command import Parser, answer

if TYPE_CHECKING:
    from allnc.trainer.run import Run


def main(arguments: Sequence[str] | None = None) -> int:
    """Print accuracy by shot and collapse of a checkpoint; return 0, or 2 for a mistake of the user."""
    parser = Parser("allnc.evaluate", __doc__)
    parser.add_argument("run", metavar="RUN_DIR", type=Path, help="folder of a run, with last.safetensors")
    parser.add_argument(
        "--on", choices=("test", "validation"), help="which images; default the run's own (its data.validation)"
    )
    parser.add_argument("--data.root", dest="root", help="folder of the images, where it is not the run's")
    parser.add_argument("--data.test_crops", dest="crops", type=int, choices=(1, 5), help="where it is not the run's")
    parser.add_argument("--model.weights", dest="weights", help="pretrained weights, where they are not the run's")
    parser.add_argument(
        "--collapse", action="store_true", help="collapse by layer and by shot instead, also into RUN_DIR/collapse.json"
    )
    parser.add_argument(
        "--layers", help="with --collapse: names in the model, with commas between them, or all; default encoder"
    )
    parser.add_argument(
        "--ood",
        type=Path,
        metavar="FILE",
        help="with --collapse: a .npz or .safetensors of images of no class, for NC5",
    )
    parser.add_argument("--train.device", dest="device", choices=("auto", "cpu", "cuda"), default="auto")
    options = parser.parse_args(arguments)
    return answer("allnc.evaluate", lambda: _evaluate(options))


def _evaluate(options: argparse.Namespace) -> None:
    from rich.console import Console

    from allnc.trainer.checkpoint import load_weights
    from allnc.trainer.launcher import world_size
    from allnc.trainer.run import Run
    from allnc.trainer.runlog import final_table, finite

    if world_size() > 1:
        raise ValueError("allnc.evaluate runs as one process: start it without a launcher such as torchrun")
    config, epoch, weights = load_weights(options.run)
    data, model = config.data, weights.model(config.model)
    if options.weights and weights.frozen is None:
        raise ValueError(f"--model.weights would be ignored: {options.run} holds every weight; remove it")
    if options.on == "validation" and data.validation == 0:
        raise ValueError(f"--on validation needs a run with data.validation; {options.run} held no image out")
    _check_collapse(options)
    run = Run(
        dataclasses.replace(
            config,
            data=dataclasses.replace(data, root=options.root or data.root, test_crops=options.crops or data.test_crops),
            model=dataclasses.replace(model, weights=options.weights or model.weights),
            train=dataclasses.replace(config.train, device=options.device),
        ),
        tested=options.on == "test",
    )
    run.load_model(weights, epoch)
    if options.collapse:
        _collapse(options, run)
        return
    measured, _ = run.measure()
    Console().print(final_table({**{k: finite(v) for k, v in measured.items()}, **run.conventions()}))


def _check_collapse(options: argparse.Namespace) -> None:
    for name, value in (("layers", options.layers), ("ood", options.ood)):
        if value is not None and not options.collapse:
            raise ValueError(f"--{name} would be ignored without --collapse; add it or remove --{name}")
    for name, value in (("on", options.on), ("data.test_crops", options.crops)):
        if options.collapse and value is not None:
            raise ValueError(
                f"--{name} would be ignored with --collapse, which measures the training images; remove it"
            )


def _collapse(options: argparse.Namespace, run: Run) -> None:
    """Print and write collapse by layer and by shot."""
    from rich.console import Console

    from allnc.trainer.collapse_report import ENCODER, layers_of, measure_layers, tables
    from allnc.trainer.folder import COLLAPSE, write_json

    layers = ENCODER if options.layers is None else options.layers
    report = measure_layers(run, layers_of(layers), options.ood)
    console = Console()
    for table in tables(report):
        console.print(table, "")
    write_json(options.run / COLLAPSE, report)
    console.print(f"all of it in {options.run / COLLAPSE}", soft_wrap=True, highlight=False)


if __name__ == "__main__":
    sys.exit(main())
