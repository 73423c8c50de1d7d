"""What the loss takes of a training step: `python benchmarks/step_share.py digits_lt fashion_lt imagenet_lt`.

A step is what the trainer does with a batch: network, loss, backward and optimiser, on random images of the recipe's
size. Beside it, in turn, the loss alone is run forward and backward, class means included, on the network's outputs of
that batch; the share is the ratio of the two medians. The plain step has cross-entropy alone, on the same images in as
many views and parts.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch
from measure import time_interleaved
from rich.console import Console
from rich.table import Table

from allnc.config import Config, DataConfig
from allnc.data import Batch, ImageSet
from allnc.models import ModelOutput
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


def outputs(run: Run, batch: Batch) -> ModelOutput:
    """The model's outputs of a batch as leaves of a graph, computed in the parts in which the batch passes."""
    parts = batch.parts(run.passes)
    with torch.no_grad(), run.autocast():
        features = torch.cat([run.model.encoder(batch.images[rows]) for rows in parts])
        output = run.model.heads(features[torch.cat(parts).argsort()])
    return output._replace(**{k: v.requires_grad_() for k, v in output._asdict().items() if v is not None})


def peak_memory(step: Callable[[], object], device: torch.device) -> str:
    """GiB that a step takes at most on a GPU, weights included."""
    if device.type != "cuda":
        return "-"
    step()
    torch.cuda.reset_peak_memory_stats(device)
    step()
    return f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+", choices=list(IMAGES))
    parser.add_argument("--batch-size", type=int, help="images in a step. Default: the recipe's")
    parser.add_argument("--micro-batch", type=int, help="images that pass the encoder at a time. Default: all")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=10.0, help="time for each recipe")
    options = parser.parse_args()
    columns = (
        "recipe",
        "images",
        "parts",
        "type",
        "step ms (p20-p80)",
        "images/s",
        "GiB",
        "loss ms (p20-p80)",
        "share",
    )
    table = Table(*columns, "plain CE: step ms (p20-p80)", "GiB", "n")
    for name in options.recipes:
        config, _ = parse(["--config", name])
        settings = {"threads": options.threads, "micro_batch": options.micro_batch}
        size = options.batch_size or config.train.batch_size
        train = dataclasses.replace(config.train, batch_size=size, **settings)
        config = dataclasses.replace(config, train=train)
        run, batch = run_on_random_images(config, IMAGES[name], size)
        plain = dataclasses.replace(config, loss=dataclasses.replace(config.loss, name="ce"))
        other, _ = run_on_random_images(plain, IMAGES[name], size)
        for each in (run, other):
            each.model.train()
        leaves = outputs(run, batch)
        steps = {
            "step": [lambda run=run, batch=batch: train_step(run, batch, progress=0.1)],
            "loss": [lambda run=run, batch=batch, x=leaves: loss_of(run, x, batch, progress=0.1).total.backward()],
            "ce": [lambda run=other, batch=batch: train_step(run, batch, progress=0.1)],
        }
        memory = {name: peak_memory(steps[name][0], run.device) for name in ("step", "ce")}
        times = time_interleaved(steps, run.device, seconds=options.seconds, min_runs=5)
        step, loss, ce = times["step"], times["loss"], times["ce"]
        table.add_row(
            *(name, str(batch.num_uniform), str(run.passes), str(run.dtype).removeprefix("torch.")),
            f"{step.median:.2f} ({step.p20:.2f}-{step.p80:.2f})",
            *(f"{1e3 * batch.num_uniform / step.median:.0f}", memory["step"]),
            f"{loss.median:.2f} ({loss.p20:.2f}-{loss.p80:.2f})",
            f"{loss.median / step.median:.1%}",
            f"{ce.median:.2f} ({ce.p20:.2f}-{ce.p80:.2f})",
            *(memory["ce"], str(step.runs)),
        )
    Console(width=180).print(table)


if __name__ == "__main__":
    main()
