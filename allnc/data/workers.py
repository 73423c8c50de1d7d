"""Worker processes that make views of images on disk, and what can become of them.

Legend: n images of a part, V views of each, c channels, H, W height and width.
"""

from __future__ import annotations

import gc
import multiprocessing
import signal
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from allnc.config import BATCH_AUGMENTATIONS, DataConfig
from allnc.data.images import read_image, readable_formats
from allnc.data.sources import ImageSet
from allnc.data.views import image_transforms

# Images that a worker makes at a time. Were it a whole batch, the first one would come when a single worker had made
# all of it, and memory would have to hold several batches for each worker.
PART = 32
Keys = Sequence[tuple[int, int]]  # position in the set and seed of the views, for each image of a part


class Views(Dataset[Tensor]):
    """Maps (position, seed) to the views [V, c, H, W] of an image; with the seed, no worker matters.

    Args:
        images: the images.
        config: views and augmentation.
        train: False gives one plain view of each, and so do augmentations of whole batches.
        margin: the plain view is the square of 8/7 of the side that it would be cut from.
    """

    def __init__(self, images: ImageSet, config: DataConfig, *, train: bool, margin: bool = False) -> None:
        size = config.image_size if images.images is None else images.images.shape[-1]
        self.set = images
        self.num_views = config.views if train and config.augmentation not in BATCH_AUGMENTATIONS[1:] else 1
        readable_formats()  # imported here, or else by each worker
        kind, mean, std = config.augmentation, images.mean, images.std
        how = {"fit": config.fit, "flip": config.flip, "crop_scale": config.crop_scale}
        self.first, self.others = image_transforms(kind, size, mean, std, train=train, margin=margin, **how)

    def __getitem__(self, key: tuple[int, int]) -> Tensor:
        index, seed = key
        image = self._read(index)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return torch.stack([(self.first if v == 0 else self.others)(image) for v in range(self.num_views)])

    def _read(self, index: int) -> Tensor | Image.Image:
        if self.set.images is not None:
            return self.set.images[index]
        image = read_image(self.set.paths[index])
        return image if self.set.channels == 3 else image.convert("L")


def view_major(parts: Sequence[Tensor]) -> Tensor:
    """Join the parts of a batch, each [n, V, c, H, W], to [V N, c, H, W]: all first views, then all second ones."""
    return torch.cat([part.transpose(0, 1) for part in parts], dim=1).flatten(0, 1)


def from_workers(
    views: Dataset[Any],
    parts: Iterable[Sequence[Any]],
    workers: int,
    device: torch.device,
    *,
    batch_size: int,
    join: Callable[[list[Any]], Any] | None = None,
) -> Iterator[Any]:
    """Yield the views of each part, [n, V, c, H, W], on the device, uint8 or as the augmentation makes them.

    The workers start with the first part that is asked for and end with the last one, or when the iterator is closed.
    Until then they are ahead by a batch and two parts for each of them.

    Args:
        views: what makes an image's views, of its key.
        parts: the keys of each part; iterated as the workers need it.
        workers: number of processes; 0 makes the views in this one when they are asked for.
        device: where the views are wanted; for a GPU, they pass through pinned memory, and nothing waits for the copy.
        batch_size: images in a batch, which tells how far ahead the workers are.
        join: what makes a part of what `views` returns, with `to` and `pin_memory` as a tensor; None stacks tensors.

    Raises:
        ValueError: an image that cannot be read, a worker process that was killed, or too little shared memory or too
            few files for the workers.
    """
    ahead = 2 + -(-batch_size // (PART * workers)) if workers else None
    # torch warns of more workers than cores, twice: images from a slow disk are a reason to have them.
    warnings.filterwarnings("ignore", message="This DataLoader will create", category=UserWarning)
    loader = DataLoader(
        views,
        batch_sampler=parts,  # pyright: ignore[reportArgumentType]
        num_workers=workers,
        prefetch_factor=ahead,
        pin_memory=device.type == "cuda",
        worker_init_fn=_leave_inherited_objects_alone,
        collate_fn=join,
        generator=torch.Generator().manual_seed(0),  # else the loader would draw from the global generator
    )
    others = set(multiprocessing.active_children())
    try:
        with _own_signal_handler():
            made = iter(loader)
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
        for part in made:
            yield part.to(device, non_blocking=True)
    except ValueError as error:
        # A worker wraps its error in the text of a traceback, of which a user needs the last line.
        problem = str(error).strip().splitlines()[-1].removeprefix("ValueError: ")
        error.__traceback__ = None
    except (RuntimeError, EOFError, OSError) as error:
        codes = [process.exitcode for process in processes if process.exitcode]
        line = "".join(str(error).strip().splitlines()[-1:])
        # The memory of a part is fetched from its worker, which fails in several ways when that has just died.
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
        # workers when the last reference goes. One that lives on without being needed is collected in the workers of
        # the next iterator, where it waits for five seconds and complains of processes that are not its own.
        del made
        raise ValueError(problem)


def _leave_inherited_objects_alone(_: int) -> None:
    """Spare a worker the copy of every page on which an object of the main process lies.

    Python's garbage collector writes to all objects that it looks at, and a page that is written to is copied.
    """
    gc.freeze()


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
