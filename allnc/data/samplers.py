"""Which images make the batches of an epoch: uniform and re-balancing samplers (C classes).

Every order is a function of (seed, stream, epoch) alone, so that a resumed run needs no saved sampler state.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Sampler

STREAMS = {"uniform": 0, "rebalance": 1, "augment": 2, "loader": 3, "classifier": 4, "mix": 5}


def seeds(seed: int, stream: str, epoch: int) -> np.random.SeedSequence:
    """Return the entropy that only `seed`, the named stream and `epoch` decide."""
    return np.random.SeedSequence([seed, STREAMS[stream], epoch])


def generator(seed: int, stream: str, epoch: int) -> torch.Generator:
    """Return a generator that only `seed`, the named stream and `epoch` decide."""
    state = seeds(seed, stream, epoch).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))  # torch seeds are signed 64 bit


def class_probabilities(class_counts: Tensor, sampler: str) -> Tensor:
    """Return how often a sampler draws each class.

    Args:
        class_counts: images of each class, [C], int64, >= 0.
        sampler: uniform (each image alike: P(c) ~ n_c), reversed (P(c) ~ 1 / n_c), class_balanced (each class
            alike) or square_root (P(c) ~ sqrt(n_c)).

    Returns:
        Probabilities, [C], float64, summing to 1; 0 for a class without images.

    Raises:
        ValueError: an unknown sampler, or counts that are negative or all zero.

    Source: reversed: Zhou et al., BBN (CVPR 2020); square_root: Mahajan et al. (ECCV 2018).
    """
    powers = {"uniform": 1.0, "reversed": -1.0, "class_balanced": 0.0, "square_root": 0.5}
    if sampler not in powers:
        raise ValueError(f"sampler must be one of {', '.join(powers)}; got {sampler!r}")
    if not len(class_counts) or int(class_counts.min()) < 0 or int(class_counts.max()) == 0:
        raise ValueError(f"class_counts must be >= 0, one of them > 0; got {class_counts.tolist()[:20]}")
    counts = class_counts.double()
    weight = torch.where(counts > 0, counts.clamp(min=1) ** powers[sampler], 0.0)  # [C]
    return weight / weight.sum()


def uniform_order(num_images: int, seed: int, epoch: int) -> Tensor:
    """Return a permutation of all images, [num_images]."""
    return torch.randperm(num_images, generator=generator(seed, "uniform", epoch))


def rebalanced_order(
    labels: Tensor, class_counts: Tensor, sampler: str, size: int, seed: int, epoch: int, *, stream: str = "rebalance"
) -> Tensor:
    """Draw `size` images with replacement so that classes appear as `class_probabilities` says, [size]."""
    per_image = class_probabilities(class_counts, sampler)[labels] / class_counts.double()[labels]  # [n]
    cumulative = per_image.cumsum(0)
    cumulative = cumulative / cumulative[-1]  # torch.multinomial stops at 2^24 images
    draws = torch.rand(size, generator=generator(seed, stream, epoch), dtype=torch.float64)
    return torch.searchsorted(cumulative, draws, right=True).clamp(max=len(labels) - 1)


class BalancedSampler(Sampler[int]):
    """Draws images so that classes appear as `class_probabilities` says; for any `torch.utils.data.DataLoader`.

    An epoch has as many images as the set, drawn with replacement. Every rank of a distributed run draws the same
    order and takes its share of it, as torch's DistributedSampler does; sizes are rounded up so that all have as many.

    Args:
        labels: [n] class of each image, >= 0.
        sampler: class_balanced, square_root or reversed, as `data.sampler` of a run; uniform takes every image once.
        size: images of an epoch, of all ranks together; None: n.
        seed: of the order; that of an epoch is a function of seed and epoch alone.
        rank, world_size: of this process; None asks torch.distributed, if it is initialised.

    Raises:
        TypeError, ValueError: labels that are no whole numbers >= 0, an unknown sampler, a rank out of its range, or
            another size with uniform.

    Example:
        >>> sampler = BalancedSampler([0] * 90 + [1] * 10)
        >>> sampler.set_epoch(3)  # before each epoch
        >>> drawn = list(sampler)
        >>> len(drawn), 35 < sum(index >= 90 for index in drawn) < 65
        (100, True)
    """

    def __init__(
        self,
        labels: Tensor | Sequence[int],
        sampler: str = "class_balanced",
        *,
        size: int | None = None,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        labels = torch.as_tensor(labels).cpu()
        if labels.dim() != 1 or not len(labels) or labels.is_floating_point() or int(labels.min()) < 0:
            got = f"{labels.dtype} {list(labels.shape)}" + (f" from {labels.min()}" if labels.numel() else "")
            raise ValueError(f"labels must be the class of each image, [n] whole numbers >= 0; got {got}")
        class_probabilities(torch.ones(1, dtype=torch.int64), sampler)
        if size is not None and (sampler == "uniform" or size < 1):
            raise ValueError(f"size must be >= 1, and None with sampler uniform; got {size}")
        ready = dist.is_available() and dist.is_initialized()
        self.rank = (dist.get_rank() if ready else 0) if rank is None else rank
        self.world_size = (dist.get_world_size() if ready else 1) if world_size is None else world_size
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank must be in [0, {self.world_size}); got {self.rank}")
        self.labels, self.sampler, self.seed, self.epoch = labels.long(), sampler, seed, 0
        self.size = len(labels) if size is None else size

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, >= 0, whose order is drawn next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.size // self.world_size)

    def __iter__(self) -> Iterator[int]:
        total = len(self) * self.world_size
        if self.sampler == "uniform":
            order = uniform_order(self.size, self.seed, self.epoch)
            order = order.repeat(-(-total // self.size))[:total]
        else:
            counts = torch.bincount(self.labels)
            order = rebalanced_order(self.labels, counts, self.sampler, total, self.seed, self.epoch)
        return iter(order[self.rank :: self.world_size].tolist())
