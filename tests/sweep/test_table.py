"""Tables against numbers worked out by hand."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from PIL import Image

from allnc.sweep.plot import plot_geometry
from allnc.sweep.record import Result
from allnc.sweep.table import MEASURES, as_csv, markdown, rows_of


def result(data: str, method: str, seed: int, accuracy: float, images: str = "same") -> Result:
    numbers = dict.fromkeys(MEASURES, 0.5) | {"few": None, "balanced": accuracy, "seconds": 10.0}
    return Result(data, method, seed, {}, {**numbers, "images": images, "measured_on": "test"})


RESULTS = [
    *(result("a", "base", seed, score) for seed, score in enumerate([80.0, 82.0, 84.0])),
    *(result("a", "new", seed, score) for seed, score in enumerate([81.0, 84.0, 87.0])),
    *(result("b", "base", seed, score) for seed, score in enumerate([60.0, 60.0])),
    *(result("b", "new", seed, score) for seed, score in enumerate([60.0, 62.0])),
]


def test_by_hand() -> None:
    rows = {(r.data, r.method): r for r in rows_of(RESULTS, "base", ["a", "b"], ["base", "new", "absent"])}
    assert len(rows) == 6
    one = rows["a", "new"]
    assert (one.seeds, one.mean["balanced"], one.std, one.difference) == (3, 84.0, 3.0, 2.0)
    assert one.half_width == pytest.approx(4.302653 / 3**0.5, rel=1e-6)  # differences 1, 2, 3; t(0.975, 2)
    assert one.mean["few"] is None
    assert rows["a", "base"].difference is None
    overall = rows["all", "new"]
    assert (overall.seeds, overall.mean["balanced"], overall.difference) == (2, 71.75, 1.25)  # 70.5, 73 - 70, 71
    assert overall.half_width is None  # two differences say nothing of their spread
    assert overall.mean["seconds"] == 20.0


def test_one_seed_has_no_interval() -> None:
    rows = rows_of([RESULTS[0], RESULTS[3]], "base", ["a"], ["base", "new"])
    assert (rows[1].difference, rows[1].half_width, rows[1].std) == (1.0, None, None)
    assert "| new | 1 | 81.00 | +1.00 |" in markdown(rows, "base", "test")


def test_text_says_what_it_compares() -> None:
    rows = rows_of(RESULTS, "base", ["a", "b"], ["base", "new"])
    text = markdown(rows, "base", "validation")
    assert "on the validation images" in text
    assert "| new | 3 | 84.00 ± 3.00 | +2.00 ± 2.48 | 0.5 | 0.5 | - | 0.500 | 0.500 | 0.500 | 0.500 | 10 |" in text
    table = list(csv.DictReader(io.StringIO(as_csv(rows))))
    assert (table[1]["method"], table[1]["balanced"], table[1]["few"]) == ("new", "84", "")
    assert float(table[1]["half_width_95"]) == pytest.approx(2.48414, rel=1e-4)


def test_runs_on_other_images_are_not_compared() -> None:
    other = result("a", "new", 0, 81.0, images="other")
    with pytest.raises(ValueError, match="runs of a must be trained and measured on the same images; base seed 0 and"):
        rows_of([RESULTS[0], other], "base", ["a"], ["base", "new"])


def test_a_plot_has_a_point_for_each_method(tmp_path: Path) -> None:
    rows = rows_of(RESULTS, "base", ["a", "b"], ["base", "new"])
    plot_geometry(rows, tmp_path / "geometry.png")
    assert Image.open(tmp_path / "geometry.png").size[0] == 1210
    plot_geometry([row._replace(mean=row.mean | {"nc3": None}) for row in rows], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_a_difference_of_fewer_seeds_than_the_mean_says_so() -> None:
    more = [*RESULTS[:3], *(result("a", "new", seed, 81.0) for seed in range(5))]
    text = markdown(rows_of(more, "base", ["a"], ["base", "new"]), "base", "test")
    assert "| new | 5 | 81.00 ± 0.00 | -1.00 ± 4.97 (n = 3) |" in text


def test_the_text_says_of_which_epoch_the_numbers_are() -> None:
    assert "images after the last epoch, in percent" in markdown([], "base", "test")
    assert "images after the best epoch, in percent" in markdown([], "base", "test", epoch="the best epoch")
