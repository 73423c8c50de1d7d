"""Which images make the batches of an epoch: uniform and re-balancing samplers (C classes).

Every order is a function of (seed, stream, epoch) alone, so that a resumed run needs no saved sampler state.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

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
