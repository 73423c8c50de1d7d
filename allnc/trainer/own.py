"""From a folder of one's own images to a configuration: look at them, say what will be done, and do it.

torch is not imported, and what reads images only once there are some to read: the first line comes at once.
"""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from allnc.config import ARRAY_ENDINGS, TEST, TRAIN, VALIDATION, Config
from allnc.trainer.folder import INDEX
from allnc.trainer.options import OF_A_MACHINE, dotted

if TYPE_CHECKING:
    from allnc.data.own import Index

LIST_ENDINGS = (".csv", ".tsv", ".txt", ".json", ".jsonl", ".lst", ".list")
SMALL = 64  # pixels: longest side of images that are seen whole and held in memory
RECIPE = "own_images"
STEPS = 1300  # of training, where the number of epochs allows
EPOCHS, EPOCHS_PRETRAINED = (20, 200), (10, 40)  # least and most
LARGEST_BATCH = 64
MEMORY = 2 * 2**30  # bytes of images that are held in memory
PHOTOGRAPH = 160  # pixels: median of the shorter side from which on images are seen at 224, else at 128
PRETRAINED = 224  # pixels: what most pretrained networks were trained at
PRETRAINED_NETWORK = "timm:resnet50"
Say = Callable[[str], None]


def spelled_out(words: Sequence[str]) -> list[str]:
    """Return a command line in which a folder, a list or a file of arrays in first place has become options.

    Raises:
        ValueError: there is no such file or folder.
    """
    if not words or words[0].startswith("-"):
        return list(words)
    place, rest = os.path.abspath(os.path.expanduser(words[0])), list(words[1:])
    if not os.path.exists(place):
        raise ValueError(
            f"the first word must be a folder of images, a list of them or a file of arrays; got {words[0]!r}, which "
            "is missing (a recipe is given by --config, a run to continue by --resume --out)"
        )
    recipe = [] if any(word == "--config" or word.startswith("--config=") for word in rest) else ["--config", RECIPE]
    if os.path.isdir(place):
        return [*recipe, "--data.name=own", f"--data.root={place}", *rest]
    if place.lower().endswith(ARRAY_ENDINGS):
        return [*recipe, "--data.name=arrays", f"--data.root={place}", *rest]
    if place.lower().endswith(LIST_ENDINGS):
        return [
            *recipe,
            "--data.name=own",
            f"--data.root={os.path.dirname(place)}",
            f"--data.train_list={place}",
            *rest,
        ]
    raise ValueError(
        f"the first word must be a folder of images, a list of them ({' '.join(LIST_ENDINGS)}) or a file of arrays "
        f"(.npz .safetensors); got the file {words[0]!r}"
    )


def settle(config: Config, given: Collection[str], typed: Collection[str], say: Say) -> tuple[Config, Index]:
    """Look at the images of data.root, choose what was not given, and say so in a few lines.

    Args:
        config: with data.name own and without data.index.
        given: dotted options that stay as they are.
        typed: those of them that stand on the command line, and are refused where they would do nothing.
        say: called with each line.

    Returns:
        The configuration of the run, and the table of its images.

    Raises:
        ValueError: the images cannot be trained on (see `allnc.data.own.scan`), or an option does not fit them.
    """
    from allnc.data.own import scan
    from allnc.data.own.look import teller

    data = config.data
    say(f"looking at the images of {data.train_list or data.root}")
    index = scan(data, teller("looked at"))
    if "data.test_share" in typed and {TEST, VALIDATION} & {*index.given}:
        raise ValueError("--data.test_share would be ignored: the images have a test set of their own; remove it")
    if data.validation > 0 and VALIDATION in index.given and TEST in index.given and "data.validation" in typed:
        raise ValueError(
            "--data.validation would be ignored: there are validation images already; remove it, or give 0 to measure "
            "on the test images"
        )
    if "train.lr" not in given and (config.train.optimizer != "sgd" or config.train.lr_scaling != "none"):
        raise ValueError(
            f"--train.lr must be given with train.optimizer {config.train.optimizer} and train.lr_scaling "
            f"{config.train.lr_scaling}: the rate that is chosen is SGD's for the batch that is chosen"
        )
    chosen = {name: value for name, value in _choices(config, index, given).items() if name not in given}
    config = changed(config, chosen)
    config.check()
    if config.train.batch_size > len(index.of(TRAIN)):
        raise ValueError(
            f"--train.batch_size must be at most {len(index.of(TRAIN))}, the number of training images; got "
            f"{config.train.batch_size}"
        )
    for line in _description(config, index):
        say(line)
    return config, index


def changed(config: Config, options: Mapping[str, Any]) -> Config:
    """Return a configuration with dotted options changed."""
    sections: dict[str, dict[str, Any]] = {}
    for name, value in options.items():
        section, option = name.split(".")
        sections.setdefault(section, {})[option] = value
    parts = {name: dataclasses.replace(getattr(config, name), **values) for name, values in sections.items()}
    return dataclasses.replace(config, **parts)


def tabled(config: Config, folder: Path, index: Index | None) -> tuple[Config, Index | None]:
    """Return the configuration with the table in the run folder, and the table; of other images, neither changes.

    Whoever has not looked at the images yet does so now, without choosing anything.
    """
    data = config.data
    if data.name != "own":
        return config, None
    if index is None:
        from allnc.data.own import read_index, scan

        index = read_index(data.index, data.root or "") if data.index else scan(data)
    return changed(config, {"data.index": str((folder / INDEX).absolute())}), index


def as_here(config: Config, index: Index | None, own: Config) -> tuple[Config, Index | None]:
    """Return what another process has found out, with the files where this one's configuration says they lie."""
    here = {name: value for name, value in dotted(own).items() if name in OF_A_MACHINE}
    out = here.pop("out")
    here.pop("data.index")  # which lies in the run folder
    config = dataclasses.replace(changed(config, here), out=out)
    return config, index and dataclasses.replace(index, root=config.data.root)


def with_index(config: Config, folder: Path) -> Config:
    """Return the configuration of a run whose table lies in its folder, wherever that is now."""
    table = folder / INDEX
    if config.data.name != "own" or not table.is_file():
        return config
    return changed(config, {"data.index": str(table.absolute())})


def _choices(config: Config, index: Index, given: Collection[str]) -> dict[str, Any]:
    """Return what the images ask for, as dotted options; those that were given are taken into account."""
    data, model = config.data, config.model
    seen_at = _image_size(index)
    size = data.image_size if "data.image_size" in given else PRETRAINED if model.pretrained else seen_at
    number = len(index.of(TRAIN))
    channels = 1 if index.all_grey and not model.pretrained else 3
    small = min(size, seen_at) <= SMALL
    bytes_in_memory = channels * size**2 * sum(1 for row in index.rows if row.split)
    cropped = "data.fit" in given and data.fit == "crop"
    gentle = small and not cropped
    augmentation = data.augmentation if "data.augmentation" in given else "shift_rotate" if gentle else "resized_crop"
    whole = small or augmentation in ("shift_rotate", "crop_flip_cutout", "autoaugment")
    batch = min(LARGEST_BATCH, 2 ** max(1, (number // 2).bit_length() - 1))
    batch = config.train.batch_size if "train.batch_size" in given else batch
    least, most = EPOCHS_PRETRAINED if model.pretrained else EPOCHS
    epochs = min(most, max(least, round(STEPS / max(1, number // batch))))
    epochs = config.train.epochs if "train.epochs" in given else epochs
    validation = len(index.of(VALIDATION))
    network = "resnet8" if size <= SMALL else "timm:resnet18"
    width = 16 if len(index.classes) <= 100 else 32  # features are 4 x as many: room between the classes
    return {
        "data.image_size": size,
        "data.fit": "whole" if whole else "crop",
        "data.channels": channels,
        "data.in_memory": size <= SMALL and bytes_in_memory <= MEMORY and not cropped,
        "data.augmentation": augmentation,
        "data.flip": not index.all_grey and augmentation not in ("none", "shift_rotate"),
        "data.workers": min(data.workers, len(os.sched_getaffinity(0))),
        "data.validation": validation / (validation + number),
        "model.name": PRETRAINED_NETWORK if model.pretrained else network,
        "model.width": width,
        "train.batch_size": batch,
        "train.epochs": epochs,
        "train.lr": (0.02 if model.pretrained else 0.1) * batch / LARGEST_BATCH,
        "train.warmup_epochs": epochs / 20,
    }


def _image_size(index: Index) -> int:
    """Return the side that nearly all small images fit into, or for photographs 224 or 128."""
    rows = [row for row in index.rows if row.split]
    longer = sorted(max(row.width, row.height) for row in rows)[int(0.95 * (len(rows) - 1))]
    if longer <= SMALL:
        return max(8, -(-longer // 4) * 4)
    shorter = sorted(min(row.width, row.height) for row in rows)[len(rows) // 2]
    return 224 if shorter >= PHOTOGRAPH else 128


def _description(config: Config, index: Index) -> list[str]:
    data, model, train = config.data, config.model, config.train
    rows = [row for row in index.rows if row.split]
    counts = Counter(row.label for row in index.of(TRAIN))
    most, least = max(counts.values()), min(counts.values())
    sizes = sorted({(row.width, row.height) for row in rows}, key=lambda size: size[0] * size[1])
    pixels = " to ".join(f"{width} x {height}" for width, height in dict.fromkeys((sizes[0], sizes[-1])))
    modes = ", ".join(f"{number:,} {mode}" for mode, number in Counter(row.mode for row in rows).most_common(4))
    lines = [
        f"{os.path.basename(data.train_list or data.root or '')}: {len(rows):,} images of {len(counts)} classes, "
        f"{pixels} pixels ({modes}); {most:,} to {least:,} training images a class, ratio {most / least:.3g}"
    ]
    numbers = {split: len(index.of(split)) for split in (TRAIN, VALIDATION, TEST)}
    split = ", ".join(f"{number:,} {name}" for name, number in numbers.items() if number)
    drawn = f"{data.test_share:.0%} of each class, drawn by data.subset_seed {data.subset_seed}"
    how = "as given" if {TEST, VALIDATION} & {*index.given} else drawn
    lines.append(f"split: {split} images ({how}), written into {INDEX} of the run folder")
    lines += [f"note: {note}" for note in index.notes]
    mirrored = data.augmentation not in ("none", "shift_rotate") and data.flip
    mirror = "mirrored (--data.flip false if left and right differ)" if mirrored else "not mirrored"
    lines.append(
        f"plan: {data.image_size} x {data.image_size} pixels, {'grey' if data.channels == 1 else 'colour'}, "
        f"{'in memory' if data.in_memory else 'from disk'}, augmented by {data.augmentation}, {mirror}; {model.name}; "
        f"loss {config.loss.name}; {train.epochs} epochs of {numbers[TRAIN] // train.batch_size} batches of "
        f"{train.batch_size}; measured on the {VALIDATION if data.validation else TEST} images"
    )
    return lines
