"""An epoch of heads on stored features of iNaturalist's size: `python benchmarks/features_epoch.py`.

437,513 x 768 float16 features in clusters, 8,142 classes in iNaturalist 2018's profile (1,000 to 2 images), in as many
passes as --views, are written as `python -m allnc.features` writes them. Then, each in a process of its own,
`loss.backend auto` trains a whole epoch at batch 16,384 through the trainer's own objects, and eager some steps of it.
Every step is timed by part: waiting for the batch, heads forward, loss forward and backward down to the model's
outputs, heads backward, optimiser. Beside it the loss's two halves are run alone: classification, the same on both
sides, and geometry (HyCon, P2P, class means). A process that needs more than --limit GiB of its own fails as on a
machine of that size.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import available_memory, peak_memory
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from allnc._sealed import sealed, sum_of
from allnc.config import FEATURES_MANIFEST
from allnc.data import Batch
from allnc.data.features import FORMAT, passes_of, shard_names
from allnc.models import ModelOutput
from allnc.trainer.command import parse
from allnc.trainer.options import to_dict
from allnc.trainer.run import Run
from allnc.trainer.step import loss_of

# iNaturalist 2018: rank of a class by size -> its images. 842 classes have more than 100, 3,224 fewer than 20.
RANKS = ((0, 1000), (842, 100), (4918, 20), (8141, 2))
IMAGES = 437_513
SHARD_ROWS = 65_536
PARTS = ("batch", "heads forward", "loss", "heads backward", "optimiser")


def class_sizes(ranks: tuple[tuple[int, int], ...], total: int) -> np.ndarray:
    """Sizes of classes, [C], through the ranks and exponential between, but for the head, which makes the total."""

    def sizes(power: float) -> np.ndarray:
        parts = []
        for (first, high), (last, low) in itertools.pairwise(ranks):
            share = (np.arange(first, last) - first) / (last - first)
            parts.append(low * (high / low) ** ((1 - share) ** (power if first == 0 else 1.0)))
        return np.rint(np.concatenate([*parts, [ranks[-1][1]]])).astype(np.int64)

    low, high = 0.1, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if sizes(middle).sum() > total else (low, middle)
    result = sizes(high)
    lacking = total - int(result.sum())
    assert 0 <= lacking < ranks[1][0], lacking
    result[1 : 1 + lacking] += 1  # the largest class stays the largest
    assert result.sum() == total and result.max() == ranks[0][1] and result.min() == ranks[-1][1]
    return result


def make_features(folder: Path, width: int, views: int, scale: float) -> None:
    """Write features in clusters, a cluster a class, train and test, as allnc.features does."""
    generator = torch.Generator().manual_seed(0)
    counts = class_sizes(RANKS, IMAGES)
    if scale < 1:  # for a try
        counts = np.maximum(2, (counts[:: int(1 / scale)] * 1.0).astype(np.int64))
    centres = torch.randn(len(counts), width, generator=generator)
    labels = {"train": np.repeat(np.arange(len(counts)), counts), "test": np.repeat(np.arange(len(counts)), 3)}
    shards = {}
    for part, of_part in labels.items():
        order = torch.from_numpy(of_part)[torch.randperm(len(of_part), generator=generator)]
        passes = passes_of(part, views)
        names = [n for pass_ in range(passes) for n in shard_names(part, pass_, len(order), SHARD_ROWS)]
        for name, rows in zip(names, order.split(SHARD_ROWS) * passes, strict=True):
            noise = torch.randn(len(rows), width, generator=generator)
            features = (0.5 * centres[rows] + noise).half()
            save_file({"features": features, "labels": rows.clone()}, folder / name)
            shards[name] = sum_of((folder / name).read_bytes())
    config, _ = parse(["--config", "inat18"])
    values = {
        "format": FORMAT,
        "config": to_dict(config),
        "passes": views,
        "shard_rows": SHARD_ROWS,
        "feature_dim": width,
        "num_classes": len(counts),
        "classes": [],
        "images": {part: len(of_part) for part, of_part in labels.items()},
        "shards": shards,
    }
    (folder / FEATURES_MANIFEST).write_text(json.dumps(sealed(values)))


def timed(body: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    value = body()
    return value, time.perf_counter() - started


def leaves_of(output: ModelOutput) -> ModelOutput:
    """The outputs of the model cut from its graph, where those that had one collect their gradient."""
    cut: dict[int, torch.Tensor] = {}
    for value in output:
        if value is not None:
            cut.setdefault(id(value), value.detach().requires_grad_(value.requires_grad))
    return ModelOutput._make(None if value is None else cut[id(value)] for value in output)


def step(run: Run, batch: Batch, progress: float) -> dict[str, float]:
    """One step of the trainer, in parts; return the seconds of each."""
    seconds = {}

    def forward() -> ModelOutput:
        with run.autocast():
            return run.network(run.loader.pixels(batch.images), train_uniform=run.loss.trains_uniform(progress))

    output, seconds["heads forward"] = timed(forward)
    leaves = leaves_of(output)
    _, seconds["loss"] = timed(lambda: loss_of(run, leaves, batch, progress=progress).total.backward())
    outputs = {id(value): value for value in output if value is not None and value.requires_grad}
    pairs = zip(output, leaves, strict=True)
    gradients = {id(value): leaf.grad for value, leaf in pairs if value is not None and leaf is not None}

    def backward() -> None:
        torch.autograd.backward(list(outputs.values()), [gradients[name] for name in outputs])

    _, seconds["heads backward"] = timed(backward)

    def optimise() -> None:
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)

    _, seconds["optimiser"] = timed(optimise)
    return seconds


def halves(run: Run, batch: Batch, progress: float) -> dict[str, float | None]:
    """Seconds and peak MiB of the loss's halves alone, forward and backward, on the outputs of the model."""
    with run.autocast():
        output = run.network(run.loader.pixels(batch.images))
    loss: Any = run.loss

    def classification() -> None:
        x = leaves_of(output)
        loss.gbbn(x.logits_uniform, batch.labels, x.logits_rebalance, batch.labels, progress).total.backward()

    def geometry() -> None:
        x = leaves_of(output)
        weight, views = run.model.class_vectors, run.config.data.views
        hycon, p2p = loss._geometry(x.features, batch.labels, weight, x.z, x.h, views, None)
        (hycon + p2p.sum()).backward()

    def whole() -> None:
        loss_of(run, leaves_of(output), batch, progress=progress).total.backward()

    found: dict[str, float | None] = {}
    for name, body in (("classification", classification), ("geometry", geometry), ("loss", whole)):
        found[f"{name} MiB"], found[f"{name} s"] = timed(lambda body=body: peak_memory(body, run.device))
    run.model.zero_grad(set_to_none=True)
    return found


def child(options: argparse.Namespace) -> None:
    """Train some steps of an epoch with one backend; print a JSON line."""
    limit = int(options.limit * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))  # memory of the process's own, not of mapped files
    words = ["--config", "features", "--data.root", str(options.folder), "--loss.backend", options.backend]
    words += [
        "--data.views",
        str(options.views),
        "--train.batch_size",
        str(options.batch_size),
        "--model.name",
        options.model,
    ]
    words += ["--train.threads", str(options.threads), "--train.precision", options.precision]
    config, _ = parse(words)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, device="cpu"))
    result: dict[str, Any] = {"backend": options.backend}
    run, result["startup s"] = timed(lambda: Run(config))
    result["precision"] = str(run.dtype).removeprefix("torch.")
    result["rss after start MiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    run.model.train()
    times: list[dict[str, float]] = []
    work: list[float] = []  # seconds of all cores of each step, which other programs on the machine change less
    steps = min(options.steps or len(run.loader), len(run.loader))
    try:
        started = time.perf_counter()
        last = started
        for index, batch in enumerate(run.loader.epoch(0)):
            waited = time.perf_counter() - last
            # In the middle of the schedule: both branches and all terms of the loss take part.
            before = time.process_time()
            times.append({"batch": waited, **step(run, batch, progress=0.15)})
            work.append(time.process_time() - before)
            if index + 1 == steps:
                break
            last = time.perf_counter()
        result["seconds"] = time.perf_counter() - started
        result["max rss MiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        result |= halves(run, batch, 0.15)
    except (RuntimeError, MemoryError) as error:
        if "allocate memory" not in str(error) and not isinstance(error, MemoryError):
            raise
        result["failed"] = f"out of memory: more than {options.limit:g} GiB"
        result["max rss MiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    result["steps"], result["whole epoch"] = len(times), len(run.loader)
    result["times"], result["cpu"] = times, work
    print(json.dumps(result))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the features are made, or are already; default: temporary")
    parser.add_argument("--batch-size", type=int, default=16_384)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--views", type=int, default=2, help="of an image in a step: rows are so many times the batch")
    parser.add_argument("--model", choices=("linear", "mlp"), default="linear")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=0, help="of auto; default: a whole epoch")
    parser.add_argument("--eager-steps", type=int, default=3)
    parser.add_argument("--limit", type=float, default=24.0, help="GiB that a process may have of its own")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the classes, for a try")
    parser.add_argument("--json", type=Path, help="file for the result")
    parser.add_argument("--backend", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.backend:
        return child(options)
    free = (available_memory() or 0) / 2**30 - 1
    if 0 < free < options.limit:
        print(f"--limit {options.limit:g} GiB lowered to {free:.1f} GiB, what is free here")
        options.limit = free
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / FEATURES_MANIFEST).exists():
            _, seconds = timed(lambda: make_features(folder, options.width, options.views, options.scale))
            print(f"features made in {seconds:.0f} s")
        results = []
        for backend in ("auto", "eager"):
            results.append(_run_child(options, folder, backend))
            if options.json:  # after each: the second may take long
                values = {"options": {k: str(v) for k, v in vars(options).items()}, "results": results}
                options.json.write_text(json.dumps(values, indent=1))
    _show(options, results)


def _run_child(options: argparse.Namespace, folder: Path, backend: str) -> dict[str, Any]:
    words = [sys.executable, __file__, "--backend", backend, "--folder", str(folder), "--limit", str(options.limit)]
    words += ["--batch-size", str(options.batch_size), "--model", options.model, "--threads", str(options.threads)]
    words += ["--precision", options.precision, "--views", str(options.views)]
    words += ["--steps", str(options.steps if backend == "auto" else options.eager_steps)]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        return {"backend": backend, "failed": f"ended with status {done.returncode}", "times": [], "steps": 0}
    return json.loads(done.stdout.splitlines()[-1])


def _show(options: argparse.Namespace, results: list[dict[str, Any]]) -> None:
    table = Table("a step, s: median (p20-p80)", *(result["backend"] for result in results), "eager / auto")

    def row(name: str, value: Callable[[dict[str, Any]], np.ndarray | None]) -> None:
        cells, medians = [], []
        for result in results:
            values = value(result) if result["times"] else None
            if values is None or not len(values):
                cells.append("-")
                continue
            low, middle, high = np.percentile(values, [20, 50, 80])
            medians.append(middle)
            cells.append(f"{middle:.2f} ({low:.2f}-{high:.2f})")
        table.add_row(name, *cells, f"{medians[1] / medians[0]:.1f}x" if len(medians) == 2 else "-")

    def counted(result: dict[str, Any]) -> list[dict[str, float]]:
        return result["times"][1:] or result["times"]  # the first step allocates

    for part in PARTS:
        row(part, lambda r, part=part: np.array([t[part] for t in counted(r)]))
    row("whole step", lambda r: np.array([sum(t.values()) for t in counted(r)]))
    row("whole step, of all cores", lambda r: np.array(r["cpu"][1:] or r["cpu"]))
    for name in ("classification s", "geometry s"):
        row(f"of the loss, {name.removesuffix(' s')}", lambda r, name=name: np.array([r[name]]) if name in r else None)
    for name in ("classification MiB", "geometry MiB", "loss MiB", "max rss MiB", "rss after start MiB", "startup s"):
        cells = [f"{r[name]:.0f}" if r.get(name) is not None else "-" for r in results]
        ours, eager = (r.get(name) for r in results)
        table.add_row(name, *cells, f"{eager / ours:.1f}x" if ours and eager else "-")
    table.add_row("steps counted", *(f"{max(r['steps'] - 1, min(r['steps'], 1))}" for r in results), "")
    table.add_row("epoch", *(_epoch(r, options.batch_size) for r in results), "")
    Console(width=120).print(table)
    for result in results:
        if "failed" in result:
            print(f"{result['backend']}: {result['failed']}")


def _epoch(result: dict[str, Any], batch_size: int) -> str:
    if not result["times"]:
        return result.get("failed", "-")
    if result["steps"] == result["whole epoch"] and "seconds" in result:
        seconds, how = result["seconds"], "measured"
    else:
        seconds = float(np.median([sum(t.values()) for t in result["times"]])) * result["whole epoch"]
        how = f"{result['whole epoch']} x median"
    return f"{seconds:.0f} s ({how}), {result['whole epoch'] * batch_size / seconds:.0f} images/s"


if __name__ == "__main__":
    main()
