"""`python -m allnc.report`: what stands on the page, what is said where something is missing, and every mistake."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from allnc.config import DataConfig
from allnc.report.__main__ import main
from tests.report.runs import made_up

NASTY = ['<b>bold</b> & "quoted"', "</script><script>alert(1)</script>", "größe\u202e", "plain"]
VOID = {"meta", "input", "img", "br", "link"}


class Balanced(HTMLParser):
    """Fails at a tag that is not closed, and gathers what the page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loaded: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loaded += [str(v) for k, v in attrs if k in ("src", "href") and not str(v).startswith(("data:", "#"))]
        self.ids += [str(v) for k, v in attrs if k == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loaded += [str(v) for k, v in attrs if k in ("src", "href") and not str(v).startswith("data:")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def check(page: str) -> None:
    parser = Balanced()
    parser.feed(page)
    assert not parser.open and not parser.loaded and len(set(parser.ids)) == len(parser.ids)
    assert not re.search(r"url\(|@import|fetch\(", page)


@pytest.fixture
def photos(tmp_path: Path) -> DataConfig:
    """A folder with a red picture for each of the eight measured images of `a` and `b`."""
    root = tmp_path / "photos"
    (root / "train").mkdir(parents=True)
    for number in range(8):
        Image.new("RGB", (60, 40), (200, 30 * number, 0)).save(root / f"{number}.png")
    return DataConfig(name="image_folder", root=str(root), augmentation="none")


@pytest.fixture
def two(tmp_path: Path, photos: DataConfig) -> tuple[Path, Path]:
    paths = [f"{n}.png" for n in range(8)]
    for name, seed in (("a", 0), ("b", 3)):
        made_up(
            tmp_path / name, classes=NASTY, counts=np.array([200, 50, 50, 4]), per_class=2, seed=seed, data=photos,
            paths=paths,
        )  # fmt: skip
    return tmp_path / "a", tmp_path / "b"


def test_two_runs_side_by_side(two: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "page.html"
    assert main([*map(str, two), "--stored", "--out", str(out), "--labels", "<i>one", "two"]) == 0
    assert capsys.readouterr().out.splitlines() == [str(out)]
    page = out.read_text()
    check(page)
    assert "<b>bold" not in page and "<i>one" not in page and "</script><script>" not in page
    assert "&lt;b&gt;bold&lt;/b&gt; &amp; &#34;quoted&#34;" in page
    for text in (
        "macro-f1",
        "calibration error",
        "nc1 within-class",
        "304 (200 to 4 a class)",
        "8 (test)",
        "difference",
    ):
        assert text in page.lower()
    files = [np.load(run / "predictions.npz") for run in two]
    first, second = (float(100 * np.mean(file["labels"] == file["predicted"])) for file in files)
    assert f"<td>{first:.1f}</td>" in page and f"<td>{second:.1f} <span" in page
    assert re.search(r"<code>seed</code></th><td>0</td><td>3</td>", page)
    mistakes = sum(int((file["labels"] != file["predicted"]).sum()) for file in files)
    assert page.count('<img src="data:image/jpeg;base64,') == mistakes > 0


def test_what_is_missing_is_said(two: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = two[0], tmp_path / "page.html"
    (run / "summary.json").unlink()
    (run / "metrics.jsonl").unlink()
    shutil.rmtree(tmp_path / "photos")
    assert main([str(run), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    for what in (
        "summary.json is missing: the run has not finished",
        "metrics.jsonl has no record of an epoch: there are no curves",
        "the angles between classes are missing:",
        "the images of mistakes are missing: data.root must be the folder of the images;",
    ):
        assert what in said and what in out.read_text()
    check(out.read_text())
    (run / "predictions.npz").unlink()
    assert main([str(run), "--out", str(out), "--stored"]) == 2
    assert "has a configuration alone" in capsys.readouterr().err


def test_images_that_cannot_be_read_are_counted(two: tuple[Path, Path], tmp_path: Path) -> None:
    for file in (tmp_path / "photos").glob("*.png"):
        file.write_bytes(b"no picture")
    assert main([str(two[0]), "--stored", "--out", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "<img" not in page and re.search(r"\d images could not be read", page)


def test_predictions_of_other_weights_are_told(two: tuple[Path, Path], tmp_path: Path) -> None:
    (two[0] / "summary.json").write_text('{"accuracy": 12.5}')
    assert main([str(two[0]), "--stored", "--out", str(tmp_path / "page.html")]) == 0
    assert "summary.json has 12.50 %: they are of other weights" in (tmp_path / "page.html").read_text()


def test_runs_of_other_classes_stand_apart(two: tuple[Path, Path], tmp_path: Path) -> None:
    counts, data = np.array([9, 5, 3]), DataConfig(name="image_folder", root="gone", augmentation="none")
    made_up(tmp_path / "c", classes=["x", "y", "z"], counts=counts, per_class=2, data=data)
    out = tmp_path / "page.html"
    assert main([*map(str, two), str(tmp_path / "c"), "--stored", "--out", str(out)]) == 0
    page = out.read_text()
    check(page)
    assert "have different classes or were measured on different images, so they stand apart" in page
    assert page.count('class="sortable"') == 2


def test_runs_measured_on_other_images_are_not_compared(two: tuple[Path, Path], tmp_path: Path) -> None:
    path = two[1] / "predictions.npz"
    with np.load(path) as file:
        kept = {name: file[name] for name in file.files}
    rows = ("labels", "predicted", "confidence", "second", "second_confidence", "true_confidence", "positions", "paths")
    np.savez(path, **{name: values[:-2] if name in rows else values for name, values in kept.items()})  # pyright: ignore[reportArgumentType]
    out = tmp_path / "page.html"
    assert main([*map(str, two), "--stored", "--out", str(out)]) == 0
    page = out.read_text()
    assert "measured on different images, so they stand apart" in page and page.count('class="sortable"') == 2
    assert '<span class="better">' not in page.split("Small numbers")[0].split("<tbody")[1]


def test_where_files_lie_is_not_told(two: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    assert main([*map(str, two), "--stored", "--out", str(out)]) == 0
    assert str(tmp_path) not in out.read_text()


def test_thousands_of_classes_stay_small(tmp_path: Path) -> None:
    counts = np.maximum(1, 1000 * np.exp(-6 * np.arange(8142) / 8142)).astype(int)
    made_up(tmp_path / "run", classes=[f"Genus species {c}" for c in range(8142)], counts=counts, per_class=3)
    start = time.process_time()
    assert main([str(tmp_path / "run"), "--stored", "--out", str(tmp_path / "page.html")]) == 0
    assert time.process_time() - start < 20
    page = (tmp_path / "page.html").read_text()
    assert len(page) < 10e6 and "8,142 classes in 40 groups of similar size" in page


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gone"], "RUN must be the folder of a run; got {at}/gone, which is no folder"),
        (["photos"], "which has no config.yaml of a run"),
        (["a", "a"], "RUN must be different folders; got one twice"),
        (["a", "--labels", "x", "y"], "--labels must name each of the 1 runs; got 2 names"),
        (["a", "--out", "photos"], "--out must be a file; got the folder {at}/photos: give {at}/photos/report.html"),
        (["a", "--out", "photos/0.png"], "--out must be a new file or an earlier report; {at}/photos/0.png is neither"),
        (["a", "--out", "gone/report.html"], "--out must be in a folder that is there; got {at}/gone/report.html"),
        (["a", "--stored", "--train.device", "cpu"], "--train.device would be ignored with --stored"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], message: str, two: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = ("gone", "photos", "a", "photos/0.png", "gone/report.html")
    placed = [str(tmp_path / word) if word in places else word for word in words]
    assert main([*placed, *([] if "--out" in placed else ["--out", str(tmp_path / "page.html")])]) == 2
    error = capsys.readouterr().err
    assert message.format(at=tmp_path) in error and error.count("\n") == 1
    assert not list(tmp_path.glob("*.html")) and (tmp_path / "photos" / "0.png").read_bytes()[:4] == b"\x89PNG"


def test_mistakes_are_answered_before_torch_is_imported() -> None:
    program = "import sys; from allnc.report.__main__ import main; main(['gone']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False" and "RUN must be the folder of a run" in done.stderr


def test_an_earlier_report_is_replaced(two: tuple[Path, Path], tmp_path: Path) -> None:
    words = [str(two[0]), "--stored", "--out", str(tmp_path / "page.html")]
    assert main(words) == 0 and main([*words, "--labels", "again"]) == 0
    assert "<h1>again</h1>" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    "files",
    [
        {"labels": None},
        {"predicted": np.zeros(3, np.int32)},
        {"labels": np.full(8, 4, np.int32)},
        {"confidence": np.full(8, np.nan, np.float32)},
        {"class_counts": np.ones(3, np.int64)},
        {"classes": np.array([{}, 1], object)},
    ],
)
def test_damaged_predictions_are_named(files: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made_up(tmp_path / "run", classes=list("abcd"), counts=np.array([9, 5, 3, 1]), per_class=2)
    held = dict(np.load(tmp_path / "run" / "predictions.npz"))
    np.savez(tmp_path / "run" / "predictions.npz", **{k: v for k, v in (held | files).items() if v is not None})
    assert main([str(tmp_path / "run"), "--stored", "--out", str(tmp_path / "page.html")]) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path}/run/predictions.npz must" in error and error.count("\n") == 1
    (tmp_path / "run" / "predictions.npz").write_bytes(b"PK nothing")
    assert main([str(tmp_path / "run"), "--stored", "--out", str(tmp_path / "page.html")]) == 2
    assert "predictions.npz must" in capsys.readouterr().err
