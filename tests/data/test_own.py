"""Images of one's own: every way in which people keep them, and what is not as it should be."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from allnc.config import DataConfig
from allnc.data import ImageSet, load
from allnc.data.own import Index, read_index, scan
from allnc.data.own.split import draw_groups
from tests.rights import needs_root, without_rights


def picture(path: Path, value: int, mode: str = "RGB", size: tuple[int, int] = (16, 16), **options: Any) -> Path:
    """Write an image whose bytes the value decides."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.RandomState(value).randint(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, **options)
    return path


def tree(root: Path, sizes: dict[str, int], start: int = 0) -> Path:
    """Write a folder of class folders."""
    for name, number in sizes.items():
        for i in range(number):
            picture(root / name / f"{i}.png", start := start + 1)
    return root


def config(root: Path, **changes: Any) -> DataConfig:
    values: dict[str, Any] = {"name": "own", "root": str(root), "augmentation": "none", "image_size": 16, **changes}
    return DataConfig(**values)


def looked(root: Path, **changes: Any) -> Index:
    return scan(config(root, **changes))


def read(root: Path, **changes: Any) -> tuple[ImageSet, ImageSet]:
    return load(config(root, **changes))


def numbers(index: Index, split: str) -> dict[str, int]:
    return dict(Counter(row.label for row in index.of(split)))


def test_one_folder_of_class_folders_is_split_by_class(tmp_path: Path) -> None:
    index = looked(tree(tmp_path, {"ant": 20, "bee": 5, "cat": 2, "dog": 1}))
    assert numbers(index, "train") == {"ant": 16, "bee": 4, "cat": 1, "dog": 1}
    assert numbers(index, "test") == {"ant": 4, "bee": 1, "cat": 1}
    assert index.given == () and index.classes == ("ant", "bee", "cat", "dog")
    assert "1 class trained but not tested, having one image alone or copies of it, such as dog" in index.notes


def test_a_folder_above_several_sets_is_said(tmp_path: Path) -> None:
    for kind in ("colour", "grey"):
        tree(tmp_path / kind, {"circle": 3, "bar": 3}, start=10 * len(kind))
    said = "every class folder holds bar and circle: if these are the classes, give one of the folders above them"
    assert said in looked(tmp_path).notes
    picture(tmp_path / "third" / "1.png", 99)
    picture(tmp_path / "third" / "2.png", 98)
    assert said not in looked(tmp_path).notes  # a class without such folders


def test_the_split_is_the_same_every_time_and_another_with_another_seed(tmp_path: Path) -> None:
    tree(tmp_path, {"a": 30, "b": 30})
    first, again, other = (looked(tmp_path, subset_seed=seed).rows for seed in (0, 0, 1))
    assert first == again and first != other
    assert {row.path for row in first} == {row.path for row in other}


@pytest.mark.parametrize(
    ("names", "validation", "test"),
    [
        (("train", "val", "test"), "val", "test"),
        (("Training", "valid", "Testing"), "valid", "Testing"),
        (("TRAIN", "dev", "test_set"), "dev", "test_set"),
        (("train", "test"), None, "test"),
        (("train", "val"), None, "val"),
    ],
)
def test_folders_of_splits_have_many_names(
    tmp_path: Path, names: tuple[str, ...], validation: str | None, test: str
) -> None:
    for start, name in enumerate(names):
        tree(tmp_path / name, {"a": 2 + start, "b": 1}, start=100 * start)
    index = looked(tmp_path)
    for split, folder in (("train", names[0]), ("validation", validation), ("test", test)):
        assert {Path(row.path).parts[0] for row in index.of(split)} == ({folder} if folder else set())
    measured, tested = load(config(tmp_path, validation=0.5 if validation else 0.0))[1], read(tmp_path)[1]
    assert Path(measured.paths[0]).parts[-3] == (validation or test) and Path(tested.paths[0]).parts[-3] == test
    if names == ("train", "val"):
        assert "there are no test images: the validation images are what is measured" in index.notes


def test_a_folder_train_alone_is_split(tmp_path: Path) -> None:
    tree(tmp_path / "train", {"a": 10, "b": 10})
    assert numbers(looked(tmp_path), "test") == {"a": 2, "b": 2}


def test_validation_images_are_held_out_of_the_training_images(tmp_path: Path) -> None:
    tree(tmp_path, {"a": 20, "b": 20})
    index = looked(tmp_path, validation=0.25)
    assert [len(index.of(split)) for split in ("train", "validation", "test")] == [24, 8, 8]
    train, measured = load(config(tmp_path, validation=0.25))
    _, test = load(config(tmp_path, validation=0.25), tested=True)
    assert len(train) == 24 and not {*measured.paths} & {*train.paths} and not {*test.paths} & {*measured.paths}
    assert {*test.paths} == {*read(tmp_path)[1].paths}  # the test images are those without validation


def test_copies_stay_together_and_are_said(tmp_path: Path) -> None:
    tree(tmp_path, {"a": 4, "b": 10})
    for i in range(12):
        (tmp_path / "a" / f"copy{i}.png").write_bytes((tmp_path / "a" / "0.png").read_bytes())
    index = looked(tmp_path, test_share=0.5)
    same = {row.split for row in index.rows if row.copy_of == "a/0.png" or row.path == "a/0.png"}
    assert len(same) == 1
    assert "12 files with the same bytes as another one (column copy_of)" in index.notes


def test_copies_in_two_splits_or_two_classes_are_said(tmp_path: Path) -> None:
    tree(tmp_path / "train", {"a": 3, "b": 3})
    tree(tmp_path / "test", {"a": 2, "b": 2}, start=50)
    (tmp_path / "test" / "a" / "x.png").write_bytes((tmp_path / "train" / "a" / "1.png").read_bytes())
    (tmp_path / "train" / "b" / "y.png").write_bytes((tmp_path / "train" / "a" / "2.png").read_bytes())
    notes = " ".join(looked(tmp_path).notes)
    assert "1 image in two of training, validation and test set, such as train/a/1.png and test/a/x.png" in notes
    assert "1 image in two classes, such as train/a/2.png and train/b/y.png" in notes


def test_files_of_one_size_are_no_copies(tmp_path: Path) -> None:
    for value in (0, 255):  # uncompressed, the same tail, another first row
        pixels = np.zeros((80, 80), np.uint8)
        pixels[-1] = value
        for name in "ab":
            (tmp_path / name).mkdir(exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / name / f"{value}.bmp")
    rows = {row.path: row.copy_of for row in looked(tmp_path).rows}
    assert rows["a/255.bmp"] == "" and rows["b/255.bmp"] == "a/255.bmp" and rows["b/0.bmp"] == "a/0.bmp"


def test_what_cannot_be_read_stops_or_is_counted(tmp_path: Path) -> None:
    tree(tmp_path, {"a": 3, "b": 3})
    whole = picture(tmp_path / "a" / "large.jpg", 5, size=(300, 200)).read_bytes()
    (tmp_path / "a" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "b" / "empty.png").touch()
    (tmp_path / "b" / "text.PNG").write_text("no image")
    for ending in ("tif", "bmp", "webp"):
        file = picture(tmp_path / "b" / f"cut.{ending}", 6, size=(200, 200))
        file.write_bytes(file.read_bytes()[:-50])
    (tmp_path / "b" / "lost.png").symlink_to("nowhere.png")
    with pytest.raises(ValueError, match=r"7 of 14 images cannot be read, and none may be, .*--data.max_bad 7$"):
        looked(tmp_path)
    with pytest.raises(ValueError, match=r"data.max_bad allows 6"):
        looked(tmp_path, max_bad=6)
    index = looked(tmp_path, max_bad=7)
    out = {row.path: row.reason for row in index.rows if not row.split}
    bad = ("empty.png", "text.PNG", "lost.png", "cut.tif", "cut.bmp", "cut.webp")
    assert {*out} == {"a/cut.jpg", *(f"b/{name}" for name in bad)}
    assert "truncated" in out["a/cut.jpg"] and out["b/lost.png"] == "a link that leads nowhere"
    assert any(note.startswith("7 files left out that cannot be read, such as") for note in index.notes)


@needs_root
def test_files_and_folders_without_rights(tmp_path: Path) -> None:
    tree(tmp_path, {"a": 3, "b": 3})
    (tmp_path / "a" / "0.png").chmod(0)
    with without_rights(tmp_path), pytest.raises(ValueError, match=r"a/0.png \(Permission denied\)"):
        looked(tmp_path)
    (tmp_path / "a").chmod(0)
    with (
        without_rights(tmp_path),
        pytest.raises(ValueError, match=r"must be a readable folder; got: Permission denied"),
    ):
        looked(tmp_path)


def test_odd_names_come_back_from_the_table(tmp_path: Path) -> None:
    names = ["großer Bär", "кот", "tab\there", 'quote"d', "new\nline", os.fsdecode(b"latin\xe4"), "猫"]
    tree(tmp_path / "data", dict.fromkeys(names, 2))
    index = looked(tmp_path / "data")
    (tmp_path / "images.tsv").write_bytes(index.text())
    again = read_index(str(tmp_path / "images.tsv"), index.root)
    assert again.rows == index.rows and again.classes == index.classes and {*again.classes} == {*names}
    assert len(read(tmp_path / "data", index=str(tmp_path / "images.tsv"))[0]) == 7


def test_the_table_goes_with_the_folder(tmp_path: Path) -> None:
    index = looked(tree(tmp_path / "here", {"a": 5, "b": 5}))
    (tmp_path / "images.tsv").write_bytes(index.text())
    (tmp_path / "here").rename(tmp_path / "there")
    picture(tmp_path / "there" / "a" / "new.png", 99)  # is of no run that began before
    train, test = read(tmp_path / "there", index=str(tmp_path / "images.tsv"))
    assert (len(train), len(test)) == (8, 2) and train.classes == ("a", "b")
    with pytest.raises(ValueError, match=r"are missing: give the folder by --data.root"):
        read(tmp_path, index=str(tmp_path / "images.tsv"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "its first line must be path class split"),
        ("path\tclass\n", "its first line must be"),
        ("{head}a.png\ta\ttrain\t1\n", "line 2 must have 8 values"),
        ("{head}a.png\ta\tnowhere\t1\t1\tL\t\t\n", "line 2 must have 8 values and a split"),
        ("{head}a.png\ta\ttrain\tx\t1\tL\t\t\n", "line 2 must have width and height; got 'x' and '1'"),
    ],
)
def test_a_damaged_table_is_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "images.tsv"
    head = "path\tclass\tsplit\twidth\theight\tmode\tcopy_of\treason\n"
    file.write_text(text.format(head=head))
    with pytest.raises(ValueError, match=message):
        read_index(str(file), str(tmp_path))
    with pytest.raises(ValueError, match=r"data.index must be a readable images.tsv"):
        read_index(str(tmp_path / "other.tsv"), str(tmp_path))


def test_nested_folders_links_and_other_files(tmp_path: Path) -> None:
    root = tree(tmp_path / "data", {"a": 2, "b/deep/er": 2, "b": 1, ".hidden": 3})
    picture(tmp_path / "elsewhere" / "1.JPEG", 77)
    (root / "c").symlink_to(tmp_path / "elsewhere")
    (root / "b" / "loop").symlink_to(root)
    (root / "a" / "again").symlink_to(root / "a")
    (root / "d").mkdir()
    (root / "a" / "Thumbs.db").touch()
    picture(root / "stray.png", 78)
    index = looked(root)
    assert Counter(row.label for row in index.rows) == {"a": 2, "b": 3, "c": 1}
    notes = "\n".join(index.notes)
    for part in ("1 image of", "stray.png", "1 file without an image's ending left out, such as a/Thumbs.db"):
        assert part in notes
    assert "d has no image: no class" in notes and "b/loop left out" in notes and "a/again left out" in notes


def test_files_of_several_endings_are_counted_by_them(tmp_path: Path) -> None:
    """A hundred photographs that cannot be read do not hide behind one Thumbs.db."""
    root = tree(tmp_path / "data", {"a": 2, "b": 2})
    for name in ("Thumbs.db", "1.HEIC", "2.heic", "README"):
        (root / "a" / name).touch()
    notes = "\n".join(looked(root).notes)
    assert "4 files without an image's ending left out" in notes and "; by ending: 2 .heic, 1 " in notes
    assert "1 .db" in notes and "1 none" in notes


def test_a_class_in_the_test_images_only_is_left_out(tmp_path: Path) -> None:
    tree(tmp_path / "train", {"a": 2, "b": 2})
    tree(tmp_path / "test", {"a": 1, "c": 3}, start=50)
    index = looked(tmp_path)
    assert index.classes == ("a", "b") and numbers(index, "test") == {"a": 1}
    assert "3 images left out of classes without a training image, such as c" in index.notes
    _, test = read(tmp_path)
    assert test.labels.tolist() == [0] and test.notes == ("1 of 2 classes has no test image",)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({}, "must hold a folder for each class, with images .*; got none: move the images"),
        ({".": 3}, "got none, and 3 images beside them: move the images of each class into a folder, or give a list"),
        ({"only": 3}, "must hold at least two classes; got one, only$"),
        ({"flowers/rose": 2, "flowers/lily": 2}, r"got one, flowers: the classes seem to be in .*flowers, give that"),
        ({"test/a": 2, "val/a": 2}, "must hold the training images in train/ beside test, val/; got none"),
        ({"a": 1, "b": 1}, "must hold a class of two images or more, .*; got one image in each class, or copies"),
    ],
)
def test_a_folder_that_holds_no_set(tmp_path: Path, sizes: dict[str, int], message: str) -> None:
    tree(tmp_path, sizes)
    with pytest.raises(ValueError, match=message):
        looked(tmp_path)


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data.root must be the folder of the images; got .*x, which is missing"):
        looked(tmp_path / "x")


def test_classes_that_differ_in_capitals_are_said(tmp_path: Path) -> None:
    tree(tmp_path, {"Cat": 3, "cat": 3, "dog": 2})
    index = looked(tmp_path)
    assert index.classes == ("Cat", "cat", "dog")
    assert any(note.startswith("Cat and cat differ in capitals alone and are 2 classes") for note in index.notes)


def test_numbers_as_names_of_classes_are_in_their_order(tmp_path: Path) -> None:
    tree(tmp_path, {str(number): 2 for number in (10, 9, 1)})
    assert looked(tmp_path).classes == ("1", "9", "10")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("list.csv", "path,label\n{lines}"),
        ("list.csv", "\ufefflabel;filename\n{swapped;}"),
        ("list.csv", "{lines}"),
        ("list.tsv", "Image\tSpecies\n{lines\t}"),
        ("list.csv", "fold,image_id,label\n{folds}"),
        ("list.txt", "{lines }"),
        ("list.txt", "{lines\t}"),
    ],
)
def test_lists_of_every_kind(tmp_path: Path, name: str, text: str) -> None:
    """Delimiters, headers, byte order marks; labels that begin at 1."""
    tree(tmp_path, {"one": 5, "two": 5})
    images = [(f"{label}/{i}.png", str(number)) for number, label in enumerate(("one", "two"), 1) for i in range(5)]
    for mark in (",", ";", "\t", " "):
        text = text.replace(f"{{lines{mark if mark != ',' else ''}}}", "\n".join(map(mark.join, images)))
        text = text.replace(f"{{swapped{mark}}}", "\n".join(mark.join(pair[::-1]) for pair in images))
    text = text.replace("{folds}", "\n".join(f"3,{','.join(pair)}" for pair in images))
    (tmp_path / name).write_text(text)
    index = looked(tmp_path, train_list=str(tmp_path / name))
    assert index.classes == ("1", "2") and numbers(index, "train") == {"1": 4, "2": 4}


def test_a_list_may_say_the_split(tmp_path: Path) -> None:
    tree(tmp_path, {"a": 4, "b": 4})
    rows = [f"{name}/{i}.png,{name},{('train', 'train', 'Valid', 'test')[i]}" for name in "ab" for i in range(4)]
    for head in ("file,class,split\n", ""):
        (tmp_path / "all.csv").write_text(head + "\n".join(rows))
        index = looked(tmp_path, train_list=str(tmp_path / "all.csv"))
        assert [len(index.of(split)) for split in ("train", "validation", "test")] == [4, 2, 2]
    (tmp_path / "all.csv").write_text("file,class,split\n" + "\n".join(rows) + "\na/0.png,a,third")
    with pytest.raises(ValueError, match=r"all.csv:10 must have train, val or test as its split; got 'third'"):
        looked(tmp_path, train_list=str(tmp_path / "all.csv"))


def test_two_lists(tmp_path: Path) -> None:
    tree(tmp_path, {"a": 3, "b": 3})
    (tmp_path / "train.txt").write_text("a/0.png 0\na/1.png 0\nb/0.png 1\nb/1.png 1\n")
    (tmp_path / "test.txt").write_text("a/2.png 0\nb/2.png 1\n")
    index = looked(tmp_path, train_list=str(tmp_path / "train.txt"), test_list=str(tmp_path / "test.txt"))
    assert (len(index.of("train")), len(index.of("test")), index.given) == (4, 2, ("train", "test"))


@pytest.mark.parametrize("kind", ["bbn", "coco", "objects", "lines"])
def test_json_lists(tmp_path: Path, kind: str) -> None:
    tree(tmp_path, {"a": 5, "b": 5})
    pairs = [(f"{name}/{i}.png", number) for number, name in enumerate("ab") for i in range(5)]
    categories = [{"id": 0, "name": "ant"}, {"id": 1, "name": "bee"}]
    values: dict[str, Any] = {
        "bbn": {"num_classes": 2, "annotations": [{"fpath": p, "image_id": i, "category_id": c}
                                                  for i, (p, c) in enumerate(pairs)]},
        "coco": {
            "images": [{"id": i, "file_name": p} for i, (p, _) in enumerate(pairs)],
            "annotations": [{"id": 7 * i, "image_id": i, "category_id": c} for i, (_, c) in enumerate(pairs)],
            "categories": categories,
        },
        "objects": [{"image": p, "label": c} for p, c in pairs],
        "lines": "\n".join(json.dumps({"path": p, "class": "ab"[c]}) for p, c in pairs),
    }  # fmt: skip
    file = tmp_path / ("list.jsonl" if kind == "lines" else "list.json")
    file.write_text(values[kind] if kind == "lines" else json.dumps(values[kind]))
    index = looked(tmp_path, train_list=str(file))
    assert index.classes == {"coco": ("ant", "bee"), "lines": ("a", "b")}.get(kind, ("0", "1"))
    assert len(index.of("train")) == 8


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("l.csv", "", "must name images; it names none"),
        ("l.csv", "picture,kind\na/0.png,a\nb/0.png,b\n", r"l.csv:1 must name its columns, .*'picture', 'kind'"),
        ("l.csv", "path,label\na/0.png,a\nb/0.png\n", r"l.csv:3 must have 2 values as the first line; got 1"),
        ("l.csv", "path,label\na/0.png,\nb/0.png,b\n", r"l.csv:2 must have a path and a class; got 'a/0.png' and ''"),
        ("l.csv", "path,label\na/0.png,a\na/0.png,b\n", r"a/0.png must have one class; got 'a' in .*2 and 'b' in"),
        ("l.csv", "path,label\nx/0.png,a\nx/1.png,b\n", r"are missing: give the folder from which its paths start"),
        ("l.txt", "a/0.png\n", r"l.txt:1 must be a file and its class; got 'a/0.png'"),
        ("l.json", "{", "must be JSON; it is not"),
        ("l.json", "[1, 2]", "must be a list of objects with a path and a label"),
    ],
)  # fmt: skip
def test_lists_that_do_not_fit(tmp_path: Path, name: str, text: str, message: str) -> None:
    tree(tmp_path, {"a": 1, "b": 1})
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        looked(tmp_path, train_list=str(tmp_path / name))


def test_a_list_in_another_encoding_and_one_that_is_missing(tmp_path: Path) -> None:
    tree(tmp_path, {"a": 1})
    (tmp_path / "l.csv").write_text("path,label\na/0.png,ä\n", encoding="utf-16")
    with pytest.raises(ValueError, match=r"l.csv must be UTF-8 text; .* iconv"):
        looked(tmp_path, train_list=str(tmp_path / "l.csv"))
    with pytest.raises(ValueError, match=r"no.csv must be a list of images"):
        looked(tmp_path, train_list=str(tmp_path / "no.csv"))


def test_a_list_without_endings_and_with_windows_separators(tmp_path: Path) -> None:
    tree(tmp_path, {"a": 3, "b": 3})
    (tmp_path / "l.csv").write_text("image_id,label\n" + "".join(f"{n}\\{i},{n}\n" for n in "ab" for i in range(3)))
    rows = looked(tmp_path, train_list=str(tmp_path / "l.csv")).rows
    assert {row.path for row in rows} == {f"{n}/{i}.png" for n in "ab" for i in range(3)}


def test_sizes_and_modes_are_what_is_seen(tmp_path: Path) -> None:
    """EXIF's turn, palettes of greys, transparency, CMYK, 1 and 16 bits."""
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(tmp_path / "a" / "turned.jpg", 1, size=(20, 10), exif=exif)
    for mode in ("1", "L", "LA", "P", "RGBA"):
        picture(tmp_path / "a" / f"{mode}.png", 2, mode)
    picture(tmp_path / "a" / "cmyk.JPG", 3, "CMYK")
    grey = Image.new("P", (16, 16))
    grey.putpalette([value for value in range(256) for _ in range(3)])
    grey.save(tmp_path / "a" / "greys.png")
    Image.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16) * 257).save(tmp_path / "a" / "deep.png")
    tree(tmp_path, {"b": 2}, start=20)
    index = looked(tmp_path)
    rows = {Path(row.path).name: (row.width, row.height, row.mode) for row in index.rows}
    assert rows["turned.jpg"] == (10, 20, "RGB") and rows["cmyk.JPG"][2] == "CMYK"
    assert rows["greys.png"][2] == "L" and rows["P.png"][2] == "P" and rows["deep.png"][2].startswith("I")
    assert not index.all_grey and index.notes == ()


def test_sixteen_bits_of_which_few_are_used_are_said(tmp_path: Path) -> None:
    tree(tmp_path, {"a": 2, "b": 2})
    for name in "ab":
        Image.fromarray(np.full((16, 16), 4095, np.uint16)).save(tmp_path / name / f"{name}.png")
    assert any("2 images of 16 bits with no value above 4,095 of 65,535" in note for note in looked(tmp_path).notes)


@pytest.mark.parametrize("in_memory", [False, True])
def test_grey_images_have_one_channel(tmp_path: Path, in_memory: bool) -> None:
    for name, values in (("a", (0, 100, 200)), ("b", (50, 150, 255))):
        for value in values:
            (tmp_path / name).mkdir(exist_ok=True)
            Image.new("L", (16, 16), value).save(tmp_path / name / f"{value}.png")
            Image.fromarray(np.full((16, 16), value * 257, np.uint16)).save(tmp_path / name / f"{value}-deep.png")
    assert looked(tmp_path).all_grey
    train, _ = read(tmp_path, channels=1, fit="whole", in_memory=in_memory)
    assert train.channels == 1 and len(train.paths) == len(train)
    if train.images is not None:
        seen = train.images.flatten(1)
        wanted = [int(Path(path).stem.split("-")[0]) for path in train.paths]
        assert seen.amin(1).tolist() == seen.amax(1).tolist() == wanted


def test_images_of_other_sizes_are_seen_whole(tmp_path: Path) -> None:
    """The border is repeated, and what fits already stays as it is."""
    for name in "ab":
        for i, size in enumerate(((16, 16), (32, 16), (8, 16))):
            picture(tmp_path / name / f"{i}.png", ord(name) + 7 * i, size=size)
    train, test = read(tmp_path, fit="whole", in_memory=True)
    for part in (train, test):
        assert part.images is not None and part.images.shape[1:] == (3, 16, 16)
        for image, path in zip(part.images, part.paths, strict=True):
            original = np.asarray(Image.open(path))
            if path.endswith("0.png"):
                assert np.array_equal(image.permute(1, 2, 0).numpy(), original)
            elif path.endswith("1.png"):
                assert (image[:, :4] == image[:, 4:5]).all() and (image[:, 12:] == image[:, 11:12]).all()
            else:
                assert np.array_equal(image[:, :, 4:12].permute(1, 2, 0).numpy(), original)


def test_a_share_of_groups_in_two_classes_leaves_each_class_an_image() -> None:
    labels, groups = ["a", "b", "a", "b"], [0, 0, 1, 1]
    for seed in range(20):
        chosen = draw_groups(labels, groups, 0.5, seed, least=1)
        assert chosen in ({0, 1}, {2, 3})
