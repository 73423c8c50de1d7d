"""What a checkpoint knows of the images it was trained on, so that it predicts without them.

It stands as JSON in the metadata of last.safetensors, under `card`; files of older versions lack it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from allnc.config import DataConfig

if TYPE_CHECKING:
    from allnc.data import ImageSet


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """Classes and pixels of a training set (C classes, c channels; of stored features F columns).

    Args:
        classes: their names, C of them; None where they have none.
        class_counts: training images of each class, C of them.
        mean, std: of the pixels scaled to [0, 1], c numbers each; empty for stored features.
        channels: c, or F.
        shape: of an image as the network sees it, (c, H, W), or (F,).
    """

    classes: tuple[str, ...] | None
    class_counts: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    channels: int
    shape: tuple[int, ...]

    @classmethod
    def of(cls, images: ImageSet, config: DataConfig) -> Card:
        """Return the card of a training set."""
        shape = images.shape(config)
        has_pixels = len(shape) == 3
        return cls(
            classes=images.classes or None,
            class_counts=tuple(images.class_counts.tolist()),
            mean=images.mean if has_pixels else (),
            std=images.std if has_pixels else (),
            channels=images.channels,
            shape=shape,
        )

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Card:
        """Return what `to_json` wrote; keys that a later version adds are not read.

        Raises:
            ValueError, KeyError, TypeError: it is something else.
        """
        values = json.loads(text)
        classes = values["classes"]
        card = cls(
            classes=None if classes is None else tuple(map(str, classes)),
            class_counts=tuple(map(int, values["class_counts"])),
            mean=tuple(map(float, values["mean"])),
            std=tuple(map(float, values["std"])),
            channels=int(values["channels"]),
            shape=tuple(map(int, values["shape"])),
        )
        if card.classes is not None and len(card.classes) != len(card.class_counts):
            raise ValueError(f"{len(card.classes)} names for {len(card.class_counts)} classes")
        return card
