"""The glyph sets, made of the fonts that matplotlib ships: what is drawn, what is left out, how families are split."""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest

from allnc.config import DataConfig
from allnc.data import load

ROOT = Path(__file__).resolve().parents[2]
FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
LETTERS = "АЖфΔξП"
SIDE = 20


@pytest.fixture
def glyphs(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    module = importlib.import_module("glyphs")
    monkeypatch.setattr(module, "ALPHABETS", {"some": module.Alphabet(LETTERS, SIDE, ("fonts-a", "fonts-b"))})
    return module


@pytest.fixture
def unpacked(tmp_path: Path) -> Path:
    """Two packages: DejaVu with a copy and a font without the letters; STIX, and a font with one box for all."""
    files = {"a": ["DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSansMono", "cmr10"]}
    files["b"] = ["STIXGeneral", "STIXGeneralBol", "LastResortHE-Regular"]
    for name, faces in files.items():
        folder = tmp_path / f"fonts-{name}"
        (folder / "DEBIAN").mkdir(parents=True)
        (folder / "DEBIAN" / "control").write_text(f"Package: fonts-{name}\nVersion: 1.2-{name}\n")
        for face in faces:
            shutil.copy(FONTS / f"{face}.ttf", folder)
    shutil.copy(FONTS / "DejaVuSans.ttf", tmp_path / "fonts-b" / "Vera.ttf")
    return tmp_path


def test_a_glyph_is_centred_and_as_large_as_fits(glyphs: Any) -> None:
    face = glyphs.Face(FONTS / "DejaVuSans.ttf", 0, "DejaVu Sans", "Book")
    images = glyphs.draw(face, LETTERS, SIDE)
    assert images.shape == (len(LETTERS), SIDE, SIDE) and images.dtype == np.uint8 and images.max() == 255
    margin = SIDE // glyphs.MARGIN
    for image in images:
        rows, columns = np.flatnonzero(image.any(1)), np.flatnonzero(image.any(0))
        assert max(len(rows), len(columns)) == SIDE - 2 * margin
        for place in (rows, columns):
            assert abs(place[0] - (SIDE - 1 - place[-1])) <= 1
    assert glyphs.draw(face, "А ", SIDE) is None  # nothing to be seen


def test_letters_are_upright_and_themselves(glyphs: Any) -> None:
    """П has a bar above and two stems; Δ is narrow above and wide below."""
    images = glyphs.draw(glyphs.Face(FONTS / "DejaVuSans.ttf", 0, "", ""), LETTERS, SIDE).astype(float)
    bar, delta = images[LETTERS.index("П")], images[LETTERS.index("Δ")]
    assert bar[3].mean() > 1.5 * bar[15].mean() and bar[15, SIDE // 2] == 0
    widths = (delta > 99).sum(1)
    assert widths[3] < 5 and widths[16] > 12


def test_faces_without_the_letters_and_with_one_box_for_all_are_left_out(glyphs: Any, unpacked: Path) -> None:
    faces, images, left_out = glyphs.render([unpacked / "fonts-a", unpacked / "fonts-b"], glyphs.ALPHABETS["some"])
    assert [face.path.stem for face in faces] == [
        *("DejaVuSans-Bold", "DejaVuSans", "DejaVuSansMono", "DejaVuSerif"),  # not cmr10
        *("STIXGeneral", "STIXGeneralBol", "Vera"),
    ]
    assert images.shape == (7, len(LETTERS), SIDE, SIDE) and left_out == {"with two classes alike": 1}


def test_a_set_has_no_family_in_both_parts(
    glyphs: Any, unpacked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(glyphs, "TEST_SHARE", 0.4)  # of six faces: two, which are STIX
    for name in ("one", "two"):
        paths = {"--out": tmp_path / f"{name}.npz", "--fonts": unpacked, "--sheet": tmp_path / "s.png"}
        glyphs.main(["some", *(str(word) for option in paths.items() for word in option)])
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()
    train, test = load(DataConfig(name="arrays", root=str(tmp_path / "one.npz")))
    assert train.class_counts.tolist() == [4] * len(LETTERS) and test.class_counts.tolist() == [2] * len(LETTERS)
    assert (
        sorted(train.classes) == sorted(LETTERS) and train.groups is not None and len(set(train.groups.tolist())) == 1
    )
    # Labels are those of the glyphs, whatever the order of the classes.
    wanted = glyphs.draw(glyphs.Face(FONTS / "STIXGeneral.ttf", 0, "", ""), LETTERS, SIDE)
    assert test.images is not None
    for image, label in zip(test.images[: len(LETTERS), 0].numpy(), test.labels, strict=False):
        assert np.array_equal(image, wanted[LETTERS.index(train.classes[label])])
    source = str(np.load(tmp_path / "one.npz")["source"])
    assert "package fonts-b 1.2-b" in source and "left out: 1 faces that are copies" in source
    assert "test faces: STIXGeneral Regular; STIXGeneral Bold" in source and (tmp_path / "s.png").stat().st_size > 0


def test_weights_widths_and_regions_are_one_family(glyphs: Any) -> None:
    def key(family: str) -> str:
        return glyphs.Face(Path("x"), 0, family, "").key

    assert key("Noto Sans CJK JP") == key("Noto Serif Display") == "noto"
    assert key("DejaVu Sans Mono") == key("DejaVu Serif") and key("M PLUS 1 Code") == key("Migu 2M")
    assert key("Nimbus Sans Narrow") == key("FreeSans") != key("FreeSerif")
    assert len({key(name) for name in ("Lato", "Inter", "PT Sans", "Serif")}) == 4


def test_related_drawings_are_one_group_and_large_groups_are_cut(glyphs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    faces = [glyphs.Face(Path("x"), 0, family, "") for family in ("Aa", "Bb", "Aa Bold", "Cc", "Dd")]
    alike = np.eye(5, dtype=np.float32)
    alike[1, 2] = alike[2, 1] = 0.96  # Bb is drawn like the bold Aa
    groups = glyphs.groups_of(faces, alike)
    assert groups[0] == groups[1] == groups[2] and len(set(groups.tolist())) == 3
    monkeypatch.setattr(glyphs, "MOST_OF_A_GROUP", 2)
    train, test = glyphs.chosen(groups)
    assert len(train) + len(test) == 4 and not set(groups[train]) & set(groups[test])
    assert glyphs.originals(np.array([[1, 0.999, 0], [0.999, 1, 0.999], [0, 0.999, 1]])) == [0, 2]


def test_packages_are_fetched_whole_and_once(glyphs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []

    def run(command: list[Any], check: bool, cwd: Any = None) -> None:
        started.append(command[0])
        if command[0] == "apt-get":
            for name in command[2:]:
                (Path(cwd) / f"{name}_1.0-1_all.deb").touch()
        else:
            control = Path(command[-1]) / "DEBIAN" / "control"
            control.parent.mkdir(parents=True)
            control.write_text(f"Package: x\nVersion: 2:{Path(command[2]).name}\n")

    monkeypatch.setattr(glyphs.subprocess, "run", run)
    for _ in range(2):
        versions = glyphs.fetch(("fonts-a", "fonts-b"), tmp_path / "fonts")
        assert versions == {name: f"2:{name}_1.0-1_all.deb" for name in ("fonts-a", "fonts-b")}
    assert started == ["apt-get", "dpkg-deb", "dpkg-deb"]
    assert sorted(path.name for path in (tmp_path / "fonts").iterdir()) == ["fonts-a", "fonts-b"]


def test_the_pinned_sets_have_a_class_for_each_character(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    module = importlib.import_module("alphabets")
    for name, classes in (("cyrillic", 66), ("kana", 142)):
        alphabet = module.ALPHABETS[name]
        assert len(alphabet.classes) == len(set(alphabet.classes)) == classes
        assert len(alphabet.packages) == len(set(alphabet.packages))
        assert not any(character.isascii() or 0x4E00 <= ord(character) < 0xA000 for character in alphabet.classes)
