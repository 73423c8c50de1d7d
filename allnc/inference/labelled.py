"""Labelled images of any kind as a set on which a run is measured; its classes are found by name.

Legend: n images, c channels, H, W height and width, C classes.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from allnc.config import ARRAY_ENDINGS, TEST, TRAIN, VALIDATION, Config
from allnc.data import ImageSet
from allnc.data.array_files import has_test_images
from allnc.data.arrays import read_labelled
from allnc.data.images import shown
from allnc.data.own import Row, read_index
from allnc.data.own.find import SPLITS, Entry, Found, find_images
from allnc.data.own.index import COLUMNS
from allnc.data.own.tables import read_table
from allnc.inference.paths import image_paths
from allnc.inference.predictor import Restored
from allnc.inference.sets import set_of, set_of_files
from allnc.inference.transform import Transform

MOST_LISTED = 20  # names in a message


class Labelled(NamedTuple):
    """Images on which a run can be measured, and sentences on how they were understood."""

    images: ImageSet
    notes: tuple[str, ...]


def labelled_images(source: str, run: Restored, root: str | None = None, *, max_bad: int = 0) -> Labelled:
    """Read labelled images for a run; every file is looked at before the network sees one.

    Args:
        source: a folder with a folder for each class, or with train/, val/ and test/ of these; a .npz or .safetensors
            file with images and labels; or a list (CSV, TSV, text or JSON) of files and classes. Of images that have a
            split, those of the test set are taken, or else those of the validation set.
        run: its classes are the labels, its pixels those of the images.
        root: folder from which the paths of a list start; None: the list's own.
        max_bad: files that cannot be read and are left out, each with a note, >= 0.

    Returns:
        A set of which every image has a class of the run; classes without an image are no fault.

    Raises:
        ValueError: no such images, more than `max_bad` that cannot be read, or a class that the run does not have, by
            name.
    """
    source = os.path.expanduser(source)
    if len(run.card.shape) != 3:
        raise ValueError(
            "--data needs a run on images; this one was trained on stored features, which python -m allnc.features "
            "makes of images: give their folder by --data.root"
        )
    if os.path.isdir(source):
        return _of_found(_in_folder(source), source, source, run, max_bad)
    if not os.path.isfile(source):
        raise ValueError(f"--data must be a folder, a list or a .npz file; there is no {shown(source)}")
    if source.lower().endswith(ARRAY_ENDINGS):
        return _of_arrays(source, run)
    if _is_index(source):  # whose paths start from the images' folder, wherever the run lies
        start = os.path.expanduser(root or run.config.data.root or "")
        entries = [Entry(row.path, row.label, row.split) for row in read_index(source, start).rows if row.split]
        return _of_found(Found(entries=entries), start, source, run, max_bad)
    start = os.path.expanduser(root) if root else os.path.dirname(source) or "."
    return _of_found(read_table(source, start), start, source, run, max_bad)


def _in_folder(source: str) -> Found:
    """Find the images of a folder; unlike a training, one class is enough, and so is test/ or val/ alone."""
    try:
        names = [name for name in os.listdir(source) if not name.startswith(".")]
    except OSError as error:
        raise ValueError(f"{shown(source)} must be a readable folder; got: {error.strerror}") from error
    folders = sorted(name for name in names if os.path.isdir(os.path.join(source, name)))
    splits = {SPLITS.get(name.lower()) for name in folders}
    if splits and splits <= {VALIDATION, TEST}:
        found = Found()
        for name in folders:
            inner, split = _in_folder(os.path.join(source, name)), SPLITS[name.lower()]
            found.entries += [Entry(os.path.join(name, e.path), e.label, split) for e in inner.entries]
            found.bad += [(Entry(os.path.join(name, e.path), e.label, split), why) for e, why in inner.bad]
            found.notes += inner.notes
        return found
    if len(folders) == 1 and None in splits:
        paths = image_paths([os.path.join(source, folders[0])])
        return Found(entries=[Entry(os.path.relpath(path, source), folders[0]) for path in paths])
    return find_images(source)


def _is_index(source: str) -> bool:
    """Whether a list is the table that a run keeps of its own images."""
    with open(source, "rb") as file:
        return file.readline(200).rstrip(b"\r\n") == "\t".join(COLUMNS).encode()


def _is_same(one: str, other: str) -> bool:
    other = os.path.expanduser(other)
    return os.path.exists(other) and os.path.samefile(one, other)


def _of_found(found: Found, start: str, source: str, run: Restored, max_bad: int) -> Labelled:
    """Return the set of what a folder or a list names, without its training images where it says which they are."""
    counts = Counter(entry.split for entry in found.entries)
    split = next((split for split in (TEST, VALIDATION, TRAIN) if counts[split]), "")
    entries = [entry for entry in found.entries if entry.split == split]
    bad = [(os.path.join(start, entry.path), why) for entry, why in found.bad if entry.split == split]
    if not entries:
        raise ValueError(f"{shown(source)} must name images; it names none")
    names = [entry.label for entry in entries]
    if os.path.isdir(source):  # whose folders have names, also where these are numbers
        labels, notes = _numbers(names, run.classes, source), []
    else:
        labels, notes = _of_list(names, run.classes, source)
    if split == TRAIN:
        notes.append(f"{shown(source)} has training images alone: a run that was trained on them is no judge of itself")
    elif split:
        notes.append(f"{shown(source)} has splits: its {len(entries):,} {split} images of {counts.total():,} are taken")
    elif any(place and _is_same(source, place) for place in (run.config.data.root, run.config.data.train_list)):
        notes.append(_trained_on(source))
    paths = [os.path.join(start, entry.path) for entry in entries]
    images, left_out = set_of_files(paths, labels, run, bad, max_bad)
    return Labelled(images, (*found.notes, *notes, *left_out))


def _numbers(names: Sequence[str], classes: Sequence[str], source: str) -> np.ndarray:
    """Return the run's number of each name, [m] int64.

    Raises:
        ValueError: the run has no such class.
    """
    number = {name: place for place, name in enumerate(classes)}
    unknown = list(dict.fromkeys(name for name in names if name not in number))
    if unknown:
        listed, few = _listed(unknown), _listed(classes)
        hint = f": give one of its folders, such as {shown(os.path.join(source, unknown[0]))}"
        inner = unknown[0].lower() in SPLITS and os.path.isdir(source)
        raise ValueError(
            f"{shown(source)} must have classes of the run; it does not know {listed}{hint if inner else ''}; the run "
            f"has {few}"
        )
    return np.array([number[name] for name in names], dtype=np.int64)


def _trained_on(source: str) -> str:
    return (
        f"{shown(source)} is what the run was made of: its training images are measured, too; without --data, its test "
        "images alone are"
    )


def _listed(names: Sequence[str]) -> str:
    """Return some names, and how many there are if these are not all."""
    more = f" ... ({len(names):,} in all)" if len(names) > MOST_LISTED else ""
    return ", ".join(map(shown, names[:MOST_LISTED])) + more


def _of_list(names: Sequence[str], classes: Sequence[str], source: str) -> tuple[np.ndarray, list[str]]:
    """Return the labels [n] of a list, which has names of classes or their numbers, and what is to be said of it."""
    known = set(classes)
    if not any(name in known for name in names) and all(name.isdecimal() for name in names):
        labels = np.array([int(name) for name in names], dtype=np.int64)
        _check_numbers(int(labels.max()), classes, source)
        return labels, [_as_numbers(source, classes)]
    return _numbers(names, classes, source), []


def _check_numbers(largest: int, classes: Sequence[str], source: str) -> None:
    if largest >= len(classes):
        raise ValueError(
            f"{shown(source)} must have labels in 0 to {len(classes) - 1}, the classes of the run; got {largest}"
        )


def _as_numbers(source: str, classes: Sequence[str]) -> str:
    return f"{shown(source)} has numbers for classes: 0 is taken for {classes[0]}, 1 for {classes[1]} ..."


def _of_arrays(source: str, run: Restored) -> Labelled:
    """Return the set of a file of arrays; images of another size become what the run takes, one by one."""
    values, labels, classes = read_labelled(source)
    notes = []
    if classes:
        number = _numbers([classes[label] for label in labels.unique().tolist()], run.classes, source)
        places = torch.zeros(len(classes), dtype=torch.int64)
        places[labels.unique()] = torch.from_numpy(number)
        labels = places[labels]
    else:
        _check_numbers(int(labels.max()), run.classes, source)
        if run.card.classes:
            notes.append(_as_numbers(source, run.classes))
    transform = Transform(run.card, run.config.data)
    if not has_test_images(source) and run.config.data.root and _is_same(source, run.config.data.root):
        notes.append(_trained_on(source))
    if values.shape[1:] != run.card.shape or not transform.of_arrays:
        if transform.size != run.card.shape[1:]:
            raise ValueError("--data.test_crops must be 1 with images in one file; got 5")
        values = torch.stack([transform.pixels(image) for image in values])
        notes.append(f"images of {shown(source)} were fitted to {' x '.join(map(str, run.card.shape[1:]))} pixels")
    return Labelled(set_of(labels.numpy(), run, images=values), tuple(notes))


def has_test_images_alone(config: Config, on: str | None) -> bool:
    """Whether a run's own test images are there, and are what it is measured on, but its training images are not.

    Args:
        config: of the run; its files are where they lie from here.
        on: test or validation, which are wanted; None: as the run measured itself.
    """
    data = config.data
    if data.root is None or (data.validation > 0 and on != "test"):
        return False
    root = os.path.expanduser(data.root)
    if data.name == "image_folder":
        return not os.path.isdir(os.path.join(root, "train")) and _test_folder(root) is not None
    if data.name == "image_list" and data.train_list and data.test_list:
        train, test = map(os.path.expanduser, (data.train_list, data.test_list))
        return os.path.isfile(test) and not os.path.isfile(train)
    if data.name == "own" and data.index and os.path.isfile(data.index):
        index = read_index(data.index, root)
        trained, tested = (_some(root, index.of(split)) for split in (TRAIN, TEST))
        return any(map(os.path.exists, tested)) and not any(map(os.path.exists, trained))
    return False


def test_images(run: Restored) -> ImageSet:
    """Return the test images of a run of which `has_test_images_alone` is true; errors as `labelled_images`."""
    data = run.config.data
    root = os.path.expanduser(data.root or "")
    if data.name == "image_list":
        assert data.test_list
        return labelled_images(data.test_list, run, root).images
    if data.name == "own":
        assert data.index
        rows = read_index(data.index, root).of(TEST)
        labels = _numbers([row.label for row in rows], run.classes, root)
        return set_of_files([os.path.join(root, row.path) for row in rows], labels, run, max_bad=None)[0]
    folder = _test_folder(root)
    assert folder is not None
    return labelled_images(folder, run).images


def _test_folder(root: str) -> str | None:
    places = (os.path.join(root, name) for name in ("test", "val"))
    return next((place for place in places if os.path.isdir(place)), None)


def _some(root: str, rows: Sequence[Row]) -> list[str]:
    return [os.path.join(root, row.path) for row in rows[:: max(1, len(rows) // 100)]]
