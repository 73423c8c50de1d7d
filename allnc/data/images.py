"""One image file as 8-bit RGB, whatever it holds: the only place that reads one.

JPEGs are no exception to PIL: the fastest other decoder of the same pixels takes 0.3 ms less of the 9 ms that two views
of a photograph take (benchmarks/loader.py), too little for a second reader with errors of its own.
"""

from __future__ import annotations

import functools
import logging
import os
import stat
import warnings

import numpy as np
from PIL import Image

Transpose = Image.Transpose
UPRIGHT = {  # EXIF's orientation: what brings the image upright
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
ORIENTATION, BITS, PHOTOMETRIC = 0x0112, 258, 262  # tags of EXIF and TIFF
WHITE_IS_ZERO = 0
# EPS starts Ghostscript, and IPTC opens what it contains with any reader, EPS among them.
NOT_READ = ("EPS", "IPTC")

# Without a handler of its own, Python prints what PIL logs about odd files, once for each image.
logging.getLogger("PIL").addHandler(logging.NullHandler())


def shown(path: str) -> str:
    """Return a path as it stands in a message of one line: escaped where it holds what cannot be printed."""
    return path if path.isprintable() else ascii(path)


def read_image(path: str) -> Image.Image:
    """Read an image file as 8-bit RGB.

    EXIF's orientation is applied. Of an animation or a file of several pages, the first image is taken. What is
    transparent is laid over white. 16 bits of a channel are cut to the upper 8.

    Args:
        path: the file, in any format that PIL reads by itself (not EPS, which another program would have to draw).

    Returns:
        An image of mode RGB.

    Raises:
        ValueError: the file is missing, not a regular file, damaged, not an image, larger than PIL's limit (twice
            `PIL.Image.MAX_IMAGE_PIXELS`: 178,956,970 pixels), or of float or 32-bit pixels, whose range is unknown.
            The message is one line and starts with the path.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a FIFO would wait for its writer
            raise ValueError("a folder, device or pipe, not a regular file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a warning for each image of a million would bury everything else
            with Image.open(path, formats=readable_formats()) as file:
                file.load()
                return to_rgb(file)
    except Exception as error:  # PIL's readers raise whatever a damaged file drives them to
        raise ValueError(f"{shown(path)} must be a readable image; got: {_reason(error)}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an image that PIL has opened as `read_image` returns its file: upright, 8 bits, RGB.

    Raises:
        ValueError: float or 32-bit pixels, whose range is unknown.
    """
    return _upright(image, _rgb(image))


@functools.cache
def readable_formats() -> list[str]:
    """Import PIL's readers, which takes a while, and return the names of those that are used."""
    Image.init()
    return [name for name in Image.ID if name not in NOT_READ]


def _reason(error: Exception) -> str:
    """Return what went wrong in one line, without the path, which stands before it."""
    if isinstance(error, Image.UnidentifiedImageError):
        return "no image format that is known"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    line = " ".join(text.split())
    return (line if line.isprintable() else ascii(line)) or type(error).__name__


def _upright(file: Image.Image, image: Image.Image) -> Image.Image:
    try:
        step = UPRIGHT.get(file.getexif().get(ORIENTATION, 1))
    except Exception:  # EXIF is often damaged where the pixels are not
        return image
    return image if step is None else image.transpose(step)


def _rgb(file: Image.Image) -> Image.Image:
    if file.mode == "F":
        raise ValueError("float pixels, whose range is unknown: save it with 8 or 16 bits")
    if file.mode.startswith("I"):
        return Image.fromarray(_eight_bits(file)).convert("RGB")
    if file.has_transparency_data:
        file = file.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", file.size, "white"), file).convert("RGB")
    return file.convert("RGB")


def _eight_bits(file: Image.Image) -> np.ndarray:
    """Return the upper 8 of the 12 or 16 bits of a grey image, [height, width], uint8."""
    tags = getattr(file, "tag_v2", {})
    if file.mode == "I" and file.format not in ("PNG", "PPM"):  # these two have 16 bits at most
        raise ValueError("32-bit or signed pixels, whose range is unknown: save it with 8 or 16 bits")
    values = np.asarray(file)
    bits = 12 if tags.get(BITS) == (12,) else 16
    values = (values >> (bits - 8)).astype(np.uint8)
    return 255 - values if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO else values
