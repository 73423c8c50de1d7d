"""Which images lie in a folder, of which class and for what, by the names of the folders around them."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from allnc.config import TEST, TRAIN, VALIDATION
from allnc.data.folders import IMAGE_ENDINGS
from allnc.data.images import shown
from allnc.data.own.notes import many

SPLITS = {
    **dict.fromkeys(("train", "training", "trainset", "train_set"), TRAIN),
    **dict.fromkeys(("val", "valid", "validation", "validate", "dev", "valset", "val_set"), VALIDATION),
    **dict.fromkeys(("test", "testing", "tests", "testset", "test_set"), TEST),
}

_RUN_FILES = {"config.yaml", "metrics.jsonl"}  # by which a run's folder is known, whose plots are nobody's images


class Entry(NamedTuple):
    """An image as a folder or a list names it.

    Args:
        path: from the root where it lies there, else absolute.
        label: name of its class.
        split: train, validation or test; "" where nothing says so.
    """

    path: str
    label: str
    split: str = ""


@dataclass(kw_only=True, slots=True)
class Found:
    """What a folder or a list names.

    Args:
        entries: the images, in the order of their paths or of the list.
        bad: files that cannot be images (links that lead nowhere, pipes), each with the reason.
        notes: sentences on what was left out.
    """

    entries: list[Entry] = field(default_factory=list)
    bad: list[tuple[Entry, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def find_images(root: str) -> Found:
    """Find the images of a folder that holds a folder for each class, or train/ and others that hold these.

    A class has all images below its folder. Names that start with a dot are left out. Links are followed, each folder
    is read once.

    Raises:
        ValueError: a folder that cannot be read, no class folders, or fewer than two of them with an image.
    """
    reader = _Reader(root)
    folders, images = reader.listed(root)
    splits = {folder: SPLITS[folder.lower()] for folder in folders if folder.lower() in SPLITS}
    found = reader.found
    if TRAIN in splits.values():
        for folder, split in sorted(splits.items(), key=lambda pair: (TRAIN, VALIDATION, TEST).index(pair[1])):
            reader.classes(folder, split)
        for other in folders:
            if other not in splits:
                found.notes.append(f"{shown(os.path.join(root, other))} left out: it lies beside train/")
    elif splits and len(splits) == len(folders):
        raise ValueError(
            f"{shown(root)} must hold the training images in train/ beside {', '.join(map(shown, splits))}/; got none"
        )
    else:
        reader.classes("", "")
    if images:
        found.notes.append(
            f"{many(len(images), 'image')} of {shown(root)} left out, such as {shown(images[0])}: outside of the "
            "class folders"
        )
    _check_classes(root, found, images)
    found.notes += _level_notes(found.entries)
    return found


def _level_notes(entries: Sequence[Entry]) -> list[str]:
    """Say where the folders taken for classes hold folders of the same names, as data sets side by side do."""
    inner: dict[str, set[str]] = {}
    for entry in entries:
        folders = entry.path.split(os.sep)[:-1]
        inner.setdefault(entry.label, set()).update(folders[folders.index(entry.label) + 1 :][:1])
    common = set.intersection(*inner.values())
    if len(common) < 2:
        return []
    such = " and ".join(map(shown, sorted(common)[:2]))
    return [f"every class folder holds {such}: if these are the classes, give one of the folders above them"]


def _check_classes(root: str, found: Found, stray: list[str]) -> None:
    """Raise ValueError unless there are two classes with an image."""
    labels = {entry.label for entry in found.entries}
    if len(labels) > 1:
        return
    if labels:
        below = {entry.path.split(os.sep)[-2] for entry in found.entries} - labels
        inner = os.path.join(root, os.path.dirname(os.path.dirname(found.entries[0].path)))
        hint = f": the classes seem to be in {shown(inner)}, give that folder" if below else ""
        raise ValueError(f"{shown(root)} must hold at least two classes; got one, {shown(min(labels))}{hint}")
    beside = f", and {many(len(stray), 'image')} beside them" if stray else "".join(f"; {n}" for n in found.notes[:1])
    raise ValueError(
        f"{shown(root)} must hold a folder for each class, with images ({' '.join(IMAGE_ENDINGS)}); got none"
        f"{beside}: move the images of each class into a folder, or give a list (a CSV file with the columns "
        "path and label)"
    )


def _by_ending(paths: Sequence[str]) -> str:
    """Return how many files have which ending, the most frequent first, where there are several; else nothing.

    One example would hide a hundred photographs of a kind that cannot be read behind a Thumbs.db.
    """
    endings = Counter(os.path.splitext(path)[1].lower() or "none" for path in paths).most_common()
    if len(endings) == 1:
        return ""
    more = f" and {len(endings) - 5} more" if len(endings) > 5 else ""
    return f"; by ending: {', '.join(f'{number:,} {shown(ending)}' for ending, number in endings[:5])}{more}"


class _Reader:
    """Reads folders below a root, each once."""

    def __init__(self, root: str) -> None:
        self.root, self.found = root, Found()
        self.real = os.path.join(os.path.realpath(root), "")
        self.entered: dict[tuple[int, int], str] = {}
        self.others: list[str] = []

    def classes(self, folder: str, split: str) -> None:
        """Add the images of all class folders of a folder below the root."""
        folders, images = self.listed(os.path.join(self.root, folder))
        if folder and images:
            self.found.notes.append(
                f"{many(len(images), 'image')} of {shown(folder)} left out, such as {shown(images[0])}: outside of "
                "the class folders"
            )
        for label in folders:
            found = self.found
            before = len(found.entries) + len(found.bad), len(found.notes)
            self._walk(os.path.join(folder, label), label, split)
            if (len(found.entries) + len(found.bad), len(found.notes)) == before:  # else a note says why it has none
                self.found.notes.append(f"{shown(os.path.join(self.root, folder, label))} has no image: no class")
        if self.others:
            self.found.notes.append(
                f"{many(len(self.others), 'file')} without an image's ending left out, such as "
                f"{shown(self.others[0])}{_by_ending(self.others)}"
            )
            self.others = []

    def listed(self, folder: str) -> tuple[list[str], list[str]]:
        """Return the names of the folders in a folder, and those of its images, sorted."""
        folders, images = [], []
        for entry in _entries(folder):
            if _is_dir(entry):
                folders.append(entry.name)
            elif entry.name.lower().endswith(IMAGE_ENDINGS):
                images.append(entry.name)
        return folders, images

    def _walk(self, top: str, label: str, split: str) -> None:
        waiting = [top]
        while waiting:
            folder = waiting.pop()
            place = os.path.join(self.root, folder)
            if not self._enter(place):
                continue
            if _RUN_FILES.issubset(entry.name for entry in _entries(place)):
                self.found.notes.append(f"{shown(folder)} left out: it is the folder of a run")
                continue
            below = []
            for entry in _entries(place):
                path = os.path.join(folder, entry.name)
                if _is_dir(entry):
                    below.append(path)
                elif not entry.name.lower().endswith(IMAGE_ENDINGS):
                    self.others.append(path)
                else:
                    self._add(entry, Entry(path, label, split))
            waiting += reversed(below)

    def _add(self, entry: os.DirEntry[str], image: Entry) -> None:
        try:
            regular = entry.is_file(follow_symlinks=False) or stat.S_ISREG(entry.stat().st_mode)
        except OSError as error:
            reason = "a link that leads nowhere" if isinstance(error, FileNotFoundError) else f"{error.strerror}"
            self.found.bad.append((image, reason))
            return
        if regular:
            self.found.entries.append(image)
        else:
            self.found.bad.append((image, "a device or pipe, not a regular file"))

    def _enter(self, folder: str) -> bool:
        """Whether a folder is to be read: not one that was read already, nor one around the root."""
        status = os.stat(folder)
        first = self.entered.setdefault((status.st_dev, status.st_ino), folder)
        if first != folder:
            self.found.notes.append(f"{shown(folder)} left out: it leads to {shown(first)}, which is read already")
            return False
        if os.path.islink(folder) and self.real.startswith(os.path.join(os.path.realpath(folder), "")):
            self.found.notes.append(f"{shown(folder)} left out: it leads to a folder around {shown(self.root)}")
            return False
        return True


def _is_dir(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link in a circle
        return False


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted((e for e in entries if not e.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        raise ValueError(f"{shown(folder)} must be a readable folder; got: {error.strerror}") from error
