"""The fuzz command: a short run of its targets, and that it sees every kind of fault."""

from __future__ import annotations

import importlib
import os
import signal
import time
import warnings
from pathlib import Path
from random import Random
from typing import Any

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def fuzz(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("fuzz")


@pytest.mark.parametrize(("name", "cases"), [("lists", 300), ("folders", 150), ("idx", 150)])
def test_a_short_run_of_a_target(name: str, cases: int, fuzz: Any) -> None:
    report = fuzz.fuzz([name], cases=cases, seed=5)
    assert report.cases == {name: cases} and not report.faults, report.faults


@pytest.mark.slow
def test_damaged_images_are_an_image_or_a_named_error(fuzz: Any) -> None:
    report = fuzz.fuzz(["images"], cases=1000, seed=5)
    assert report.cases == {"images": 1000} and not report.faults, report.faults


def test_a_plain_reader_of_images_is_caught(fuzz: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What other code does with a damaged file is a fault for the target of images."""

    def plain(path: str) -> Image.Image:
        try:
            with Image.open(path) as file:
                return file.convert("RGB")
        except OSError as error:
            raise ValueError(f"{path} must be a readable image; got: no") from error

    raw = Path(__file__).read_bytes()
    monkeypatch.setattr(fuzz, "_image_files", lambda: [("png", _png(fuzz)), ("txt", raw)])
    assert not fuzz.fuzz(["images"], cases=100, seed=5).faults
    monkeypatch.setattr(fuzz, "read_image", plain)
    report = fuzz.fuzz(["images"], cases=100, seed=5)
    assert report.faults and report.cases == {"images": 100}
    _, case, problem = report.faults[0]
    again = fuzz.fuzz(["images"], cases=1, first=case, seed=5)
    assert "not a readable error" in problem and len(again.faults) == 1 and again.faults[0][1] == case


def _png(fuzz: Any) -> bytes:
    with fuzz.io.BytesIO() as memory:
        Image.effect_noise((20, 10), 50).save(memory, format="PNG")
        return memory.getvalue()


def test_every_kind_of_fault_is_seen(fuzz: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def target(random: Random, folder: Path) -> None:
        """Fails by the number of the case that the seed of the generator tells."""
        number = int((folder / "number").read_text()) if (folder / "number").exists() else 0
        (folder / "number").write_text(str(number + 1))
        if number == 1:
            raise KeyError("unexpected")
        if number == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        if number == 3:
            time.sleep(60)
        if number == 4:
            warnings.warn("printed for each image", stacklevel=1)
        if number == 5:
            bytearray(300 * 2**20)

    def other(random: Random, folder: Path) -> None:
        assert random.random() < 1

    monkeypatch.setitem(fuzz.TARGETS, "target", target)
    monkeypatch.setitem(fuzz.TARGETS, "other", other)
    monkeypatch.setattr(fuzz, "LONGEST_SECONDS", 2)
    monkeypatch.setattr(fuzz, "MOST_MEMORY", 200 * 2**10)
    report = fuzz.fuzz(["target", "other"], cases=8)
    assert report.cases == {"target": 8, "other": 8}
    wanted = [
        "KeyError: 'unexpected'",
        "ended with -9",
        "no answer in 2 seconds",
        "UserWarning: printed",
        "took 0.3 GiB",
    ]
    assert [case for _, case, _ in report.faults] == [1, 2, 3, 4, 5]
    assert all(want in problem for want, (_, _, problem) in zip(wanted, report.faults, strict=True)), report.faults


def test_the_command(fuzz: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert fuzz.main(["lists", "--seconds", "1"]) == 0
    assert "lists" in capsys.readouterr().out
    monkeypatch.setitem(fuzz.TARGETS, "lists", lambda random, folder: 1 / 0)
    assert fuzz.main(["lists", "--case", "7", "--seed", "3"]) == 1
    out = capsys.readouterr().out
    assert "ZeroDivisionError" in out and "lists --seed 3 --case 7" in out and "lists 1 cases; 1 faults" in out
    with pytest.raises(SystemExit):
        fuzz.main(["nothing"])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "cases"), [("configs", 40), ("checkpoints", 15)])
def test_a_short_run_of_a_slow_target(name: str, cases: int, fuzz: Any) -> None:
    report = fuzz.fuzz([name], cases=cases, seed=5)
    assert report.cases == {name: cases} and not report.faults, report.faults
