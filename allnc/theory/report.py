"""Results of the theory as tables on the terminal and as files: predicted beside found."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

Column = tuple[str, Callable[[Any], str]]  # heading, and the cell of a record


def make_folder(folder: Path | None) -> None:
    """Make the folder of the results before anything is computed for it."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise ValueError(f"--out must be a folder that can be written to; got {folder}")


def print_table(console: Console, title: str, columns: Sequence[Column], records: Sequence[Any]) -> None:
    """Print one row for each record."""
    table = Table(title=title, title_justify="left")
    for number, (heading, _) in enumerate(columns):
        table.add_column(heading, justify="right" if number else "left", no_wrap=True)
    for record in records:
        table.add_row(*(cell(record) for _, cell in columns))
    console.print(table)


def small(value: float | None) -> str:
    """An error or a gradient: two digits and the power of ten; "-" for what does not exist."""
    return "-" if value is None or math.isnan(value) else f"{value:.1e}"


def number(value: float | None, digits: int = 4) -> str:
    """A number with so many digits after the point; "-" for what does not exist."""
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def write_results(folder: Path, tables: Mapping[str, Sequence[Any]]) -> None:
    """Write all tables as results.json and each as NAME.csv; numbers that are not finite become null and empty."""
    folder.mkdir(parents=True, exist_ok=True)
    plain = {name: [_plain(record) for record in records] for name, records in tables.items()}
    (folder / "results.json").write_text(json.dumps(plain, indent=1, allow_nan=False) + "\n")
    for name, records in plain.items():
        single = [{k: v for k, v in record.items() if not isinstance(v, list) or len(v) < 20} for record in records]
        with (folder / f"{name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(single[0]) if single else [], lineterminator="\n")
            writer.writeheader()
            writer.writerows(single)


def _plain(record: Any) -> dict[str, Any]:
    fields = dataclasses.asdict(record) if dataclasses.is_dataclass(record) else record._asdict()  # pyright: ignore[reportArgumentType]
    return {name: _finite(value) for name, value in fields.items()}


def _finite(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
