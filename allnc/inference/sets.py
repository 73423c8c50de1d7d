"""Sets on which a run is measured: of files, all of which are read or looked at first, or of pixels.

Legend: n images, c channels, H, W height and width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from allnc.data import ImageSet
from allnc.data.images import shown
from allnc.data.own.look import look, teller
from allnc.data.paths import PathList
from allnc.inference.predictor import Restored
from allnc.inference.reading import read_parts
from allnc.inference.transform import Transform

Bad = tuple[str, str]  # path of a file, and why it cannot be read


def set_of_files(
    paths: Sequence[str], labels: np.ndarray, run: Restored, bad: Sequence[Bad] = (), max_bad: int | None = 0
) -> tuple[ImageSet, list[str]]:
    """Return the set of some files, and a note on each that cannot be read.

    All are decoded, so that none stops a measurement that has begun; small images stay in memory.

    Args:
        paths: of the files, [n].
        labels: the run's numbers of their classes, [n] int64.
        run: whose set it is.
        bad: files beside them that are no images.
        max_bad: how many files may be left out; None: none, and nobody can say otherwise.

    Raises:
        ValueError: more files than that cannot be read, or all of them.
    """
    transform, images = Transform(run.card, run.config.data), None
    if transform.of_arrays:
        parts = list(read_parts(paths, transform, torch.device("cpu")))
        images = torch.cat([part.pixels for part in parts])
        unread = dict(_reason(part.names[place], text) for part in parts for place, text in part.errors.items())
    else:
        seen = look(paths, teller("looked at"), whole=True)
        unread = {path: one.fault for path, one in zip(paths, seen, strict=True) if one.fault}
    kept = np.array([path not in unread for path in paths], np.bool_)
    number = len(paths) + len(bad)
    bad = [*unread.items(), *bad]
    if len(bad) > (max_bad or 0) or not kept.any():
        some = "; ".join(f"{shown(path)} ({why})" for path, why in bad[:3])
        allowed = f"--max_bad allows {max_bad}" if max_bad else "none may be"
        leave = f", or leave them out with --max_bad {len(bad)}" if kept.any() and max_bad is not None else ""
        raise ValueError(
            f"{len(bad):,} of {number:,} images cannot be read, and {allowed}, such as {some}: mend or remove "
            f"them{leave}"
        )
    notes = [f"{len(bad):,} of {number:,} images left out that cannot be read:"] if bad else []
    notes += [f"{shown(path)} ({why})" for path, why in bad]
    files = PathList.of([path for path in paths if path not in unread])
    return set_of(labels[kept], run, images=images, paths=files), notes


def _reason(path: str, text: str) -> Bad:
    """Return a path and why it cannot be read, of the sentence that says so."""
    return path, text.removeprefix(f"{shown(path)} must be a readable image; got: ")


def set_of(
    labels: np.ndarray, run: Restored, *, images: Tensor | None = None, paths: PathList | None = None
) -> ImageSet:
    """Return the set of images [n, c, H, W] uint8, or of files, with the run's numbers of their classes, [n] int64."""
    return ImageSet(
        labels=torch.from_numpy(labels),
        num_classes=len(run.classes),
        mean=run.card.mean,
        std=run.card.std,
        images=images,
        paths=PathList.of(()) if paths is None else paths,
        classes=run.classes,
    )
