"""Image files: every kind of pixel, orientation, transparency, and all that can be wrong with a file."""

from __future__ import annotations

import logging
import os
import resource
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from allnc.data.images import read_image
from tests.rights import needs_root, without_rights

GREY = np.array([[0, 255], [128, 64]], np.uint8)
RED, WHITE = (255, 0, 0), (255, 255, 255)


def pixels(path: Path) -> np.ndarray:
    """The image as [height, width, 3], uint8."""
    image = read_image(str(path))
    assert image.mode == "RGB"
    return np.asarray(image)


def saved(path: Path, image: Image.Image, **options: Any) -> Path:
    image.save(path, **options)
    return path


@pytest.mark.parametrize("ending", ["png", "tif", "pgm"])
def test_sixteen_bits_of_grey_are_scaled_to_eight(ending: str, tmp_path: Path) -> None:
    wide = Image.fromarray(GREY.astype(np.uint16) * 256 + 77)
    found = pixels(saved(tmp_path / f"a.{ending}", wide))
    # A PGM is scaled by PIL when it is read, which may round up.
    np.testing.assert_allclose(found, np.repeat(GREY[:, :, None], 3, 2), atol=ending == "pgm")


def test_twelve_bits_and_white_is_zero_of_a_tiff(tmp_path: Path) -> None:
    packed = bytes([0x00, 0x0F, 0xFF, 0x80, 0x04, 0x00])  # 0x000 0xfff / 0x800 0x400
    for photometric, expected in ((1, [[0, 255], [128, 64]]), (0, [[255, 0], [127, 191]])):
        tags = {256: 2, 257: 2, 258: 12 if photometric else 16, 259: 1, 262: photometric, 277: 1, 278: 2}
        data = packed if photometric else (np.array([[0, 255], [128, 64]], "<u2") * 257).tobytes()
        entries = [*tags.items(), (273, 8 + 2 + 12 * 9 + 4), (279, len(data))]
        body = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(entries))
        raw = b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(entries)) + body + bytes(4) + data
        path = tmp_path / f"{photometric}.tif"
        path.write_bytes(raw)
        assert pixels(path)[:, :, 0].tolist() == expected


@pytest.mark.parametrize(
    ("mode", "ending", "message"),
    [("F", "tif", "float pixels"), ("F", "pfm", "float pixels"), ("I", "tif", "32-bit or signed")],
)
def test_pixels_of_unknown_range_are_refused(mode: str, ending: str, message: str, tmp_path: Path) -> None:
    path = saved(tmp_path / f"a.{ending}", Image.new(mode, (3, 2), 1))
    with pytest.raises(ValueError, match=rf"^{path} must be .*{message}"):
        read_image(str(path))


def test_orientation_is_applied(tmp_path: Path) -> None:
    upright = Image.fromarray(np.arange(6 * 4, dtype=np.uint8).reshape(6, 4) * 10).convert("RGB")
    stored = {  # how a camera stores the upright image for each value of EXIF's orientation
        1: [],
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_90],
        7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
        9: [],  # not a value of EXIF
    }
    for ending in ("png", "webp", "tif"):
        for value, steps in stored.items():
            image = upright
            for step in steps:
                image = image.transpose(step)
            exif = Image.Exif()
            exif[0x0112] = value
            path = saved(tmp_path / f"{value}.{ending}", image, exif=exif, lossless=True)
            assert np.array_equal(pixels(path), np.asarray(upright)), (ending, value)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_a_broken_exif_costs_the_orientation_not_the_image(tmp_path: Path) -> None:
    image = Image.fromarray(np.repeat(GREY[:, :, None], 3, 2))
    for exif in (b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\x7f", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\x01" * 40):
        for ending in ("jpg", "png"):
            path = saved(tmp_path / f"a.{ending}", image, exif=exif)
            with Image.open(path) as file:
                assert np.array_equal(pixels(path), np.asarray(file))


def test_palette_grey_bits_and_cmyk(tmp_path: Path) -> None:
    colours = Image.new("RGB", (4, 4), RED)
    colours.paste((0, 0, 255), (0, 0, 2, 4))
    expected = np.asarray(colours)
    assert np.array_equal(pixels(saved(tmp_path / "p.png", colours.quantize(4))), expected)
    assert np.array_equal(pixels(saved(tmp_path / "p.gif", colours.quantize(4))), expected)
    bits = Image.fromarray(GREY > 100)
    assert pixels(saved(tmp_path / "1.png", bits))[:, :, 2].tolist() == [[0, 255], [255, 0]]
    grey = Image.fromarray(GREY)
    assert np.array_equal(pixels(saved(tmp_path / "l.png", grey))[:, :, 1], GREY)
    cmyk = saved(tmp_path / "cmyk.tif", colours.convert("CMYK"))
    assert np.array_equal(pixels(cmyk), expected)
    cmyk = saved(tmp_path / "cmyk.jpg", colours.resize((32, 32)).convert("CMYK"), quality=100)
    assert np.abs(pixels(cmyk)[4, -4].astype(int) - RED).max() < 12


def test_what_is_transparent_is_white(tmp_path: Path) -> None:
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))  # black lies under what nobody sees
    image.putpixel((1, 0), (255, 0, 0, 255))
    expected = [[list(WHITE), list(RED)]]
    assert pixels(saved(tmp_path / "rgba.png", image)).tolist() == expected
    assert pixels(saved(tmp_path / "rgba.webp", image, lossless=True)).tolist() == expected
    assert pixels(saved(tmp_path / "p.gif", image)).tolist() == expected
    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.putpixel((1, 0), 1)
    assert pixels(saved(tmp_path / "p.png", palette, transparency=b"\0\xff")).tolist() == expected
    assert pixels(saved(tmp_path / "p1.png", palette, transparency=0)).tolist() == expected
    opaque = Image.new("RGB", (2, 1), RED)
    opaque.putpixel((0, 0), (0, 0, 0))
    assert pixels(saved(tmp_path / "rgb.png", opaque, transparency=(0, 0, 0))).tolist() == expected
    grey = Image.new("LA", (2, 1), (0, 0))
    grey.putpixel((1, 0), (7, 255))
    assert pixels(saved(tmp_path / "la.png", grey))[0, :, 0].tolist() == [255, 7]
    half = Image.new("RGBA", (1, 1), (0, 0, 0, 128))
    assert pixels(saved(tmp_path / "half.png", half))[0, 0].tolist() == [127, 127, 127]


@pytest.mark.parametrize("ending", ["gif", "webp", "png", "tif"])
def test_of_an_animation_the_first_frame(ending: str, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (3, 2), colour) for colour in (RED, WHITE, (0, 0, 255))]
    options = {"lossless": True} if ending == "webp" else {}
    path = saved(tmp_path / f"a.{ending}", frames[0], save_all=True, append_images=frames[1:], **options)
    assert np.array_equal(pixels(path), np.asarray(frames[0]))


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def large_png(path: Path, side: int) -> Path:
    """A PNG of side x side black pixels in a few hundred kilobytes."""
    packer = zlib.compressobj(9)
    row = bytes(1 + 3 * side)
    data = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + _chunk(b"IDAT", data) + _chunk(b"IEND", b""))
    return path


def test_a_decompression_bomb_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    path = large_png(tmp_path / "bomb.png", 20000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=rf"^{path} must be a readable image; got: .*400000000 pixels"):
        read_image(str(path))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB, of 1.2 GB


def broken_files(folder: Path) -> dict[str, Path]:
    """Files that are no images, by the name of what is wrong with them."""
    noise = Image.effect_noise((40, 30), 50).convert("RGB")
    found = {"empty": folder / "empty.png", "text": folder / "text.png", "cut": folder / "cut.jpg"}
    found["empty"].write_bytes(b"")
    found["text"].write_text("not an image")
    whole = saved(folder / "whole.jpg", noise).read_bytes()
    found["cut"].write_bytes(whole[: len(whole) // 2])
    found["chunk"] = saved(folder / "chunk.png", noise)
    raw = bytearray(found["chunk"].read_bytes())
    raw[29:33] = b"\0\0\0\0"  # the checksum of the header
    found["chunk"].write_bytes(raw)
    for ending in ("avif", "dds", "ppm", "sgi", "tif"):
        path = saved(folder / f"broken.{ending}", noise)
        raw = path.read_bytes()
        path.write_bytes(raw[:12] + b"\xff" * 40 + raw[52 : len(raw) // 2])
        found[ending] = path
    (folder / "folder.png").mkdir()
    found["folder"] = folder / "folder.png"
    os.mkfifo(folder / "fifo.png")
    found["fifo"] = folder / "fifo.png"
    found["device"] = folder / "zero.png"
    found["device"].symlink_to("/dev/zero")
    found["missing"] = folder / "missing.png"
    found["dangling"] = folder / "dangling.png"
    found["dangling"].symlink_to("nowhere")
    found["loop"] = folder / "loop.png"
    found["loop"].symlink_to("loop.png")
    found["too long"] = folder / ("x" * 300 + ".png")
    found["postscript"] = folder / "a.eps"
    found["postscript"].write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n")
    return found


NAMES = [
    "empty",
    "text",
    "cut",
    "chunk",
    "avif",
    "dds",
    "ppm",
    "sgi",
    "tif",
    "folder",
    "fifo",
    "device",
    "missing",
    "dangling",
    "loop",
    "postscript",
]


@pytest.mark.parametrize("kind", [*NAMES, "too long"])
def test_what_is_no_image_is_named_in_one_line(kind: str, tmp_path: Path) -> None:
    path = broken_files(tmp_path)[kind]
    with pytest.raises(ValueError) as caught:
        read_image(str(path))
    message = str(caught.value)
    assert message.startswith(f"{path} must be a readable image; got: ") and "\n" not in message
    assert message.count(path.name) == 1 and len(message) > len(f"{path} must be a readable image; got: ")


def test_a_name_that_would_break_the_line_is_escaped(tmp_path: Path) -> None:
    for name in ("a\nb.png", "a\x1b[31mb.png", os.fsdecode(b"a\xff.png")):
        with pytest.raises(ValueError) as caught:
            read_image(str(tmp_path / name))
        assert str(caught.value).isprintable() and str(caught.value).encode()


@needs_root
def test_no_permission(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png", Image.new("RGB", (2, 2)))
    path.chmod(0)
    refusal = pytest.raises(ValueError, match=r"must be a readable image; got: Permission denied")
    with without_rights(tmp_path), refusal:
        read_image(str(path))


def test_nothing_is_printed(tmp_path: Path) -> None:
    """A warning for each image of a million would bury everything else."""
    noise = Image.effect_noise((40, 30), 50)
    palette = noise.quantize(8)
    files = [
        saved(tmp_path / "exif.jpg", noise, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\xff\xff\xff\xff\0\0"),
        saved(tmp_path / "palette.png", palette, transparency=bytes(range(8))),
        large_png(tmp_path / "large.png", 9600),  # PIL warns from 89 million pixels
        tmp_path / "tags.tif",
    ]
    raw = saved(files[-1], noise, tiffinfo={270: "x" * 100}).read_bytes()
    files[-1].write_bytes(raw.replace(struct.pack("<HHI", 270, 2, 101), struct.pack("<HHI", 270, 2, 10**6)))
    program = (
        "import sys; from allnc.data.images import read_image\n"
        "for path in sys.argv[1:]:\n"
        "    try: read_image(path)\n"
        "    except ValueError: pass"
    )
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", program, *files], check=True, capture_output=True, text=True
    )
    assert done.stdout + done.stderr == ""
    with warnings.catch_warnings(record=True) as seen:  # other filters are as they were
        warnings.simplefilter("always")
        read_image(str(files[0]))
        warnings.warn("still heard", stacklevel=1)
    assert [str(w.message) for w in seen] == ["still heard"]
    assert logging.getLogger("PIL").level == logging.NOTSET


def test_one_pixel_and_extreme_shapes(tmp_path: Path) -> None:
    for size in ((1, 1), (1, 3000), (3000, 1)):
        assert read_image(str(saved(tmp_path / "a.png", Image.new("L", size, 7)))).size == size
