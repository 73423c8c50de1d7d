"""Features that `python -m allnc.features` has stored: their files, and the set that is read from them.

    features.json                    what made them, their sizes, and the SHA-256 of every other file
    train-pass0-00000.safetensors    [rows, F] float16 `features` and [rows] int64 `labels` of the first images
    test-pass0-00000.safetensors     the same of the test images

Pass 0 is of the images as they are, every other pass of views that the recipe's augmentation has drawn.

Legend: n images, F features, K passes, S rows of a shard (the last one of a pass may have fewer).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from allnc._sealed import sum_of_values, unsealed
from allnc.config import FEATURES_MANIFEST as MANIFEST
from allnc.config import DataConfig
from allnc.data.images import shown
from allnc.data.sources import ImageSet

FORMAT = 1
PARTS = ("train", "test")
_PIECE = 1 << 22  # bytes hashed at a time


class StoredFeatures:
    """All passes over one part, memory-mapped: processes of a machine share them, and none holds them whole.

    Args:
        shards: [rows, F] float16 of every shard, pass after pass, each pass in S, S, ... rows and a rest.
        shard_rows: S.
        num_images: n.
    """

    def __init__(self, shards: Sequence[Tensor], shard_rows: int, num_images: int) -> None:
        self.shards, self.shard_rows = shards, shard_rows
        self.shards_of_a_pass = -(-num_images // shard_rows)

    @property
    def passes(self) -> int:
        return len(self.shards) // self.shards_of_a_pass

    @property
    def dim(self) -> int:
        return self.shards[0].shape[1]

    def rows(self, images: Tensor, passes: Tensor | None = None) -> Tensor:
        """Gather rows.

        Args:
            images: which images, [m] int64.
            passes: from which pass each, [m] int64; None takes pass 0.

        Returns:
            [m, F] float16.
        """
        shard, local = images // self.shard_rows, images % self.shard_rows
        if passes is not None:
            shard = shard + passes * self.shards_of_a_pass
        gathered = torch.empty(len(images), self.dim, dtype=torch.float16)
        sizes = shard.bincount(minlength=len(self.shards)).tolist()
        for number, places in enumerate(shard.argsort(stable=True).split(sizes)):
            if len(places):
                gathered.index_copy_(0, places, self.shards[number].index_select(0, local[places]))
        return gathered


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureSet(ImageSet):
    """Stored features of images with labels; of an ImageSet it has everything but pixels.

    Args:
        stored: the features of all images of the part from which this set may be cut.
        positions: which of them are in this set, [n] int64.
        made: SHA-256 of the SHA-256 of all files.
    """

    stored: StoredFeatures
    positions: Tensor
    made: str

    def __post_init__(self) -> None:
        assert self.labels.shape == self.positions.shape

    @property
    def channels(self) -> int:
        """Width F, which takes the place of an image's channels."""
        return self.stored.dim

    def shape(self, config: DataConfig) -> tuple[int, ...]:
        """Shape of what the model sees of an image."""
        return (self.stored.dim,)

    def fingerprint(self) -> str:
        """Return the SHA-256 of labels, features and which of them are in this set."""
        sha = hashlib.sha256(self.made.encode())
        for values in (self.labels, self.positions):
            sha.update(values.numpy().tobytes())
        return sha.hexdigest()

    def select(self, positions: np.ndarray) -> FeatureSet:
        """Return the set of the images at `positions`, in that order; the features stay where they are."""
        index = torch.from_numpy(np.asarray(positions, dtype=np.int64))
        return replace(self, labels=self.labels[index], positions=self.positions[index])

    def plain_batches(self, batch_size: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the features of pass 0 once, in order: ([n, F] float32, [n] int64) on the device."""
        for images, labels in zip(self.positions.split(batch_size), self.labels.split(batch_size), strict=True):
            yield self.stored.rows(images).to(device).float(), labels.to(device)


def shard_names(part: str, pass_: int, num_images: int, shard_rows: int) -> list[str]:
    """Return the names of the files of a pass over a part."""
    return [f"{part}-pass{pass_}-{number:05d}.safetensors" for number in range(-(-num_images // shard_rows))]


def passes_of(part: str, passes: int) -> int:
    """Return how many passes a part has; test images are never augmented."""
    return passes if part == "train" else 1


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return what features.json says.

    Raises:
        ValueError: there is none, it is damaged, or of another version.
    """
    path = folder / MANIFEST
    try:
        return unsealed(path.read_bytes(), FORMAT)
    except FileNotFoundError:
        raise ValueError(
            f"{shown(str(folder))} must be a folder that allnc.features wrote; it has no {MANIFEST}"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{shown(str(path))} must be the description of stored features; got: {reason}") from error


def read_features(config: DataConfig) -> tuple[FeatureSet, FeatureSet]:
    """Return the training and the test set in data.root, once every file has the SHA-256 that features.json names.

    Raises:
        ValueError: a file is missing, damaged or of other features, or not all of them are made yet.
    """
    assert config.root  # DataConfig has checked
    folder = Path(config.root)
    manifest = read_manifest(folder)
    sets = [_read_part(folder, manifest, part) for part in PARTS]
    name = manifest["config"]["model"]["name"]
    passes = manifest["passes"]
    note = f"features of {name}, {sets[0].channels} wide, {passes} pass{'es' if passes > 1 else ''}"
    return replace(sets[0], notes=(note,)), sets[1]


def _read_part(folder: Path, manifest: dict[str, Any], part: str) -> FeatureSet:
    number, rows = manifest["images"][part], manifest["shard_rows"]
    shards: list[Tensor] = []
    labels: list[Tensor] = []
    for pass_ in range(passes_of(part, manifest["passes"])):
        for name in shard_names(part, pass_, number, rows):
            if name not in manifest["shards"]:
                raise ValueError(
                    f"data.root must hold whole features; {shown(str(folder))} is without {name}: "
                    f"python -m allnc.features --resume --out {shown(str(folder))} makes the rest"
                )
            _check_sum(folder / name, manifest["shards"][name])
            with safe_open(folder / name, "pt") as file:
                shards.append(file.get_tensor("features"))
                if pass_ == 0:
                    labels.append(file.get_tensor("labels").clone())
    stored = StoredFeatures(shards, rows, number)
    assert sum(map(len, labels)) == number and stored.dim == manifest["feature_dim"]
    return FeatureSet(
        labels=torch.cat(labels),
        num_classes=manifest["num_classes"],
        mean=(),
        std=(),
        classes=tuple(manifest["classes"]),
        stored=stored,
        positions=torch.arange(number),
        made=sum_of_values(manifest["shards"]),
    )


def _check_sum(path: Path, wanted: str) -> None:
    """Raise ValueError unless a file has the SHA-256 that features.json names."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while piece := file.read(_PIECE):
                digest.update(piece)
    except FileNotFoundError:
        raise ValueError(f"{shown(str(path))} is missing; {MANIFEST} names it: make the features again") from None
    if digest.hexdigest() != wanted:
        raise ValueError(
            f"{shown(str(path))} is damaged, or of other features (its SHA-256 is not that in {MANIFEST}): make the "
            "features again"
        )
