"""Lists of images: what a line may be, encodings, labels, and lists that contradict themselves."""

from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from allnc.config import DataConfig
from allnc.data import ImageSet, lists, load
from tests.rights import needs_root, without_rights


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png", "one two.png", "sub/c.png", "sub/été.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (20, 16)).save(tmp_path / name)
    return tmp_path


def read(root: Path, train: str | bytes, test: str | bytes = "sub/c.png 0\n") -> tuple[ImageSet, ImageSet]:
    for name, text in (("train.txt", train), ("test.txt", test)):
        (root / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return load(config(root))


def config(folder: Path, **changes: Any) -> DataConfig:
    values: dict[str, Any] = {
        "name": "image_list",
        "root": str(folder),
        "train_list": str(folder / "train.txt"),
        "test_list": str(folder / "test.txt"),
        "augmentation": "none",
        **changes,
    }
    return DataConfig(**values)


def test_paths_and_labels(root: Path) -> None:
    train, test = read(root, "one two.png 0\nb.png 1\n\nsub/c.png 1\n", "a.png 1\n")
    assert tuple(train.paths) == (str(root / "one two.png"), str(root / "b.png"), str(root / "sub/c.png"))
    assert (train.labels.tolist(), test.labels.tolist(), train.num_classes) == ([0, 1, 1], [1], 2)
    assert train.count_text == "3" and not train.notes and not test.notes  # every image, whatever the class sizes


@pytest.mark.parametrize(
    "text",
    [
        "\ufeffa.png 0\nsub/été.png 1\n".encode(),
        b"a.png 0\r\nsub/\xc3\xa9t\xc3\xa9.png 1\r\n",
        b"a.png 0\rsub/\xc3\xa9t\xc3\xa9.png 1",
        "a.png\t0\n\n \t\nsub/été.png \t 1  \n".encode(),
        "  a.png 00\n\tsub/été.png 1".encode(),
    ],
    ids=["byte order mark", "CRLF", "CR", "tabs", "blanks around"],
)
def test_what_editors_make_of_a_list(text: bytes, root: Path) -> None:
    train, _ = read(root, text)
    assert tuple(train.paths) == (str(root / "a.png"), str(root / "sub/été.png")) and train.labels.tolist() == [0, 1]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_do_not_depend_on_the_blocks(end: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [("a.png", 0), ("sub/été.png", 1), ("one two.png", 2), ("b.png", 3), ("./sub/c.png", 4)]
    text = end.join(f"{path} {label}{end}" for path, label in pairs)  # with an empty line after each
    for block in range(20, 90):
        monkeypatch.setattr(lists, "BLOCK", block)
        train, _ = read(root, text, "b.png 3\n")
        assert list(train.paths) == [f"{root}/{path}" for path, _ in pairs] and train.labels.tolist() == [0, 1, 2, 3, 4]
        with pytest.raises(ValueError, match=r"c\.png must have one label; got 4 in .*:9 and 0 in .*:11$"):
            read(root, f"{text}{end}sub/c.png 0{end}")


def test_a_path_may_hold_what_ends_lines_elsewhere(root: Path) -> None:
    for odd in ("x\x85y.png", "x\u2028y.png", "x\x0cy.png", "x\u00a0y.png", "\u3000.png"):
        Image.new("RGB", (2, 2)).save(root / odd)
        train, _ = read(root, f"{odd} 0\n")
        assert tuple(train.paths) == (str(root / odd),)


def test_absolute_paths_and_paths_out_of_the_root(root: Path) -> None:
    """A list is its owner's own file: it may name images anywhere."""
    (root / "inner").mkdir()
    (root / "train.txt").write_text(f"../a.png 0\n{root}/b.png 1\n")
    (root / "test.txt").write_text("../sub/c.png 0\n")
    train, _ = load(config(root, root=str(root / "inner")))
    assert tuple(train.paths) == (f"{root}/inner/../a.png", f"{root}/b.png")


def test_home_is_expanded(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read(root, "a.png 0\n")
    monkeypatch.setenv("HOME", str(root))
    train, _ = load(config(root, root="~", train_list="~/train.txt", test_list="~/test.txt"))
    assert tuple(train.paths) == (str(root / "a.png"),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.png 0\ngone.png 1\n", r"gone\.png, which is missing \(.*train\.txt:2\): data\.root must be the folder"),
        ("a.png\n", r"train\.txt:1 must be `relative/path label`, the label a number from 0; got 'a\.png'"),
        ("", r"data\.train_list must name images; got the empty list"),
        (" \n\n", r"data\.train_list must name images; got the empty list"),
        ("a.png 0\nb.png -1\n", r"train\.txt:2 must be .* a number from 0; got 'b\.png -1'"),
        ("a.png +0\n", r"train\.txt:1 must be"),
        ("a.png 0.0\n", r"train\.txt:1 must be"),
        ("a.png ²\n", r"train\.txt:1 must be .*²"),
        ("a.png ٣\n", r"train\.txt:1 must be .*٣"),
        ("a.png 1_0\n", r"train\.txt:1 must be"),
        ("a.png,0\n", r"train\.txt:1 must be"),
        ("0\n", r"train\.txt:1 must be"),
        (" 0\n", r"train\.txt:1 must be"),
        ("a.png 0\na\0.png 0\n", r"train\.txt:2 must be text; got a NUL character"),
        ("a.png 0\na.png 0\x00\n", r"train\.txt:2 must be text; got a NUL character"),
        ("x" * 200_000 + " 0\n", r"train\.txt:1 must be .*; got a line of 65536 bytes or more"),
        ("x" * 5000 + " 0\n", r"x, which is missing \(.*train\.txt:1\)"),
        ("a.png 0\nb.png 3000000000\n", r"labels up to 3000000000 \(.*train\.txt:2\) and no image of class 1"),
        ("a.png 0\n\nb.png " + "9" * 30 + "\n", r"train\.txt:3 must have a label below 10\^18; got 9999"),
        (
            "a.png 1\nb.png 2\n",
            r"got labels up to 2 \(.*train\.txt:2\) and no image of class 0: subtract 1 from each, or train on",
        ),
        ("a.png 0\nb.png 2\n", r"from 0 without a gap; got labels up to 2 \(.*train\.txt:2\) and no image of class 1$"),
        (
            "a.png,0\nb.png,1\n",
            r"train\.txt:1 must be .* a blank or a tab between them; got 'a\.png,0': replace the ','",
        ),
        ("a.png;cat\n", r"got 'a\.png;cat': replace the ';', or train on the list as it is by python -m allnc\.train"),
        ("a,b.png -1\n", r"train\.txt:1 must be .* a number from 0; got 'a,b\.png -1'"),
        ("a.png 0\n\nb.png 1\na.png 1\n", r"a\.png must have one label; got 0 in .*\.txt:1 and 1 in .*\.txt:4"),
        ("sub/c.png 0\n./sub//x/../c.png 1\n", r"c\.png must have one label; got 0 in .*:1 and 1 in .*:2"),
    ],
)
def test_broken_lists_are_refused_before_training(text: str, message: str, root: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=message) as caught:
        read(root, text)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 6000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB; label 3e9 took 24 GB


def test_a_test_label_that_training_lacks(root: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.test_list must have labels below 1, .*; got 1 in .*test\.txt:2"):
        read(root, "a.png 0\n", "sub/c.png 0\nb.png 1\n")


def test_an_image_in_both_lists_is_said_and_two_labels_are_refused(root: Path) -> None:
    train, test = read(root, "a.png 0\nb.png 1\na.png 0\n", "./a.png 0\nsub/c.png 1\n")
    assert len(train) == 3 and not train.notes  # twice in one list with one label: drawn twice as often
    assert test.notes == (f"1 of the test images are in the training list too, such as {root}/a.png",)
    with pytest.raises(ValueError, match=r"a\.png must have one label; got 0 in .*train\.txt:1 and 1 in .*test\.txt:2"):
        read(root, "a.png 0\nb.png 1\n", "sub/c.png 1\na.png 1\n")


@pytest.mark.parametrize(
    ("encoding", "text", "remedy"),
    [
        ("utf-16", "a.png 0\n", "iconv -f UTF-16 -t UTF-8"),
        ("utf-16-le", "a.png 0\nsub/été.png 1\n", "iconv -f UTF-16 -t UTF-8"),
        ("utf-16-le", "a.png 0\n", "NUL character: save the list as UTF-8"),
        ("latin-1", "a.png 0\nsub/été.png 1\n", "iconv -f LATIN1 -t UTF-8"),
    ],
)
def test_other_encodings_are_named_with_the_remedy(encoding: str, text: str, remedy: str, root: Path) -> None:
    with pytest.raises(ValueError) as caught:
        read(root, text.encode(encoding))
    assert "train.txt" in str(caught.value) and remedy in str(caught.value)


def test_a_list_that_is_no_file(root: Path) -> None:
    os.mkfifo(root / "fifo")
    for name, problem in (
        ("sub", "is a folder"),
        ("fifo", "is no file"),
        ("gone", "is missing"),
        ("a\0", "is missing"),
    ):
        (root / "test.txt").write_text("sub/c.png 0\n")
        with pytest.raises(ValueError, match=rf"data\.train_list must be a text file .*, which {problem}"):
            load(config(root, train_list=str(root / name)))


@needs_root
def test_a_list_without_permission(root: Path) -> None:
    (root / "test.txt").write_text("sub/c.png 0\n")
    (root / "train.txt").write_text("a.png 0\n")
    (root / "train.txt").chmod(0)
    refusal = pytest.raises(ValueError, match=r"data\.train_list must be a readable file; got .*: Permission denied")
    with without_rights(root), refusal:
        load(config(root))


@pytest.mark.parametrize("folder", ["/nowhere", "x" * 5000, "a\0b", "/dev/null"])
def test_a_root_that_is_no_folder(folder: str, root: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.root must be the folder of the images; got"):
        load(config(root, root=folder))
