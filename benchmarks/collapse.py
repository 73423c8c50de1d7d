"""Measures of collapse: other programs' conventions on a run's features, and time and memory at a size.

python benchmarks/collapse.py conventions RUN
python benchmarks/collapse.py size --classes 8142 --features 2048 --images 40000
"""

from __future__ import annotations

import argparse
import resource
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from allnc.metrics import CollapseAccumulator, by_shot, collapse
from allnc.metrics.conventions import CONVENTIONS
from allnc.trainer.checkpoint import load_weights
from allnc.trainer.measure import outputs
from allnc.trainer.run import Run

BATCH = 512


def conventions(folder: Path) -> None:
    """Print what every convention says of the training features of a run with a linear classifier."""
    config, epoch, weights = load_weights(folder)
    run = Run(config)
    run.load_model(weights, epoch)
    found = [(output.features, labels) for output, labels in outputs(run.model, run.train_set, config.data, run.device)]
    features, labels = (torch.cat(parts).cpu() for parts in zip(*found, strict=True))
    weight, bias = run.model.predicting_vectors.detach().cpu(), run.model.classifier_bias
    bias = None if bias is None else bias.detach().cpu()
    measured = {name: collapse(features, labels, weight, bias, convention=name) for name in CONVENTIONS}
    table = Table("", *CONVENTIONS)
    for key in dict.fromkeys(key for name in CONVENTIONS[1:] for key in measured[name]):
        table.add_row(key, *(f"{measured[name][key]:.4g}" if key in measured[name] else "-" for name in CONVENTIONS))
    Console().print(table)


def size(classes: int, features: int, images: int) -> None:
    """Print seconds of a core and peak memory over the start for a stream of random features of a long tail."""
    torch.manual_seed(0)
    counts = torch.randint(1, max(2, 2 * images // classes), (classes,))
    labels = torch.arange(classes).repeat_interleave(counts)
    labels = labels[torch.randperm(len(labels))]
    means, weight = torch.randn(classes, features), torch.randn(classes, features)
    start = _peak()
    print(f"{classes} classes, {features} features, {len(labels)} images, {torch.get_num_threads()} threads")
    accumulator = CollapseAccumulator(classes, features, class_counts=counts)
    clock = time.perf_counter(), time.process_time()
    for rows in labels.split(BATCH):
        accumulator.update(means[rows] + 0.3 * torch.randn(len(rows), features), rows)
    clock = _say("first pass", clock, start)
    accumulator.compute(weight)
    clock = _say("measures", clock, start)
    accumulator.compute(weight, spectral=True)
    clock = _say("measures with the spectral ones", clock, start)
    by_shot(accumulator.moments, counts, weight=weight, many=2 * images // classes * 2 // 3, few=images // classes)
    _say("by shot", clock, start)


def _say(what: str, clock: tuple[float, float], start: float) -> tuple[float, float]:
    wall, cpu = time.perf_counter() - clock[0], time.process_time() - clock[1]
    print(f"{what}: {wall:.1f} s, {cpu:.1f} s of a core; peak {_peak() - start:.2f} GiB over the start", flush=True)
    return time.perf_counter(), time.process_time()


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("conventions").add_argument("run", type=Path)
    of_size = commands.add_parser("size")
    of_size.add_argument("--classes", type=int, default=8142)
    of_size.add_argument("--features", type=int, default=2048)
    of_size.add_argument("--images", type=int, default=40_000)
    options = parser.parse_args()
    if options.command == "conventions":
        conventions(options.run)
    else:
        size(options.classes, options.features, options.images)


if __name__ == "__main__":
    main()
