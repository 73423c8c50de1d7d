"""Folders of images, one for each class: what torchvision's ImageFolder reads, without its silent faults.

Links are followed, as subsets are often made of them; but a folder is read once, so that no link brings a class's
images into another class, into the test set, or in twice. Names that start with a dot are left out.
"""

from __future__ import annotations

import os
import stat
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from allnc.data.images import shown

# torchvision's, and the four others of photographs that PIL reads.
IMAGE_ENDINGS = (
    *(".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"),
    *(".avif", ".gif", ".jfif", ".jpe"),
)
Key = tuple[int, int]  # device and inode, which name a file or a folder whatever its path


@dataclass(kw_only=True, slots=True)
class Part:
    """What one of the folders train/, val/ or test/ holds.

    Args:
        folder: its path.
        classes: names of the class folders, sorted.
        paths: the images, class after class, in ImageFolder's order.
        labels: position of each image's class in `classes`.
        devices, inodes: what tells whether two paths lead to one file.
        notes: sentences on what was left out.
    """

    folder: str
    classes: tuple[str, ...] = ()
    paths: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    devices: array[int] = field(default_factory=lambda: array("Q"))
    inodes: array[int] = field(default_factory=lambda: array("Q"))
    notes: list[str] = field(default_factory=list)


def read_folders(folders: Sequence[str]) -> list[Part]:
    """Read the images of several folders that hold a folder for each class.

    Returns:
        One part for each folder. Files that several paths lead to (links of files) are kept and said in the notes:
        stores that keep equal files once make such links, and a copy would not be refused, either.

    Raises:
        ValueError: a folder that cannot be read or is reached twice, a link that leads nowhere, an image that is not
            a regular file, a class without an image.
    """
    reader = _Reader()
    parts = [reader.part(folder) for folder in folders]
    _note_shared_files(parts)
    return parts


class _Reader:
    """Reads folders, each once."""

    def __init__(self) -> None:
        self.read: dict[Key, str] = {}
        self.around: dict[Key, str] = {}  # folders around those that are read: no link may lead there

    def part(self, folder: str) -> Part:
        """Read the class folders of one part."""
        part = Part(folder=folder)
        self._enter(folder)
        self.around[_key(os.stat(folder))] = f"is {shown(folder)}"
        self._surround(folder)
        entries = list(_entries(folder))
        part.classes = tuple(entry.name for entry, mode in entries if stat.S_ISDIR(mode))
        stray = [entry.name for entry, mode in entries if not stat.S_ISDIR(mode) and _is_image(entry.name)]
        if not part.classes:
            found = f"got none, and {_count(len(stray), 'image')} beside them" if stray else "got none"
            raise ValueError(f"{shown(folder)} must hold a folder for each class; {found}")
        others: list[str] = []
        for label, name in enumerate(part.classes):
            others += self._class(part, label, os.path.join(folder, name))
        if others:
            part.notes.append(
                f"{_count(len(others), 'file')} of {shown(folder)} without an image's ending left out, such as "
                f"{shown(others[0])}"
            )
        if stray:
            part.notes.append(
                f"{_count(len(stray), 'image')} of {shown(folder)} outside of the class folders left out, such as "
                f"{shown(stray[0])}"
            )
        return part

    def _class(self, part: Part, label: int, top: str) -> list[str]:
        """Add the images of a class to the part; return the paths of its other files."""
        found, others, waiting = [], [], [top]
        while waiting:
            folder = waiting.pop()
            self._enter(folder)
            if os.path.islink(folder):
                self._surround(folder)
            device = os.stat(folder).st_dev
            images = []
            for entry, mode in _entries(folder):
                if stat.S_ISDIR(mode):
                    waiting.append(entry.path)
                elif not _is_image(entry.name):
                    others.append(entry.path)
                elif not stat.S_ISREG(mode):
                    raise ValueError(f"{shown(entry.path)} must be a regular file; got a device or pipe: remove it")
                else:
                    images.append(
                        (entry.path, *(_key(entry.stat()) if entry.is_symlink() else (device, entry.inode())))
                    )
            found.append((folder, images))
        found.sort(key=lambda pair: pair[0])
        for _, images in found:
            for path, device, inode in images:
                part.paths.append(path)
                part.labels.append(label)
                part.devices.append(device)
                part.inodes.append(inode & (2**64 - 1))  # Windows has longer ones
        if not any(images for _, images in found):
            more = ""
            if others:
                more = f", and {_count(len(others), 'other file')} such as {shown(os.path.basename(min(others)))}"
            raise ValueError(
                f"{shown(top)} must hold an image; got none{more}: put images there "
                f"({' '.join(IMAGE_ENDINGS)}) or remove the folder"
            )
        return others

    def _enter(self, folder: str) -> None:
        """Refuse a folder that was read already or that lies around one."""
        try:
            key = _key(os.stat(folder))
        except OSError as error:
            raise ValueError(f"{shown(folder)} must be a readable folder; got: {error.strerror}") from error
        if key in self.around:
            raise ValueError(f"{_link(folder)} {self.around[key]}: remove the link")
        first = self.read.setdefault(key, folder)
        if first != folder and folder.startswith(first + os.sep):
            raise ValueError(f"{_link(folder)} is {shown(first)}: remove the link")
        if first != folder:
            raise ValueError(
                f"{shown(os.path.realpath(folder))} is read twice: as {shown(first)} and as {shown(folder)}; each "
                "image must be in one class of one part: remove one of the two"
            )

    def _surround(self, folder: str) -> None:
        """Note the folders around a folder's real place, up to the root."""
        place = os.path.realpath(folder)
        while (parent := os.path.dirname(place)) != place:
            place = parent
            try:
                key = _key(os.stat(place))
            except OSError:  # a mount that shows itself to its owner alone: no link leads there, either
                return
            if key in self.around:
                return
            self.around[key] = f"holds {shown(folder)}"


def _entries(folder: str) -> Iterator[tuple[os.DirEntry[str], int]]:
    """Yield what a folder holds, sorted by name, with the type of what links lead to; hidden names are left out."""
    try:
        with os.scandir(folder) as entries:
            listed = sorted((e for e in entries if not e.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        raise ValueError(f"{shown(folder)} must be a readable folder; got: {error.strerror}") from error
    for entry in listed:
        # What the listing tells already costs no further look at the disk, of which there would be a million.
        if entry.is_dir(follow_symlinks=False):
            yield entry, stat.S_IFDIR
        elif entry.is_file(follow_symlinks=False):
            yield entry, stat.S_IFREG
        else:
            try:
                yield entry, entry.stat().st_mode
            except FileNotFoundError as error:
                raise ValueError(f"{_link(entry.path)} is missing: remove or mend the link") from error
            except OSError as error:
                raise ValueError(f"{_link(entry.path)} cannot be read: {error.strerror}") from error


def _note_shared_files(parts: Sequence[Part]) -> None:
    """Say which files are in two classes of a part, and which of a later part are in the first."""
    paths = [path for part in parts for path in part.paths]
    owner = np.repeat(np.arange(len(parts)), [len(part.paths) for part in parts])
    labels = np.concatenate([np.asarray(part.labels) for part in parts])
    inode, device = (
        np.concatenate([np.frombuffer(getattr(part, name), np.uint64) for part in parts])
        for name in ("inodes", "devices")
    )
    order = np.lexsort((device, inode))  # stable: of the paths to one file, those of the first part come first
    same = (inode[order][1:] == inode[order][:-1]) & (device[order][1:] == device[order][:-1])
    starts = np.flatnonzero(np.r_[True, ~same])
    at = np.flatnonzero(same) + 1  # places in `order` whose file is that of the place before
    head, before, here = order[starts[np.searchsorted(starts, at, side="right") - 1]], order[at - 1], order[at]
    two_classes = (owner[before] == owner[here]) & (labels[before] != labels[here])
    trained_on = (owner[head] == 0) & (owner[here] > 0)
    for number, part in enumerate(parts):
        for wrong, other, thing, where in (
            (two_classes, before, "file", "in two classes"),
            (trained_on, head, "test image", "in the training set too"),
        ):
            pairs = np.flatnonzero(wrong & (owner[here] == number))
            if not len(pairs):
                continue
            one, two = paths[other[pairs[0]]], paths[here[pairs[0]]]
            if os.path.samefile(one, two):  # some network disks make up numbers
                part.notes.append(
                    f"{_count(len(pairs), thing)} of {shown(part.folder)} {where} (links to one file), such as "
                    f"{shown(one)} and {shown(two)}"
                )


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_ENDINGS)


def _key(status: os.stat_result) -> Key:
    return status.st_dev, status.st_ino


def _link(path: str) -> str:
    """Begin a sentence on what a path leads to; the path of a mount is no link."""
    return f"{shown(path)} is a link to {shown(os.readlink(path))}, which" if os.path.islink(path) else shown(path)


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"
