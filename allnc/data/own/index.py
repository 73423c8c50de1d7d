"""The table of a set of images of one's own: images.tsv, which a run keeps.

A line for each image: path (from data.root), class, split (train, validation, test, or nothing for what was left
out), width, height, mode, copy_of (the first file with the same bytes), reason (why it was left out). Whoever has the
table has the same split for ever, wherever the folder moves.
"""

from __future__ import annotations

import csv
import io
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from allnc.config import TEST, TRAIN, VALIDATION, DataConfig
from allnc.data.images import shown
from allnc.data.own.find import Entry, Found, find_images
from allnc.data.own.look import Seen, Tell, copies, look
from allnc.data.own.notes import case_notes, copy_notes, dark_notes, many
from allnc.data.own.split import draw_groups
from allnc.data.own.tables import read_table

COLUMNS = ("path", "class", "split", "width", "height", "mode", "copy_of", "reason")


class Row(NamedTuple):
    """An image, as its line says."""

    path: str
    label: str
    split: str
    width: int
    height: int
    mode: str
    copy_of: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Index:
    """All images of a set.

    Args:
        root: folder from which the paths start.
        rows: an image each, those that were left out among them.
        notes: sentences on what was left out or looks wrong.
        given: the splits that folders or list had already.
        all_grey: whether no image has a colour.
    """

    root: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    given: tuple[str, ...] = ()
    all_grey: bool = False

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes with a training image: numbers by value, other names by letter."""
        labels = {row.label for row in self.rows if row.split == TRAIN}
        if all(label.isascii() and label.isdigit() for label in labels):
            return tuple(sorted(labels, key=lambda label: (int(label), label)))
        return tuple(sorted(labels))

    def of(self, split: str) -> list[Row]:
        """Return the images of a split."""
        return [row for row in self.rows if row.split == split]

    def text(self) -> bytes:
        """Return what images.tsv holds."""
        stream = io.StringIO(newline="")
        writer = csv.writer(stream, delimiter="\t", lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(self.rows)
        return stream.getvalue().encode("utf-8", "surrogateescape")  # names that are no UTF-8 as the disk has them


def read_index(file: str, root: str) -> Index:
    """Read what `Index.text` returned.

    Raises:
        ValueError: no such file, or not such a table.
    """
    try:
        with open(file, encoding="utf-8", errors="surrogateescape", newline="") as stream:
            reader = csv.reader(stream, delimiter="\t", strict=True)
            head = tuple(next(reader, ()))
            if head != COLUMNS:
                raise ValueError(f"its first line must be {' '.join(COLUMNS)}; got {' '.join(head)[:80]!r}")
            rows = tuple(_row(values, reader.line_num) for values in reader)
    except OSError as error:
        raise ValueError(f"data.index must be a readable images.tsv; got {shown(file)}: {error.strerror}") from error
    except (ValueError, csv.Error) as error:
        raise ValueError(f"data.index must be an images.tsv as a run leaves it; {shown(file)}: {error}") from error
    return Index(root=root, rows=rows)


def _row(values: list[str], line: int) -> Row:
    if len(values) != len(COLUMNS) or values[2] not in (TRAIN, VALIDATION, TEST, ""):
        raise ValueError(f"line {line} must have {len(COLUMNS)} values and a split; got {' '.join(values)[:80]!r}")
    path, label, split, width, height, *rest = values
    if not (width.isdecimal() and height.isdecimal()):
        raise ValueError(f"line {line} must have width and height; got {width!r} and {height!r}")
    return Row(path, label, split, int(width), int(height), *rest)


def scan(config: DataConfig, tell: Tell | None = None) -> Index:
    """Look at every image of data.root, or of the lists, and decide what each is for.

    Args:
        config: of which root, lists, test_share, validation, subset_seed and max_bad are read.
        tell: called now and then with how many images were looked at, and of how many.

    Raises:
        ValueError: no images, fewer than two classes, more files that cannot be read than data.max_bad, or no image to
            test on.
    """
    assert config.root  # DataConfig has checked
    found = _find(config)
    images = found.entries
    paths = [os.path.join(config.root, entry.path) for entry in images]
    seen = look(paths, tell)
    bad = [(entry, one.fault) for entry, one in zip(images, seen, strict=True) if one.fault] + found.bad
    _check_bad(bad, len(images) + len(found.bad), config)
    first = copies(paths, seen)
    given = tuple(split for split in (TRAIN, VALIDATION, TEST) if any(entry.split == split for entry in images))
    splits, notes = _splits(config, images, seen, first, given)
    reasons = [one.fault for one in seen]
    trained = {entry.label for entry, split in zip(images, splits, strict=True) if split == TRAIN}
    strangers = Counter()
    for position, entry in enumerate(images):
        if splits[position] and entry.label not in trained:
            splits[position], reasons[position] = "", "its class has no training image"
            strangers[entry.label] += 1
    if len(trained) < 2:
        raise ValueError(f"{shown(config.root)} must hold training images of at least two classes; got {len(trained)}")
    rows = [
        Row(
            *(entry.path, entry.label, splits[position], one.width, one.height, one.mode),
            images[first[position]].path if first[position] != position else "",
            reasons[position],
        )
        for position, (entry, one) in enumerate(zip(images, seen, strict=True))
    ]
    rows += [Row(entry.path, entry.label, "", 0, 0, "", "", reason) for entry, reason in found.bad]
    if bad:
        notes = [f"{many(len(bad), 'file')} left out that cannot be read, such as {_example(bad)}", *notes]
    notes = [*found.notes, *notes, *case_notes(trained), *copy_notes(rows), *dark_notes(seen)]
    if strangers:
        notes.append(
            f"{many(strangers.total(), 'image')} left out of classes without a training image, such as "
            f"{shown(min(strangers))}"
        )
    grey = all(one.is_grey for one in seen if not one.fault)
    return Index(root=config.root, rows=tuple(rows), notes=tuple(notes), given=given, all_grey=grey)


def _find(config: DataConfig) -> Found:
    root = config.root
    assert root
    if not os.path.isdir(root):
        state = "is missing" if not os.path.exists(root) else "is no folder"
        raise ValueError(f"data.root must be the folder of the images; got {shown(root)}, which {state}: --data.root")
    if config.train_list is None:
        return find_images(root)
    if config.test_list is None:
        return read_table(config.train_list, root)
    train, test = read_table(config.train_list, root, TRAIN), read_table(config.test_list, root, TEST)
    return Found(entries=train.entries + test.entries, notes=train.notes + test.notes)


def _check_bad(bad: list[tuple[Entry, str]], number: int, config: DataConfig) -> None:
    if len(bad) <= config.max_bad:
        return
    allowed = f"data.max_bad allows {config.max_bad}" if config.max_bad else "none may be"
    raise ValueError(
        f"{len(bad):,} of {many(number, 'image')} cannot be read, and {allowed}, such as {_example(bad)}: mend or "
        f"remove them, or leave them out with --data.max_bad {len(bad)}"
    )


def _example(bad: Sequence[tuple[Entry, str]]) -> str:
    return "; ".join(f"{shown(entry.path)} ({reason})" for entry, reason in bad[:3])


def _splits(
    config: DataConfig, images: Sequence[Entry], seen: Sequence[Seen], first: Sequence[int], given: tuple[str, ...]
) -> tuple[list[str], list[str]]:
    """Return the split of each image, "" for those that cannot be read, and sentences on classes that have few."""
    notes: list[str] = []
    unsaid = [entry for entry in images if not entry.split]
    if unsaid and given:
        raise ValueError(f"a list must say the split of every image or of none; {shown(unsaid[0].path)} has none")
    splits = ["" if one.fault else entry.split or TRAIN for entry, one in zip(images, seen, strict=True)]
    if given == (TRAIN, VALIDATION):
        splits = [TEST if split == VALIDATION else split for split in splits]
        notes.append("there are no test images: the validation images are what is measured")
    if VALIDATION in given or TEST in given:
        tested = splits.count(TEST)
    else:
        _hold_out(splits, TEST, config.test_share, config.subset_seed, images, first, least=1)
        tested = splits.count(TEST)
        labels = {s: {e.label for e, other in zip(images, splits, strict=True) if other == s} for s in (TRAIN, TEST)}
        alone = labels[TRAIN] - labels[TEST]
        if alone:
            notes.append(
                f"{many(len(alone), 'class', 'classes')} trained but not tested, having one image alone or copies of "
                f"it, such as {shown(min(alone))}"
            )
    if not tested and not {VALIDATION, TEST} & {*given}:
        raise ValueError(
            f"{shown(config.root or '')} must hold a class of two images or more, one of which can be tested; got one "
            "image in each class, or copies of it: add images, or give test images (a folder test/ beside train/, or "
            "--data.test_list)"
        )
    if TRAIN not in splits or not tested:
        raise ValueError(
            f"{shown(config.root or '')} must hold training and test images; got {splits.count(TRAIN)} and {tested}"
        )
    if config.validation > 0 and VALIDATION not in splits:
        _hold_out(splits, VALIDATION, config.validation, config.subset_seed, images, first, least=0)
        if VALIDATION not in splits:
            raise ValueError(f"data.validation must hold out an image of some class; got {config.validation:g}")
    return splits, notes


def _hold_out(
    splits: list[str],
    split: str,
    share: float,
    seed: int,
    images: Sequence[Entry],
    first: Sequence[int],
    *,
    least: int,
) -> None:
    """Move a share of the training images of each class to a split."""
    among = [position for position, known in enumerate(splits) if known == TRAIN]
    labels = [images[position].label for position in among]
    for chosen in draw_groups(labels, [first[position] for position in among], share, seed, least=least):
        splits[among[chosen]] = split
