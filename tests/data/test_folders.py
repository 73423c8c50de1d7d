"""Image folders: the order of torchvision's ImageFolder, links of every kind, and what is not as it should be."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

from allnc.config import DataConfig
from allnc.data import ImageSet, load
from tests.rights import needs_root, without_rights


def picture(path: Path, value: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 16), (value, 0, 0)).save(path)
    return path


def read(root: Path, **changes: Any) -> tuple[ImageSet, ImageSet]:
    values: dict[str, Any] = {"name": "image_folder", "root": str(root), "augmentation": "none", **changes}
    return load(DataConfig(**values))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """cat: 3 training images, dog: 2, one test image each."""
    for part, label, number in (("train", "cat", 3), ("train", "dog", 2), ("val", "cat", 1), ("val", "dog", 1)):
        for i in range(number):
            picture(tmp_path / "data" / part / label / f"{i}.png", i)
    return tmp_path / "data"


def test_images_and_order_are_those_of_torchvision(root: Path) -> None:
    for name in ("dog/b/z.JPG", "dog/a/y.jpeg", "dog/a.png", "dog/a-b/x.webp", "cat/9.png", "cat/10.png", "Emu/1.bmp"):
        picture(root / "train" / name)
    picture(root / "val" / "Emu" / "1.tiff")
    train, test = read(root)
    for found, part in ((train, "train"), (test, "val")):
        wanted = ImageFolder(str(root / part))
        assert tuple(found.paths) == tuple(path for path, _ in wanted.samples)
        assert found.labels.tolist() == wanted.targets and found.classes == tuple(wanted.classes)


def test_by_default_every_image_is_taken(root: Path) -> None:
    train, test = read(root)
    assert (len(train), len(test)) == (5, 2)
    assert train.count_text == "5" and test.count_text == "2"


def test_a_subset_says_of_how_many(root: Path) -> None:
    for i in range(6):
        picture(root / "train" / "cat" / f"more{i}.png")
        picture(root / "train" / "dog" / f"more{i}.png")
    train, _ = read(root, imbalance="exponential", max_per_class=8, imbalance_ratio=4)
    assert train.class_counts.tolist() == [8, 2] and train.count_text == "10 of 17"


@pytest.mark.parametrize("changes", [{}, {"max_per_class": 9}, {"max_per_class": 9, "imbalance_ratio": 3}])
@pytest.mark.parametrize("profile", ["exponential", "step"])
def test_an_imbalance_that_cannot_be_cut_is_one_clear_error(
    profile: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    for i, (label, number) in enumerate((("a", 9), ("b", 2), ("c", 1))):
        for j in range(number):
            picture(tmp_path / "train" / label / f"{j}.png", i)
        picture(tmp_path / "val" / label / "0.png")
    with pytest.raises(ValueError) as caught:
        read(tmp_path, imbalance=profile, **changes)
    message = str(caught.value)
    for part in (
        "data.imbalance",
        "data.max_per_class",
        "data.imbalance_ratio",
        "class ",
        "has ",
        "data.imbalance none",
    ):
        assert part in message, message
    assert ("(b), which has 2" in message) or ("(c), which has 1" in message), message


def test_a_link_to_a_folder_that_holds_it_is_found(root: Path) -> None:
    link = root / "train" / "cat" / "up"
    for target in ("..", ".", "../..", "../../../data", "/"):
        link.symlink_to(target)
        with pytest.raises(ValueError, match=rf"{link} is a link to .*, which (holds|is) .*: remove the link"):
            read(root)
        link.unlink()


def test_two_links_to_the_own_folder(root: Path) -> None:
    for name in ("a", "b"):
        (root / "train" / "cat" / name).symlink_to(".")
    with pytest.raises(ValueError, match="remove the link"):
        read(root)


def test_a_link_to_another_class_is_refused(root: Path) -> None:
    for link, target in (("dog/more", "../cat"), ("cat/more", "../dog"), ("emu", "dog"), ("Ant", "dog")):
        (root / "train" / link).symlink_to(target)
        with pytest.raises(ValueError, match=r"is read twice: as .*train/.* and as .*train/"):
            read(root)
        (root / "train" / link).unlink()


def test_a_link_from_test_into_training_is_refused(root: Path) -> None:
    (root / "val" / "cat" / "more").symlink_to("../../train/cat")
    with pytest.raises(ValueError, match=r"is read twice: as .*train/cat and as .*val/cat/more"):
        read(root)
    (root / "val" / "cat" / "more").unlink()
    (root / "val").rename(root / "old")
    (root / "val").symlink_to("train")
    with pytest.raises(ValueError, match=r"val is a link to .*train, which is"):
        read(root)


def test_honest_links_are_followed(root: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    picture(elsewhere / "one.png")
    picture(elsewhere / "sub" / "two.png")
    for part in ("train", "val"):
        (root / part / "emu").symlink_to(picture(tmp_path / f"pool_{part}" / "emu" / "0.png").parent)
    (root / "train" / "cat" / "more").symlink_to(elsewhere)  # a folder of images that is nowhere else
    (root / "train" / "dog" / "7.png").symlink_to(picture(tmp_path / "pool" / "7.png"))
    (tmp_path / "link").symlink_to(root)
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "train").symlink_to(root / "train")
    (tmp_path / "parts" / "val").symlink_to(root / "val")
    for place in (root, tmp_path / "link", tmp_path / "parts"):
        train, test = read(place)
        assert train.class_counts.tolist() == [5, 3, 1] and test.class_counts.tolist() == [1, 1, 1]
        assert train.classes == ("cat", "dog", "emu") and all(p.startswith(str(place)) for p in train.paths)
        assert not train.notes and not test.notes


def test_one_file_in_two_classes_or_parts_is_said(root: Path) -> None:
    """Stores that link equal files to one another make such links of copies: they are said, not refused."""
    os.link(root / "train" / "cat" / "0.png", root / "train" / "dog" / "linked.png")
    (root / "val" / "dog" / "linked.png").symlink_to("../../train/dog/0.png")
    train, test = read(root)
    (note,) = train.notes
    assert "1 file of" in note and "cat/0.png" in note and "dog/linked.png" in note and "two classes" in note
    (note,) = test.notes
    assert "1 test image" in note and "dog/linked.png" in note and "train/dog/0.png" in note


def test_a_link_that_leads_nowhere_is_refused(root: Path) -> None:
    for name in ("cat/gone.png", "emu", "cat/gone"):
        link = root / "train" / name
        link.symlink_to("nowhere")
        with pytest.raises(ValueError, match=f"{link} is a link to nowhere, which is missing"):
            read(root)
        link.unlink()
    (root / "train" / "cat" / "loop.png").symlink_to("loop.png")
    with pytest.raises(ValueError, match=r"loop\.png is a link to loop\.png, which"):
        read(root)


def test_a_pipe_among_the_images_is_named(root: Path) -> None:
    os.mkfifo(root / "train" / "cat" / "pipe.png")
    with pytest.raises(ValueError, match=r"pipe\.png must be a regular file"):
        read(root)


def test_hidden_files_and_folders_are_left_out(root: Path) -> None:
    picture(root / "train" / "cat" / ".hidden.png")
    (root / "train" / "cat" / "._0.png").write_bytes(b"resource fork")
    picture(root / "train" / "cat" / ".thumbnails" / "0.png")
    picture(root / "train" / ".ipynb_checkpoints" / "0.png")
    train, _ = read(root)
    assert train.class_counts.tolist() == [3, 2] and train.classes == ("cat", "dog") and not train.notes


def test_other_files_are_left_out_and_counted(root: Path) -> None:
    for name in ("cat/Thumbs.db", "cat/readme.txt", "labels.csv"):
        (root / "train" / name).write_text("x")
    picture(root / "train" / "stray.png")
    train, test = read(root)
    assert train.class_counts.tolist() == [3, 2] and not test.notes
    assert len(train.notes) == 2
    assert "2 files of" in train.notes[0] and "Thumbs.db" in train.notes[0]
    assert (
        train.notes[1].startswith("1 image of")
        and "outside of the class folders" in train.notes[1]
        and "stray.png" in train.notes[1]
    )


def test_classes_without_an_image(root: Path) -> None:
    (root / "train" / "emu").mkdir()
    (root / "val" / "emu").mkdir()
    with pytest.raises(ValueError, match=r"train/emu must hold an image; got none: .*remove the folder"):
        read(root)
    (root / "train" / "emu" / "a.txt").write_text("x")
    (root / "train" / "emu" / "b.heic").write_text("x")
    with pytest.raises(ValueError, match=r"train/emu must hold an image; got none, and 2 other files such as a\.txt"):
        read(root)
    picture(root / "train" / "emu" / "0.png")
    with pytest.raises(ValueError, match=r"val/emu must hold an image; got none"):
        read(root)


def test_no_class_folders(tmp_path: Path) -> None:
    picture(tmp_path / "train" / "a.png")
    (tmp_path / "val").mkdir()
    with pytest.raises(ValueError, match=r"train must hold a folder for each class; got none, and 1 image"):
        read(tmp_path)


def test_odd_names_of_classes(tmp_path: Path) -> None:
    names = ["two words", "été", "犬", "new\nline", os.fsdecode(b"\xff\xfe"), "-", "a.png"]
    for part in ("train", "val"):
        for name in names:
            picture(tmp_path / part / name / "0.png")
    train, test = read(tmp_path)
    assert train.classes == tuple(sorted(names)) and len(train) == len(test) == len(names)
    picture(tmp_path / "val" / "odd\nname" / "0.png")
    with pytest.raises(ValueError) as caught:
        read(tmp_path)
    assert r"odd\nname" in str(caught.value) and str(caught.value).isprintable()


def test_parts_must_have_the_same_classes(root: Path) -> None:
    picture(root / "val" / "emu" / "0.png")
    with pytest.raises(ValueError, match="they differ in emu"):
        read(root)


@needs_root
def test_a_folder_without_permission_is_named(root: Path, tmp_path: Path) -> None:
    (root / "train" / "dog").chmod(0)
    refusal = pytest.raises(ValueError, match=r"train/dog must be a readable folder; got: Permission denied")
    with without_rights(tmp_path), refusal:
        read(root)


@pytest.mark.parametrize("root", ["/nowhere", "x" * 5000, "a\0b", "/dev/null"])
def test_a_root_that_is_no_folder(root: str) -> None:
    with pytest.raises(ValueError, match=r"data\.root must"):
        load(DataConfig(name="image_folder", root=root, augmentation="none"))
