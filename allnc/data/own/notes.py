"""Sentences on what looks wrong among images: copies, classes whose names are nearly the same, images nearly black."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from allnc.data.images import shown

if TYPE_CHECKING:
    from allnc.data.own.index import Row
    from allnc.data.own.look import Seen


def case_notes(classes: Iterable[str]) -> list[str]:
    """Say which classes have names that differ in capitals alone."""
    alike: dict[str, list[str]] = {}
    for name in sorted(classes):
        alike.setdefault(name.casefold(), []).append(name)
    groups = [names for names in alike.values() if len(names) > 1]
    if not groups:
        return []
    more = f", and so do {len(groups) - 1:,} more" if len(groups) > 1 else ""
    return [
        f"{' and '.join(map(shown, groups[0]))} differ in capitals alone and are {len(groups[0])} classes{more}: give "
        "them one name if they are one"
    ]


def copy_notes(rows: Sequence[Row]) -> list[str]:
    """Say which files are there twice: in two classes, and in training and test set."""
    by_path: dict[str, Row] = {}
    for row in rows:
        by_path.setdefault(row.path, row)
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row.split and row.copy_of:
            groups.setdefault(row.copy_of, [by_path[row.copy_of]]).append(row)
    notes = []
    copied = sum(len(group) - 1 for group in groups.values())
    if copied:
        notes.append(f"{many(copied, 'file')} with the same bytes as another one (column copy_of)")
    for column, words in (("label", "in two classes"), ("split", "in two of training, validation and test set")):
        pairs = [
            (group[0], other)
            for group in groups.values()
            if (other := next((row for row in group if getattr(row, column) != getattr(group[0], column)), None))
        ]
        if pairs:
            one, other = pairs[0]
            notes.append(
                f"{many(len(pairs), 'image')} {words}, such as {shown(one.path)} and {shown(other.path)}: remove one "
                "of the two"
            )
    return notes


def dark_notes(seen: Sequence[Seen]) -> list[str]:
    """Say when images of 16 bits use few of them, as those of cameras with 12 bits do."""
    deep = [one.brightest for one in seen if one.mode.startswith("I") and not one.fault]
    if not deep or max(deep) >= 128:
        return []
    return [
        f"{many(len(deep), 'image')} of 16 bits with no value above {256 * max(deep) + 255:,} of 65,535: only the "
        "upper 8 bits are seen, nearly black here; scale them to the whole range"
    ]


def many(number: int, one: str, several: str | None = None) -> str:
    """Return a number with the word for it."""
    return f"{number:,} {one if number == 1 else several or one + 's'}"
