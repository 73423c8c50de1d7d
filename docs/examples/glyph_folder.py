"""Make a folder of images to try the tutorial on: 40 letters in the fonts that come with matplotlib.

    python docs/examples/glyph_folder.py letters            # 40 class folders, 200 to 5 colour PNGs of 32 x 32 each
    python docs/examples/glyph_folder.py letters --grey

No two images are alike: font, size, place, slant, turn, colours and noise are drawn anew for each.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

LETTERS = "АБВГДЕЖЗИКЛМНОПРСТУФХЦЧШЫЬЭЮЯαβγδεζηθλΔΣ"
FONTS = [
    f"DejaVu{family}{style}.ttf"
    for family, styles in (
        ("Sans", ("", "-Bold", "-Oblique", "-BoldOblique")),
        ("Serif", ("", "-Bold", "-Italic", "-BoldItalic")),
        ("SansMono", ("", "-Bold", "-Oblique", "-BoldOblique")),
    )
    for style in styles
]
SIDE, LARGE = 32, 96  # pixels of an image, and of the drawing it is shrunk from


def class_sizes(classes: int, *, most: int, least: int) -> list[int]:
    """Return sizes that fall exponentially from `most` to `least`."""
    return np.geomspace(most, least, classes).round().astype(int).tolist()


def draw(letter: str, fonts: list[Path], random: np.random.Generator, *, grey: bool) -> Image.Image:
    """Return one image of a letter."""
    font = ImageFont.truetype(str(fonts[random.integers(len(fonts))]), int(random.integers(40, 62)))
    mask = Image.new("L", (LARGE, LARGE))
    place = tuple((LARGE / 2 + random.uniform(-12, 12, 2)).tolist())
    ImageDraw.Draw(mask).text(place, letter, fill=255, font=font, anchor="mm")
    slant = random.uniform(-0.3, 0.3)
    mask = mask.transform(mask.size, Image.Transform.AFFINE, (1, slant, -slant * LARGE / 2, 0, 1, 0))
    mask = mask.rotate(random.uniform(-20, 20), Image.Resampling.BILINEAR).resize((SIDE, SIDE), Image.Resampling.BOX)
    share = np.asarray(mask, dtype=np.float32)[:, :, None] / 255
    channels = 1 if grey else 3
    paper = random.uniform(120, 240, channels)
    ink = random.uniform(50, 140, channels)  # how much darker
    pixels = paper - ink * share + random.normal(0, 22, (SIDE, SIDE, channels))
    pixels = pixels.clip(0, 255).astype(np.uint8)
    return Image.fromarray(pixels[:, :, 0] if grey else pixels)


def make(folder: Path, *, classes: int = 40, most: int = 200, least: int = 5, grey: bool = False, seed: int = 0) -> int:
    """Write a folder of images for each class and return the number of images."""
    import matplotlib

    random = np.random.default_rng(seed)
    fonts = [Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name for name in FONTS]
    sizes = class_sizes(classes, most=most, least=least)
    for letter, size in zip(LETTERS[:classes], sizes, strict=True):
        (folder / letter).mkdir(parents=True)
        for number in range(size):
            draw(letter, fonts, random, grey=grey).save(folder / letter / f"{number:03}.png")
    return sum(sizes)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="made anew")
    parser.add_argument("--grey", action="store_true", help="grey instead of colour")
    parser.add_argument("--seed", type=int, default=0, help="of the images; default 0")
    options = parser.parse_args()
    print(f"{make(options.folder, grey=options.grey, seed=options.seed)} images in {options.folder}")
