"""Lists of images: text files of `path label` lines.

They are read by blocks of a few megabytes, all lines of a block at once: half a million lines take half a second.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple

import numpy as np

from allnc.data.images import shown
from allnc.data.paths import PathList

CHECKED_FILES = 2000
BLOCK = 2**22  # bytes
LONGEST_LINE = 2**16  # bytes; paths have 4,096 at most
LONGEST_LABEL = 18  # digits of an int64
TAB, NEWLINE, BLANK, DOT, SLASH, ZERO, NINE = b"\t\n ./09"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(kw_only=True, slots=True)
class ImageList:
    """What a list holds.

    Args:
        option: the option that names the list.
        file: its path.
        paths: the images, in the list's order, n of them.
        labels: their classes, [n], int64.
        lines: the line of each image, from 1, [n], int64.
        keys: the hash of each path in its shortest form, [n], int64.
    """

    option: str
    file: str
    paths: PathList
    labels: np.ndarray
    lines: np.ndarray
    keys: np.ndarray

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
    _, of_train, of_test = np.intersect1d(train.keys, test.keys, return_indices=True)
    for one, other in zip(of_train, of_test, strict=True):
        _check_same_label(train, one, test, other)
    if not len(of_test):
        return train, test, num_classes, []
    first = min(os.path.normpath(train.paths[one]) for one in of_train)
    known = f"{len(of_test):,} of the test images are in the training list too, such as {shown(first)}"
    return train, test, num_classes, [known]


def _check_same_label(one_list: ImageList, one: int, other_list: ImageList, other: int) -> None:
    """Raise ValueError unless two places with the same key have the same label, or are not the same path after all."""
    labels = one_list.labels[one], other_list.labels[other]
    path = os.path.normpath(one_list.paths[one])
    if labels[0] != labels[1] and path == os.path.normpath(other_list.paths[other]):
        raise ValueError(
            f"{shown(path)} must have one label; got {labels[0]} in {one_list.place(one)} and {labels[1]} in "
            f"{other_list.place(other)}"
        )


def _read(option: str, file: str, root: str) -> ImageList:
    if not os.path.isfile(file):
        problem = "is a folder" if os.path.isdir(file) else "is no file" if os.path.exists(file) else "is missing"
        raise ValueError(
            f"{option} must be a text file of `relative/path label` lines; got {shown(file)}, which {problem}"
        )
    try:
        found = _read_lines(option, file, root)
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
    if not len(found.paths):
        raise ValueError(f"{option} must name images; got the empty list {shown(file)}")
    _check_labels_of_repeated(found)
    # One look at every file of a million would take minutes on a network disk.
    for position in range(0, len(found.paths), max(1, len(found.paths) // CHECKED_FILES)):
        if not os.path.isfile(found.paths[position]):
            raise ValueError(
                f"{option} names {shown(found.paths[position])}, which is missing ({found.place(position)}): data.root "
                f"must be the folder its paths start from; got {shown(root)}"
            )
    return found


class _Lines(NamedTuple):
    """Lines that name an image: number from 1, where the path begins and ends in the text, label; each [n], int64."""

    numbers: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    labels: np.ndarray


def _read_lines(option: str, file: str, root: str) -> ImageList:
    texts, parts, keys = [b""], [_Lines(*np.zeros((4, 0), np.int64))], [np.zeros(0, np.int64)]
    prefix = os.path.join(root, "").encode("utf-8", "surrogatepass")
    size = count = 0
    with open(file, "rb") as raw:
        for text in _blocks(raw):
            lines = _parse(file, text, count)
            texts.append(text)
            parts.append(lines._replace(starts=lines.starts + size, ends=lines.ends + size))
            keys.append(_keys(text, lines, prefix))
            size += len(text)
            count += text.count(b"\n")
    lines = _Lines(*map(np.concatenate, zip(*parts, strict=True)))
    paths = PathList(np.frombuffer(b"".join(texts), np.uint8), lines.starts, lines.ends, root)
    return ImageList(
        option=option, file=file, paths=paths, labels=lines.labels, lines=lines.numbers, keys=np.concatenate(keys)
    )


def _blocks(file: BinaryIO) -> Iterator[bytes]:
    """Yield the text in blocks of whole lines, each of which ends in a newline as Python's text files have it."""
    rest, at_start = b"", True
    while more := file.read(BLOCK):
        rest += more
        if at_start:  # with or without a byte order mark
            rest, at_start = rest.removeprefix(_BYTE_ORDER_MARK), False
        # A carriage return at the end may be half of the end of a line.
        cut = max(rest.rfind(b"\n"), rest.rfind(b"\r", 0, len(rest) - 1)) + 1
        cut = cut or len(rest)  # a line of more than a block is too long wherever it ends
        yield _with_newlines(rest[:cut])
        rest = rest[cut:]
    if rest:
        yield _with_newlines(rest + b"\n")


def _with_newlines(text: bytes) -> bytes:
    text = text.replace(b"\r\n", b"\n").replace(b"\r", b"\n") if b"\r" in text else text
    return text if text.endswith(b"\n") else text + b"\n"


def _parse(file: str, text: bytes, count: int) -> _Lines:
    """Find paths and labels of the lines of a block before which there are `count` lines.

    Raises:
        ValueError: a line that is not `path label`.
        UnicodeDecodeError: not UTF-8.
    """
    values = np.frombuffer(text, np.uint8)
    blank = (values == BLANK) | (values == TAB)
    line_ends = np.flatnonzero(values == NEWLINE)
    starts = np.concatenate([np.zeros(1, np.int64), line_ends[:-1] + 1])
    too_long = np.flatnonzero(line_ends - starts >= LONGEST_LINE)
    if len(too_long):
        raise ValueError(
            f"{shown(file)}:{count + int(too_long[0]) + 1} must be `relative/path label`; got a line of {LONGEST_LINE} "
            "bytes or more"
        )
    text.decode()
    starts = starts.copy()
    _step_over(blank, starts, +1)
    full = starts < line_ends
    numbers, starts, line_ends = np.flatnonzero(full) + count + 1, starts[full], line_ends[full]
    ends = line_ends.copy()
    _step_over(blank, ends, -1)

    # The label is the digits at the end, 0 to 9 alone: int() also takes a sign, underscores and other scripts' digits.
    cuts, labels, active = ends.copy(), np.zeros(len(ends), np.int64), np.arange(len(ends))
    for place in range(LONGEST_LABEL):
        before = values[cuts[active] - 1]
        is_digit = (before >= ZERO) & (before <= NINE) & (cuts[active] > starts[active])
        active, before = active[is_digit], before[is_digit]
        labels[active] += (before - ZERO).astype(np.int64) * 10**place
        cuts[active] -= 1
    # What stands before the label of a sound line is a blank, and before that the path.
    wrong = (cuts == ends) | (cuts == starts) | ~blank[cuts - 1]
    nul = np.searchsorted(line_ends, np.flatnonzero(values == 0))
    wrong[nul] = True
    if wrong.any():
        first = int(wrong.argmax())
        raise ValueError(_wrong_line(file, int(numbers[first]), text[starts[first] : line_ends[first]]))
    path_ends = cuts - 1
    _step_over(blank, path_ends, -1)
    return _Lines(numbers, starts, path_ends, labels)


def _step_over(blank: np.ndarray, places: np.ndarray, step: int) -> None:
    """Move each place over the blanks behind it (+1) or before it (-1), in the array itself."""
    shift = min(step, 0)
    moving = np.flatnonzero(blank[places + shift])
    while len(moving):
        places[moving] += step
        moving = moving[blank[places[moving] + shift]]


def _keys(text: bytes, lines: _Lines, prefix: bytes) -> np.ndarray:
    """Return the hashes of the paths in their shortest form, [n], int64."""
    pairs = zip(lines.starts.tolist(), lines.ends.tolist(), strict=True)
    keys = np.fromiter((hash(text[start:end]) for start, end in pairs), np.int64, len(lines.starts))
    values = np.frombuffer(text, np.uint8)
    # Few lists have paths that are not in their shortest form already, and few places in a text look like one.
    places = np.flatnonzero((values[:-1] == SLASH) & ((values[1:] == SLASH) | (values[1:] == DOT)))
    odd = np.isin(values[lines.starts], (SLASH, DOT))
    inside = np.searchsorted(lines.starts, places, side="right") - 1
    odd[inside] = True
    for at in np.flatnonzero(odd).tolist():
        keys[at] = hash(_shortest(text[lines.starts[at] : lines.ends[at]], prefix))
    return keys


def _shortest(path: bytes, prefix: bytes) -> bytes:
    """Return a path without what changes nothing, from the root if it is an absolute one that lies there."""
    path = os.path.normpath(path)
    return path.removeprefix(prefix) if os.path.isabs(path) else path


def _check_labels_of_repeated(found: ImageList) -> None:
    """Raise ValueError for a path that has two labels."""
    order = np.argsort(found.keys, kind="stable")  # the lines of one path come one after the other, the first first
    head = np.concatenate([[True], found.keys[order][1:] != found.keys[order][:-1]])
    firsts = np.empty_like(order)
    firsts[order] = order[head][np.cumsum(head) - 1]
    for here in np.flatnonzero(found.labels != found.labels[firsts]).tolist():
        _check_same_label(found, int(firsts[here]), found, here)


def _wrong_line(file: str, number: int, line: bytes) -> str:
    place = f"{shown(file)}:{number}"
    text = line.decode().strip(" \t")
    if "\0" in text:
        return f"{place} must be text; got a NUL character: save the list as UTF-8, not as UTF-16"
    label = text.split(" ")[-1].split("\t")[-1]
    for mark in ",;":
        before, _, after = text.rpartition(mark)
        if before and after.strip() and "." not in after and " " not in after.strip():
            return (
                f"{place} must be `relative/path label` with a blank or a tab between them; got {_short(text)!r}: "
                f"replace the {mark!r}, or train on the list as it is by python -m allnc.train {shown(file)}"
            )
    if label.isascii() and label.isdigit() and len(label) > LONGEST_LABEL and label != text:
        return f"{place} must have a label below 10^{LONGEST_LABEL}; got {label}"
    return f"{place} must be `relative/path label`, the label a number from 0; got {_short(text)!r}"


def _short(text: str) -> str:
    return text if len(text) <= 100 else text[:60] + " ... " + text[-30:]


def _number_of_classes(train: ImageList) -> int:
    """Check that the labels are 0 to C - 1, each at least once; return C."""
    largest = int(train.labels.argmax())
    present = np.unique(train.labels)
    if len(present) <= train.labels[largest]:
        remedy = ""
        if len(present) == present[-1] and present[0] == 1:
            remedy = (
                f": subtract 1 from each, or train on the list as it is by python -m allnc.train {shown(train.file)}"
            )
        missing = int(np.flatnonzero(np.append(present, -1) != np.arange(len(present) + 1))[0])
        raise ValueError(
            f"{train.option} must number the classes from 0 without a gap; got labels up to {train.labels[largest]} "
            f"({train.place(largest)}) and no image of class {missing}{remedy}"
        )
    return len(present)
