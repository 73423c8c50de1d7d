"""Charts as SVG that follows the page's colours, light or dark: lines, points, reliability diagrams, heat maps.

Colours are names of CSS variables of style.css, and whatever a pointer shows stands in data attributes that script.js
reads. All text is escaped.

Legend: G rows or columns of a heat map.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from markupsafe import Markup
from PIL import Image

WIDTH, WIDE, HEIGHT = 360, 520, 244  # of a chart and of a wide one, in units that are pixels on a narrow screen
LEFT, RIGHT, TOP, BOTTOM = 42, 10, 26, 38
MOST_ANNOTATED = 15  # up to so many rows of a heat map carry their numbers
MOST_POINTS = 400  # of a line: more than a screen has
HEAT = 640  # width of a heat map
RED, BLUE, PURPLE, ORANGE = (213, 94, 0), (0, 114, 178), (126, 87, 194), (230, 130, 0)


class Key(NamedTuple):
    """An entry of a legend; of a run's number where the reader can hide the run."""

    label: str
    colour: str
    run: int | None = None
    dashed: bool = False


class Figure(NamedTuple):
    """A chart with what stands around it."""

    title: str
    svg: Markup
    keys: tuple[Key, ...] = ()
    note: str = ""
    scale: Markup | str = ""


class Line(NamedTuple):
    """A line through points, and whether the points are all there is."""

    key: Key
    x: Sequence[float]
    y: Sequence[float]
    points_only: bool = False
    sizes: Sequence[float] | None = None  # radii of the points; None draws all alike


class Axis:
    """A scale from values to the share of the axis, with round numbers along it.

    Args:
        values: what it must hold; NaN is left out.
        log: logarithmic; only positive values count then.
        low, high: ends that do not depend on the values.
        whole: only whole numbers are marked.
    """

    def __init__(
        self,
        values: Sequence[float],
        *,
        log: bool = False,
        low: float | None = None,
        high: float | None = None,
        whole: bool = False,
    ) -> None:
        known = [v for v in values if math.isfinite(v) and (v > 0 or not log)] or [1.0]
        self.log, self.whole = log, whole
        least, most = min(known) if low is None else low, max(known) if high is None else high
        if log:
            least, most = least / 1.15, most * 1.15
        elif least == most:
            least, most = (least - 0.5, most + 0.5) if low is None else (least, most + 1)
        else:
            margin = 0.05 * (most - least)
            least, most = least - (low is None) * margin, most + (high is None) * margin
        self.low, self.high = least, most

    def place(self, value: float) -> float:
        """Return where a value lies, 0 at the low end and 1 at the high one."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Return about five round numbers."""
        if self.log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            steps = (1, 2, 5) if last - first <= 3 else (1,)
            every = 1 if last - first <= 6 else math.ceil((last - first) / 6)
            found = [step * 10.0**power for power in range(first, last + 1, every) for step in steps]
            return [v for v in found if self.low <= v <= self.high]
        raw = (self.high - self.low) / 5
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
        if self.whole:
            step = max(1.0, round(step))
        first = math.ceil(self.low / step - 1e-9)
        return [round(k * step, 12) for k in range(first, math.floor(self.high / step + 1e-9) + 1)]


def lines(
    title: str,
    found: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    x: Axis,
    y: Axis,
    names: str = "",
    marks: Sequence[float] = (),
    note: str = "",
    diagonal: bool = False,
    keys: Sequence[Key] | None = None,
    width: int = WIDTH,
) -> Figure:
    """Draw lines or points over two axes.

    Args:
        title: what is drawn.
        found: the lines.
        x_label, y_label: what the axes are, with units.
        x, y: their scales.
        names: id of the page's list of names, of as many as each line has points.
        marks: heights of dotted lines.
        note: a sentence beneath.
        diagonal: draw the line y = x.
        keys: the legend; None takes those of the lines.
        width: in units that are pixels where the page has room for it.
    """
    wide, high = width - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def at(value: float) -> float:
        return LEFT + wide * x.place(value)

    def up(value: float) -> float:
        return TOP + high * (1 - y.place(value))

    body = [Markup('<g class="grid">')]
    for tick in y.ticks():
        height = up(tick)
        body.append(Markup('<path d="M{} {:.1f}H{}"/>').format(LEFT, height, width - RIGHT))
        body.append(Markup('<text x="{}" y="{:.1f}" class="y">{}</text>').format(LEFT - 5, height + 4, _number(tick)))
    for tick in x.ticks():
        place = at(tick)
        body.append(Markup('<path d="M{:.1f} {}v4"/>').format(place, TOP + high))
        body.append(Markup('<text x="{:.1f}" y="{}" class="x">{}</text>').format(place, TOP + high + 16, _number(tick)))
    body.append(Markup('<path class="axis" d="M{} {}V{}H{}"/></g>').format(LEFT, TOP, TOP + high, width - RIGHT))
    body.append(
        Markup('<text class="name x" x="{}" y="{}">{}</text>').format(LEFT + wide / 2, HEIGHT - 5, x_label)
        + Markup('<text class="name" x="2" y="12">{}</text>').format(y_label)
    )
    if diagonal:
        ends = at(x.low), up(x.low), at(x.high), up(x.high)
        body.append(Markup('<path class="mark" d="M{:.1f} {:.1f}L{:.1f} {:.1f}"/>').format(*ends))
    body += [Markup('<path class="mark" d="M{} {:.1f}H{}"/>').format(LEFT, up(v), width - RIGHT) for v in marks]
    for line in found:
        body.append(_line(line, at, up, log=(x.log, y.log)))
    label = f"{title}. {y_label} against {x_label}: {', '.join(dict.fromkeys(line.key.label for line in found))}"
    svg = Markup(
        '<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}" data-names="{}" data-x="{}" data-y="{}">'
    ).format(width, HEIGHT, label, names, x_label, y_label)
    shown = keys if keys is not None else [line.key for line in found]
    return Figure(title, svg + Markup("").join(body) + Markup("</svg>"), tuple(dict.fromkeys(shown)), note)


def _line(line: Line, at, up, *, log: tuple[bool, bool]) -> Markup:
    points = [
        (x, y, number)
        for number, (x, y) in enumerate(zip(line.x, line.y, strict=True))
        if math.isfinite(y) and (y > 0 or not log[1]) and (x > 0 or not log[0])
    ]
    if not line.points_only and len(points) > MOST_POINTS:
        every = math.ceil(len(points) / MOST_POINTS)
        points = points[:-1:every] + points[-1:]
    places = [(at(x), up(y)) for x, y, _ in points]
    run = "" if line.key.run is None else f" run{line.key.run}"
    start = Markup('<g class="line{}{}" style="--c:var(--{})" data-label="{}"').format(
        run, " dashed" if line.key.dashed else "", line.key.colour, line.key.label
    )
    if line.points_only:
        size = 3.2 if len(points) <= 200 else 1.8
        values = json.dumps([[n, _short(x), _short(y)] for x, y, n in points], separators=(",", ":"))
        sizes = [size if line.sizes is None else line.sizes[n] for _, _, n in points]
        dots = Markup("").join(
            Markup('<circle cx="{:.1f}" cy="{:.1f}" r="{:.1f}"/>').format(*place, radius)
            for place, radius in zip(places, sizes, strict=True)
        )
        return start + Markup(' data-points="{}">').format(values) + dots + Markup("</g>")
    values = json.dumps([[_short(x), _short(y)] for x, y, _ in points], separators=(",", ":"))
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places) if places else ""
    dots = places if len(places) <= 24 else [places[-1]]
    return (
        start
        + Markup(' data-values="{}"><path d="{}"/>').format(values, path)
        + Markup("").join(Markup('<circle cx="{:.1f}" cy="{:.1f}" r="2.2"/>').format(*p) for p in dots)
        + Markup("</g>")
    )


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
    values = json.dumps([None if math.isnan(v) else _short(v) for v in cells.ravel().tolist()], separators=(",", ":"))
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


def _clipped(name: str, length: int = 14) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"


def _number(value: float) -> str:
    return f"{value:,g}".replace("-", "−")  # a minus, not a hyphen


def _short(value: float) -> float | int:
    """A number of four digits, for a tooltip."""
    number = float(f"{value:.4g}")
    return int(number) if number.is_integer() else number
