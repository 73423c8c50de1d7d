"""The lists of ImageNet-LT and iNaturalist 2018: read at their real size, trained on and measured by the real commands.

Training lists are made up and have the published class sizes. The test lists are the published ones where ALLNC_LISTS
names their folder (or data/lists holds them), and made up to the same size elsewhere. `python
benchmarks/real_lists.py train imagenet_lt inat18` trains on all of it.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from allnc import evaluate
from allnc.config import DataConfig
from allnc.data import load
from tests.faults.runs import command
from tests.processes import needs_gloo
from tests.trainer.test_ranks import launch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
TINY = (
    *("--model.name", "resnet8", "--model.width", "4", "--model.projection_hidden", "16", "--data.image_size", "8"),
    *("--train.epochs", "1", "--train.warmup_epochs", "0", "--train.device", "cpu", "--train.threads", "1"),
    *("--train.precision", "fp32", "--data.workers", "1"),
)


@pytest.fixture
def pictures(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("pictures")


def published(name: str, pictures: Any) -> list[str]:
    """Lines of a published list; skips the test where it is not here."""
    if not (pictures.LISTS / name).is_file():
        pytest.skip(f"{name} is not in {pictures.LISTS}, nor does ALLNC_LISTS name its folder")
    return (pictures.LISTS / name).read_text().splitlines()


def tree(folder: Path, pictures: Any, train: list[str], test: list[str], step: int | None = None) -> dict[str, str]:
    """Write both lists and the files of their lines, or of every so many of them; return the options of data."""
    photos = pictures.write_photos(folder / "photos", 40, 20, 16)
    for name, lines in (("train", train), ("test", test)):
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")
        there = lines[:: step or 1] if step is None else lines[:: max(1, len(lines) // step)]
        pictures.link_tree(folder / "root", pictures.names_of(there), photos)
    return {f"{name}_list": str(folder / f"{name}.txt") for name in ("train", "test")} | {"root": str(folder / "root")}


@pytest.mark.parametrize("name", ["imagenet_lt", "inat18"])
def test_lists_of_the_real_size_are_read_at_once_and_in_little_memory(name: str, pictures: Any, tmp_path: Path) -> None:
    profile = pictures.PROFILES[name]
    options = tree(tmp_path, pictures, list(pictures.training_lines(profile)), pictures.test_lines(profile), step=2000)
    config = DataConfig(name="image_list", augmentation="none", **options)  # pyright: ignore[reportArgumentType]
    began = time.process_time()
    train, test = load(config)
    assert time.process_time() - began < 5
    tracemalloc.start()
    load(config)
    assert tracemalloc.get_traced_memory()[1] < 200 * 2**20
    tracemalloc.stop()
    assert (len(train), len(test), train.num_classes) == (profile.images, profile.tests, profile.classes)
    counts = train.class_counts
    assert (int(counts.max()), int(counts.min())) == (profile.most, profile.least)
    assert not train.notes and not test.notes


def part_of_imagenet_lt(folder: Path, pictures: Any, share: int) -> tuple[list[str], int]:
    """Words that train a tiny network on one image in `share` of each class, at least one; and how many these are."""
    profile = pictures.PROFILES["imagenet_lt"]
    train = list(pictures.training_lines(profile, -(-pictures.sizes_of(profile) // share)))
    options = tree(folder, pictures, train, pictures.test_lines(profile)[:: share // 4])
    words = [word for name, value in options.items() for word in (f"--data.{name}", value)]
    return ["--config", "imagenet_lt", *words, *TINY], len(train)


def test_a_small_part_of_imagenet_lt_trains_and_is_measured(
    pictures: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, images = part_of_imagenet_lt(tmp_path, pictures, 200)
    out = tmp_path / "run"
    status, errors = command(*words, "--out", str(out))
    assert status == 0, errors
    summary = json.loads((out / "summary.json").read_text())
    assert sum(summary["class_counts"]) == images and len(summary["class_counts"]) == 1000
    (record,) = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert 0 < record["loader_wait"] < 1 and summary["loader_wait"] == record["loader_wait"]
    capsys.readouterr()
    assert evaluate.main([str(out)]) == 0
    accuracy = re.search(r"accuracy \(test\) +│ +([\d.]+)", capsys.readouterr().out)
    assert accuracy is not None and float(accuracy.group(1)) == pytest.approx(summary["accuracy"], abs=0.06)


@needs_gloo
def test_two_processes_in_parts_are_killed_resumed_by_one_and_evaluated(
    pictures: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, _ = part_of_imagenet_lt(tmp_path, pictures, 400)
    out = tmp_path / "run"
    process = launch(2, *words, "--train.epochs", "3", "--train.micro_batch", "32", "--out", str(out))
    while not (out / "checkpoint.json").exists():
        assert process.poll() is None
        time.sleep(0.02)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)  # the launcher ends the other one
    process.communicate(timeout=60)
    assert not (out / "summary.json").exists(), "the run was over before it was killed"
    status, errors = command("--resume", "--out", str(out))
    assert status == 0, errors
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in records] == [1, 2, 3]
    assert records[-1]["loss"] < records[0]["loss"]
    assert evaluate.main([str(out)]) == 0
    assert "accuracy (test)" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["ImageNet_LT_val.txt", "ImageNet_LT_test.txt", "Places_LT_test.txt"])
def test_published_lists_are_read_as_they_are(name: str, pictures: Any, tmp_path: Path) -> None:
    lines = published(name, pictures)
    options = tree(tmp_path, pictures, lines, lines, step=2000)
    train, test = load(DataConfig(name="image_list", augmentation="none", **options))  # pyright: ignore
    assert [
        f"{path.removeprefix(options['root'] + '/')} {y}" for path, y in zip(train.paths, train.labels, strict=True)
    ] == lines
    assert test.notes == (
        f"{len(lines):,} of the test images are in the training list too, such as {min(train.paths)}",
    )
