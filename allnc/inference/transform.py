"""From an image to the pixels that a run's network takes: those that the trainer measures.

Legend: c channels, H, W height and width of what the network takes; h, w of an image.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from allnc.config import SMALL_SETS, DataConfig
from allnc.data.images import read_image, to_rgb
from allnc.data.views import image_transforms, normalise
from allnc.trainer.card import Card

Source = str | os.PathLike[str] | Image.Image | Tensor | np.ndarray[Any, Any]
MODES = {1: "L", 3: "RGB"}


class Transform:
    """Maps an image to normalised pixels [c, H, W]; picklable, so that worker processes can have it.

    A file is read as the trainer reads it (EXIF, transparency, 16 bits). A run on files then resizes and cuts it as the
    trainer's test images; a run on arrays or a published set of small images takes an image of its own size as it is,
    and of another size the middle of it, scaled.

    Args:
        card: shape, mean and deviation of the images.
        data: of the run's configuration.
    """

    def __init__(self, card: Card, data: DataConfig) -> None:
        self.shape, self.mean, self.std = card.shape, card.mean, card.std
        self.of_arrays = data.name in SMALL_SETS
        margin, side = data.test_crops == 5, card.shape[-1]
        self.size = (side * 8 // 7,) * 2 if margin else card.shape[1:]  # of what it returns
        plain = image_transforms("none", side, self.mean, self.std, train=False, margin=margin, fit=data.fit)[0]
        self.cut = None if self.of_arrays else plain

    def __call__(self, image: Source) -> Tensor:
        """Return an image as the network takes it, [c, H, W] float32.

        Args:
            image: path of a file, PIL image, or uint8 tensor or array, [c, h, w] or [h, w] (arrays also [h, w, 3]).

        Raises:
            ValueError: a file that cannot be read, or a tensor of another type or number of channels.
        """
        return self.normalised(self.pixels(image)[None])[0]

    def normalised(self, pixels: Tensor) -> Tensor:
        """Return uint8 pixels [n, c, H, W] as the network takes them, float32, on their device."""
        return normalise(pixels, self.mean, self.std)

    def pixels(self, image: Source) -> Tensor:
        """Return the pixels of an image before they are normalised, [c, H, W] uint8; arguments as `__call__`."""
        if isinstance(image, (Tensor, np.ndarray)):
            values = self._checked(image)
            if self.of_arrays and values.shape == self.shape:
                return values
            if values.shape[0] not in MODES:
                raise ValueError(f"images must be {self._wanted()}; got {_shape(values)}")
            grey_or_colour = values[0] if len(values) == 1 else values.permute(1, 2, 0)
            picture = Image.fromarray(grey_or_colour.contiguous().cpu().numpy())
        else:
            picture = image if isinstance(image, Image.Image) else read_image(os.fspath(image))
        channels, height, width = self.shape
        if channels not in MODES:
            raise ValueError(f"images must be {self._wanted()}: files have 1 or 3 channels")
        picture = to_rgb(picture).convert(MODES[channels])
        if self.cut is not None:
            return self.cut(picture)
        if picture.size != (width, height):
            picture = ImageOps.fit(picture, (width, height), Image.Resampling.BILINEAR)
        values = torch.from_numpy(np.array(picture))
        return values[None] if channels == 1 else values.permute(2, 0, 1).contiguous()

    def _checked(self, image: Tensor | np.ndarray[Any, Any]) -> Tensor:
        """Return an image of numbers as a tensor [c, h, w] uint8."""
        if isinstance(image, np.ndarray):
            if image.ndim == 3 and image.shape[2] in MODES and image.shape[0] not in MODES:
                image = image.transpose(2, 0, 1)
            image = torch.from_numpy(np.ascontiguousarray(image))
        image = image[None] if image.ndim == 2 else image
        if image.dtype != torch.uint8 or image.ndim != 3 or 0 in image.shape:
            raise ValueError(
                f"images must be {self._wanted()}; got {_shape(image)} of type {image.dtype}: normalised float pixels "
                "go to .model"
            )
        return image

    def _wanted(self) -> str:
        sizes = " x ".join(map(str, self.shape)) if self.of_arrays else "[3, h, w] or [1, h, w]"
        return f"files, PIL images or uint8 tensors of {sizes}"


def _shape(values: Tensor) -> str:
    return str(list(values.shape))
