"""What a command line asks for: configuration, run folder and what to do with it, before anything is trained.

Neither torch nor numpy is imported: mistakes are answered before they are.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from allnc.config import SECTIONS, Config
from allnc.trainer import launcher, own, own_arrays
from allnc.trainer.command import DEFAULT_RECIPE, FLAGS, given_options, parse, recipe_path, refuse_ignored, take
from allnc.trainer.folder import CONFIG, INDEX, Mode, check_folder, new_folder
from allnc.trainer.manifest import changes_on_resuming, read_manifest
from allnc.trainer.options import OF_A_MACHINE, dotted, to_dict
from allnc.trainer.places import placed

MOST_TOLD = 4  # options in the name of a run folder


class Plan(NamedTuple):
    """What a command line asks for.

    Attributes:
        config: of the run.
        folder: of the run.
        mode: what to do with it.
        index: of a new run on one's own images, the table of them.
        recipe: of a new run, what was asked for by --config.
    """

    config: Config
    folder: Path
    mode: Mode
    index: own.Index | None = None
    recipe: str | None = None


def plan(words: Sequence[str]) -> Plan:
    """Return configuration, run folder and what to do with it, from the words of a command line.

    A folder without a name is made at once, so that no other process takes the same. Of the processes of a launcher
    such as torchrun, only the first looks at the folder of a new run, because only it writes there.

    Raises:
        ValueError: options that contradict each other, the folder or the configuration.
        OSError: the folder cannot be made.
    """
    given = [flag for flag in FLAGS if f"--{flag}" in words]
    words = [word for word in words if word not in [f"--{flag}" for flag in FLAGS]]
    if len(given) == 2:
        raise ValueError("--resume and --overwrite exclude each other: choose one")
    if given == ["resume"]:
        return _resumed(words)
    looks, words = own.is_file_of_arrays(words), own.spelled_out(words)
    config, stem = _parsed(words, looks)
    config = _in_a_new_folder(config, words)
    recipe = " + ".join(take(words, "config")[0] or [DEFAULT_RECIPE])
    if given and config.out is None:
        raise ValueError(f"--{given[0]} needs --out DIR, the folder of the run")
    mode: Mode = "overwrite" if given else "new"
    if launcher.rank() > 0:  # the first process looks at the images, and tells the others; each reads arrays
        config, _ = settled(config, words, _say_nothing, looks=True) if looks else (config, None)
        return Plan(_with_whole_paths(config), Path(config.out or "runs"), mode, recipe=recipe)
    if config.out is not None:
        check_folder(path_of(config.out), mode)  # before minutes of looking at images
    config, index = settled(config, words, functools.partial(print, flush=True), looks=looks)
    if config.out is None:
        place = Path(config.data.train_list or config.data.root or stem)
        name = stem if stem != own.RECIPE else place.name if place.is_dir() else place.stem
        folder = new_folder("-".join([name, config.loss.name, *_told_apart(config, words), f"seed{config.seed}"]))
    else:
        folder = path_of(config.out)
    return Plan(dataclasses.replace(config, out=os.path.abspath(folder)), folder, mode, index, recipe)


def settled(
    config: Config, words: Sequence[str], say: own.Say, *, looks: bool = False
) -> tuple[Config, own.Index | None]:
    """Return the configuration with what one's own images ask for, and their table, which arrays have not.

    Args:
        config: what `parse` has made of the words.
        words: the command line.
        say: called with each line on the images.
        looks: whether a file of arrays is looked at as well, and options are chosen for it.

    Raises:
        ValueError: the images cannot be trained on, or an option does not fit them.
    """
    config, typed = _with_whole_paths(config), given_options(words)
    if config.data.name == "arrays":
        own_arrays.refuse_split(config, typed)
        if looks:
            config = own_arrays.settle(config, {*typed}, say)
            refuse_ignored(config, typed)
        return config, None
    if not config.data.undecided:
        return config, None
    config, index = own.settle(config, _given(words), typed, say)
    refuse_ignored(config, typed)
    return config, index


def _parsed(words: Sequence[str], looks: bool) -> tuple[Config, str]:
    """Return what `parse` does, once it holds no mistake that looking at one's own images could not mend."""
    config, recipe = parse(words, waits=looks)
    if config.data.undecided:
        config.check(_given(words))
    elif looks:
        config.check(_given(words) | own_arrays.NOT_CHOSEN)
    _check_depth(config.model.name)
    return config, recipe


def _given(words: Sequence[str]) -> set[str]:
    """Return the options that stay as they are whatever one's own images are: of the words, and of other recipes."""
    given = {*given_options(words)}
    for name in take(words, "config")[0]:
        values = yaml.safe_load(recipe_path(name).read_text(encoding="utf-8-sig")) if name != own.RECIPE else {}
        given |= {f"{section}.{option}" for section in SECTIONS for option in values.get(section) or ()}
    return given


def look_only(words: Sequence[str]) -> None:
    """Say what a run on one's own images would do."""
    mode: Mode = "overwrite" if "--overwrite" in words else "new"
    words = [word for word in words if word not in ("--dry_run", "--overwrite")]
    looks, words = own.is_file_of_arrays(words), own.spelled_out(words)
    config, _ = _parsed(words, looks)
    if config.out is not None:
        check_folder(path_of(config.out), mode)
    if not looks and (config.data.name != "own" or config.data.index is not None):
        raise ValueError(
            "--dry_run looks at a folder, a list or a file of arrays: give it as the first word, a file of arrays "
            "without --config (--print_config prints what other runs would do)"
        )
    config, index = settled(config, words, functools.partial(print, flush=True), looks=looks)
    own.check_trainable(config, index)


def print_config(words: Sequence[str]) -> None:
    """Print the whole configuration of a command line as YAML."""
    words = [word for word in words if word != "--print_config"]
    looks, words = own.is_file_of_arrays(words), own.spelled_out(words)
    config, _ = _parsed(words, looks)
    if config.data.name == "own" or looks:
        config, _ = settled(config, words, _say_nothing, looks=looks)
    print(yaml.safe_dump(to_dict(config), sort_keys=False), end="")


def _say_nothing(line: str) -> None:
    pass


def _resumed(words: Sequence[str]) -> Plan:
    """Plan to continue a run: its own configuration, with what the words change."""
    outs, rest = take(words, "out")
    if not outs:
        raise ValueError("--resume needs --out DIR, the folder of the run")
    folder = path_of(outs[-1])
    check_folder(folder, "resume")
    for option, what in (("config", CONFIG), ("data.index", INDEX)):
        if take(rest, option)[0]:
            raise ValueError(f"--resume continues {folder} with its own {what}; remove --{option}")
    if rest and not rest[0].startswith("-"):
        raise ValueError(f"--resume continues {folder} with its own images; remove {rest[0]}")
    config, _ = parse(["--config", str(folder / CONFIG), *rest])
    config = _with_whole_paths(placed(config, folder, given_options(rest)))
    config = dataclasses.replace(config, out=os.path.abspath(folder))
    manifest = read_manifest(folder)
    if manifest is None:
        raise ValueError(
            f"--resume needs a run with a checkpoint; {folder} has none yet: --overwrite starts the run again"
        )
    changes_on_resuming(manifest, config)
    return Plan(config, folder, "resume")


def path_of(name: str) -> Path:
    expanded = os.path.expanduser(name)
    if not name or "\0" in name or expanded.startswith("~"):
        raise ValueError(f"--out must be the name of a folder, or ~ or ~user before one; got {name!r}")
    return Path(expanded)


def _check_depth(name: str) -> None:
    """Raise ValueError for a CIFAR ResNet that nobody means: one whose depth ImageNet's have, too."""
    parameters = {"resnet50": 0.8, "resnet152": 2.4}.get(name)
    if parameters:
        raise ValueError(
            f"--model.name {name} would be the CIFAR ResNet of depth {name[6:]}, {parameters} M parameters: give "
            f"timm:{name} for ImageNet's, or resnet56 or resnet110 for small images"
        )


def _with_whole_paths(config: Config) -> Config:
    """Let files and folders be found from any folder, also by whoever evaluates the run."""
    places = ("root", "train_list", "test_list", "index")
    given = {name: value for name in places if (value := getattr(config.data, name))}
    whole = {name: os.path.abspath(os.path.expanduser(value)) for name, value in given.items()}
    weights = config.model.weights and os.path.abspath(os.path.expanduser(config.model.weights))
    model = dataclasses.replace(config.model, weights=weights)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **whole), model=model)


def _in_a_new_folder(config: Config, words: Sequence[str]) -> Config:
    """Let a run that is trained by another one's config.yaml have a folder of its own."""
    if take(words, "out")[0] or config.out is None:
        return config
    folders = {recipe_path(name).resolve().parent for name in take(words, "config")[0]}
    return dataclasses.replace(config, out=None) if path_of(config.out).resolve() in folders else config


def _told_apart(config: Config, words: Sequence[str]) -> list[str]:
    """Return what the name of a run folder says of the options that were given, the first four of them."""
    values = dotted(config)
    silent = {"loss.name", "seed", "out", "train.device", "data.download", *OF_A_MACHINE}
    if values["data.name"] in ("own", "arrays"):  # whose file or folder is told
        silent.add("data.name")
    told = [name for name in dict.fromkeys(given_options(words)) if name in values and name not in silent]
    parts = [f"{name.split('.')[1]}={_in_a_name(values[name])}" for name in told[:MOST_TOLD]]
    return [*parts, "etc"] if len(told) > MOST_TOLD else parts


def _in_a_name(value: Any) -> str:
    return re.sub(r"[^A-Za-z0-9.+_]+", "_", str(value))[:24]
