"""Long-tailed class sizes and subsets: index arithmetic on labels, no images (C classes)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

IndexArray = npt.NDArray[np.int64]


def class_sizes(num_classes: int, largest: int, ratio: float, profile: str = "exponential") -> list[int]:
    """Return the number of images of each class, largest class first.

    Args:
        num_classes: number of classes C, >= 1.
        largest: images of the first class, >= 1.
        ratio: largest over smallest class size, >= 1.
        profile: exponential (n_i = int(largest * ratio^(-i / (C - 1)))), or step (the first half of the
            classes has `largest` images, the rest largest / ratio).

    Returns:
        C sizes, each >= 1.

    Raises:
        ValueError: a value out of range, or a smallest class without an image.

    Source: Cao et al., LDAM (NeurIPS 2019), whose CIFAR subsets these are.
    """
    if num_classes < 1 or largest < 1 or ratio < 1:
        raise ValueError(
            f"num_classes, largest and ratio must be >= 1; got num_classes {num_classes}, largest "
            f"{largest}, ratio {ratio}"
        )
    if profile == "exponential":
        sizes = [int(largest * ratio ** (-i / max(1, num_classes - 1))) for i in range(num_classes)]
    elif profile == "step":
        half = num_classes - num_classes // 2  # an odd number of classes has one more large class
        sizes = [largest] * half + [int(largest / ratio)] * (num_classes - half)
    else:
        raise ValueError(f"profile must be exponential or step; got {profile!r}")
    if sizes[-1] < 1:
        raise ValueError(
            f"imbalance_ratio must leave an image in the smallest class; got {ratio:g} with {largest} in the largest"
        )
    return sizes


def shuffled_by_class(labels: IndexArray, num_classes: int, seed: int) -> list[IndexArray]:
    """Return for each class the positions of its images in an order that the seed decides."""
    generator = np.random.RandomState(seed)  # frozen stream: the same subset under every numpy version
    return [generator.permutation(np.flatnonzero(labels == c)) for c in range(num_classes)]


def subset(labels: IndexArray, sizes: list[int], seed: int) -> IndexArray:
    """Choose `sizes[c]` images of every class c.

    Args:
        labels: class of every image, [n].
        sizes: images to keep, by class, [C].
        seed: which images; independent of the run's seed.

    Returns:
        Positions of the chosen images, class after class, [sum(sizes)].

    Raises:
        ValueError: a class has fewer images than asked for.
    """
    chosen = []
    for c, positions in enumerate(shuffled_by_class(labels, len(sizes), seed)):
        if len(positions) < sizes[c]:
            raise ValueError(
                f"data.max_per_class must leave every class enough images; class {c} has {len(positions)}, "
                f"{sizes[c]} asked for"
            )
        chosen.append(positions[: sizes[c]])
    return np.concatenate(chosen)
