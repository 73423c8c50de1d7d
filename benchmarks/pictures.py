"""Trees of JPEGs and lists of the real data sets' sizes, made on the spot: measuring a loader needs no data set."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

# Published lists, where somebody has put them; they name images that nobody needs to have.
LISTS = Path(os.environ.get("ALLNC_LISTS") or Path(__file__).resolve().parents[1] / "data" / "lists")


@dataclass(frozen=True, kw_only=True)
class Profile:
    """A data set's class sizes, and its published list of test images.

    Args:
        images: training images in all.
        classes: number of classes.
        most, least: size of the largest and of the smallest class.
        tests: test images.
        test_list: file of the published list of these.
        folder: where training images lie, with room for class and number.
    """

    images: int
    classes: int
    most: int
    least: int
    tests: int
    test_list: str
    folder: str


PROFILES = {
    "imagenet_lt": Profile(
        images=115_846,
        classes=1_000,
        most=1_280,
        least=5,
        tests=50_000,
        test_list="ImageNet_LT_test.txt",
        folder="train/n{0:08d}/n{0:08d}_{1}.JPEG",
    ),
    "inat18": Profile(
        images=437_513,
        classes=8_142,
        most=1_000,
        least=2,
        tests=24_426,
        test_list="iNaturalist18_val.txt",
        folder="train_val2018/Plantae/{0}/{1:032x}.jpg",
    ),
}


def sizes_of(profile: Profile) -> np.ndarray:
    """Sizes of the classes, [classes], falling: a power of the rank whose exponent gives the number of images."""
    ranks = np.linspace(1, 0, profile.classes)
    low, high = 0.01, 100.0
    for _ in range(60):
        middle = (low + high) / 2
        sizes = np.rint(profile.least + (profile.most - profile.least) * ranks**middle).astype(int)
        low, high = (middle, high) if sizes.sum() > profile.images else (low, middle)
    # What rounding left over goes to classes of the middle, one image to each.
    off = profile.images - sizes.sum()
    first = profile.classes // 4
    sizes[first : first + abs(off)] += np.sign(off)
    assert sizes.sum() == profile.images and sizes.max() == profile.most and sizes.min() == profile.least
    return sizes


def training_lines(profile: Profile, sizes: Iterable[int] | None = None) -> Iterator[str]:
    """Lines of a training list of the profile's classes, or of the sizes given."""
    number = 0
    for label, size in enumerate(sizes_of(profile) if sizes is None else sizes):
        for _ in range(size):
            yield f"{profile.folder.format(label, number)} {label}"
            number += 1


def test_lines(profile: Profile) -> list[str]:
    """Lines of the published test list; made-up ones of its size where it is not here."""
    if (LISTS / profile.test_list).is_file():
        return (LISTS / profile.test_list).read_text().splitlines()
    return [f"val/{n % profile.classes}/{n:08d}.jpg {n % profile.classes}" for n in range(profile.tests)]


def photo(random: np.random.Generator, width: int, height: int) -> Image.Image:
    """A picture with the spectrum of photographs: amplitudes fall with the frequency, colours go together."""
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(height), np.fft.rfftfreq(width), indexing="ij"))
    frequency[0, 0] = 1

    def field(power: float) -> np.ndarray:
        waves = random.normal(size=frequency.shape) + 1j * random.normal(size=frequency.shape)
        values = np.fft.irfft2(waves / frequency**power, s=(height, width))
        return (values - values.mean()) / values.std()

    grey = field(1.1)
    channels = np.stack([grey + 0.35 * field(1.4) for _ in range(3)], axis=-1)
    return Image.fromarray(np.clip(channels * 48 + 118, 0, 255).astype(np.uint8))


def write_photos(folder: Path, number: int, width: int, height: int, quality: int = 90) -> list[Path]:
    """Write different JPEGs; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    paths = [folder / f"{n}.jpg" for n in range(number)]
    for path in paths:
        photo(random, width, height).save(path, quality=quality)
    return paths


def link_tree(root: Path, names: Iterable[str], photos: Sequence[Path]) -> None:
    """Make a file of each name, relative to the root: hard links of a few photographs, which cost no space."""
    made: set[str] = set()
    for number, name in enumerate(names):
        folder = os.path.join(root, os.path.dirname(name))
        if folder not in made:
            os.makedirs(folder, exist_ok=True)
            made.add(folder)
        with contextlib.suppress(FileExistsError):  # a name that another list had already
            os.link(photos[number % len(photos)], os.path.join(root, name))


def names_of(lines: Iterable[str]) -> Iterator[str]:
    """Paths of the lines of a list."""
    return (line.rsplit(" ", 1)[0] for line in lines)
