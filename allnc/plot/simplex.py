"""Train four methods on three digits with two or three features, and draw their geometry: a still and an animation.

`python -m allnc.plot.simplex [--out DIR]`; see `python -m allnc.plot` for runs of your own.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from allnc._command import Parser, answer

if TYPE_CHECKING:
    from allnc.data import ImageSet
    from allnc.metrics.plots import Scene
    from allnc.trainer.run import Run

FRAMES = 30  # of the animation, at most
METHODS: dict[str, dict[str, dict[str, Any]]] = {
    "cross-entropy": {"loss": {"name": "ce"}, "model": {"classifier": "linear"}},
    "fixed ETF classifier": {"loss": {"name": "ce"}, "model": {"classifier": "etf"}},
    "feature constraint": {"loss": {"name": "ce"}, "model": {"classifier": "normalised"}},
    "AllNC": {"loss": {"name": "allnc", "p2p_centre": False}, "model": {"classifier": "normalised"}},
}
# Cosines in two dimensions leave a feature few ways around a wrong class vector: a small scale and small steps help.
_NETWORK = {"name": "resnet8", "width": 8, "projection_dim": 16, "classifier_scale": 4.0}
_BATCH_SIZE = 32  # at most: there may be fewer images
_TRAINING = {"lr": 0.05, "grad_clip": 1.0, "device": "cpu", "precision": "fp32", "threads": 1}


def main(arguments: Sequence[str] | None = None) -> int:
    """Write DIR/simplex.png and DIR/simplex.gif; return 0, 2 for a mistake of the user, 130 after Ctrl-C."""
    parser = Parser("allnc.plot.simplex", __doc__)
    parser.add_argument("--out", metavar="DIR", type=Path, default=Path("plots"), help="default plots")
    parser.add_argument("--features", type=int, choices=(2, 3), default=2, help="dimensions of the picture; default 2")
    parser.add_argument("--digits", type=int, nargs=3, choices=range(10), default=[3, 5, 8], help="default 3 5 8")
    parser.add_argument(
        "--images", metavar="N", type=int, nargs=3, default=[100, 10, 10], help="of each digit; default 100 10 10"
    )
    parser.add_argument("--epochs", type=int, default=80, help="default 80")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    options = parser.parse_args(arguments)
    return answer("allnc.plot.simplex", lambda: _draw(options))


def _draw(options: argparse.Namespace) -> None:
    from allnc.metrics.plots import animate_scenes, plot_scenes
    from allnc.trainer.folder import check_place

    check_place(options.out)
    images = _images(options.digits, options.images)
    histories = [_trained(name, images, options) for name in METHODS]
    options.out.mkdir(parents=True, exist_ok=True)
    still, film = options.out / "simplex.png", options.out / "simplex.gif"
    moments = [(f"epoch {epoch}", [history[epoch] for history in histories]) for epoch in histories[0]]
    plot_scenes(moments[-1][1], still)
    animate_scenes(moments, film)
    print(f"{still}\n{film}")


def _images(digits: Sequence[int], sizes: Sequence[int]) -> tuple[ImageSet, ImageSet]:
    """Return so many training images of each of the digits, and their test images."""
    import dataclasses

    import numpy as np
    import torch

    from allnc.config import DataConfig
    from allnc.data import load, subset

    if len(set(digits)) < len(digits):
        raise ValueError(f"--digits must be different; got {' '.join(map(str, digits))}")

    def of_these(images: ImageSet) -> ImageSet:
        chosen = images.select(np.flatnonzero(np.isin(images.labels.numpy(), digits)))
        labels = torch.tensor([list(digits).index(label) for label in chosen.labels.tolist()])
        names = tuple(f"digit {digit}" for digit in digits)
        return dataclasses.replace(chosen, labels=labels, num_classes=len(digits), classes=names)

    train, test = map(of_these, load(DataConfig(name="digits", imbalance="none")))
    for digit, size, most in zip(digits, sizes, train.class_counts.tolist(), strict=True):
        if not 1 <= size <= most:
            raise ValueError(f"--images must be 1 to {most} for the digit {digit}; got {size}")
    return train.select(subset(train.labels.numpy(), list(sizes), seed=0)), test


def _trained(name: str, images: tuple[ImageSet, ImageSet], options: argparse.Namespace) -> dict[int, Scene]:
    """Train a method; return the geometry of some epochs, the first and the last among them."""
    from rich.console import Console

    from allnc.trainer.loop import train_epoch
    from allnc.trainer.options import from_dict
    from allnc.trainer.run import Run
    from allnc.trainer.runlog import RunLog

    method = METHODS[name]
    config = from_dict(
        {
            "data": {"name": "digits", "imbalance": "none"},
            "model": {**_NETWORK, "feature_dim": options.features, **method["model"]},
            "loss": method["loss"],
            "train": {**_TRAINING, "epochs": options.epochs, "batch_size": min(_BATCH_SIZE, len(images[0]))},
            "seed": options.seed,
        }
    )
    run = Run(config, images=images)
    run.start_classifier()
    scenes = {0: _scene(run, name)}
    with RunLog(None, Console(quiet=True), epochs=options.epochs) as log:
        while run.epoch < options.epochs:
            train_epoch(run, log)
            run.epoch += 1
            if run.epoch * FRAMES // options.epochs > max(scenes) * FRAMES // options.epochs:
                scenes[run.epoch] = _scene(run, name)
    return scenes


def _scene(run: Run, name: str) -> Scene:
    from allnc.plot.runs import scene_of

    accuracy, geometry = run.measure_accuracy(), run.measure_collapse()[0]
    note = (
        f"test accuracy {accuracy['accuracy']:.0f} %\n"
        f"NC2 means {geometry['nc2_means']:.2f}, classifier {geometry['nc2_weights']:.2f}"
    )
    return scene_of(run, title=name, note=note)


if __name__ == "__main__":
    sys.exit(main())
