"""Lists of images as people have them: CSV and TSV with or without a header, `path label` lines, JSON."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from allnc.data.folders import IMAGE_ENDINGS
from allnc.data.images import shown
from allnc.data.own.find import SPLITS, Entry, Found

# Names of columns, the better ones first: a list with the number and the name of the class has both.
PATHS = ("path", "image_path", "filepath", "file_path", "fpath", "filename", "file_name", "file", "im_path")
PATHS += ("image", "img", "image_name", "image_id", "img_id", "id")
LABELS = ("class_name", "classname", "category_name", "label_name", "class", "category", "species", "label", "labels")
LABELS += ("target", "class_id", "category_id", "label_id", "y")
PARTS = ("split", "subset", "partition", "set")


class _Line(NamedTuple):
    """The values of a line or an annotation, and where it stands."""

    values: list[str]
    place: str


def read_table(file: str, root: str, split: str = "") -> Found:
    """Read a list of images.

    Args:
        file: the list. Paths in it start from `root` unless they are absolute.
        root: folder of the images.
        split: what all of them are for; "" lets a column `split` say so, if there is one.

    Raises:
        ValueError: no such list, a line that does not fit, a file with two classes, or none of the first files there.
    """
    if not os.path.isfile(file):
        raise ValueError(f"{shown(file)} must be a list of images (CSV, TSV, text or JSON); it is no file")
    text = _text(file)
    if file.lower().endswith((".json", ".jsonl")):
        columns, lines = _json(file, text)
    else:
        columns, lines = _rows(file, text)
    if not lines:
        raise ValueError(f"{shown(file)} must name images; it names none")
    return _entries(file, root, split, columns, lines)


def _text(file: str) -> str:
    try:
        with open(file, encoding="utf-8-sig", newline="") as stream:  # with or without a byte order mark
            text = stream.read()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{shown(file)} must be UTF-8 text; byte {error.start} is not: save it as UTF-8, as with iconv -t UTF-8 "
            "-f UTF-16 (or LATIN1)"
        ) from None
    except OSError as error:
        raise ValueError(f"{shown(file)} must be a readable list; got: {error.strerror}") from error
    if "\0" in text:
        raise ValueError(f"{shown(file)} must be text; it holds NUL characters: save it as UTF-8, not as UTF-16")
    return text


def _rows(file: str, text: str) -> tuple[tuple[int, int, int | None], list[_Line]]:
    """Return which columns are path, class and split, and the lines of a text without those that name the columns."""
    rows = _split_lines(file, text)
    if not rows:
        return (0, 1, None), []
    columns = _named([value.strip().lower() for value in rows[0].values])
    if columns is not None:
        return columns, rows[1:]
    has_names = any(any(map(_looks_like_image, row.values)) for row in rows[1:2])
    has_names = has_names and not any(map(_looks_like_image, rows[0].values))
    columns = None if has_names else _guessed(rows)
    if columns is None:
        raise ValueError(
            f"{rows[0].place} must name its columns, one of {', '.join(PATHS[:6])} ... for the file and one of "
            f"{', '.join(LABELS[:8])} ... for the class; got {', '.join(map(repr, rows[0].values))[:200]}"
        )
    return columns, rows


def _guessed(rows: list[_Line]) -> tuple[int, int, int | None] | None:
    """Return the places of path, class and split by their values; None where these do not tell."""
    first = rows[0].values
    path = next((place for place, value in enumerate(first) if _looks_like_image(value)), 0)
    others = [place for place in range(len(first)) if place != path]
    if len(others) == 1:
        return path, others[0], None
    for part, label in (others[::-1], others) if len(others) == 2 else ():
        if {row.values[part].strip().lower() for row in rows} <= set(SPLITS):
            return path, label, part
    return None


def _split_lines(file: str, text: str) -> list[_Line]:
    """Part the lines into values, by the delimiter that parts most of the first ones alike, or else by blanks."""
    for delimiter in ("\t", ",", ";"):
        try:
            reader = csv.reader(text.splitlines(keepends=True), delimiter=delimiter, strict=True)
            rows = [
                _Line(values, f"{shown(file)}:{reader.line_num}") for values in reader if any(map(str.strip, values))
            ]
        except csv.Error:
            continue
        width = len(rows[0].values) if rows else 0
        if width >= 2 and 2 * sum(len(row.values) == width for row in rows[:20]) > len(rows[:20]):
            wrong = next((row for row in rows if len(row.values) != width), None)
            if wrong is not None:
                raise ValueError(f"{wrong.place} must have {width} values as the first line; got {len(wrong.values)}")
            return rows
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            rows.append(_Line(line.strip().rsplit(None, 1), f"{shown(file)}:{number}"))
            if len(rows[-1].values) != 2:
                raise ValueError(f"{rows[-1].place} must be a file and its class; got {line.strip()[:80]!r}")
    return rows


def _named(head: list[str]) -> tuple[int, int, int | None] | None:
    """Return the places of path, class and split by their names; None where path or class has no name."""
    path, label, part = (next((head.index(n) for n in names if n in head), None) for names in (PATHS, LABELS, PARTS))
    return None if path is None or label is None else (path, label, part)


def _looks_like_image(value: str) -> bool:
    return value.strip().lower().endswith(IMAGE_ENDINGS)


def _json(file: str, text: str) -> tuple[tuple[int, int, int | None], list[_Line]]:
    """Read a list of objects, or the `annotations` of BBN's and COCO's files, with their images and categories."""
    try:
        if file.lower().endswith(".jsonl"):
            values: Any = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{shown(file)} must be JSON; it is not: {error}") from None
    names: dict[str, str] = {}
    files: dict[str, str] = {}
    if isinstance(values, Mapping):
        names = {str(c["id"]): str(c["name"]) for c in _objects(values.get("categories")) if {"id", "name"} <= set(c)}
        images = [i for i in _objects(values.get("images")) if {"id", "file_name"} <= set(i)]
        files = {str(i["id"]): str(i["file_name"]) for i in images}
        values = values.get("annotations", values.get("images"))
    objects = list(_objects(values))
    if not objects or not isinstance(values, list) or len(objects) != len(values):
        raise ValueError(
            f'{shown(file)} must be a list of objects with a path and a label, or hold it as "annotations"; it does not'
        )
    lines = []
    for number, one in enumerate(objects):
        place = f"{shown(file)}, image {number + 1}"
        path, label, part = (next((one[n] for n in ns if one.get(n) is not None), "") for ns in (PATHS, LABELS, PARTS))
        if isinstance(path, (Mapping, list)) or isinstance(label, (Mapping, list)):
            raise ValueError(f"{place} must have one path and one label; got {str(one)[:80]}")
        if "image_id" in one and str(one["image_id"]) in files:
            path = files[str(one["image_id"])]
        lines.append(_Line([str(path), names.get(str(label), str(label)), str(part)], place))
    return (0, 1, 2 if any(line.values[2] for line in lines) else None), lines


def _objects(values: Any) -> Iterable[Mapping[str, Any]]:
    return (value for value in values if isinstance(value, Mapping)) if isinstance(values, list) else ()


def _entries(file: str, root: str, split: str, columns: tuple[int, int, int | None], lines: list[_Line]) -> Found:
    path_at, label_at, part_at = columns
    found, seen, again = Found(), {}, 0
    paths = _own_separators(root, [line.values[path_at].strip() for line in lines])
    ending = _ending(root, paths[:20])
    for line, path in zip(lines, paths, strict=True):
        label = line.values[label_at].strip()
        if not path or not label:
            raise ValueError(f"{line.place} must have a path and a class; got {path!r} and {label!r}")
        part = "" if part_at is None else line.values[part_at].strip().lower()
        if not split and part_at is not None and part not in SPLITS:
            raise ValueError(f"{line.place} must have train, val or test as its split; got {part!r}")
        entry = Entry(_inside(path + ending, root), label, split or SPLITS.get(part, ""))
        first = seen.setdefault(entry.path, (entry, line.place))
        if first[0].label != label:
            raise ValueError(
                f"{shown(entry.path)} must have one class; got {first[0].label!r} in {first[1]} and {label!r} in "
                f"{line.place}"
            )
        if first[1] != line.place and first[0] == entry:
            again += 1
            continue
        found.entries.append(entry)
    if again:
        found.notes.append(f"{again:,} lines of {shown(file)} repeat another and count once")
    looked = [os.path.join(root, entry.path) for entry in found.entries[:: max(1, len(found.entries) // 100)]]
    if not any(map(os.path.exists, looked)):
        raise ValueError(
            f"{shown(file)} must name files that are there; got {shown(looked[0])} and others, which are missing: give "
            "the folder from which its paths start by --data.root"
        )
    return found


def _inside(path: str, root: str) -> str:
    """Return a path from the root where it lies there, in its shortest form."""
    path = os.path.normpath(path)
    inside = os.path.join(root, "")
    return path[len(inside) :] if path.startswith(inside) else path


def _own_separators(root: str, paths: list[str]) -> list[str]:
    """Return the paths of a list that was written under Windows with the separators of this machine."""
    if os.sep == "\\" or not all("\\" in path for path in paths[:20]):
        return paths
    if any(os.path.exists(os.path.join(root, path)) for path in paths[:20]):
        return paths
    return [path.replace("\\", "/") for path in paths]


def _ending(root: str, paths: list[str]) -> str:
    """Return the ending that a list leaves out, as lists of numbers of images do; "" where it leaves none out."""
    if any(_looks_like_image(path) or os.path.exists(os.path.join(root, path)) for path in paths):
        return ""
    return next((e for e in IMAGE_ENDINGS if any(os.path.exists(os.path.join(root, p + e)) for p in paths)), "")
