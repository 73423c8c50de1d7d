"""The measured images of a run, as small pictures inside a page."""

from __future__ import annotations

import base64
import dataclasses
import io
import os
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from allnc.config import Config
from allnc.report.numbers import Answers

if TYPE_CHECKING:
    from allnc.data import ImageSet

SIDE = 96  # longest side in pixels
SMALL = 40  # up to so many pixels a picture is kept exactly, as PNG


class Thumbnails:
    """Pictures of the images of predictions, read when they are asked for.

    Args:
        config: of the run.
        told: its predictions.
        root: where the images are; None for the run's own data.root.
        images: the measured set, where it is at hand; None reads it where the predictions name no files.

    Raises:
        ValueError: the images are not there, are others than those of the predictions, or are no images.
    """

    def __init__(self, config: Config, told: Answers, root: str | None = None, images: ImageSet | None = None) -> None:
        from allnc.data import FeatureSet, load

        self.told, self.unread = told, 0
        self.root = os.path.expanduser(root or config.data.root or "")
        self.images: ImageSet | None = None
        if told.paths is not None:
            if not os.path.isdir(self.root):
                raise ValueError(f"data.root must be the folder of the images; {self.root or 'it'} is not there")
            return
        if images is None:
            data = dataclasses.replace(config.data, root=root or config.data.root)
            images = load(data, tested=told.measured_on == "test")[1]
        if isinstance(images, FeatureSet):
            raise ValueError("the run was trained on stored features, which have no pictures")
        there = told.positions < len(images)
        if not there.all() or not np.array_equal(images.labels.numpy()[told.positions], told.labels):
            raise ValueError(f"the {told.measured_on} images are others than those that the run measured")
        self.images = images

    def uri(self, row: int) -> str | None:
        """Return the picture of the image in a row of the predictions as a data URI; None where it cannot be read."""
        from allnc.data.images import read_image

        try:
            if self.told.paths is not None:
                return _encoded(read_image(os.path.join(self.root, str(self.told.paths[row]))))
            assert self.images is not None
            position = int(self.told.positions[row])
            if self.images.images is None:
                return _encoded(read_image(self.images.paths[position]))
            pixels = self.images.images[position].numpy()  # [c, H, W]
            pixels = pixels.transpose(1, 2, 0)[..., :3] if len(pixels) >= 3 else pixels[0]
            return _encoded(Image.fromarray(np.ascontiguousarray(pixels)))
        except ValueError:
            self.unread += 1
            return None


def _encoded(image: Image.Image) -> str:
    image.thumbnail((SIDE, SIDE))
    exact = max(image.size) <= SMALL
    buffer = io.BytesIO()
    image.save(buffer, "PNG" if exact else "JPEG", optimize=True, **({} if exact else {"quality": 80}))
    return f"data:image/{'png' if exact else 'jpeg'};base64,{base64.b64encode(buffer.getvalue()).decode()}"
