"""Long-tailed class sizes and subsets: index arithmetic on labels, no images (C classes)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

PROFILES = ("exponential", "step")
ROUNDING = 1e-9  # 49 * 49 ** -1.0 is below 1
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
    if not (num_classes >= 1 and largest >= 1 and 1 <= ratio < math.inf):  # a NaN is none of these
        raise ValueError(
            f"num_classes, largest and ratio must be >= 1 and finite; got num_classes {num_classes}, largest "
            f"{largest}, ratio {ratio}"
        )
    if profile not in PROFILES:
        raise ValueError(f"profile must be {' or '.join(PROFILES)}; got {profile!r}")
    sizes = _sizes(num_classes, largest, ratio, profile)
    if sizes[-1] < 1:
        raise ValueError(
            f"imbalance_ratio must leave an image in the smallest class; got {ratio:g} with {largest} in the largest"
        )
    return sizes


def _sizes(num_classes: int, largest: int, ratio: float, profile: str) -> list[int]:
    if profile == "exponential":
        sizes = [largest * ratio ** (-i / max(1, num_classes - 1)) for i in range(num_classes)]
    else:
        half = num_classes - num_classes // 2  # an odd number of classes has one more large class
        sizes = [largest] * half + [largest / ratio] * (num_classes - half)
    return [int(size + ROUNDING) for size in sizes]


def sizes_within(
    counts: Sequence[int], largest: int | None, ratio: float, profile: str, names: Sequence[str] = ()
) -> list[int]:
    """Return the class sizes of a profile, which the images at hand must fill.

    Args:
        counts: images at hand, by class, [C], each >= 1.
        largest: size of the first class; None takes the smallest of `counts`.
        ratio: largest over smallest class size, >= 1.
        profile: exponential or step, as in `class_sizes`.
        names: of the classes, for the message, [C]; empty when they have none.

    Returns:
        C sizes, each >= 1 and within `counts`.

    Raises:
        ValueError: a class has fewer images than the profile asks for, or the profile leaves it without any. The
            message names the options, the class with its count, and what would do.
    """

    def fits(sizes: list[int]) -> bool:
        return all(1 <= size <= count for size, count in zip(sizes, counts, strict=True))

    if min(counts) < 1:
        raise ValueError(f"every class must have an image; class {counts.index(min(counts))} has none")
    first = min(counts) if largest is None else largest
    sizes = _sizes(len(counts), first, ratio, profile)
    if fits(sizes):
        return class_sizes(len(counts), first, ratio, profile)
    lacking = max(range(len(counts)), key=lambda c: sizes[c] - counts[c])
    if sizes[lacking] <= counts[lacking]:
        lacking = len(counts) - 1
    name = f"class {lacking} ({names[lacking]})" if names else f"class {lacking}"
    # Sizes grow with that of the first class, so that the largest that can be filled is found by bisection.
    low, high = 0, max(counts)
    while low < high:
        middle = (low + high + 1) // 2
        short = any(a > b for a, b in zip(_sizes(len(counts), middle, ratio, profile), counts, strict=True))
        low, high = (low, middle - 1) if short else (middle, high)
    if fits(_sizes(len(counts), low, ratio, profile)):
        remedy = f"data.max_per_class {low}"
    else:
        remedy = f"data.max_per_class {min(counts)} and data.imbalance_ratio {min(counts)} or less"
    asked = f"asks for {sizes[lacking]} images of" if sizes[lacking] else "leaves no image of"
    raise ValueError(
        f"data.imbalance {profile} {asked} {name}, which has {counts[lacking]}: data.max_per_class is {first}"
        f"{' (the smallest class)' if largest is None else ''} and data.imbalance_ratio {ratio:g}; take every image "
        f"with data.imbalance none, or set {remedy}"
    )


def shuffled_by_class(labels: IndexArray, num_classes: int, seed: int) -> list[IndexArray]:
    """Return for each class the positions of its images in an order that the seed decides."""
    generator = np.random.RandomState(seed)  # frozen stream: the same subset under every numpy version
    return [generator.permutation(np.flatnonzero(labels == c)) for c in range(num_classes)]


def held_out(
    labels: IndexArray, num_classes: int, share: float, seed: int, groups: IndexArray | None = None
) -> tuple[IndexArray, IndexArray]:
    """Split a set in two: a share of each class is held out, and every class keeps an image.

    Args:
        labels: class of every image, [n].
        num_classes: number of classes C.
        share: of each class, in (0, 1): round(share * n_c) images of n_c, at most n_c - 1.
        seed: which images.
        groups: a number for every image, [n]: images of a group (all letters of a font, all photographs of an animal)
            are held out together or not at all, so many groups that they have about that share of all images.

    Returns:
        Positions of the images that are kept and of those held out, each in the order of the set.

    Raises:
        ValueError: no image would be held out, or groups leave a class without an image.
    """
    out = np.zeros(len(labels), dtype=bool)
    if groups is None:
        for positions in shuffled_by_class(labels, num_classes, seed):
            out[positions[: max(0, min(len(positions) - 1, round(share * len(positions))))]] = True
    else:
        numbers, sizes = np.unique(groups, return_counts=True)
        order = np.random.RandomState(seed).permutation(len(numbers))
        before = np.cumsum(sizes[order]) - sizes[order]  # images in the groups before this one
        out = np.isin(groups, numbers[order[before + sizes[order] / 2 < share * len(labels)]])
        lost = np.setdiff1d(labels[out], labels[~out])
        if len(lost):
            raise ValueError(
                f"data.validation must leave every class an image; got {share:g}, and class {lost[0]} loses all of its "
                "groups"
            )
    if not out.any():
        raise ValueError(f"data.validation must hold out an image of some class; got {share:g} of {len(labels)} images")
    return np.flatnonzero(~out), np.flatnonzero(out)


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
