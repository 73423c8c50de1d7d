"""Square matrices of classes or groups of classes as SVG, whose cells are one picture with a transparent ground.

Legend: G rows or columns of a heat map, C classes.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Sequence

import numpy as np
from markupsafe import Markup
from PIL import Image

from allnc.report.charts import Figure, short

HEAT = 640  # width of a heat map, in units that are pixels where the page has room for it
MOST_ANNOTATED = 15  # up to so many rows of a heat map carry their numbers
RED, BLUE, PURPLE, ORANGE = (213, 94, 0), (0, 114, 178), (126, 87, 194), (230, 130, 0)


def heat_map(
    title: str,
    cells: np.ndarray,
    colours: np.ndarray,
    *,
    rows: Sequence[str],
    borders: Sequence[tuple[str, int]],
    sentence: str,
    axes: tuple[str, str],
    note: str = "",
    scale: Markup | str = "",
) -> Figure:
    """Draw a square matrix.

    Args:
        title: what is drawn.
        cells: [G, G] float; NaN is empty.
        colours: [G, G, 4] uint8, RGBA: transparent where there is nothing to see, on whatever ground.
        rows: [G] names of rows and columns.
        borders: names and numbers of rows of what follows each other along an axis, such as many, medium and few.
        sentence: what a pointer shows, with {row}, {column} and {value}.
        axes: what the rows are, and the columns.
        note: a sentence beneath.
        scale: the key of the colours.
    """
    number = len(cells)
    shown = [_clipped(name) for name in rows]
    left = 34 + 5.6 * max(map(len, shown))
    side = HEAT - left - 26
    cell = side / number
    every = max(1, math.ceil(9 / cell))
    font = min(11.0, max(8.0, 0.8 * cell * every))
    top, bottom = 24, 22 + 4.6 * max(map(len, shown))
    body = [
        Markup('<rect class="ground" x="{0:.1f}" y="{1}" width="{2:.1f}" height="{2:.1f}"/>').format(left, top, side),
        Markup(
            '<image x="{0:.1f}" y="{1}" width="{2:.1f}" height="{2:.1f}" href="{3}" preserveAspectRatio="none"/>'
        ).format(left, top, side, png(colours)),
    ]
    for place in range(0, number, every):
        middle = (place + 0.5) * cell
        body.append(
            Markup('<text class="y" x="{:.1f}" y="{:.1f}" font-size="{:.1f}">{}</text>').format(
                left - 4, top + middle + 0.35 * font, font, shown[place]
            )
            + Markup(
                '<text class="y" font-size="{:.1f}" transform="translate({:.1f} {:.1f}) rotate(-55)">{}</text>'
            ).format(font, left + middle + 0.35 * font, top + side + 9, shown[place])
        )
    if number <= MOST_ANNOTATED:
        body += _annotations(cells, colours, left, top, cell)
    start = 0
    for name, size in borders:
        if start:
            edge = start * cell
            body.append(
                Markup('<path class="border" d="M{:.1f} {:.1f}h{:.1f}M{:.1f} {}v{:.1f}"/>').format(
                    left, top + edge, side, left + edge, top, side
                )
            )
        if size:
            middle = (start + size / 2) * cell
            body.append(
                Markup('<text class="x" x="{:.1f}" y="{}">{}</text>').format(left + middle, top - 6, name)
                + Markup('<text class="x" transform="translate({:.1f} {:.1f}) rotate(90)">{}</text>').format(
                    left + side + 8, top + middle, name
                )
            )
        start += size
    height = top + side + bottom + 14
    body.append(
        Markup('<text class="name x" x="{:.1f}" y="{:.1f}">{}</text>').format(left + side / 2, height - 4, axes[1])
        + Markup('<text class="name x" transform="translate(11 {:.1f}) rotate(-90)">{}</text>').format(
            top + side / 2, axes[0]
        )
    )
    values = json.dumps([None if math.isnan(v) else short(v) for v in cells.ravel().tolist()], separators=(",", ":"))
    svg = Markup(
        '<svg class="heat" viewBox="0 0 {} {:.0f}" role="img" aria-label="{}" data-side="{:.1f} {} {:.1f}" '
        'data-cells="{}" data-rows="{}" data-sentence="{}">'
    ).format(
        HEAT, height, f"{title}: {axes[0]} against {axes[1]}", left, top, side, values, json.dumps(list(rows)), sentence
    )
    return Figure(title, svg + Markup("").join(body) + Markup("</svg>"), note=note, scale=scale)


def _annotations(cells: np.ndarray, colours: np.ndarray, left: float, top: float, cell: float) -> list[Markup]:
    """The numbers of the cells that are not empty and not 0."""
    return [
        Markup('<text class="cell{}" x="{:.1f}" y="{:.1f}">{:.0f}</text>').format(
            " strong" if colours[row, column, 3] > 150 else "",
            left + (column + 0.5) * cell,
            top + (row + 0.5) * cell + 4,
            value,
        )
        for (row, column), value in np.ndenumerate(cells)
        if round(np.nan_to_num(value)) != 0
    ]


def confusion_colours(cells: np.ndarray, *, errors_only: bool) -> np.ndarray:
    """Return [G, G, 4] uint8: right answers on the diagonal blue, mistakes red, so that few of them are seen too."""
    share = np.sqrt(np.nan_to_num(cells) / (max(1e-9, float(np.nanmax(cells, initial=0))) if errors_only else 100))
    red = np.concatenate([np.broadcast_to(RED, (*cells.shape, 3)), 255 * share[..., None]], -1)
    if not errors_only:
        diagonal = np.arange(len(cells))
        red[diagonal, diagonal, :3] = BLUE
        red[diagonal, diagonal, 3] = 255 * np.nan_to_num(cells[diagonal, diagonal]) / 100
    return red.round().astype(np.uint8)


def angle_colours(cells: np.ndarray, ideal: float, far: float) -> np.ndarray:
    """Return [G, G, 4] uint8: purple where classes are closer than the ideal, orange where they are further apart."""
    away = np.nan_to_num((cells - ideal) / far).clip(-1, 1)
    colour = np.where((away < 0)[..., None], PURPLE, ORANGE)
    return np.concatenate([colour, 255 * np.abs(away)[..., None]], -1).round().astype(np.uint8)


def scale_bar(stops: str, labels: Sequence[str]) -> Markup:
    """Return a bar of colours with words beneath; `stops` are those of a CSS gradient."""
    words = Markup("").join(Markup("<span>{}</span>").format(label) for label in labels)
    return Markup('<div class="scale"><i style="background:linear-gradient(90deg,{})"></i><p>{}</p></div>').format(
        stops, words
    )


def png(pixels: np.ndarray) -> str:
    """Return RGBA pixels [height, width, 4] uint8 as a data URI."""
    buffer = io.BytesIO()
    Image.fromarray(pixels, "RGBA").save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def row_names(groups: Sequence[np.ndarray], classes: Sequence[str], counts: np.ndarray) -> list[str]:
    """Names of the classes, or the sizes of the classes of a group."""
    if all(len(members) == 1 for members in groups):
        return [classes[int(members[0])] for members in groups]
    names = []
    for members in groups:
        most, least = int(counts[members].max()), int(counts[members].min())
        names.append(f"{most:,}" if most == least else f"{most:,}–{least:,}")
    return names


def borders_of(groups: Sequence[np.ndarray], masks: dict[str, np.ndarray]) -> list[tuple[str, int]]:
    """How many rows many-, medium- and few-shot classes have; a group belongs to its first class."""
    first = np.array([members[0] for members in groups])
    return [(name, int(mask[first].sum())) for name, mask in masks.items()]


def _clipped(name: str, length: int = 14) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"
