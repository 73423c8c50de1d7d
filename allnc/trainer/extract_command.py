"""The command line of allnc.features: which model's features of which images go where.

Neither torch nor numpy is imported: mistakes are answered before they are.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from allnc.config import FEATURES_MANIFEST, Config
from allnc.trainer import launcher
from allnc.trainer.command import Program, given_options, parse, take
from allnc.trainer.folder import CONFIG, LOCK, Mode, check_place, is_run
from allnc.trainer.places import placed
from allnc.trainer.planning import path_of

SHARD_ROWS = 65_536  # 96 MiB of 768 features: minutes of work at most are lost, and it fits in memory twice
PROGRAM = Program(
    "allnc.features",
    "Store the features of every training and test image once; `--data.name features` trains on them.",
    {"resume": "continue what was stopped in --out DIR"},
    {
        "run": "folder of a run whose trained encoder is taken, with its configuration, instead of --config",
        "passes": "passes over the training images: one without augmentation, the others augmented; default 1",
        "shard_rows": f"images of a file, default {SHARD_ROWS}",
    },
    {
        "What goes where": ("out", "resume", "passes", "shard_rows"),
        "Model": ("config", "run", "model.name", "model.pretrained", "model.weights"),
        "Images": ("data.name", "data.root", "data.image_size", "data.augmentation", "data.workers"),
        "Machine": ("train.device",),
    },
    (
        "--config imagenet_lt --model.name timm:resnet50 --model.pretrained true --out features",
        "--run runs/trained --passes 3 --out features",
    ),
)
# Every other option of a configuration is of the training that is to come.
_READ = (
    *("seed", "model.name", "model.width", "model.feature_dim", "model.shortcut", "model.norm"),
    *("model.pretrained", "model.weights"),
    *(f"train.{name}" for name in ("device", "threads", "channels_last", "matmul_precision")),
    *(f"data.{name}" for name in ("name", "root", "train_list", "test_list", "download", "workers")),
    *(f"data.{name}" for name in ("imbalance", "imbalance_ratio", "max_per_class", "subset_seed")),
    *(f"data.{name}" for name in ("index", "test_share", "max_bad", "in_memory")),
    *(f"data.{name}" for name in ("image_size", "fit", "channels", "augmentation", "flip", "crop_scale")),
    *(f"data.{name}" for name in ("mean", "std")),
)
_OF_VIEWS = ("data.flip", "data.crop_scale")  # of augmented passes alone
_OWN_FILE = re.compile(r"(train|test)-pass\d+-\d{5}\.safetensors")


class Plan(NamedTuple):
    """What a command line asks for; to resume, the folder alone."""

    folder: Path
    mode: Mode
    config: Config | None = None
    run: Path | None = None
    passes: int = 1
    shard_rows: int = SHARD_ROWS


def plan(words: Sequence[str]) -> Plan:
    """Return what the words of a command line ask for.

    Raises:
        ValueError: options that contradict each other, or a folder that does not suit.
        SystemExit: after --help.
    """
    if launcher.world_size() > 1:
        raise ValueError("allnc.features runs as one process: start it without a launcher such as torchrun")
    for asked in ("--help", "-h", "--help-all"):
        if asked in words:
            parse([asked], PROGRAM)
    given = given_options(words, PROGRAM)
    outs, rest = take(words, "out")
    if not outs:
        raise ValueError("--out DIR must be given, the folder of the features")
    folder = path_of(outs[-1])
    if "resume" in given:
        others = [name for name in given if name not in ("resume", "out")]
        if others:
            raise ValueError(f"--resume continues {folder} with its own configuration; remove --{others[0]}")
        if rest != ["--resume"]:
            raise ValueError(f"--resume takes no value; got {' '.join(rest)}")
        check_folder(folder, "resume")
        return Plan(folder, "resume")
    runs, rest = take(rest, "run")
    passes, rest = _whole_number("passes", 1, rest)
    rows, rest = _whole_number("shard_rows", SHARD_ROWS, rest)
    if runs:
        if not is_run(Path(runs[-1])):
            raise ValueError(f"--run must be the folder of a run; got {runs[-1]}, which has no {CONFIG} of a run")
        if "config" in given:
            raise ValueError(f"--run takes the configuration of {runs[-1]}; remove --config")
        rest = ["--config", str(Path(runs[-1]) / CONFIG), *rest]
    config, _ = parse(rest, PROGRAM)
    for name in given:
        if "." in name or name == "seed":
            if runs and (name == "seed" or (name.startswith("model.") and name != "model.weights")):
                raise ValueError(f"--{name} would be ignored: the model is that of --run; remove it")
            # The images that a run has held out are no training images of its features, either.
            if name not in _READ and not (runs and name == "data.validation"):
                raise ValueError(f"--{name} would be ignored: it is of the training on the features; remove it")
            if passes == 1 and name in _OF_VIEWS:
                raise ValueError(
                    f"--{name} would be ignored: it is of augmented passes, and --passes 1 makes none; remove it"
                )
    if config.data.name == "features":
        raise ValueError("data.name must be of images; got features, which are made already")
    if passes > 1 and config.data.augmentation == "none":
        raise ValueError(f"--passes must be 1 with data.augmentation none, all would be alike; got {passes}")
    check_folder(folder, "new")
    if runs:
        config = placed(config, Path(runs[-1]), given)
    config = dataclasses.replace(config, out=None)
    return Plan(folder, "new", config, Path(runs[-1]) if runs else None, passes, rows)


def check_folder(path: Path, mode: Mode) -> None:
    """Raise ValueError unless the folder suits the mode; nothing is written."""
    check_place(path)
    begun = (path / FEATURES_MANIFEST).is_file()
    if mode == "resume" and not begun:
        raise ValueError(f"--resume needs a folder that allnc.features has begun; {path} has no {FEATURES_MANIFEST}")
    if mode == "new" and begun:
        raise ValueError(
            f"--out must be a new folder; {path} holds features: give --resume to continue, or another --out"
        )
    foreign = [entry.name for entry in path.iterdir() if not _is_own(entry.name, begun)] if path.exists() else []
    if foreign:
        raise ValueError(f"--out must be a folder of features alone; {path} holds {min(foreign)!r}, too")


def _is_own(name: str, begun: bool) -> bool:
    inner = name.removeprefix(".").removesuffix(".tmp") if name.endswith(".tmp") else name
    if name == LOCK or (inner != name and inner == FEATURES_MANIFEST):  # a process that died at its start leaves them
        return True
    return begun and (inner == FEATURES_MANIFEST or _OWN_FILE.fullmatch(inner) is not None)


def _whole_number(option: str, default: int, words: list[str]) -> tuple[int, list[str]]:
    values, rest = take(words, option)
    if not values:
        return default, rest
    if not (values[-1].isdecimal() and 1 <= int(values[-1]) <= 2**31):
        raise ValueError(f"--{option} must be a whole number >= 1; got {values[-1]}")
    return int(values[-1]), rest
