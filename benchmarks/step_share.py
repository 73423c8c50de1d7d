"""What the loss takes of a training step: `python benchmarks/step_share.py digits_lt fashion_lt imagenet_lt`.

A step is what the trainer does with a batch: network, loss, backward and optimiser, on random images of the recipe's
size. Beside it, in turn, the loss alone is run forward and backward, class means included, on the network's outputs of
that batch; the share is the ratio of the two medians.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import NamedTuple

import torch
from measure import time_interleaved
from rich.console import Console
from rich.table import Table

from allnc.config import Config, DataConfig
from allnc.data import Batch, ImageSet
from allnc.trainer.command import parse
from allnc.trainer.run import Run
from allnc.trainer.step import loss_of, train_step


class Images(NamedTuple):
    channels: int
    size: int
    classes: int


IMAGES = {
    "digits_lt": Images(1, 8, 10),
    "fashion_lt": Images(1, 28, 10),
    "cifar10_lt": Images(3, 32, 10),
    "cifar100_lt": Images(3, 32, 100),
    "imagenet_lt": Images(3, 224, 1000),
    "places_lt": Images(3, 224, 365),
    "inat18": Images(3, 224, 8142),
}


def run_on_random_images(config: Config, shape: Images, batch_size: int) -> tuple[Run, Batch]:
    """A run whose data sets are random images, and a batch of them in the recipe's number of views."""
    generator = torch.Generator().manual_seed(0)
    num_images = max(batch_size, shape.classes)
    labels = torch.cat([torch.arange(shape.classes), torch.zeros(num_images - shape.classes).long()])
    images = torch.randint(0, 256, (num_images, shape.channels, 8, 8), generator=generator, dtype=torch.uint8)
    half = (0.5,) * shape.channels
    data = ImageSet(labels=labels, num_classes=shape.classes, mean=half, std=half, images=images)
    memory = DataConfig(views=config.data.views, imbalance="none", augmentation="none")
    train = dataclasses.replace(config.train, batch_size=min(batch_size, num_images))
    model = dataclasses.replace(config.model, pretrained=False)
    run = Run(dataclasses.replace(config, data=memory, train=train, model=model), images=(data, data))
    rows = batch_size * memory.views
    pixels = torch.randn(rows, shape.channels, shape.size, shape.size, generator=generator).to(run.device)
    labels = torch.randint(0, shape.classes, (batch_size,), generator=generator).repeat(memory.views)
    return run, Batch(pixels, labels.to(run.device), batch_size, 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+", choices=list(IMAGES))
    parser.add_argument("--batch-size", type=int, help="images in a step. Default: the recipe's")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=10.0, help="time for each recipe")
    options = parser.parse_args()
    table = Table("recipe", "images", "type", "step ms (p20-p80)", "loss ms (p20-p80)", "share", "n")
    for name in options.recipes:
        config, _ = parse(["--config", name])
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, threads=options.threads))
        run, batch = run_on_random_images(config, IMAGES[name], options.batch_size or config.train.batch_size)
        run.model.train()
        with torch.no_grad(), run.autocast():
            output = run.model(batch.images)
        leaves = output._replace(**{k: v.requires_grad_() for k, v in output._asdict().items() if v is not None})
        steps = {
            "step": [lambda run=run, batch=batch: train_step(run, batch, progress=0.1)],
            "loss": [lambda run=run, batch=batch, x=leaves: loss_of(run, x, batch, progress=0.1).total.backward()],
        }
        times = time_interleaved(steps, run.device, seconds=options.seconds, min_runs=5)
        step, loss = times["step"], times["loss"]
        table.add_row(
            name,
            str(batch.num_uniform),
            str(run.dtype).removeprefix("torch."),
            f"{step.median:.2f} ({step.p20:.2f}-{step.p80:.2f})",
            f"{loss.median:.2f} ({loss.p20:.2f}-{loss.p80:.2f})",
            f"{loss.median / step.median:.1%}",
            str(step.runs),
        )
    Console().print(table)


if __name__ == "__main__":
    main()
