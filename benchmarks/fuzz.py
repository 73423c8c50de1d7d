"""Look for faults with random input, for as long as one likes: `python benchmarks/fuzz.py images lists --seconds 3600`.

A target makes one random case in a folder of its own, tries it, and raises where the code does not do what it promises:
the right result, or one of the errors that it names. Cases run in a child process, so that a crash, a hang (30 seconds
without an answer), a warning and memory beyond 2 GiB are faults like any other. A case depends on the seed, the
target and its number alone; each fault is printed with the command that repeats it.
"""

from __future__ import annotations

import argparse
import functools
import io
import multiprocessing
import os
import resource
import shutil
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any

import fuzz_runs
import fuzz_sets
import numpy as np
from mutate import Target, mutated, refused
from PIL import Image

from allnc.config import DataConfig
from allnc.data import load
from allnc.data.folders import IMAGE_ENDINGS
from allnc.data.images import read_image

LONGEST_SECONDS = 30
MOST_MEMORY = 2**21  # KiB above what the process had at its start


def images(random: Random, folder: Path) -> None:
    """Damaged image files: a ValueError that names the file, or three channels of 8 bits."""
    ending, raw = random.choice(_image_files())
    raw = mutated(random, raw)
    if ending == "png" and random.random() < 0.7:
        raw = _with_checksums(raw)  # else few damages would get past the checksum of a chunk
    path = folder / f"image.{ending if random.random() < 0.8 else 'png'}"
    path.write_bytes(raw)
    try:
        image = read_image(str(path))
    except Exception as error:
        return refused(error, f"{path} must be a readable image; got: ")
    assert image.mode == "RGB" and np.asarray(image).shape == (image.height, image.width, 3)


@functools.cache
def _image_files() -> list[tuple[str, bytes]]:
    """Valid files of every format that PIL writes, in every mode that the format takes."""
    Image.init()
    noise = Image.effect_noise((37, 23), 60)
    colours = Image.merge("RGB", [noise, noise.rotate(90), noise.transpose(Image.Transpose.FLIP_TOP_BOTTOM)])
    wide = Image.fromarray(np.asarray(noise).astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "words"
    modes = ("RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16", "I", "F", "YCbCr", "LAB")
    tries: dict[str, list[tuple[str, dict[str, Any]]]] = {
        "TIFF": [("RGB", {"compression": c}) for c in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "zstd")],
        "JPEG": [("RGB", {"progressive": True})],
        "PNG": [("RGB", {"transparency": (0, 0, 0)}), ("P", {"bits": 4})],
        "WEBP": [("RGB", {"lossless": True})],
        "DDS": [("RGBA", {"pixel_format": p}) for p in ("DXT1", "DXT3", "DXT5")],
    }
    common = [("RGB", {"exif": exif}), ("RGB", {"save_all": True, "append_images": [colours] * 2})]
    endings = {name: ending.removeprefix(".") for ending, name in Image.EXTENSION.items()}
    files = {}
    for name in sorted(set(Image.SAVE) - {"PDF"}):  # which PIL cannot read
        for mode, options in [*((mode, {}) for mode in modes), *common, *tries.get(name, [])]:
            memory = io.BytesIO()
            try:
                image = wide if mode == "I;16" else colours.convert(mode)
                image.save(memory, format=name, **options)
            except Exception:  # a mode or an option that the format does not have
                continue
            files[memory.getvalue()] = endings.get(name, name.lower())
    return [(ending, raw) for raw, ending in files.items()]


def _with_checksums(raw: bytes) -> bytes:
    """Set the checksum of every chunk of a PNG to that of its bytes."""
    data, at = bytearray(raw), 8
    while at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        if end + 4 > len(data):
            break
        data[end : end + 4] = struct.pack(">I", zlib.crc32(data[at + 4 : end]))
        at = end + 4
    return bytes(data)


def lists(random: Random, folder: Path) -> None:
    """Lists in every honest form are read as they are meant; damaged ones are refused, or make whole sets."""
    names = ["a.png", "two words.png", "sub/b.png", "sub/été.png", "犬.png", "x\u2028y.png"]
    if not (folder / "sub").is_dir():
        (folder / "sub").mkdir()
        for name in names:
            (folder / name).write_bytes(b"")
    num_classes = random.randint(1, 4)
    of_class = {name: random.randrange(num_classes) for name in names}
    pairs = [(name, of_class[name]) for name in random.choices(names, k=random.randrange(8))]
    honest = bool(pairs) and {label for _, label in pairs} == set(range(max(label for _, label in pairs) + 1))
    blank = random.choice((" ", "\t", "  ", " \t "))
    lines = [random.choice(("", "", " ", "\t")) + f"{name}{blank}{label}" for name, label in pairs]
    text = random.choice(("\n", "\r\n", "\n\n")).join(lines) + random.choice(("", "\n"))
    raw = text.encode(random.choice(("utf-8", "utf-8", "utf-8-sig")))
    damaged = random.random() < 0.6
    if damaged:
        odd = (
            "²",
            "٣",
            " -1",
            " 3000000000",
            "\0",
            "\r",
            "/../",
            "./",
            "//",
            " 99999999999999999999",
            "\ufeff",
            "\x1b[",
        )
        at = random.randrange(len(raw) + 1)
        raw = raw[:at] + random.choice(odd).encode() + raw[at:] if random.random() < 0.5 else mutated(random, raw)
    (folder / "train.txt").write_bytes(raw)
    (folder / "test.txt").write_bytes(f"a.png {of_class['a.png']}\n".encode())
    config = DataConfig(
        name="image_list",
        root=str(folder),
        train_list=str(folder / "train.txt"),
        test_list=str(folder / "test.txt"),
        augmentation="none",
    )
    try:
        train, _ = load(config)
    except Exception as error:
        refused(error, "train.txt", "test.txt")
        if honest and not damaged and "data.test_list" not in str(error):
            raise AssertionError(f"an honest list was refused: {raw!r}") from error
        return
    found = list(zip([path.removeprefix(f"{folder}/") for path in train.paths], train.labels.tolist(), strict=True))
    assert damaged or found == pairs
    assert int(train.class_counts.min()) >= 1 and all(os.path.isfile(path) for path in train.paths)


def folders(random: Random, folder: Path) -> None:
    """Folders with links of every kind: refused, or every image once, in the class in whose folder it lies."""
    root = folder / "root"
    shutil.rmtree(root, ignore_errors=True)
    places = [root / part / label for part in ("train", "val") for label in ("cat", "dog")]
    for place in places:
        (place / "sub").mkdir(parents=True)
        for name in random.sample(("a.png", "b.JPG", "c.tif", "notes.txt", ".hidden.png", "sub/d.png"), 4):
            (place / name).write_bytes(b"")
    (folder / "pool" / "deep").mkdir(parents=True, exist_ok=True)
    (folder / "pool" / "deep" / "p.png").write_bytes(b"")
    linked = 0
    for number in range(random.choice((0, 1, 2, 4))):
        inside = [path for path in root.rglob("*") if not path.is_symlink()]  # a link within a link would never end
        link = random.choice([*places, root / "train"]) / f"link{number}{random.choice(('', '.png'))}"
        targets = [*inside, folder / "pool", folder / "pool" / "deep" / "p.png", link, Path("/dev/zero"), Path("/")]
        target = random.choice(targets)
        link.symlink_to(os.path.relpath(target, link.parent) if random.random() < 0.5 else target)
        linked += 1
    try:
        sets = load(DataConfig(name="image_folder", root=str(root), augmentation="none"))
    except Exception as error:
        return refused(error, str(folder))
    for part, found in zip(("train", "val"), sets, strict=True):
        by_folder: dict[str, str] = {}
        for path, label in zip(found.paths, found.labels.tolist(), strict=True):
            assert Path(path).relative_to(root / part).parts[0] == found.classes[label] and os.path.isfile(path)
            place = os.path.dirname(path)
            assert by_folder.setdefault(os.path.realpath(place), place) == place, "a folder is read by two paths"
        if not linked:
            wanted = [p for p in (root / part).rglob("*") if p.suffix.lower() in IMAGE_ENDINGS and p.name[0] != "."]
            assert sorted(found.paths) == sorted(map(str, wanted))


ALL = (images, lists, folders, fuzz_sets.idx, fuzz_sets.arrays, fuzz_runs.configs, fuzz_runs.checkpoints)
TARGETS: dict[str, Target] = {target.__name__: target for target in ALL}


@dataclass
class Report:
    """Cases tried by target, and the faults: target, number of the case, what happened."""

    cases: dict[str, int] = field(default_factory=dict)
    faults: list[tuple[str, int, str]] = field(default_factory=list)


def fuzz(names: Sequence[str], *, seed: int = 0, seconds: float = 1e9, cases: int = 10**15, first: int = 0) -> Report:
    """Try the targets in turn until the time is over or each has had `cases` cases, from number `first` on."""
    report = Report(dict.fromkeys(names, 0))
    context = multiprocessing.get_context("fork")
    end, number = time.monotonic() + seconds, first * len(names)
    if images.__name__ in names:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL is going to drop some formats
            _image_files()  # before the child starts, and the next after a fault
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="allnc-fuzz-", dir=memory) as folder:
        while number < (first + cases) * len(names) and time.monotonic() < end:
            ours, theirs = context.Pipe()
            stop = (first + cases) * len(names)
            child = context.Process(target=_try, args=(theirs, names, seed, number, stop, end, folder))
            child.start()
            theirs.close()
            problem = "running"
            while problem == "running":
                try:
                    waited = ours.poll(LONGEST_SECONDS)
                    number, problem = ours.recv() if waited else (number, f"no answer in {LONGEST_SECONDS} seconds")
                except EOFError:
                    child.join()
                    problem = f"the process ended with {child.exitcode}" if child.exitcode else "done"
            child.kill()
            child.join()
            for place, name in enumerate(names):  # cases before `number`, and the faulty one itself
                last = number + (problem != "done")
                report.cases[name] = len(range(first * len(names) + place, last, len(names)))
            if problem != "done":
                report.faults.append((names[number % len(names)], number // len(names), problem))
                number += 1
    return report


def _try(pipe: Connection, names: Sequence[str], seed: int, number: int, stop: int, end: float, folder: str) -> None:
    """Try cases in a child process; send the number of each before it starts, and what went wrong."""
    warnings.simplefilter("error")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libtiff prints what it finds wrong with a file
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    while number < stop and time.monotonic() < end:
        pipe.send((number, "running"))
        name = names[number % len(names)]
        place = Path(folder, name)
        place.mkdir(exist_ok=True)
        try:
            TARGETS[name](Random(f"{name} {seed} {number // len(names)}"), place)
            used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base
            assert used < MOST_MEMORY, f"took {used / 2**20:.1f} GiB"
        except BaseException:
            pipe.send((number, traceback.format_exc()))
            return
        number += 1
    pipe.send((number, "running"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 1 if a fault was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="target", help=f"of {', '.join(TARGETS)}; default: all")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="repeat this case alone")
    given = parser.parse_args(arguments)
    names = list(dict.fromkeys(given.targets)) or list(TARGETS)
    if unknown := set(names) - set(TARGETS):
        parser.error(f"target must be of {', '.join(TARGETS)}; got {', '.join(sorted(unknown))}")
    if given.case is None:
        report = fuzz(names, seed=given.seed, seconds=given.seconds)
    else:
        report = fuzz(names, seed=given.seed, cases=1, first=given.case)
    for name, case, problem in report.faults:
        print(f"{problem}\n{name}, case {case}: python {sys.argv[0]} {name} --seed {given.seed} --case {case}\n")
    print(", ".join(f"{name} {number:,} cases" for name, number in report.cases.items()), end="; ")
    print(f"{len(report.faults)} faults")
    return 1 if report.faults else 0


if __name__ == "__main__":
    sys.exit(main())
