"""Charts: round ticks, gaps, escaped text, cells of the right colour."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from PIL import Image

from allnc.report.charts import MOST_POINTS, Axis, Key, Line, lines
from allnc.report.heatmaps import BLUE, ORANGE, PURPLE, RED, angle_colours, confusion_colours, heat_map


@pytest.mark.parametrize(
    ("axis", "ticks"),
    [
        (Axis([], low=0, high=100), [0, 20, 40, 60, 80, 100]),
        (Axis([0.0, 0.1]), [0, 0.025, 0.05, 0.075, 0.1]),
        (Axis([1, 3], whole=True), [1, 2, 3]),
        (Axis([1, 1000], log=True), [1, 10, 100, 1000]),
        (Axis([2, 30], log=True), [2, 5, 10, 20]),
        (Axis([0.05, 0.1], log=True), [0.06, 0.08, 0.1]),
        (Axis([5.0]), [4.6, 4.8, 5, 5.2, 5.4]),
        (Axis([math.nan]), [0.6, 0.8, 1, 1.2, 1.4]),
    ],
)
def test_ticks_are_round(axis: Axis, ticks: list[float]) -> None:
    assert axis.ticks() == pytest.approx(ticks)
    assert all(0 <= axis.place(tick) <= 1 for tick in ticks)


def test_lines_leave_out_what_cannot_be_drawn_and_keep_the_last_point() -> None:
    nasty = "<b>&\"'</svg>"
    x = list(range(1, 1002))
    y = [math.nan, *([2.0] * 999), 7.0]
    figure = lines(nasty, [Line(Key(nasty, "run0"), x, y)], x_label="x", y_label="y", x=Axis(x), y=Axis(y))
    drawn = ET.fromstring(str(figure.svg))
    group = next(g for g in drawn.iter("g") if g.get("data-values"))
    assert group.get("data-label") == nasty and nasty in str(drawn.get("aria-label"))
    values = json.loads(str(group.get("data-values")))
    assert len(values) <= MOST_POINTS + 1 and values[0] == [2, 2] and values[-1] == [1001, 7]
    on_a_log = lines(
        "", [Line(Key("a", "run0"), [0, 1, 2], [1, 0, 3])], x_label="", y_label="", x=Axis(x), y=Axis([1], log=True)
    )
    assert re.findall(r'data-values="([^"]*)"', str(on_a_log.svg)) == ["[[0,1],[2,3]]"]


def test_heat_map_is_one_picture_and_its_numbers() -> None:
    cells = np.array([[75.0, 25.0], [np.nan, np.nan]])
    figure = heat_map(
        "t", cells, confusion_colours(cells, errors_only=False), rows=["<a>", "b"], borders=[("many", 1), ("few", 1)],
        sentence="{row} {column} {value}", axes=("true", "predicted"),
    )  # fmt: skip
    drawn = ET.fromstring(str(figure.svg))
    assert json.loads(str(drawn.get("data-cells"))) == [75, 25, None, None]
    assert json.loads(str(drawn.get("data-rows"))) == ["<a>", "b"]
    picture = next(drawn.iter("image"))
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(str(picture.get("href")).split(",")[1]))))
    assert pixels.shape == (2, 2, 4)
    assert tuple(pixels[0, 0]) == (*BLUE, 191) and tuple(pixels[0, 1]) == (*RED, 128)  # 255 * 0.75, 255 * sqrt(0.25)
    assert not pixels[1, :, 3].any()
    assert [t.text for t in drawn.iter("text") if t.get("class", "").startswith("cell")] == ["75", "25"]


def test_angles_without_colour_are_ideal() -> None:
    pixels = angle_colours(np.array([[np.nan, 90.0], [80.0, 100.0]]), 90, 10)
    assert pixels[..., 3].tolist() == [[0, 0], [255, 255]]
    assert tuple(pixels[1, 0, :3]) == PURPLE and tuple(pixels[1, 1, :3]) == ORANGE
