"""Mixup and remix: what is mixed with what in each step, and which labels a mixture has.

Legend: B images of a batch, N rows, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from allnc.data.samplers import seeds

KAPPA, TAU = 3.0, 0.5  # of remix: how many times rarer a class must be, and its image's share is more than 1 - TAU


class Mixture(NamedTuple):
    """How the batch of a step is mixed."""

    share: float  # λ in [0, 1], of every image's own pixels
    partners: Tensor  # [B] int64: which images of the batch the rest is of


def mixtures(alpha: float, batch_size: int, *, seed: int, epoch: int) -> Iterator[Mixture]:
    """Yield the mixtures of the steps of an epoch, without end; they depend on the arguments alone.

    Args:
        alpha: of the distribution Beta(alpha, alpha) of the share, > 0.
        batch_size: images of a batch, B.
        seed: of the run.
        epoch: from 0 on.

    Source: Zhang et al., mixup: Beyond Empirical Risk Minimization (ICLR 2018); one share a step, as in their code.
    """
    random = np.random.default_rng(seeds(seed, "mix", epoch))
    while True:
        yield Mixture(float(random.beta(alpha, alpha)), torch.from_numpy(random.permutation(batch_size)))


def remix_labels(own: Tensor, other: Tensor, share: float, class_counts: Tensor) -> tuple[Tensor, Tensor]:
    """Let a rare class be the only label of a mixture whose larger part is its image's.

    Rare is a class with at most a third of the other's training images.

    Args:
        own, other: [N] int64, labels of the two images.
        share: λ in [0, 1], of the own image.
        class_counts: [C] training images of each class, >= 1.

    Returns:
        The labels that count λ and 1 - λ, [N] int64 each.

    Source: Chou et al., Remix: Rebalanced Mixup (ECCV 2020 workshops), with its κ = 3 and τ = 0.5.
    """
    counts = class_counts.to(own.device).double()
    ratio = counts[own] / counts[other]  # [N]
    other_wins = (ratio >= KAPPA) & (share < TAU)
    own_wins = (ratio <= 1 / KAPPA) & (1 - share < TAU)
    return torch.where(other_wins, other, own), torch.where(own_wins, own, other)
