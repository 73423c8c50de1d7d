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

from allnc.config import ARRAY_ENDINGS, REWEIGHTED, TEST, TRAIN, VALIDATION, Config, DataConfig
from allnc.trainer import choices
from allnc.trainer.folder import INDEX
from allnc.trainer.options import OF_A_MACHINE, dotted

if TYPE_CHECKING:
    from allnc.data.own import Index

LIST_ENDINGS = (".csv", ".tsv", ".txt", ".json", ".jsonl", ".lst", ".list")
RECIPE = "own_images"
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
    if os.path.isdir(place):
        name, places = "own", {"data.root": place}
    elif place.lower().endswith(ARRAY_ENDINGS):
        name, places = "arrays", {"data.root": place}
    elif place.lower().endswith(LIST_ENDINGS):
        name, places = "own", {"data.train_list": place}
    else:
        raise ValueError(
            f"the first word must be a folder of images, a list of them ({' '.join(LIST_ENDINGS)}) or a file of arrays "
            f"(.npz .safetensors); got the file {words[0]!r}"
        )
    for option in ("data.name", *places):
        if _is_given(option, rest):
            raise ValueError(
                f"the first word, {words[0]}, and --{option} both say which images: remove one of the two (without the "
                "first word, --config gives a recipe)"
            )
    if name == "own" and "data.root" not in places:
        places = {"data.root": os.path.dirname(place), **places}  # another one may follow, from which the paths start
    recipe = [] if _is_given("config", rest) else ["--config", RECIPE]
    return [*recipe, f"--data.name={name}", *(f"--{option}={value}" for option, value in places.items()), *rest]


def is_file_of_arrays(words: Sequence[str]) -> bool:
    """Whether a command line begins with a file of arrays and has no recipe, so that the file is looked at."""
    first = next(iter(words), "-")
    return not first.startswith("-") and first.lower().endswith(ARRAY_ENDINGS) and not _is_given("config", words)


def _is_given(option: str, words: Sequence[str]) -> bool:
    return any(word == f"--{option}" or word.startswith(f"--{option}=") for word in words)


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
    choices.check_rate(config, given)
    trained = _trained(data, index)
    number = sum(trained.values())
    chosen = choices.of_files(config, index, number, given)
    config = changed(config, {name: value for name, value in chosen.items() if name not in given})
    config.check()
    choices.check_batch(config, number)
    for line in _description(config, index, trained):
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


def check_trainable(config: Config, index: Index | None) -> None:
    """Raise ValueError where the run would: for a device that is not there, or weights of unknown classes.

    torch is imported only if there is something to ask it.

    Args:
        config: of the run.
        index: table of the images; None: they are in a file of arrays.
    """
    if config.train.device == "cuda":
        from allnc.trainer.runtime import pick_device

        pick_device(config.train)
    weights = config.loss.class_weights
    if config.loss.name in REWEIGHTED and isinstance(weights, Mapping):
        from allnc.data import load
        from allnc.losses.base import class_weights

        if index is None:
            images = load(config.data)[0]
            classes = images.classes or tuple(map(str, range(images.num_classes)))
        else:
            classes = index.classes
        class_weights(weights, [1] * len(classes), classes)


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


def _trained(data: DataConfig, index: Index) -> dict[str, int]:
    """Return the training images of each class, once class sizes were cut out of them as `allnc.data.load` does."""
    counts = Counter(row.label for row in index.of(TRAIN))
    sizes = [counts[name] for name in index.classes]
    if data.profile != "none":
        from allnc.data.longtail import sizes_within

        sizes = sizes_within(sizes, data.max_per_class, data.imbalance_ratio, data.profile, index.classes)
    return dict(zip(index.classes, sizes, strict=True))


def _description(config: Config, index: Index, trained: Mapping[str, int]) -> list[str]:
    data = config.data
    rows = [row for row in index.rows if row.split]
    sizes = sorted({(row.width, row.height) for row in rows}, key=lambda size: size[0] * size[1])
    pixels = " to ".join(f"{width} x {height}" for width, height in dict.fromkeys((sizes[0], sizes[-1])))
    kinds = Counter(row.mode for row in rows).most_common()
    modes = ", ".join(f"{number:,} {mode}" for mode, number in kinds[:4]) + ", ..." * (len(kinds) > 4)
    name = os.path.basename(data.train_list or data.root or "")
    numbers = {split: f"{len(index.of(split)):,}" for split in (TRAIN, VALIDATION, TEST) if index.of(split)}
    if data.profile != "none":
        numbers[TRAIN] = f"{sum(trained.values()):,} of {numbers[TRAIN]}"
    split = ", ".join(f"{number} {name}" for name, number in numbers.items())
    drawn = f"{data.test_share:.0%} of each class, drawn by data.subset_seed {data.subset_seed}"
    how = "as given" if {TEST, VALIDATION} & {*index.given} else drawn
    size, kind = f"{data.image_size} x {data.image_size}", "grey" if data.channels == 1 else "colour"
    return [
        choices.sizes_line(name, len(rows), trained, f"{pixels} pixels ({modes})"),
        f"split: {split} images ({how}), written into {INDEX} of the run folder",
        *(f"note: {note}" for note in index.notes),
        choices.plan_line(config, sum(trained.values()), size, kind),
    ]
