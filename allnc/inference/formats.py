"""Predictions as text: a table for eyes, CSV, JSON and JSON lines for programs; each image is written as it comes."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TextIO, get_args

Format = Literal["table", "csv", "json", "jsonl"]
FORMATS: tuple[Format, ...] = get_args(Format)
WIDEST = 60  # columns of a path or a class in a table; what is longer moves the rest of its line


@dataclass(frozen=True, slots=True)
class Row:
    """What is predicted of an image.

    Args:
        path: its file, as it was given.
        classes: names of the most probable classes, the first one first; empty where there is an error.
        probabilities: of them, in [0, 1].
        error: why the image could not be read; None where it could.
    """

    path: str
    classes: Sequence[str] = ()
    probabilities: Sequence[float] = ()
    error: str | None = None


class Writer:
    """Writes rows to a text stream, part by part.

    Args:
        stream: where to; opened with newline="" for csv.
        kind: table, csv, json (one array) or jsonl (an object a line).
        top: classes of each image.
    """

    def __init__(self, stream: TextIO, kind: Format, top: int) -> None:
        self.stream, self.kind, self.top = stream, kind, top
        self.rows = 0
        if kind == "csv":
            names = [f"{name}_{place}" for place in range(1, top + 1) for name in ("class", "probability")]
            self._csv = csv.writer(stream, lineterminator="\n")
            self._csv.writerow(["path", *names, "error"])

    def write(self, rows: Sequence[Row]) -> None:
        """Write the rows of a part."""
        if self.kind == "csv":
            self._csv.writerows(self._cells(row) for row in rows)
        elif self.kind == "table":
            self._aligned(rows)
        else:
            for row in rows:
                start = "" if self.kind == "jsonl" else "[\n" if self.rows == 0 else ",\n"
                self.stream.write(f"{start}{json.dumps(_object(row))}{'' if self.kind == 'json' else chr(10)}")
                self.rows += 1
        self.stream.flush()

    def finish(self) -> None:
        """End what was begun."""
        if self.kind == "json":
            self.stream.write("\n]\n" if self.rows else "[]\n")
        self.stream.flush()

    def _cells(self, row: Row) -> list[str]:
        pairs = zip(row.classes, row.probabilities, strict=True)
        cells = [cell for name, share in pairs for cell in (name, _number(share))]
        return [row.path, *cells, *[""] * (2 * self.top - len(cells)), row.error or ""]

    def _aligned(self, rows: Sequence[Row]) -> None:
        """Write lines whose columns are as wide as this part needs."""
        paths = [_shown(row.path) for row in rows]
        width = min(WIDEST, max(map(len, paths), default=0))
        names = [[_shown(name) for name in row.classes] for row in rows]
        widths = [min(WIDEST, max((len(n[at]) for n in names if n), default=0)) for at in range(self.top)]
        for row, path, shown in zip(rows, paths, names, strict=True):
            if row.error is not None:
                self.stream.write(f"{path:{width}}  not read: {_shown(row.error.removeprefix(row.path).strip())}\n")
                continue
            columns = zip(shown, widths, row.probabilities, strict=True)
            cells = [f"{name:{wide}} {100 * share:5.1f} %" for name, wide, share in columns]
            self.stream.write("  ".join([f"{path:{width}}", *cells]) + "\n")


def _object(row: Row) -> dict[str, object]:
    if row.error is not None:
        return {"path": row.path, "error": row.error}
    pairs = zip(row.classes, row.probabilities, strict=True)
    return {"path": row.path, "predictions": [{"class": c, "probability": float(_number(p))} for c, p in pairs]}


def _number(share: float) -> str:
    return f"{share:.6g}"


def _shown(text: str) -> str:
    """Return a text as it stands on one line of a terminal."""
    return text if text.isprintable() else ascii(text)
