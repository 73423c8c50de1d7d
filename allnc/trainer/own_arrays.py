"""From a file of arrays to a configuration: look at its images as at those of a folder, and choose what was not given.

Imported without torch, which reading the file imports.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from allnc.config import TEST, TRAIN, VALIDATION, Config
from allnc.trainer import choices
from allnc.trainer.own import changed

if TYPE_CHECKING:
    from allnc.data import ImageSet


# What only a folder decides, of the options that contradict others (see allnc/config/together.py).
NOT_CHOSEN = frozenset(("data.validation", "data.fit", "data.in_memory"))


def refuse_split(config: Config, typed: Collection[str]) -> None:
    """Raise ValueError where options say how images are held out, and the file has its test images."""
    from allnc.data.array_files import has_test_images

    data = config.data
    idle = (
        {"data.test_share"}
        if data.profile != "none" or data.validation > 0
        else {"data.test_share", "data.subset_seed"}
    )
    given = next((name for name in typed if name in idle), None)
    if given is not None and has_test_images(data.root or ""):
        raise ValueError(
            f"--{given} would be ignored: {os.path.basename(data.root or '')} has test images of its own; remove it"
        )


def settle(config: Config, given: Collection[str], say: Callable[[str], None]) -> Config:
    """Look at the images of a file of arrays, choose what was not given, and say so in a few lines.

    Args:
        config: with data.name arrays.
        given: dotted options that stay as they are.
        say: called with each line.

    Returns:
        The configuration of the run.

    Raises:
        ValueError: the file cannot be trained on (see `allnc.data.arrays.read_arrays`), or an option does not fit it.
    """
    choices.check_rate(config, given)
    say(f"looking at the images of {config.data.root}")
    from allnc.data.array_files import has_test_images  # torch from here on
    from allnc.data.arrays import read_arrays
    from allnc.data.own.notes import case_notes
    from allnc.data.sources import divided

    data = config.data
    whole, tests = read_arrays(data)
    train, measured = divided(whole, tests, data)
    parts = {TRAIN: train, TEST: tests}
    if data.validation > 0:
        parts = {TRAIN: train, VALIDATION: measured, TEST: tests}
    shape, number, counts = train.shape(data), len(train), train.class_counts.tolist()
    channels = shape[0]
    grey = all(_is_grey(part) for part in parts.values())
    colour = channels in (3, 4) and not grey
    chosen = choices.of_arrays(config, number, len(counts), shape, given, colour=colour)
    config = changed(config, {name: value for name, value in chosen.items() if name not in given})
    config.check()
    choices.check_batch(config, number)

    name, size = os.path.basename(data.root or ""), f"{shape[2]} x {shape[1]}"
    kind = "grey" if grey else "colour" if colour else f"{channels} channels"
    looks = f"{channels} channel{'s' * (channels > 1)}{', all grey' * (grey and channels > 1)}"
    say(choices.sizes_line(name, len(whole) + len(tests), counts, f"{size} pixels ({looks})"))
    few = f"{number:,} of {train.available:,}" if train.available not in (None, number) else f"{number:,}"
    others = ", ".join(f"{len(part):,} {split}" for split, part in parts.items() if split != TRAIN)
    drawn = f"{data.test_share:.0%} of each class, drawn by data.subset_seed {data.subset_seed}"
    say(f"split: {few} train, {others} images ({'as given' if has_test_images(data.root or '') else drawn})")
    for note in (*case_notes(whole.classes), *_untested(measured, *parts), *_copy_notes(parts)):
        say(f"note: {note}")
    say(choices.plan_line(config, number, size, kind))
    return config


def _is_grey(images: ImageSet) -> bool:
    """Whether no image has a colour: one channel, or three that are the same."""
    pixels = images.images
    assert pixels is not None
    return pixels.shape[1] == 1 or (pixels.shape[1] == 3 and bool((pixels == pixels[:, :1]).all()))


def _untested(measured: ImageSet, *splits: str) -> tuple[str, ...]:
    from allnc.data.sources import untested_notes

    return untested_notes(measured.class_counts, VALIDATION if VALIDATION in splits else TEST)


def _copy_notes(parts: dict[str, ImageSet]) -> list[str]:
    """Say which images are there twice: in two classes, and in training and test set."""
    import numpy as np

    from allnc.data.arrays import first_copies
    from allnc.data.images import shown
    from allnc.data.own.notes import many

    pixels = np.concatenate([part.images.numpy() for part in parts.values() if part.images is not None])
    splits = [split for split, part in parts.items() for _ in range(len(part))]
    labels = [label for part in parts.values() for label in part.labels.tolist()]
    names = parts[TRAIN].classes or tuple(map(str, range(parts[TRAIN].num_classes)))
    pairs = [(first, place) for place, first in enumerate(first_copies(pixels)) if first != place]
    notes = [f"{many(len(pairs), 'image')} with the same pixels as another one"] if pairs else []
    for values, words in ((labels, "in two classes"), (splits, "in two of training, validation and test set")):
        groups = {first: place for first, place in pairs if values[first] != values[place]}
        if groups:
            classes = dict.fromkeys(names[labels[place]] for place in next(iter(groups.items())))
            such = " and ".join(map(shown, classes))
            notes.append(f"{many(len(groups), 'image')} {words}, such as one of {such}: remove one of the two")
    return notes
