"""Which shapes are measured: presets, and the command line's changes to them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch
from cases import Shape

ROWS = (512, 2048, 8192, 16384, 32768, 65536, 131072)
COLUMNS = (64, 128, 256, 512, 2048)
CLASSES = (10, 100, 1000, 8142)  # CIFAR-10, CIFAR-100, ImageNet, iNaturalist 2018
FEATURES = (64, 512, 2048)  # of a CIFAR ResNet, ResNet-18, ResNet-50


@dataclass(frozen=True, kw_only=True)
class Block:
    """The product of some sizes. An op takes only those it has."""

    n: Sequence[int] = (0,)
    d: Sequence[int] = (0,)
    c: Sequence[int] = (0,)
    f: Sequence[int] = (0,)


# The sizes each op has. C is the number of classes of the labels, also for supcon, which takes no means.
SIZES = {
    "hycon": "ndc",
    "supcon": "ndc",
    "pairs": "nd",
    "p2p": "cf",
    "class_mean_ema": "ncf",
    "all_around": "ndcf",
}

PRESETS: dict[str, dict[str, list[Block]]] = {
    # About ten minutes on two cores.
    "cpu": {
        "hycon": [Block(n=(512, 2048, 8192), d=(128,), c=(1000,))],
        "supcon": [Block(n=(512, 2048), d=(64, 128, 512), c=(100,))],
        "pairs": [Block(n=(2048,), d=(128,))],
        "p2p": [Block(c=(100, 1000), f=(512,))],
        "class_mean_ema": [Block(n=(2048, 8192), c=(1000,), f=(512,))],
        "all_around": [Block(n=(2048,), d=(128,), c=(1000,), f=(512,))],
    },
    # Some minutes on one GPU: what the goals are stated for, and the ends of the grid.
    "gpu": {
        "hycon": [
            Block(n=(512, 2048, 8192, 16384, 32768, 65536, 131072), d=(128,), c=(1000,)),
            Block(n=(16384, 65536), d=(64, 256, 512, 2048), c=(1000,)),
            Block(n=(16384,), d=(128,), c=(10, 8142)),
        ],
        "supcon": [Block(n=(512, 2048, 16384), d=(128,), c=(1000,))],
        "pairs": [Block(n=(512, 2048, 16384, 65536), d=(128,)), Block(n=(16384,), d=(64, 256, 512, 2048))],
        "p2p": [Block(c=CLASSES, f=(512, 2048))],
        "class_mean_ema": [Block(n=(2048, 16384, 65536), c=(1000,), f=(512, 2048))],
        "all_around": [Block(n=(512, 2048, 16384), d=(128,), c=(1000,), f=(2048,))],
    },
    "full": {
        "hycon": [Block(n=ROWS, d=COLUMNS, c=CLASSES)],
        "supcon": [Block(n=ROWS, d=COLUMNS, c=(1000,))],
        "pairs": [Block(n=ROWS, d=COLUMNS)],
        "p2p": [Block(c=CLASSES, f=FEATURES)],
        "class_mean_ema": [Block(n=ROWS, c=(10, 1000, 8142), f=FEATURES)],
        "all_around": [Block(n=ROWS, d=(128,), c=CLASSES, f=(512, 2048))],
    },
}


def shapes_of(
    op: str,
    preset: str,
    dtype: torch.dtype,
    *,
    n: Sequence[int] | None = None,
    d: Sequence[int] | None = None,
    c: Sequence[int] | None = None,
    f: Sequence[int] | None = None,
) -> list[Shape]:
    """The shapes at which an op is measured, smallest first: its preset's, with the sizes given in their place.

    Sizes the op does not have are left out, so that `--n` does nothing to p2p and `--features` nothing to hycon.
    """
    given = {key: value for key, value in (("n", n), ("d", d), ("c", c), ("f", f)) if value and key in SIZES[op]}
    blocks: Iterable[Block] = (replace(block, **given) for block in PRESETS[preset][op])
    shapes = {
        Shape(N=rows, D=columns, C=classes, F=features, dtype=dtype)
        for block in blocks
        for rows, columns, classes, features in product(block.n, block.d, block.c, block.f)
    }
    return sorted(shapes, key=lambda shape: (shape.D, shape.C, shape.F, shape.N))
