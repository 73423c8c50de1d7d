"""Which images are held out where nobody has said so: a share of every class, and never a copy of one that is kept."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np


def draw_groups(labels: Sequence[Hashable], groups: Sequence[int], share: float, seed: int, *, least: int) -> set[int]:
    """Choose a share of the images of each class; images of a group are chosen together or not at all.

    Args:
        labels: name or number of the class of each image, [n].
        groups: number of the group of each image, [n], such as that of the first of several copies.
        share: of each class, in (0, 1).
        seed: which images.
        least: images of a class of at least two groups that are chosen at least.

    Returns:
        Positions of the chosen images. Every class keeps an image.

    `allnc.data.longtail.held_out`, which holds out validation images of sets that know no copies, has another order of
    random numbers: neither may take the other's place, or the splits of runs that are there would change.
    """
    order: list[int] = np.random.RandomState(seed).permutation(len(labels)).tolist()  # frozen stream, as of the subsets
    members: dict[int, list[int]] = {}
    left: dict[Hashable, int] = {}
    for position in order:
        members.setdefault(groups[position], []).append(position)
        left[labels[position]] = left.get(labels[position], 0) + 1
    wanted = {label: min(number - 1, max(least, round(share * number))) for label, number in left.items()}
    chosen: set[int] = set()
    for group in members.values():
        counts: dict[Hashable, int] = {}
        for position in group:
            counts[labels[position]] = counts.get(labels[position], 0) + 1
        # A file that lies in two classes counts for both of them.
        if all(number <= wanted[label] and number < left[label] for label, number in counts.items()):
            chosen.update(group)
            for label, number in counts.items():
                wanted[label] -= number
                left[label] -= number
    return chosen
