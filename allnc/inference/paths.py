"""Which files a command line names: files, folders, patterns and lists on standard input, one after the other.

Nothing is held but the names of a folder: there may be millions of images. What a command line names is checked before
torch is imported.
"""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Iterable, Iterator
from typing import TextIO

from allnc.data.folders import IMAGE_ENDINGS
from allnc.data.images import shown


def check_sources(sources: Iterable[str]) -> None:
    """Raise ValueError unless each source is there: `-`, a file, a folder with an image, or a pattern that fits one."""
    seen_stdin = False
    for source in sources:
        if source == "-":
            if seen_stdin:
                raise ValueError("IMAGES must name standard input once; got - twice")
            seen_stdin = True
        elif not os.path.exists(source) and not (glob.has_magic(source) and _matches(source)):
            what = "no file fits the pattern" if glob.has_magic(source) else "there is no such file or folder"
            raise ValueError(
                f"IMAGES must be files, folders, patterns or - (a list on standard input); {what}: {source}"
            )
        elif os.path.isdir(source) and next(_walk(source, IMAGE_ENDINGS, set()), None) is None:
            raise ValueError(
                f"IMAGES must name images; the folder {shown(source)} holds none, nor do those in it (what counts ends "
                f"in {' '.join(IMAGE_ENDINGS)})"
            )


def image_paths(sources: Iterable[str], listed: TextIO | None = None) -> Iterator[str]:
    """Yield the paths of the images of all sources, in their order.

    A file is taken whatever its ending; of a folder, and those in it, the files with an image's ending, by name, hidden
    ones left out. A folder without any is yielded itself, so that reading it says so.

    Args:
        sources: as `check_sources`.
        listed: what `-` stands for, one path a line; None is standard input.
    """
    for source in sources:
        if source == "-":
            for line in listed or sys.stdin:
                if path := line.rstrip("\r\n"):
                    yield path
        else:
            for path in [source] if os.path.exists(source) else _matches(source):
                yield from _of(path)


def _matches(pattern: str) -> list[str]:
    return sorted(glob.glob(pattern, recursive=True))


def _of(path: str) -> Iterator[str]:
    """Yield a file, or the images of a folder."""
    if not os.path.isdir(path):
        yield path
        return
    found = False
    for image in _walk(path, IMAGE_ENDINGS, set()):
        found = True
        yield image
    if not found:
        yield path


def _walk(folder: str, endings: tuple[str, ...], around: set[tuple[int, int]]) -> Iterator[str]:
    """Yield the images of a folder and of those in it; a link to a folder around it is not followed."""
    status = os.stat(folder)
    key = status.st_dev, status.st_ino
    if key in around:
        return
    try:
        names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError:
        yield folder  # reading it says why
        return
    for name in names:
        path = os.path.join(folder, name)
        if os.path.isdir(path):
            yield from _walk(path, endings, around | {key})
        elif name.lower().endswith(endings):
            yield path
