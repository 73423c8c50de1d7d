"""What every image is, by its header: size, mode, soundness; and which files hold the same bytes."""

from __future__ import annotations

import hashlib
import os
import stat
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from allnc.data.images import ORIENTATION, read_image, readable_formats

DECODED = 64  # pixels: longest side of images that are decoded whole, which takes no longer than to open them
THREADS = 8  # readers of headers: they wait for the disk most of the time
TAIL = 4096  # bytes at the end of a file, by which files of one size are told apart before all of them is read
GREY = ("1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "I;16N")
# How a file ends that was written to its end; WebP tells when it is opened.
_ENDS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82", "WEBP": b""}
Tell = Callable[[int, int], None]


class Seen(NamedTuple):
    """What the header of an image says.

    Args:
        width, height: in pixels, as EXIF turns it.
        mode: PIL's; a palette of greys counts as L.
        brightest: of 16 bits, the largest value as 8 bits show it; else 255.
        key: number of bytes and sum of the last ones; copies have the same.
        fault: why it cannot be read; "" where it can.
    """

    width: int = 0
    height: int = 0
    mode: str = ""
    brightest: int = 255
    key: tuple[int, bytes] = (0, b"")
    fault: str = ""

    @property
    def is_grey(self) -> bool:
        return self.mode in GREY


def look(paths: Sequence[str], tell: Tell | None = None, *, whole: bool = False) -> list[Seen]:
    """Look at every image.

    Small images are decoded whole, and so are larger ones, except JPEG, PNG and WebP files that have their end: of
    these the header is read.

    Args:
        paths: of the files.
        tell: called now and then with how many were looked at, and of how many.
        whole: decode all of them, so that every one without a fault can be read.
    """
    readable_formats()
    seen: list[Seen] = []
    with ThreadPoolExecutor(THREADS) as pool:
        for one in pool.map(partial(_look, whole=whole), paths, chunksize=64):
            seen.append(one)
            if tell is not None and len(seen) % 64 == 0:
                tell(len(seen), len(paths))
    if tell is not None:
        tell(len(paths), len(paths))
    return seen


def copies(paths: Sequence[str], seen: Sequence[Seen]) -> list[int]:
    """Return for each file the position of the first one with the same bytes, its own where there is none."""
    first = list(range(len(paths)))
    alike: dict[tuple[int, bytes], list[int]] = {}
    for position, one in enumerate(seen):
        if not one.fault:
            alike.setdefault(one.key, []).append(position)
    for positions in alike.values():
        sums: dict[bytes, int] = {}
        for position in positions if len(positions) > 1 else ():
            first[position] = sums.setdefault(_sum(paths[position]), position)
    return first


def teller(word: str) -> Tell:
    """Return what shows on a terminal how far a look at many images is."""
    shown_at = 0.0

    def tell(done: int, total: int) -> None:
        nonlocal shown_at
        now = time.monotonic()
        if sys.stderr.isatty() and (now - shown_at > 0.2 or done == total):
            shown_at = now
            line = f"{word} {done:,} of {total:,} images" if done < total else ""
            print(f"\r{line}\x1b[K", end="\r", file=sys.stderr, flush=True)

    return tell


def _look(path: str, whole: bool) -> Seen:
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            return Seen(fault="a folder, device or pipe, not a regular file")
        with warnings.catch_warnings(), open(path, "rb") as file:
            warnings.simplefilter("ignore")
            with Image.open(file, formats=readable_formats()) as image:
                width, height = image.size
                mode = "L" if image.mode == "P" and _is_grey_palette(image) else image.mode
                if image.format in ("JPEG", "MPO", "TIFF", "WEBP") and _turned(image):
                    width, height = height, width
                kind = image.format or ""
            file.seek(max(0, status.st_size - TAIL))
            tail = file.read()
        ended = kind in _ENDS and tail.rstrip(b"\0").endswith(_ENDS[kind])
        brightest = 255
        if whole or not ended or max(width, height) <= DECODED or mode == "F" or mode.startswith("I"):
            pixels = read_image(path)
            if mode.startswith("I"):
                brightest = int(np.asarray(pixels).max())
        key = (status.st_size, hashlib.blake2b(tail, digest_size=16).digest())
        return Seen(width, height, mode, brightest, key)
    except Exception:  # PIL's readers raise whatever a damaged file drives them to
        return Seen(fault=_fault(path))


def _fault(path: str) -> str:
    """Return why an image cannot be read, in the words of the one module that reads images."""
    try:
        read_image(path)
    except ValueError as error:
        return str(error).split("; got: ", 1)[-1]
    return "its header cannot be read"


def _is_grey_palette(image: Image.Image) -> bool:
    palette = image.getpalette("RGB") or [0, 1]
    return "transparency" not in image.info and palette[::3] == palette[1::3] == palette[2::3]


def _turned(image: Image.Image) -> bool:
    try:
        return image.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8)
    except Exception:  # EXIF is often damaged where the pixels are not
        return False


def _sum(path: str) -> bytes:
    sha = hashlib.blake2b(digest_size=16)
    try:
        with open(path, "rb") as file:
            for block in _blocks(file):
                sha.update(block)
    except OSError:  # gone meanwhile: no copy of anything
        return os.fsencode(path)
    return sha.digest()


def _blocks(file: BinaryIO) -> Iterable[bytes]:
    while block := file.read(2**20):
        yield block
