"""Batches of views: from memory with whole-batch augmentation, or from worker processes, behind one
interface.

Legend: B images of the uniform branch, R of the re-balancing branch (0 when one batch serves both), V views,
N = V (B + R) rows. Rows are view-major: row v (B + R) + b is view v of image b, and the uniform branch's
images come first.
"""

from __future__ import annotations

import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from allnc.config import BATCH_AUGMENTATIONS, DataConfig
from allnc.data.images import read_image, readable_formats
from allnc.data.samplers import generator, rebalanced_order, uniform_order
from allnc.data.sources import ImageSet
from allnc.data.views import Draws, augment_batch, image_transforms, normalise


class Batch(NamedTuple):
    """Views of one step; `num_uniform` and `num_rebalance` count images, B and R."""

    images: Tensor  # [N, c, H, W] float32
    labels: Tensor  # [N] int64
    num_uniform: int
    num_rebalance: int

    def branch(self, values: Tensor, *, rebalance: bool) -> Tensor:
        """Return the rows of one branch, view-major; all rows when one batch serves both branches."""
        if self.num_rebalance == 0:
            return values
        by_view = values.unflatten(0, (-1, self.num_uniform + self.num_rebalance))  # [V, B + R, ...]
        return (by_view[:, self.num_uniform :] if rebalance else by_view[:, : self.num_uniform]).flatten(0, 1)


class TrainLoader:
    """Endless supply of epochs of augmented batches; an epoch depends on (seed, epoch) only.

    Args:
        images: the training set.
        config: views, augmentation and samplers.
        batch_size: images of the uniform branch in a batch, B.
        seed: of the order and the augmentation.
        two_batches: draw a second batch of the same size for the re-balancing branch.
        device: where batches are wanted.
        share: which of B images are this process's; the batches are those of one process with all of them.

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
        self.own = torch.cat([own, batch_size + own]) if two_batches else own  # columns of `indices`
        self.num_own = len(own)
        self.counts = images.class_counts
        self.in_memory = images.images is not None and config.augmentation in BATCH_AUGMENTATIONS
        self.pixels = images.images.to(device) if images.images is not None and self.in_memory else None
        self.workers = None if self.in_memory else _ViewDataset(images, config, train=True)

    def __len__(self) -> int:
        return len(self.set) // self.batch_size

    def indices(self, epoch: int) -> Tensor:
        """Return the images of each batch of an epoch, [batches, B + R]."""
        count = len(self) * self.batch_size
        order = uniform_order(len(self.set), self.seed, epoch)[:count].view(-1, self.batch_size)
        if not self.two_batches:
            return order
        sampler = self.config.rebalance_sampler
        second = rebalanced_order(self.set.labels, self.counts, sampler, count, self.seed, epoch)
        return torch.cat([order, second.view(-1, self.batch_size)], dim=1)

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Yield the batches of an epoch (0-based), on the device."""
        views, num_rebalance = self.config.views, self.num_own if self.two_batches else 0
        batches = self.indices(epoch)
        images = self._augmented(batches, epoch) if self.in_memory else self._decoded(batches, epoch)
        for index, pixels in zip(batches, images, strict=True):
            labels = self.set.labels[index[self.own]].repeat(views).to(self.device)
            yield Batch(pixels, labels, self.num_own, num_rebalance)

    def _augmented(self, batches: Tensor, epoch: int) -> Iterator[Tensor]:
        assert self.pixels is not None
        random = generator(self.seed, "augment", epoch)
        views, width = self.config.views, batches.shape[1]
        rows = (width * torch.arange(views)[:, None] + self.own).flatten()  # of the whole batch's V (B + R)
        for index in batches:
            repeated = self.pixels[index[self.own].to(self.device)].repeat(views, 1, 1, 1)
            draws = Draws(random, views * width, rows)
            yield augment_batch(repeated, self.config.augmentation, self.set.mean, self.set.std, draws)

    def _decoded(self, batches: Tensor, epoch: int) -> Iterator[Tensor]:
        assert self.workers is not None
        seeds = torch.randint(2**62, batches.shape, generator=generator(self.seed, "augment", epoch))
        own = zip(batches[:, self.own].tolist(), seeds[:, self.own].tolist(), strict=True)
        plan = [list(zip(indices, of_batch, strict=True)) for indices, of_batch in own]
        for stacked in _from_workers(self.workers, plan, self.config.workers, self.device):
            yield stacked.transpose(0, 1).flatten(0, 1)  # [N, c, H, W]


def plain_batches(
    images: ImageSet, config: DataConfig, batch_size: int, device: torch.device, *, margin: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield every image once, in order, not augmented: ([n, c, H, W] float32, [n] int64) on the device.

    With `margin`, large images have the square of 8/7 of the side out of whose middle the plain view is cut.
    """
    starts = range(0, len(images), batch_size)
    if images.images is not None:
        for start in starts:
            part = images.images[start : start + batch_size].to(device)
            yield (
                normalise(part, images.mean, images.std),
                images.labels[start : start + batch_size].to(device),
            )
        return
    plan = [[(i, 0) for i in range(s, min(s + batch_size, len(images)))] for s in starts]
    dataset = _ViewDataset(images, config, train=False, margin=margin)
    loader = _from_workers(dataset, plan, config.workers, device)
    for start, stacked in zip(starts, loader, strict=True):
        labels = images.labels[start : start + batch_size]
        yield stacked.flatten(0, 1), labels.to(device)


class _ViewDataset(Dataset[Tensor]):
    """Maps (index, seed) to the views [V, c, H, W] of an image; with the seed, no worker matters."""

    def __init__(self, images: ImageSet, config: DataConfig, *, train: bool, margin: bool = False) -> None:
        size = config.image_size if images.images is None else images.images.shape[-1]
        self.set, self.num_views = images, config.views if train else 1
        readable_formats()  # imported here, or else by each worker of each epoch
        kind, mean, std = config.augmentation, images.mean, images.std
        self.first, self.others = image_transforms(kind, size, mean, std, train=train, margin=margin)

    def __getitem__(self, key: tuple[int, int]) -> Tensor:
        index, seed = key
        image = self._read(index)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return torch.stack([(self.first if v == 0 else self.others)(image) for v in range(self.num_views)])

    def _read(self, index: int) -> Tensor | Image.Image:
        return read_image(self.set.paths[index]) if self.set.images is None else self.set.images[index]


def _from_workers(
    dataset: _ViewDataset, plan: list[list[tuple[int, int]]], workers: int, device: torch.device
) -> Iterator[Tensor]:
    """Yield the batches [n, V, c, H, W] of a plan of (index, seed) pairs.

    Raises:
        ValueError: an image that cannot be read, a worker process that was killed, or too little shared memory or too
            few files for the workers.
    """
    loader = DataLoader(
        dataset,
        batch_sampler=plan,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        generator=torch.Generator().manual_seed(0),  # else the loader would draw from the global generator
    )
    others = set(multiprocessing.active_children())
    try:
        with _own_signal_handler():
            batches = iter(loader)
    except Exception as error:
        # A worker that dies now makes torch's handler raise anywhere in here, and what that interrupts may raise, too.
        if "DataLoader worker" in f"{error} {error.__context__}":
            raise ValueError(f"{_ended(0)}; got data.workers {workers}") from error
        if not isinstance(error, OSError):
            raise
        raise ValueError(f"data.workers must be processes that can be started; got {workers}: {error}") from error
    processes = set(multiprocessing.active_children()) - others
    problem = None
    try:
        for batch in batches:
            yield batch.to(device, non_blocking=True)
    except ValueError as error:
        # A worker wraps its error in the text of a traceback, of which a user needs the last line.
        problem = str(error).strip().splitlines()[-1].removeprefix("ValueError: ")
        error.__traceback__ = None
    except (RuntimeError, EOFError, OSError) as error:
        codes = [process.exitcode for process in processes if process.exitcode]
        line = "".join(str(error).strip().splitlines()[-1:])
        # The memory of a batch is fetched from its worker, which fails in several ways when that has just died.
        if "DataLoader worker" in line or (codes and isinstance(error, (EOFError, OSError))):
            problem = _ended(codes[0] if codes else 0)
        elif "No space left on device" in line or "shared memory" in line:
            problem = "shared memory is too small for the workers' batches: enlarge /dev/shm or lower data.workers"
        elif "Too many open files" in line:
            problem = "the workers have too many files open: raise the limit (ulimit -n) or lower data.workers"
        else:
            raise
        problem += f"; got data.workers {workers}"
        error.__traceback__ = None
    if problem is not None:
        # Raised here, and without the first error's traceback, so that nothing refers to the iterator: it ends its
        # workers when the last reference goes. One that lives on is copied into the workers of the next iterator,
        # where it waits for five seconds and complains of processes that are not its own.
        del batches
        raise ValueError(problem)


@contextmanager
def _own_signal_handler() -> Iterator[None]:
    """Keep the handler of SIGCHLD as it is.

    torch sets one that raises in the main process at whatever line it is when a worker dies, in the midst of a
    checkpoint maybe. The loader looks after its workers by itself when it waits for a batch, every five seconds.
    """
    if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        if handler is not None:  # None is one that was not set from Python and could not be set again
            signal.signal(signal.SIGCHLD, handler)


def _ended(code: int) -> str:
    """Say in one line how a worker process ended (0: not known) and what helps."""
    if code >= 0:
        return f"a process that reads images ended{f' with status {code}' if code else ''}; data.workers 0 shows where"
    name = signal.Signals(-code).name
    help_ = {
        "SIGKILL": "most often the machine ran out of memory: lower data.workers or free memory",
        "SIGBUS": "most often shared memory is too small: enlarge /dev/shm or lower data.workers",
    }.get(name, "data.workers 0 reads in the main process and shows where")
    return f"a process that reads images was ended by {name}; {help_}"
