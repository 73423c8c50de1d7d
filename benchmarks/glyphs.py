"""Many-class image sets rendered from the fonts of Debian packages: real shapes, any number, nothing to ask for.

    python benchmarks/glyphs.py cyrillic --out data/cyrillic.npz
    python benchmarks/glyphs.py kana --out data/kana.npz

Each face of a font gives one image of each class. No family is in both parts, and neither is a copy of one: families
whose glyphs look the same are one group, and a group is in one part. The files are what `data.name arrays` reads.

Needs Debian 12 (apt-get and dpkg-deb, not root) and fontTools, which matplotlib brings. With the same versions of the
packages and of Pillow, which the file names, the file is the same to the byte.

Legend: n faces, C classes, S side of an image in pixels.
"""

from __future__ import annotations

import argparse
import logging
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL
from alphabets import ALPHABETS, Alphabet
from fontTools.ttLib import TTCollection, TTFont
from PIL import Image, ImageDraw, ImageFont, features

Images = npt.NDArray[np.uint8]
Integers = npt.NDArray[np.int64]

EM = 160  # size of the drawing that is scaled down to S
MARGIN = 10  # sides of the image in one of the margin around the glyph
SAME = 0.99  # correlation of two glyphs of a face from which on nobody can tell these classes apart
COPY = 0.995  # of the same glyphs of two faces, from which on the second one is left out
RELATED = 0.95  # of two faces, from which on their families are one group
MOST_OF_A_GROUP = 16  # faces
TEST_SHARE = 0.25  # of the faces
SEED = 0
NOT_LETTERS = ("UKIJ Tughra",)  # pictures in the places of letters
# What the name of a family adds to that of another: weight, width, optical size, region, kind of file.
STYLES = re.compile(
    r"\b(thin|extra|ultra|semi|demi|light|book|regular|medium|bold|heavy|black|italic|oblique|upright|condensed|"
    r"narrow|compact|caption|display|sc|smallcaps|caps|alt|classic|classical|cjk|jp|kr|cn|tc|hk|tw|mbe|mono|"
    r"code|typewriter|one|eco|pro|minus|o|p|ui|ttf|tt|math|variable|width|text|serif|sans)\b|\d+|[^\w]+"
)
# Starts of family names that stand for one design, which names or drawings do not tell everywhere.
DESIGNS = {
    "helvetica": ("nimbus sans", "freesans", "induni-h"),
    "times": ("nimbus roman", "freeserif", "induni-t"),
    "courier": ("nimbus mono", "freemono", "induni-c"),
    "palatino": ("p052", "induni-p"),
    "schoolbook": ("c059", "induni-n"),
    "m plus": ("m plus", "migmix", "migu", "umeplus", "mmcedar", "komatuna", "vl ", "ricty", "konatu"),
    **{
        name: (name,)
        for name in ("yoz", "ume ", "kiloji", "misaki", "px ", "cmu", "roboto", "gentium", "nanum", "kouzan", "ipa")
    },
}


@dataclass(frozen=True)
class Face:
    """One face of a font file: the `index`-th of a collection."""

    path: Path
    index: int
    family: str
    style: str

    @property
    def key(self) -> str:
        """The family without what its members differ in."""
        name = self.family.lower()
        design = next((design for design, starts in DESIGNS.items() if name.startswith(starts)), None)
        return design or " ".join(STYLES.sub(" ", name).split()) or name


def fetch(packages: Sequence[str], folder: Path) -> dict[str, str]:
    """Download and unpack those packages that are not in `folder` yet; return the version of each."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = [name for name in packages if not (folder / name / "DEBIAN" / "control").is_file()]
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        if missing:
            subprocess.run(["apt-get", "download", *missing], cwd=temporary, check=True)
        for name in missing:
            (archive,) = Path(temporary).glob(f"{name}_*.deb")
            subprocess.run(["dpkg-deb", "--raw-extract", archive, Path(temporary, name)], check=True)
            Path(temporary, name).rename(folder / name)  # whole or not at all
            archive.unlink()
    versions = {}
    for name in packages:
        control = (folder / name / "DEBIAN" / "control").read_text(encoding="utf-8")
        versions[name] = re.findall(r"^Version: (.+)$", control, re.M)[0]
    return versions


def faces_with(folder: Path, characters: str) -> Iterator[Face]:
    """Yield the faces of all scalable fonts under `folder` that map every character, in a fixed order."""
    wanted = set(map(ord, characters))
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in (".ttf", ".otf", ".ttc") or path.is_symlink():
            continue
        collection = TTCollection(path, lazy=True).fonts if path.suffix.lower() == ".ttc" else [TTFont(path, lazy=True)]
        for index, font in enumerate(collection):
            if wanted <= (font.getBestCmap() or {}).keys():
                names = font["name"]
                family = names.getDebugName(16) or names.getDebugName(1) or path.stem
                style = names.getDebugName(17) or names.getDebugName(2) or ""
                yield Face(path, index, family, style)


def draw(face: Face, characters: str, side: int) -> Images | None:
    """Return one glyph a character, white on black, as large as fits and centred: [C, S, S]; None without ink."""
    font = ImageFont.truetype(str(face.path), EM, index=face.index, layout_engine=ImageFont.Layout.BASIC)
    images = np.zeros((len(characters), side, side), np.uint8)
    for image, character in zip(images, characters, strict=True):
        left, top, right, bottom = font.getbbox(character)
        width, height = int(right - left), int(bottom - top)
        if width < 1 or height < 1 or max(width, height) > 8 * EM:
            return None
        glyph = Image.new("L", (width, height))
        ImageDraw.Draw(glyph).text((-left, -top), character, fill=255, font=font)
        box = glyph.getbbox()
        if box is None:
            return None
        glyph = glyph.crop(box)
        scale = (side - 2 * (side // MARGIN)) / max(glyph.size)
        glyph = glyph.resize([max(1, round(length * scale)) for length in glyph.size], Image.Resampling.LANCZOS)
        row, column = (side - glyph.height) // 2, (side - glyph.width) // 2
        image[row : row + glyph.height, column : column + glyph.width] = np.asarray(glyph)
    return images


def standardised(rows: npt.NDArray[np.generic]) -> npt.NDArray[np.float32]:
    """Return rows of which every product is a correlation: mean 0, length 1, [n, m] float32."""
    rows = rows.astype(np.float32)
    rows -= rows.mean(1, keepdims=True)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def groups_of(faces: Sequence[Face], alike: npt.NDArray[np.float32]) -> Integers:
    """Number the groups of faces, [n]: those of one family, and of families that have related faces, are one group."""
    groups = np.arange(len(faces))
    first: dict[str, int] = {}
    pairs = [(first.setdefault(face.key, place), place) for place, face in enumerate(faces)]
    for one, other in (*pairs, *np.argwhere(np.triu(alike > RELATED, 1))):
        groups[groups == groups[other]] = groups[one]
    return np.unique(groups, return_inverse=True)[1].astype(np.int64)


def chosen(groups: Integers) -> tuple[list[int], list[int]]:
    """Return the places of the faces of the training and of the test part, whole groups, at most so many of each."""
    generator = np.random.RandomState(SEED)  # a frozen stream, whatever the version of numpy
    members = [
        sorted(generator.permutation(np.flatnonzero(groups == group))[:MOST_OF_A_GROUP].tolist())
        for group in range(groups.max() + 1)
    ]
    wanted = TEST_SHARE * sum(map(len, members))
    train: list[int] = []
    test: list[int] = []
    for group in generator.permutation(len(members)):
        (test if len(test) + len(members[group]) <= wanted else train).extend(members[group])
    return sorted(train), sorted(test)


def render(folders: Sequence[Path], alphabet: Alphabet) -> tuple[list[Face], Images, Counter[str]]:
    """Draw every usable face once.

    Args:
        folders: one a package.
        alphabet: what is drawn.

    Returns:
        The faces, their images [n, C, S, S], and how many were left out, by reason.
    """
    faces: list[Face] = []
    images: list[Images] = []
    left_out: Counter[str] = Counter()
    for face in (face for folder in folders for face in faces_with(folder, alphabet.classes)):
        try:
            glyphs = None if face.family in NOT_LETTERS else draw(face, alphabet.classes, alphabet.side)
        except OSError:  # FreeType's: bitmaps that cannot be scaled, broken hinting
            glyphs = None
        if glyphs is None:
            left_out["without the letters"] += 1
            continue
        within = standardised(glyphs.reshape(len(glyphs), -1))
        if np.triu(within @ within.T, 1).max() > SAME:
            left_out["with two classes alike"] += 1
        else:
            faces.append(face)
            images.append(glyphs)
    return faces, np.stack(images), left_out


def originals(alike: npt.NDArray[np.float32]) -> list[int]:
    """Return the places of the faces that are no copies of an earlier one, of their correlations [n, n]."""
    kept: list[int] = []
    for place, row in enumerate(alike):
        if not (row[kept] > COPY).any():
            kept.append(place)
    return kept


def sheet(faces: Sequence[Face], images: Images) -> Image.Image:
    """Return a picture with a line a face."""
    n, classes, side, _ = images.shape
    lines = images.transpose(0, 2, 1, 3).reshape(n * side, classes * side)
    picture = Image.new("L", (240 + lines.shape[1], len(lines)), 40)
    picture.paste(Image.fromarray(lines), (240, 0))
    pen = ImageDraw.Draw(picture)
    for place, face in enumerate(faces):
        pen.text((2, place * side + 4), f"{face.family} {face.style}"[:38], fill=255)
    return picture


def compose(name: str, fonts: Path) -> tuple[dict[str, npt.NDArray[Any]], Image.Image]:
    """Return what the file of a set holds, and a picture of it: the faces for training first, then those of the test.

    Args:
        name: of the alphabet.
        fonts: folder of the unpacked packages; missing ones are fetched.
    """
    alphabet = ALPHABETS[name]
    versions = fetch(alphabet.packages, fonts)
    faces, images, left_out = render([fonts / package for package in alphabet.packages], alphabet)
    rows = standardised(images.reshape(len(images), -1))
    alike = rows @ rows.T
    kept = originals(alike)
    left_out["that are copies"] = len(faces) - len(kept)
    faces, images = [faces[i] for i in kept], images[kept]
    groups = groups_of(faces, alike[np.ix_(kept, kept)])
    train, test = chosen(groups)
    parts = {"train": train, "test": test}
    source = [f"{name}: {len(alphabet.classes)} classes, {alphabet.side} x {alphabet.side} pixels"]
    source += [f"{part}: {len(at)} faces in {len(set(groups[at]))} groups" for part, at in parts.items()]
    source += [f"left out: {count} faces {reason}" for reason, count in sorted(left_out.items())]
    source.append(f"drawn by Pillow {PIL.__version__} with FreeType {features.version('freetype2')}")
    for part, at in parts.items():
        source.append(f"{part} faces: " + "; ".join(f"{faces[i].family} {faces[i].style}" for i in at))
    source += [f"package {package} {version}" for package, version in versions.items()]
    # Profiles make the last classes the rare ones: in the order of the alphabet, these would all be of one kind.
    order = np.random.RandomState(SEED).permutation(len(alphabet.classes))
    square = (alphabet.side, alphabet.side)
    arrays = {
        "images": images[train].reshape(-1, *square),
        "labels": np.tile(np.argsort(order), len(train)),
        "test_images": images[test].reshape(-1, *square),
        "test_labels": np.tile(np.argsort(order), len(test)),
        "groups": np.repeat(groups[train], len(alphabet.classes)),
        "classes": np.array(list(alphabet.classes))[order],
        "source": np.array("\n".join(source)),
    }
    return arrays, sheet([faces[i] for i in (*train, *test)], images[[*train, *test]])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=ALPHABETS)
    parser.add_argument("--out", type=Path, required=True, help="the npz file to write")
    parser.add_argument(
        "--fonts", type=Path, default=Path("data/fonts"), help="folder of unpacked packages; missing ones are fetched"
    )
    parser.add_argument("--sheet", type=Path, help="write a picture of all glyphs, too (PNG)")
    options = parser.parse_args(arguments)
    arrays, picture = compose(options.set, options.fonts)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("wb") as file:
        np.savez_compressed(file, **arrays)  # pyright: ignore[reportArgumentType]
    if options.sheet:
        picture.save(options.sheet)
    print(str(arrays["source"]).partition("\ntrain faces")[0])


if __name__ == "__main__":
    logging.getLogger("fontTools").setLevel(logging.ERROR)  # it tells of every odd table
    main()
