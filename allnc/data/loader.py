"""Batches of views: from memory with whole-batch augmentation, or from worker processes, behind one
interface.

Images on disk come as uint8, a quarter of the bytes of float32, and are normalised where and when they are wanted.

Legend: B images of the uniform branch, R of the re-balancing branch (0 when one batch serves both), V views,
N = V (B + R) rows. Rows are view-major: row v (B + R) + b is view v of image b, and the uniform branch's
images come first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from allnc.config import BATCH_AUGMENTATIONS, DataConfig
from allnc.data.features import FeatureSet
from allnc.data.samplers import generator, rebalanced_order, uniform_order
from allnc.data.sources import ImageSet
from allnc.data.views import Draws, augment_batch, normalise
from allnc.data.waiting import Waiting
from allnc.data.workers import PART, Keys, Views, from_workers, view_major


class Batch(NamedTuple):
    """Views of one step; `num_uniform` and `num_rebalance` count images, B and R."""

    images: Tensor  # [N, c, H, W]: what TrainLoader.pixels makes the network's input of
    labels: Tensor  # [N] int64
    num_uniform: int
    num_rebalance: int
    other_labels: Tensor | None = None  # [N] int64, of mixed images: the loss counts `share` at labels, the rest here
    share: float = 1.0

    def branch(self, values: Tensor, *, rebalance: bool) -> Tensor:
        """Return the rows of one branch, view-major; all rows when one batch serves both branches."""
        if self.num_rebalance == 0:
            return values
        by_view = values.unflatten(0, (-1, self.num_uniform + self.num_rebalance))  # [V, B + R, ...]
        return (by_view[:, self.num_uniform :] if rebalance else by_view[:, : self.num_uniform]).flatten(0, 1)

    def parts(self, number: int) -> list[Tensor]:
        """Return the rows of each of so many parts, as equal as can be: all views of some images of both branches."""
        width = self.num_uniform + self.num_rebalance
        rows = torch.arange(len(self.labels), device=self.labels.device).view(-1, width)  # [V, B + R]
        branches = rows.split([self.num_uniform, self.num_rebalance], dim=1)
        shares = zip(*(branch.tensor_split(number, dim=1) for branch in branches), strict=True)
        return [torch.cat(share, dim=1).flatten() for share in shares]


class TrainLoader:
    """Endless supply of epochs of augmented batches; an epoch depends on (seed, epoch) only.

    Workers are started once: while the last batches of an epoch are used and the model is measured, they make the
    first ones of the next.

    Args:
        images: the training set.
        config: views, augmentation and samplers.
        batch_size: images of the uniform branch in a batch, B.
        seed: of the order and the augmentation.
        two_batches: draw a second batch of the same size for the re-balancing branch.
        device: where batches are wanted.
        share: which of B images are this process's; the batches are those of one process with all of them.
        epochs: epochs of the run, beyond which nothing is made ahead.

    Raises:
        ValueError: fewer images than one batch (an incomplete last batch is left out).
    """

    def __init__(
        self,
        images: ImageSet,
        config: DataConfig,
        *,
        batch_size: int,
        seed: int,
        two_batches: bool,
        device: torch.device,
        share: Callable[[int], slice] = slice,
        epochs: int = 0,
    ) -> None:
        if len(images) < batch_size:
            raise ValueError(
                f"train.batch_size must be <= {len(images)}, the number of training images; got {batch_size}"
            )
        self.set, self.config, self.seed, self.device = images, config, seed, device
        self.batch_size, self.two_batches = batch_size, two_batches
        own = torch.arange(batch_size)[share(batch_size)]
        if not len(own):
            raise ValueError(f"train.batch_size must be at least the number of processes; got {batch_size}")
        self.num_own = len(own)
        samplers = (config.sampler, config.rebalance_sampler if two_batches else None)
        self.plan = _Plan(images, samplers, batch_size, seed, own)
        self.epochs = epochs
        self.ahead: tuple[int, Iterator[Tensor]] | None = None  # the epoch that comes next, and its parts
        self.waiting = Waiting()
        self._open()

    def _open(self) -> None:
        """Get ready whatever supplies the views."""
        images, config = self.set, self.config
        self.in_memory = images.images is not None and config.augmentation in BATCH_AUGMENTATIONS
        self.stored = images.images.to(self.device) if images.images is not None and self.in_memory else None
        self.views = None if self.in_memory else Views(images, config, train=True)

    def __len__(self) -> int:
        return len(self.plan)

    def indices(self, epoch: int) -> Tensor:
        """Return the images of each batch of an epoch, [batches, B + R]."""
        return self.plan.indices(epoch)

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Yield the batches of an epoch (0-based), on the device; `waiting` tells how long they were waited for."""
        return self.waiting.watch(self._batches(epoch), self.batch_size)

    def pixels(self, images: Tensor) -> Tensor:
        """Return the network's input for images of a batch, all or some of them.

        Args:
            images: [n, c, H, W], rows of `Batch.images`, in any memory format.

        Returns:
            [n, c, H, W], float32, normalised, in the same memory format.
        """
        return normalise(images, self.set.mean, self.set.std) if images.dtype == torch.uint8 else images

    def advice(self) -> str | None:
        """Say what to do if the last epoch was spent waiting for images; None if it was not, or nothing helps."""
        return None if self.in_memory else self.waiting.advice(self.config.workers)

    def _batches(self, epoch: int) -> Iterator[Batch]:
        views, num_rebalance = self.config.views, self.num_own if self.two_batches else 0
        batches = self.indices(epoch)
        images = self._in_memory(batches) if self.in_memory else self._decoded(epoch)
        if self.in_memory or self.config.augmentation in BATCH_AUGMENTATIONS[1:]:
            images = self._augmented(images, batches.shape[1], epoch)
        for index, pixels in zip(batches, images, strict=True):
            labels = self.set.labels[index[self.plan.own]].repeat(views).to(self.device)
            yield Batch(pixels, labels, self.num_own, num_rebalance)

    def _augmented(self, plain: Iterator[Tensor], width: int, epoch: int) -> Iterator[Tensor]:
        """Augment whole batches of images [B + R, c, H, W], from memory or from disk alike."""
        random = generator(self.seed, "augment", epoch)
        views = self.config.views
        rows = (width * torch.arange(views)[:, None] + self.plan.own).flatten()  # of the whole batch's V (B + R)
        for images in plain:  # to its end: what supplies images from disk makes the next epoch's then
            draws = Draws(random, views * width, rows)
            kind, mean, std = self.config.augmentation, self.set.mean, self.set.std
            yield augment_batch(images.repeat(views, 1, 1, 1), kind, mean, std, draws, flip=self.config.flip)

    def _in_memory(self, batches: Tensor) -> Iterator[Tensor]:
        assert self.stored is not None
        for index in batches:
            yield self.stored[index[self.plan.own].to(self.device)]

    def _decoded(self, epoch: int) -> Iterator[Tensor]:
        assert self.views is not None
        following, parts = self.ahead or (None, None)
        self.ahead = None  # what is left of an epoch that breaks off is of no use
        width = len(self.plan.own)
        if parts is None or following != epoch:
            del parts  # ends its workers before others start
            keys = self.plan.parts(epoch, max(epoch + 1, self.epochs))
            parts = from_workers(self.views, keys, self.config.workers, self.device, batch_size=width)
        for _ in range(len(self)):
            yield view_major(list(islice(parts, -(-width // PART))))
        if epoch + 1 < self.epochs:
            self.ahead = epoch + 1, parts


class _Plan:
    """Which images make the batches; it knows nothing of the loader, whose workers end when the last of it goes.

    Args:
        images: the training set.
        samplers: of the uniform branch, and of a second batch of the same size, None for one batch.
        batch_size: images of the uniform branch in a batch, B.
        seed: of the order and the augmentation.
        own: this process's images of the B, positions in [0, B).
    """

    def __init__(
        self, images: ImageSet, samplers: tuple[str, str | None], batch_size: int, seed: int, own: Tensor
    ) -> None:
        self.labels, self.counts = images.labels, images.class_counts
        self.samplers, self.batch_size, self.seed = samplers, batch_size, seed
        self.own = own if samplers[1] is None else torch.cat([own, batch_size + own])  # columns of `indices`

    def __len__(self) -> int:
        return len(self.labels) // self.batch_size

    def indices(self, epoch: int) -> Tensor:
        """Return the images of each batch of an epoch, [batches, B + R]."""
        orders = [
            self._order(sampler, stream, epoch).view(-1, self.batch_size)
            for sampler, stream in zip(self.samplers, ("uniform", "rebalance"), strict=True)
            if sampler is not None
        ]
        return torch.cat(orders, dim=1)

    def _order(self, sampler: str, stream: str, epoch: int) -> Tensor:
        """Return the images of a branch's whole epoch: of the uniform sampler each once, of others by chance."""
        size = len(self) * self.batch_size
        if sampler == "uniform":
            return uniform_order(len(self.labels), self.seed, epoch)[:size]
        return rebalanced_order(self.labels, self.counts, sampler, size, self.seed, epoch, stream=stream)

    def parts(self, first: int, stop: int) -> Iterator[Keys]:
        """Yield positions and seeds of this process's images, part by part of each batch of the epochs."""
        for epoch in range(first, stop):
            batches = self.indices(epoch)
            seeds = torch.randint(2**62, batches.shape, generator=generator(self.seed, "augment", epoch))
            for index, of_batch in zip(batches[:, self.own], seeds[:, self.own], strict=True):
                for part in zip(index.split(PART), of_batch.split(PART), strict=True):
                    yield list(zip(*(values.tolist() for values in part), strict=True))


def plain_batches(
    images: ImageSet, config: DataConfig, batch_size: int, device: torch.device, *, margin: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield every image once, in order, not augmented: ([n, c, H, W] float32, [n] int64) on the device.

    With `margin`, large images have the square of 8/7 of the side out of whose middle the plain view is cut.
    """
    if isinstance(images, FeatureSet):
        yield from images.plain_batches(batch_size, device)
        return
    starts = range(0, len(images), batch_size)
    if images.images is not None:
        for start in starts:
            part = images.images[start : start + batch_size].to(device)
            yield (
                normalise(part, images.mean, images.std),
                images.labels[start : start + batch_size].to(device),
            )
        return
    stops = [min(start + batch_size, len(images)) for start in starts]
    ranges = [
        range(at, min(at + PART, end))
        for start, end in zip(starts, stops, strict=True)
        for at in range(start, end, PART)
    ]
    keys = ([(i, 0) for i in part] for part in ranges)
    views = Views(images, config, train=False, margin=margin)
    parts = from_workers(views, keys, config.workers, device, batch_size=batch_size)
    for start, end in zip(starts, stops, strict=True):
        pixels = view_major(list(islice(parts, -(-(end - start) // PART))))
        yield normalise(pixels, images.mean, images.std), images.labels[start:end].to(device)
