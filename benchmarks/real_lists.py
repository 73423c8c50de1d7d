"""Lists of the real sizes through the real commands: `python benchmarks/real_lists.py startup imagenet_lt inat18`.

    startup NAME ...    time and memory of a run's start: libraries, lists, sets, network
    train NAME ...      an epoch of the whole list on tiny images of a tree that is made for it, and evaluated;
                        --share 100 takes a hundredth of each class, at least one image

The training lists are made up and have the published number of images and classes, largest and smallest class. The
test lists are the published ones where ALLNC_LISTS names their folder (or data/lists holds them), else made up, too.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pictures import LISTS, PROFILES, Profile, link_tree, names_of, sizes_of, test_lines, training_lines, write_photos

CHECKED = 2000  # files of a list that a run's start looks at
STARTUP = """
import sys, time
from pathlib import Path

def memory(field="VmHWM"):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field + ":"))

began = time.perf_counter()
from allnc.trainer.command import parse
import torch
libraries = {"torch": time.perf_counter() - began}
began = time.perf_counter()
import timm, torchvision.transforms.v2, allnc.trainer.loop
from allnc.data.images import readable_formats
readable_formats()
libraries["the rest"] = time.perf_counter() - began
from allnc.data import load, sources
from allnc.trainer.run import Run
config, _ = parse(sys.argv[1:])
before, began = memory(), time.perf_counter()
sets = load(config.data)
lists, after = time.perf_counter() - began, memory()
began = time.perf_counter()
run = Run(config, images=sets)
order = run.loader.indices(0)
rest = time.perf_counter() - began
print(" ".join(f"{x:.2f}" for x in (libraries["torch"], libraries["the rest"], lists, rest, before, after, memory())))
"""


def write_lists(folder: Path, profile: Profile, share: int = 1) -> list[str]:
    """Write train.txt and test.txt, of one image in `share`; return the options that name them."""
    (folder / "train.txt").write_text("\n".join(training_lines(profile, -(-sizes_of(profile) // share))) + "\n")
    (folder / "test.txt").write_text("\n".join(test_lines(profile)[::share]) + "\n")
    root, train, test = folder / "root", folder / "train.txt", folder / "test.txt"
    root.mkdir()
    return ["--data.root", str(root), "--data.train_list", str(train), "--data.test_list", str(test)]


def startup(name: str, repeats: int) -> None:
    """Print time and memory of a run's start, each time in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="allnc-lists-") as place:
        words = write_lists(Path(place), PROFILES[name])
        photos = write_photos(Path(place, "photos"), 10, 20, 16)
        for part in ("train.txt", "test.txt"):
            lines = Path(place, part).read_text().splitlines()
            link_tree(Path(place, "root"), names_of(lines[:: max(1, len(lines) // CHECKED)]), photos)
        words = ["--config", name, *words, "--model.name", "resnet8", "--train.device", "cpu"]
        for _ in range(repeats):
            done = subprocess.run(
                [sys.executable, "-c", STARTUP, *words], check=True, capture_output=True, text=True
            ).stdout.split()
            torch, others, lists, rest, before, after, end = map(float, done)
            print(
                f"{name}: import torch {torch:.2f} s, other libraries {others:.2f} s; lists {lists:.2f} s, model and "
                f"first order {rest:.2f} s; peak {before:.0f} MiB with the libraries, +{after - before:.0f} with the "
                f"lists, +{end - after:.0f} with the rest"
            )


def train(name: str, workers: int, share: int) -> None:
    """Train one epoch of the whole list on tiny images and evaluate it again."""
    with tempfile.TemporaryDirectory(prefix="allnc-lists-") as place:
        began = time.perf_counter()
        words = write_lists(Path(place), PROFILES[name], share)
        photos = write_photos(Path(place, "photos"), 300, 20, 16)
        for part in ("train.txt", "test.txt"):
            with Path(place, part).open() as lines:
                link_tree(Path(place, "root"), names_of(line.rstrip("\n") for line in lines), photos)
        print(f"tree: {time.perf_counter() - began:.1f} s")
        out = str(Path(place, "run"))
        model = ["--model.name", "resnet8", "--model.width", "4", "--data.image_size", "16"]
        steps = ["--train.epochs", "1", "--train.warmup_epochs", "0", "--train.device", "cpu", "--train.threads", "1"]
        words = ["--config", name, *words, *model, *steps, "--data.workers", str(workers), "--out", out]
        for command in (["allnc.train", *words], ["allnc.evaluate", out]):
            began = time.perf_counter()
            subprocess.run([sys.executable, "-m", *command], check=True)
            print(f"{command[0]}: {time.perf_counter() - began:.1f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("startup", "train"))
    parser.add_argument("names", nargs="+", choices=list(PROFILES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--share", type=int, default=1)
    options = parser.parse_args()
    for name in options.names:
        found = (LISTS / PROFILES[name].test_list).is_file()
        print(f"{name}: test list {'as published' if found else 'made up: no published one in ' + str(LISTS)}")
        if options.what == "startup":
            startup(name, options.repeats)
        else:
            train(name, options.workers, options.share)


if __name__ == "__main__":
    main()
