"""Storing the features of every image: file after file, each whole or not there, so that it can stop at any moment.

features.json is written first and again after each file, whose SHA-256 it then names. A file that it does not name is
made anew when the extraction goes on. All that decides a bit of a file (images, weights, batches, random numbers)
starts anew with it, so that the result does not depend on where it stopped.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from safetensors.torch import save as to_bytes
from torch import Tensor

from allnc._sealed import sealed, sum_of
from allnc.config import FEATURES_MANIFEST
from allnc.data import ImageSet, TrainLoader, plain_batches
from allnc.data.features import FORMAT, PARTS, passes_of, read_manifest, shard_names
from allnc.models import sum_of_tensors
from allnc.trainer.checkpoint import load_weights
from allnc.trainer.extract_command import Plan, check_folder
from allnc.trainer.folder import RunFolder, write_json, write_whole
from allnc.trainer.measure import BATCH
from allnc.trainer.options import from_dict, to_dict
from allnc.trainer.run import Run
from allnc.trainer.runtime import git_commit, versions


def extract(plan: Plan, console: Console) -> None:
    """Store features of all images of a configuration, in a folder that this process alone writes.

    Args:
        plan: what to store, and where.
        console: where a line a file goes.

    Raises:
        ValueError: images, model or folder are not to be had or not those of the beginning, or a feature is not finite
            in float16.
        KeyboardInterrupt: with a line that says how to go on.
    """
    with RunFolder(plan.folder, plan.mode, check_folder) as folder:
        manifest = read_manifest(plan.folder) if plan.mode == "resume" else None
        if manifest is not None:
            run = Path(manifest["run"]) if manifest["run"] else None
            rows, passes = manifest["shard_rows"], manifest["passes"]
            plan = Plan(plan.folder, "resume", from_dict(manifest["config"]), run, passes, rows)
        work = _Extraction(plan)
        if manifest is None:
            manifest = work.manifest
        elif changed := [what for name, what in _FIXED.items() if work.manifest[name] != manifest[name]]:
            raise ValueError(
                f"--resume needs the images and the model that {plan.folder} was begun with; "
                f"{' and '.join(changed)} differ"
            )
        try:
            _store(work, manifest, folder, console)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"stopped; --resume --out {folder} continues") from None


# Entries of features.json that must be the same when an extraction goes on, and what they mean.
_FIXED = {"images_sha256": "images", "weights_sha256": "weights", "classes": "class names"}


def _store(work: _Extraction, manifest: dict[str, Any], folder: RunFolder, console: Console) -> None:
    """Make the files that the manifest does not name yet."""

    def said(text: str) -> None:
        console.print(text, soft_wrap=True, highlight=False, markup=False)

    counts = " and ".join(f"{len(work.sets[part])} {part}" for part in PARTS)
    passes = f"{manifest['passes']} pass{'es' if manifest['passes'] > 1 else ''}"
    said(f"features of {counts} images, {manifest['feature_dim']} wide, {passes}; {folder}")
    for note in work.notes:
        said(f"note: {note}")
    _write_manifest(folder, manifest)
    started, stored = time.perf_counter(), 0
    for part in PARTS:
        images = work.sets[part]
        for pass_ in range(passes_of(part, manifest["passes"])):
            for number, name in enumerate(shard_names(part, pass_, len(images), manifest["shard_rows"])):
                if name in manifest["shards"]:
                    continue
                first = number * manifest["shard_rows"]
                stop = min(first + manifest["shard_rows"], len(images))
                features = work.features(part, pass_, first, stop)
                data = to_bytes({"features": features, "labels": images.labels[first:stop].clone()})
                write_whole(folder / name, data)
                manifest["shards"][name] = sum_of(data)
                _write_manifest(folder, manifest)
                stored += stop - first
                rate = stored / (time.perf_counter() - started)
                said(f"{part} pass {pass_}: {stop} of {len(images)} images, {rate:.0f} images/s")
    said(f"whole; train on them with --config features --data.root {folder}")


def _write_manifest(folder: RunFolder, manifest: dict[str, Any]) -> None:
    write_json(folder / FEATURES_MANIFEST, sealed(manifest))


class _Extraction:
    """Images and encoder of a plan, and what features.json says of them.

    The encoder runs in float32 (TF32 where train.matmul_precision has it): bfloat16 keeps fewer digits than the files.
    """

    def __init__(self, plan: Plan) -> None:
        assert plan.config is not None
        config, epoch, weights = plan.config, 0, None
        if plan.run is None:  # what light tuning would add is no part of the encoder yet
            model = dataclasses.replace(config.model, tune="full", tune_rank=None)
            data = dataclasses.replace(config.data, validation=0.0)  # what trains on the features may hold some out
            config = dataclasses.replace(config, data=data, model=model)
        else:
            of_run, epoch, weights = load_weights(plan.run)
            model = dataclasses.replace(of_run.model, weights=config.model.weights or of_run.model.weights)
            # The loss decides on the heads, which the weights hold, too.
            config = dataclasses.replace(config, model=weights.model(model), loss=of_run.loss)
        # What a training makes of images and weights; its steps, which there are none of, shall not refuse a small set.
        # The weights of a run are those that it measures, a moving average where it has one.
        train = dataclasses.replace(config.train, batch_size=2, micro_batch=None, ema_decay=None)
        run = Run(dataclasses.replace(config, train=train), tested=True)
        if weights is not None:
            run.load_model(weights, epoch)
        self.sets: dict[str, ImageSet] = {"train": run.train_set, "test": run.measured_set}
        self.config, self.device, self.memory = config, run.device, run.memory
        self.encoder = run.model.encoder.eval()
        images = run.train_set
        self.notes = [note for part in self.sets.values() for note in part.notes]
        if plan.run is None and not config.model.pretrained:
            self.notes.append(
                f"{config.model.name} has random weights, whose features say little: --model.pretrained true or --run"
            )
        self.manifest: dict[str, Any] = {
            "format": FORMAT,
            "config": to_dict(config),
            "run": None if plan.run is None else str(plan.run.absolute()),
            "passes": plan.passes,
            "shard_rows": plan.shard_rows,
            "feature_dim": run.model.feature_dim,
            "num_classes": images.num_classes,
            "classes": list(images.classes),
            "mean": list(images.mean),
            "std": list(images.std),
            "images": {part: len(each) for part, each in self.sets.items()},
            "images_sha256": {part: each.fingerprint() for part, each in self.sets.items()},
            "weights_sha256": sum_of_tensors(self.encoder.state_dict()),
            "device": self.device.type,
            "threads": torch.get_num_threads(),
            "versions": versions(),
            "commit": git_commit(),
            "shards": {},
        }

    def features(self, part: str, pass_: int, first: int, stop: int) -> Tensor:
        """Return the features of some images of a pass, [stop - first, F] float16.

        Raises:
            ValueError: one is not finite in float16; the image is named.
        """
        images = self.sets[part].select(np.arange(first, stop))
        features = torch.empty(stop - first, self.manifest["feature_dim"], dtype=torch.float16)
        views = self._plain(images) if pass_ == 0 else self._views(images, pass_ * len(self.sets[part]) + first)
        for rows, pixels in views:
            with torch.inference_mode():
                features[rows] = self.encoder(pixels.contiguous(memory_format=self.memory)).half().cpu()
            wrong = (~features[rows].isfinite()).any(1).nonzero()
            if len(wrong):
                index = int(rows[wrong[0, 0]])
                name = images.paths[index] if len(images.paths) else f"{part} image {first + index}"
                raise ValueError(
                    f"features must be finite and at most 65504, what float16 holds; those of {name} are not: the "
                    f"model's weights are damaged, or the model needs a normalisation at its end"
                )
        return features

    def _plain(self, images: ImageSet) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield which images, and their pixels as test images have them."""
        places = torch.arange(len(images)).split(BATCH)
        for rows, (pixels, _) in zip(places, plain_batches(images, self.config.data, BATCH, self.device), strict=True):
            yield rows, pixels

    def _views(self, images: ImageSet, stream: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield which images, and an augmented view of each; `stream` is the start of their random numbers."""
        config = dataclasses.replace(self.config.data, views=1, sampler="uniform", rebalance_sampler="uniform")
        whole = len(images) // BATCH * BATCH  # the loader leaves out an incomplete batch
        for first, stop in ((0, whole), (whole, len(images))):
            if first < stop:
                loader = TrainLoader(
                    images.select(np.arange(first, stop)),
                    config,
                    batch_size=min(BATCH, stop - first),
                    seed=self.config.seed,
                    two_batches=False,
                    device=self.device,
                )
                epoch = stream + first
                for rows, batch in zip(loader.indices(epoch), loader.epoch(epoch), strict=True):
                    yield first + rows, loader.pixels(batch.images)
