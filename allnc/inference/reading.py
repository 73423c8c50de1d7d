"""Streams images through worker processes: some are decoded while others pass the network, and none are kept."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from allnc.data.images import readable_formats
from allnc.data.workers import from_workers
from allnc.inference.transform import Transform

BATCH = 64  # images that are read, and pass the network, at a time


class Part:
    """Some images that were read.

    Args:
        names: what they are called, m of them.
        pixels: of those that could be read, [n, c, H, W] uint8.
        errors: why the others could not, by position in `names`.
    """

    def __init__(self, names: list[str], pixels: Tensor, errors: dict[int, str]) -> None:
        self.names, self.pixels, self.errors = names, pixels, errors

    def pin_memory(self) -> Part:
        return Part(self.names, self.pixels.pin_memory(), self.errors)

    def to(self, device: torch.device, *, non_blocking: bool = False) -> Part:
        return Part(self.names, self.pixels.to(device, non_blocking=non_blocking), self.errors)


class Reader(Dataset[Any]):
    """Maps the path of an image to its pixels, or to the reason why there are none."""

    def __init__(self, transform: Transform) -> None:
        self.transform = transform
        readable_formats()  # imported here, or else by each worker

    def __getitem__(self, path: str) -> tuple[str, Tensor | str]:
        try:
            return path, self.transform.pixels(path)
        except ValueError as error:
            return path, str(error)

    def joined(self, images: list[tuple[str, Tensor | str]]) -> Part:
        """Join images to a part."""
        pixels = [values for _, values in images if isinstance(values, Tensor)]
        errors = {place: values for place, (_, values) in enumerate(images) if isinstance(values, str)}
        stacked = torch.stack(pixels) if pixels else torch.empty(0, *self.transform.shape, dtype=torch.uint8)
        return Part([path for path, _ in images], stacked, errors)


def read_parts(
    paths: Iterable[str], transform: Transform, device: torch.device, *, workers: int | None = None
) -> Iterator[Part]:
    """Yield the images of paths, in their order, `BATCH` at a time.

    Args:
        paths: read as they are needed.
        transform: what makes an image's pixels.
        device: where the pixels are wanted.
        workers: processes that decode; None takes as many as there are cores, 8 at most, or none for a few images.
    """
    parts = _in_parts(iter(paths))
    first = list(itertools.islice(parts, 2))
    if workers is None:
        workers = 0 if len(first) < 2 else min(8, len(os.sched_getaffinity(0)))
    reader = Reader(transform)
    all_parts = itertools.chain(first, parts)
    yield from from_workers(reader, all_parts, workers, device, batch_size=BATCH, join=reader.joined)


def _in_parts(paths: Iterator[str]) -> Iterator[list[str]]:
    while part := list(itertools.islice(paths, BATCH)):
        yield part
