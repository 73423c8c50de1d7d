"""allnc.predict: names with commas and quotes, every format, lists and folders, what cannot be read, mistakes."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import allnc
from allnc import predict
from allnc.inference import predict as predicting
from allnc.inference.formats import Row, Writer
from allnc.inference.paths import check_sources, image_paths
from allnc.inference.predict import predict_files
from tests.inference.conftest import CLASSES, rows_of


@pytest.fixture
def photos(tree: Path, tmp_path: Path) -> Path:
    """Images below a folder with an odd name, a damaged one, a text, a hidden one, and a link around all of them."""
    folder = tmp_path / 'a, "b"'
    (folder / "inner").mkdir(parents=True)
    for at, name in enumerate(CLASSES):
        shutil.copy(tree / "test" / name / "0.png", folder / "inner" / f"{at}.PNG")
    (folder / "broken.jpg").write_text("no image")
    (folder / "notes.txt").write_text("no image")
    shutil.copy(tree / "test" / CLASSES[0] / "0.png", folder / ".hidden.png")
    (folder / "inner" / "up").symlink_to(folder)
    return folder


def names(folder: Path) -> list[str]:
    return [str(folder / "broken.jpg"), *(str(folder / "inner" / f"{at}.PNG") for at in range(3))]


def test_every_format_says_the_same(run_of_files: Path, photos: Path, tmp_path: Path) -> None:
    words = [str(run_of_files), str(photos), "--top", "2"]
    for kind in ("csv", "json", "jsonl"):
        assert predict.main([*words, "--format", kind, "--out", str(tmp_path / kind)]) == 1
    loaded = allnc.load(run_of_files)
    shares, classes = loaded(names(photos)[1:]).topk(2, dim=1)
    wanted = [[loaded.classes[c] for c in row] for row in classes.tolist()]

    head, broken, *rows = rows_of(tmp_path / "csv")
    assert head == ["path", "class_1", "probability_1", "class_2", "probability_2", "error"]
    assert broken[:5] == [names(photos)[0], "", "", "", ""] and "no image format that is known" in broken[5]
    assert [row[0] for row in rows] == names(photos)[1:] and [row[1:4:2] for row in rows] == wanted
    assert [float(row[2]) for row in rows] == pytest.approx(shares[:, 0].tolist(), rel=1e-5)

    objects = json.loads((tmp_path / "json").read_text())
    assert objects == [json.loads(line) for line in (tmp_path / "jsonl").read_text().splitlines()]
    assert (
        set(objects[0]) == {"path", "error"} and [[p["class"] for p in o["predictions"]] for o in objects[1:]] == wanted
    )
    assert not list(tmp_path.glob("*.part"))


def test_the_table_has_a_line_an_image(run_of_files: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert predict.main([str(run_of_files), str(photos / "inner" / "*.PNG")]) == 0
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 3 and said.out.count(" %") == 9 and "3 images in" in said.err
    assert predict.main([str(run_of_files), str(photos / "broken.jpg")]) == 1
    said = capsys.readouterr()
    assert "not read: must be a readable image" in said.out and "1 could not be read" in said.err


def test_sources_come_in_their_order(photos: Path) -> None:
    listed = io.StringIO("one.png\r\n\ntwo.png\n")
    first = names(photos)
    assert [*image_paths([first[1], str(photos), "-", str(photos / "inner" / "[01].PNG")], listed)] == [
        first[1],
        *first,
        "one.png",
        "two.png",
        *first[1:3],
    ]
    empty = photos / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match=r"the folder .*empty holds none, .* ends in \.jpg "):
        check_sources([first[1], str(empty)])
    check_sources([first[1], str(photos)])


def test_workers_change_nothing(run_of_files: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = names(photos) * 40  # three parts of 64 at most
    texts = []
    for workers in (0, 2):
        stream = io.StringIO()
        done = predict_files(allnc.load(run_of_files), iter(paths), Writer(stream, "jsonl", 1), workers=workers)
        assert (done.images, done.unread) == (160, 40)
        texts.append(stream.getvalue())
    assert texts[0] == texts[1]


def test_a_prior_moves_the_probabilities(run_of_files: Path, photos: Path, tmp_path: Path) -> None:
    """The recipe's loss assumes even classes: under the training frequencies each counts with its share."""
    plain, adjusted = (allnc.load(run_of_files, prior=prior) for prior in (None, "train"))
    counts = torch.tensor(plain.card.class_counts, dtype=torch.float64)
    even, trained = (each(names(photos)[1:]).double() for each in (plain, adjusted))
    wanted = even * counts / (even * counts).sum(1, keepdim=True)
    torch.testing.assert_close(trained, wanted, rtol=1e-5, atol=1e-7)
    (tmp_path / "prior.csv").write_text('"apple, red",1\n"the ""pear""",0\nÜgli,1\n')
    share = allnc.load(run_of_files, prior=str(tmp_path / "prior.csv"))(names(photos)[1])
    assert share[0, sorted(CLASSES).index('the "pear"')] == 0 and float(share.sum()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gone.png"], "there is no such file or folder: gone.png"),
        (["*.gone"], "no file fits the pattern: *.gone"),
        (["-", "-"], "must name standard input once"),
        ([".", "--top", "0"], "--top must be >= 1; got 0"),
        ([".", "--workers", "-1"], "--workers must be >= 0"),
        ([".", "--overwrite"], "--overwrite would be ignored without --out"),
    ],
)
def test_mistakes(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert predict.main(["run", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_files_that_are_there_stay(run_of_files: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = photos / "notes.txt"
    words = [str(run_of_files), str(photos), "--out", str(kept)]
    assert predict.main(words) == 2 and kept.read_text() == "no image"
    assert predict.main([*words, "--top", "4", "--overwrite"]) == 2 and kept.read_text() == "no image"
    assert "--top must be <= 3, the number of classes; got 4" in capsys.readouterr().err
    assert predict.main([*words, "--overwrite"]) == 1 and "apple, red" in kept.read_text()


def test_what_a_prediction_that_failed_has_left_is_said_and_kept(
    run_of_files: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, part = photos / "out.csv", photos / "out.csv.part"
    words = [str(run_of_files), str(photos), "--format", "csv", "--out", str(out)]

    def failing(predictor: object, paths: object, writer: Writer, **_: object) -> None:
        writer.write([Row("one.png", ["a"], [1.0])])
        raise faults.pop()

    with monkeypatch.context() as patch:
        patch.setattr(predicting, "predict_files", failing)
        faults = [ValueError("no worker"), OSError(28, "No space left on device")]
        while faults:
            assert predict.main([*words, "--overwrite"]) == 2
            assert f"what was predicted is in {part}\n" in capsys.readouterr().err
    before = part.read_bytes()
    assert b"one.png" in before
    assert predict.main(words) == 2
    assert f"{part} is there, of a prediction that was stopped" in capsys.readouterr().err
    assert part.read_bytes() == before and not out.exists()
    assert predict.main([*words, "--overwrite"]) == 1 and out.exists() and not part.exists()
    assert predict.main([*words[:-1], str(photos), "--overwrite"]) == 2
    assert f"--out must be a file; got the folder {photos}" in capsys.readouterr().err


def test_a_mistake_is_answered_before_torch_is_imported() -> None:
    program = "import sys; from allnc import predict; print(predict.main(['run', 'gone.png']), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "2 False"


def test_paths_that_are_no_text_are_written_as_they_are(tmp_path: Path) -> None:
    name = os.fsdecode(b"\xff\n.png")
    with (tmp_path / "out").open("w", encoding="utf-8", errors="surrogateescape", newline="") as stream:
        writer = Writer(stream, "csv", 1)
        writer.write([Row(name, ["a"], [1.0])])
    assert b'"\xff\n.png",a,1,\n' in (tmp_path / "out").read_bytes()
