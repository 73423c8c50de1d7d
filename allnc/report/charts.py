"""Charts as SVG that follows the page's colours, light or dark: lines and points over two axes.

Colours are names of CSS variables of style.css, and whatever a pointer shows stands in data attributes that script.js
reads. All text is escaped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from markupsafe import Markup

WIDTH, WIDE, HEIGHT = 360, 470, 244  # of a chart and of a wide one, in units that are pixels on a narrow screen
LEFT, RIGHT, TOP, BOTTOM = 42, 10, 26, 38
MOST_POINTS = 400  # of a line: more than a screen has


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
    x: Sequence[float] | np.ndarray
    y: Sequence[float] | np.ndarray
    points_only: bool = False
    sizes: Sequence[float] | np.ndarray | None = None  # radii of the points; None draws all alike


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
            found = [v for v in found if self.low <= v <= self.high]
            if len(found) > 2:
                return found
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
        size, shade = (3.2, 0.5) if len(points) <= 200 else (1.8, max(0.08, 100 / len(points)))  # where many overlap
        values = json.dumps([[n, short(x), short(y)] for x, y, n in points], separators=(",", ":"))
        sizes = [size if line.sizes is None else line.sizes[n] for _, _, n in points]
        dots = Markup("").join(
            Markup('<circle cx="{:.1f}" cy="{:.1f}" r="{:.1f}"/>').format(*place, radius)
            for place, radius in zip(places, sizes, strict=True)
        )
        return start + Markup(' data-points="{}" fill-opacity="{:.2f}">').format(values, shade) + dots + Markup("</g>")
    values = json.dumps([[short(x), short(y)] for x, y, _ in points], separators=(",", ":"))
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places) if places else ""
    dots = places if len(places) <= 24 else [places[-1]]
    return (
        start
        + Markup(' data-values="{}"><path d="{}"/>').format(values, path)
        + Markup("").join(Markup('<circle cx="{:.1f}" cy="{:.1f}" r="2.2"/>').format(*p) for p in dots)
        + Markup("</g>")
    )


def _number(value: float) -> str:
    return f"{value:,g}".replace("-", "−")  # a minus, not a hyphen


def short(value: float) -> float | int:
    """Return a number of four digits, for a tooltip."""
    number = float(f"{value:.4g}")
    return int(number) if number.is_integer() else number
