"""What light tuning saves: `python benchmarks/tuning.py --batch-size 8`.

A step of the recipe imagenet_lt_vit (network, loss, backward and optimiser, on random images of 224 pixels) for each
model.tune, all of them in turn on one machine: weights that train, time, peak memory beyond what stood before the step,
and the two files of a checkpoint on disk (model, and what resuming needs). The pretrained weights are a file of random
ones: none of it depends on their values.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path

import timm
import torch
from measure import peak_memory, time_interleaved, warm_up
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from allnc.config import DataConfig
from allnc.data import Batch, ImageSet
from allnc.trainer import state
from allnc.trainer.command import parse
from allnc.trainer.loop import train_step
from allnc.trainer.run import Run

MODES = ("full", "norm", "lora", "adapter", "head")


def tuned_run(mode: str, weights: Path, options: argparse.Namespace) -> Run:
    """A run of the recipe with another model.tune, on images in memory, all of which are the same black one."""
    config, _ = parse(["--config", "imagenet_lt_vit"])
    size = options.image_size
    pixels = torch.zeros(1, 3, size, size, dtype=torch.uint8).expand(options.classes, -1, -1, -1)
    labels = torch.arange(options.classes)
    images = ImageSet(labels=labels, num_classes=options.classes, mean=(0.5,) * 3, std=(0.5,) * 3, images=pixels)
    data = DataConfig(views=1, imbalance="none", augmentation="none")
    model = dataclasses.replace(
        config.model, name=f"timm:{options.model}", weights=str(weights), tune=mode, classifier_init="random"
    )
    train = dataclasses.replace(config.train, batch_size=options.batch_size, threads=options.threads)
    return Run(dataclasses.replace(config, data=data, model=model, train=train), images=(images, images))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_base_patch16_clip_quickgelu_224", help="timm's name")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=60.0, help="time for all of the steps")
    options = parser.parse_args()
    table = Table(
        "model.tune", "M that train", "step ms (p20-p80)", "of full", "peak MiB", "of full", "weights, state MB"
    )
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "pretrained.safetensors"
        save_file(timm.create_model(options.model, num_classes=0).state_dict(), weights)
        runs = {mode: tuned_run(mode, weights, options) for mode in MODES}
        device = next(iter(runs.values())).device
        pixels = torch.randn(options.batch_size, 3, options.image_size, options.image_size).to(device)
        batch = Batch(pixels, torch.arange(options.batch_size).to(device) % options.classes, options.batch_size, 0)
        steps = {}
        for mode, run in runs.items():
            run.model.train()
            steps[mode] = [lambda run=run: train_step(run, batch, progress=0.1)]
            warm_up(steps[mode], device)
        peaks = {mode: peak_memory(step[0], device) for mode, step in steps.items()}
        times = time_interleaved(steps, device, seconds=options.seconds, min_runs=5, warmed=True)
        for mode, run in runs.items():
            place = Path(folder) / mode
            place.mkdir()
            state.save(run, place)
            sizes = [(place / name).stat().st_size / 1e6 for name in ("last.safetensors", "state.pt")]
            time, peak, most = times[mode], peaks[mode], peaks["full"]
            table.add_row(
                mode,
                f"{sum(p.numel() for p in run.model.parameters() if p.requires_grad) / 1e6:.3f}",
                f"{time.median:.0f} ({time.p20:.0f}-{time.p80:.0f})",
                f"{time.median / times['full'].median:.2f}",
                f"{peak:.0f}" if peak is not None else "-",
                f"{peak / most:.2f}" if peak is not None and most else "-",
                f"{sizes[0]:.1f}, {sizes[1]:.1f}",
            )
        dtype = str(runs["full"].dtype).removeprefix("torch.")
    title = f"{options.model}, C = {options.classes}, batch {options.batch_size}, {dtype}, {device.type}"
    table.title = f"{title}, {options.threads} threads, n = {times['full'].runs}"
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
