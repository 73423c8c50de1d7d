"""From the table of one's own images to sets in memory or on disk."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import torch

from allnc.config import TEST, TRAIN, VALIDATION, DataConfig
from allnc.data.arrays import statistics
from allnc.data.images import read_image, shown
from allnc.data.own.index import Index, read_index, scan
from allnc.data.paths import PathList
from allnc.data.sources import ImageSet, on_disk, untested_notes
from allnc.data.views import whole


def read_own(config: DataConfig, index: Index | None = None, *, tested: bool = False) -> tuple[ImageSet, ImageSet]:
    """Return the training set and the set on which it is measured.

    Args:
        config: what to load.
        index: the table of its images; None reads data.index, or else looks at the images.
        tested: measure on the test images also where there are validation images.

    Raises:
        ValueError: the table or an image cannot be read, or a split has no image.
    """
    assert config.root  # DataConfig has checked
    if index is None:
        index = read_index(config.index, config.root) if config.index else scan(config)
    number = {label: position for position, label in enumerate(index.classes)}
    measured = VALIDATION if config.validation > 0 and not tested else TEST
    parts = {split: index.of(split) for split in (TRAIN, measured)}
    for split, rows in parts.items():
        if not rows:
            raise ValueError(f"data.index must name {split} images; got none")
    sets = {}
    for split, rows in parts.items():
        paths = [os.path.join(config.root, row.path) for row in rows]
        _check_there(paths, config.root)
        labels = np.array([number[row.label] for row in rows], np.int64)
        part = on_disk(PathList.of(paths), labels, len(number), config.channels)
        sets[split] = replace(part, classes=index.classes)
    train, test = sets[TRAIN], sets[measured]
    test = replace(test, notes=untested_notes(test.class_counts, measured))
    if not config.in_memory:
        return train, test
    train, test = (replace(part, images=_decoded(part.paths, config)) for part in (train, test))
    assert train.images is not None
    mean, std = statistics(train.images.permute(0, 2, 3, 1).numpy())
    return replace(train, mean=mean, std=std), replace(test, mean=mean, std=std)


def _check_there(paths: list[str], root: str) -> None:
    """Raise ValueError unless some of the images are there; which one is missing is said when it is read."""
    looked = paths[:: max(1, len(paths) // 100)]
    if not any(map(os.path.exists, looked)):
        raise ValueError(
            f"data.root must be the folder of the images; got {shown(root)}, in which {shown(looked[0])} and others "
            "are missing: give the folder by --data.root"
        )


def _decoded(paths: PathList, config: DataConfig) -> torch.Tensor:
    """Return all images, [n, c, size, size], uint8."""
    size, channels = config.image_size, config.channels
    images = np.empty((len(paths), size, size, channels), np.uint8)
    for position, path in enumerate(paths):
        image = read_image(path)
        square = whole(image if channels == 3 else image.convert("L"), size)
        images[position] = np.asarray(square).reshape(size, size, channels)
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
