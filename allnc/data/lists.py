"""Lists of images: text files of `path label` lines."""

from __future__ import annotations

import os
from array import array
from dataclasses import dataclass, field

import numpy as np

from allnc.data.images import shown

CHECKED_FILES = 2000
LONGEST_LINE = 2**16  # characters; paths have 4,096 bytes at most
LONGEST_LABEL = 18  # digits of an int64


@dataclass(kw_only=True, slots=True)
class ImageList:
    """What a list holds.

    Args:
        option: the option that names the list.
        file: its path.
        paths: the images, in the list's order.
        labels: their classes.
        lines: the line of each image, from 1.
        index: position in `paths` by path, in its shortest form.
    """

    option: str
    file: str
    paths: list[str] = field(default_factory=list)
    labels: array[int] = field(default_factory=lambda: array("q"))
    lines: array[int] = field(default_factory=lambda: array("I"))
    index: dict[str, int] = field(default_factory=dict)

    def place(self, position: int) -> str:
        """Name the line of an image."""
        return f"{shown(self.file)}:{self.lines[position]}"


def read_lists(train_file: str, test_file: str, root: str) -> tuple[ImageList, ImageList, int, list[str]]:
    """Read the lists of the training and the test images.

    A line is a path, blanks or tabs, and the class as a number from 0. A path may hold blanks; it starts from `root`
    unless it is absolute, and may lead out of it (`..`): a list is its owner's own file. The text is UTF-8.

    Args:
        train_file, test_file: the lists.
        root: folder from which relative paths start.

    Returns:
        Both lists, the number of classes, and sentences on what looks wrong (test images that are trained on).

    Raises:
        ValueError: a list that cannot be read, is no such text or is empty; a path with two labels; training labels
            that are not 0 to C - 1, each at least once; a test label beyond them; files that are missing (a sample
            of 2,000 is looked at). The message names the list and the line.
    """
    train = _read("data.train_list", train_file, root)
    test = _read("data.test_list", test_file, root)
    num_classes = _number_of_classes(train)
    largest = int(np.argmax(test.labels))
    if test.labels[largest] >= num_classes:
        raise ValueError(
            f"data.test_list must have labels below {num_classes}, as data.train_list; got {test.labels[largest]} in "
            f"{test.place(largest)}"
        )
    both = test.index.keys() & train.index.keys()
    for path in both:
        one, other = train.index[path], test.index[path]
        if train.labels[one] != test.labels[other]:
            raise ValueError(
                f"{shown(path)} must have one label; got {train.labels[one]} in {train.place(one)} and "
                f"{test.labels[other]} in {test.place(other)}"
            )
    known = f"{len(both):,} of the test images are in the training list too, such as {shown(min(both))}" if both else ""
    return train, test, num_classes, [known] if both else []


def _read(option: str, file: str, root: str) -> ImageList:
    if not os.path.isfile(file):
        problem = "is a folder" if os.path.isdir(file) else "is no file" if os.path.exists(file) else "is missing"
        raise ValueError(
            f"{option} must be a text file of `relative/path label` lines; got {shown(file)}, which {problem}"
        )
    found = ImageList(option=option, file=file)
    try:
        _read_lines(found, root)
    except UnicodeDecodeError as error:
        with open(file, "rb") as raw:
            head = raw.read(64)
        encoding = "UTF-16" if head[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in head else "LATIN1"
        raise ValueError(
            f"{option} must be UTF-8 text; got {shown(file)} with the byte {error.object[error.start]:#x}: "
            f"save it as UTF-8, as with iconv -f {encoding} -t UTF-8"
        ) from error
    except OSError as error:
        raise ValueError(f"{option} must be a readable file; got {shown(file)}: {error.strerror}") from error
    if not found.paths:
        raise ValueError(f"{option} must name images; got the empty list {shown(file)}")
    # One look at every file of a million would take minutes on a network disk.
    for position in range(0, len(found.paths), max(1, len(found.paths) // CHECKED_FILES)):
        if not os.path.isfile(found.paths[position]):
            raise ValueError(
                f"{option} names {shown(found.paths[position])}, which is missing ({found.place(position)}): data.root "
                f"must be the folder its paths start from; got {shown(root)}"
            )
    return found


def _read_lines(found: ImageList, root: str) -> None:
    paths, labels, lines, index = found.paths, found.labels, found.lines, found.index
    prefix = os.path.join(root, "")
    with open(found.file, encoding="utf-8-sig") as text:  # with or without a byte order mark
        number = 0
        while line := text.readline(LONGEST_LINE):
            number += 1
            words = line.strip(" \t\n")
            if not words:
                continue
            cut = max(words.rfind(" "), words.rfind("\t"))
            path, label = words[: max(cut, 0)].rstrip(" \t"), words[cut + 1 :]
            # Only the digits 0 to 9: int() also takes a sign, underscores and the digits of other scripts.
            if not path or not (label.isascii() and label.isdigit()) or len(line) == LONGEST_LINE or "\0" in path:
                raise ValueError(_wrong_line(found.file, number, line))
            if len(label) > LONGEST_LABEL:
                raise ValueError(
                    f"{shown(found.file)}:{number} must have a label below 10^{LONGEST_LABEL}; got {label}"
                )
            full = path if os.path.isabs(path) else prefix + path
            key = full
            if "/." in path or "//" in path or path.startswith("."):
                key = os.path.normpath(path) if os.path.isabs(path) else prefix + os.path.normpath(path)
            first = index.setdefault(key, len(paths))
            if first != len(paths) and labels[first] != int(label):
                raise ValueError(
                    f"{shown(path)} must have one label; got {labels[first]} in {found.place(first)} and {label} in "
                    f"{shown(found.file)}:{number}"
                )
            paths.append(full)
            labels.append(int(label))
            lines.append(number)


def _wrong_line(file: str, number: int, line: str) -> str:
    if "\0" in line:
        return f"{shown(file)}:{number} must be text; got a NUL character: save the list as UTF-8, not as UTF-16"
    if len(line) == LONGEST_LINE:
        return f"{shown(file)}:{number} must be `relative/path label`; got a line of {LONGEST_LINE} characters or more"
    text = line.rstrip("\n")
    text = text if len(text) <= 100 else text[:60] + " ... " + text[-30:]
    return f"{shown(file)}:{number} must be `relative/path label`, the label a number from 0; got {text!r}"


def _number_of_classes(train: ImageList) -> int:
    """Check that the labels are 0 to C - 1, each at least once; return C."""
    labels = np.frombuffer(train.labels, np.int64)
    largest = int(labels.argmax())
    present = set(labels.tolist())
    if len(present) <= labels[largest]:
        missing = next(c for c in range(len(present) + 1) if c not in present)
        raise ValueError(
            f"{train.option} must number the classes from 0 without a gap; got labels up to {labels[largest]} "
            f"({train.place(largest)}) and no image of class {missing}"
        )
    return int(labels[largest]) + 1
