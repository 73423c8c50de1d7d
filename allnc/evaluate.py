"""Measure a trained run again, on its own images or on others: `python -m allnc.evaluate RUN_DIR [--data DIR]`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from allnc._command import Parser, answer
from allnc.inference.options import add_device, add_prior, add_weights, check_run

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor

    from allnc.data import ImageSet
    from allnc.inference.predictor import Restored
    from allnc.trainer.run import Run


def main(arguments: Sequence[str] | None = None) -> int:
    """Print accuracy by shot and collapse of a checkpoint; return 0, or 2 for a mistake of the user."""
    parser = Parser("allnc.evaluate", __doc__, allow_abbrev=False)
    parser.add_argument("run", metavar="RUN_DIR", type=Path, help="folder of a run, with last.safetensors")
    parser.add_argument(
        "--data",
        metavar="DIR|LIST|FILE",
        help="other labelled images: a folder of class folders, a CSV, TSV, text or JSON list, a .npz or .safetensors",
    )
    parser.add_argument(
        "--max_bad", type=int, metavar="N", help="with --data: leave out up to N files that cannot be read; default 0"
    )
    parser.add_argument(
        "--on", choices=("test", "validation"), help="which images; default the run's own (its data.validation)"
    )
    add_weights(parser)
    add_prior(parser, "adjust the logits to this class prior and measure under it")
    parser.add_argument("--classes", action="store_true", help="also accuracy by class: the worst ten and the best ten")
    parser.add_argument(
        "--predictions", action="store_true", help="also write RUN_DIR/predictions.npz and RUN_DIR/classes.csv"
    )
    parser.add_argument(
        "--data.root", dest="root", help="folder of the images, where it is not the run's, or not that of the list"
    )
    parser.add_argument("--data.test_crops", dest="crops", type=int, choices=(1, 5), help="where it is not the run's")
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
        help="with --collapse: a .npz or .safetensors of images of no class, for NC5: its test images, or else all",
    )
    add_device(parser)
    options = parser.parse_args(arguments)
    return answer("allnc.evaluate", lambda: _evaluate(options))


def _evaluate(options: argparse.Namespace) -> None:
    from allnc.trainer.launcher import world_size

    if world_size() > 1:
        raise ValueError("allnc.evaluate runs as one process: start it without a launcher such as torchrun")
    _check_options(options)
    check_run(options.run)
    from rich.console import Console

    console = Console()
    if options.data:
        _measure_data(options, console)
    else:
        _measure_run(options, console)


def _measure_data(options: argparse.Namespace, console: Console) -> None:
    """Print accuracy on the images of --data."""
    from allnc.inference.labelled import labelled_images

    # A folder is the one from which the paths of a list start.
    root = options.root if options.root and os.path.isfile(options.root) else None
    run = _restored(options, root)
    labelled = labelled_images(options.data, run, options.root, max_bad=options.max_bad or 0)
    for note in labelled.notes:
        _say(console, f"note: {note}")
    _measure(options, run, labelled.images, options.data, console)


def _restored(options: argparse.Namespace, root: str | None) -> Restored:
    from allnc.inference.predictor import restore

    return restore(
        options.run,
        which=options.which,
        device=options.device,
        root=root,
        pretrained=options.pretrained,
        crops=options.crops,
    )


def _measure(options: argparse.Namespace, run: Restored, images: ImageSet, measured_on: str, console: Console) -> None:
    """Print accuracy on some images."""
    from rich.markup import escape

    from allnc.inference.measure import measure
    from allnc.trainer.classes import class_table
    from allnc.trainer.runlog import final_table, finite

    measured = measure(run, images, prior=options.prior, measured_on=escape(measured_on))
    tested = sum(1 for score in measured.classes if score.measured_images)
    _say(console, f"{len(images):,} images of {tested:,} of {len(run.classes):,} classes")
    _say_prior(options, console)
    console.print(final_table({name: finite(value) for name, value in measured.values.items()}))
    if options.classes:
        console.print("", class_table(measured.classes))


def _measure_run(options: argparse.Namespace, console: Console) -> None:
    """Print accuracy and collapse, of the run's own images."""
    from allnc.inference.labelled import has_test_images_alone, test_images
    from allnc.trainer.classes import class_table
    from allnc.trainer.finished import finished_run
    from allnc.trainer.folder import CLASSES, PREDICTIONS
    from allnc.trainer.places import check_root
    from allnc.trainer.run import Run
    from allnc.trainer.runlog import final_table, finite

    config, epoch, weights = finished_run(
        options.run,
        options.which,
        root=options.root,
        crops=options.crops,
        pretrained=options.pretrained,
        device=options.device,
    )
    if options.on == "validation" and config.data.validation == 0:
        raise ValueError(f"--on validation needs a run with data.validation; {options.run} held no image out")
    if options.root is None:
        check_root(config.data)
    if not options.collapse and not options.predictions and has_test_images_alone(config, options.on):
        _say(console, "note: the training images are not there: accuracy alone is measured")
        run = _restored(options, options.root)
        _measure(options, run, test_images(run), "test", console)
        return
    run = Run(config, tested=options.on == "test")
    run.load_model(weights, epoch)
    if options.collapse:
        _collapse(options, run, console)
        return
    measured, _ = run.measure(_prior(options, run))
    _say_prior(options, console)
    console.print(final_table({**{k: finite(v) for k, v in measured.items()}, **run.conventions()}))
    if options.classes:
        console.print("", class_table(run.class_scores()))
    if options.predictions:
        run.write_predictions(options.run)
        _say(console, f"image by image in {options.run / PREDICTIONS}, class by class in {options.run / CLASSES}")


def _say_prior(options: argparse.Namespace, console: Console) -> None:
    if options.prior is not None:
        _say(console, f"measured under the class prior {options.prior}: each class counts with its share in it")


def _say(console: Console, line: str) -> None:
    console.print(line, soft_wrap=True, highlight=False, markup=False)


def _prior(options: argparse.Namespace, run: Run) -> Tensor | None:
    """Return the class prior that is asked for, once the run's logits are known to have one."""
    from allnc.trainer.predictions import class_names
    from allnc.trainer.prior import wanted_prior

    return None if options.prior is None else wanted_prior(options.prior, run.counts, class_names(run.train_set))


def _check_options(options: argparse.Namespace) -> None:
    if options.prior is not None and options.predictions:
        raise ValueError("--predictions would write those of another class prior; give it without --prior")
    if options.max_bad is not None and options.max_bad < 0:
        raise ValueError(f"--max_bad must be >= 0; got {options.max_bad}")
    if options.max_bad is not None and not options.data:
        raise ValueError("--max_bad would be ignored without --data; add it or remove --max_bad")
    for name, value in (("layers", options.layers), ("ood", options.ood)):
        if value is not None and not options.collapse:
            raise ValueError(f"--{name} would be ignored without --collapse; add it or remove --{name}")
    idle = {
        "data": options.data,
        "on": options.on,
        "data.test_crops": options.crops,
        "prior": options.prior,
        "classes": options.classes or None,
        "predictions": options.predictions or None,
    }
    for name, value in idle.items():
        if options.collapse and value is not None:
            raise ValueError(
                f"--{name} would be ignored with --collapse, which measures the training images; remove it"
            )
    if options.data and options.on:
        raise ValueError("--on would be ignored with --data, which names the images; remove one of the two")
    if options.data and options.predictions:
        raise ValueError("--predictions would replace those of the run's own images; give it without --data")
    if options.data and not os.path.exists(os.path.expanduser(options.data)):
        raise ValueError(f"--data must be a folder, a list or a .npz file; there is no {options.data}")


def _collapse(options: argparse.Namespace, run: Run, console: Console) -> None:
    """Print and write collapse by layer and by shot."""
    from allnc.trainer.collapse_report import layers_of, measure_layers, tables
    from allnc.trainer.folder import COLLAPSE, write_json
    from allnc.trainer.measure import ENCODER

    layers = ENCODER if options.layers is None else options.layers
    report = measure_layers(run, layers_of(layers), options.ood)
    for table in tables(report):
        console.print(table, "")
    write_json(options.run / COLLAPSE, report)
    _say(console, f"all of it in {options.run / COLLAPSE}")


if __name__ == "__main__":
    sys.exit(main())
