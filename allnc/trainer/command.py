"""The command line of training: from words to a configuration and a run folder, every mistake on one line.

Neither torch nor numpy is imported: mistakes are answered before they are.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from allnc._command import typed
from allnc.config import SECTIONS, Config
from allnc.trainer import launcher, own
from allnc.trainer.folder import CONFIG, Mode, check_folder, new_folder
from allnc.trainer.help import short_help, wrapped
from allnc.trainer.manifest import changes_on_resuming, read_manifest
from allnc.trainer.names import nearest
from allnc.trainer.options import OF_A_MACHINE, dotted, from_dict, ignored_options, option_names, to_dict
from allnc.trainer.places import placed

RECIPES = Path(__file__).parents[1] / "recipes"
DEFAULT_RECIPE = "digits_lt"
MOST_TOLD = 4  # options in the name of a run folder
FLAGS: dict[str, str] = {
    "resume": "continue the run in --out DIR as it was; train.* and where files lie may change",
    "overwrite": "start again in --out DIR, deleting the run that is there",
}
ACTIONS: dict[str, str] = {  # flags that `parse` does not know: allnc.train takes them first
    "report": "when it is trained, write report.html into the run folder: a page about the run",
    "dry_run": "look at the images of DIR, say what is planned, and stop",
    "print_config": "print the whole configuration and stop",
}


class Program(NamedTuple):
    """A program whose command line is a configuration, and what it knows beside it."""

    name: str
    does: str
    flags: dict[str, str]  # what each means
    options: dict[str, str]  # those with a value
    shown: dict[str, tuple[str, ...]]  # what --help shows, under headings; --help-all shows all of it
    examples: tuple[str, ...]  # what follows the program's name


TRAIN = Program(
    "allnc.train",
    "Train an image classifier on DIR, a folder with a folder for each class, or on the data set of a recipe.",
    FLAGS,
    {},
    {
        "The run": ("config", "out", "seed", *FLAGS, "report", "dry_run"),
        "Images": ("data.name", "data.root", "data.validation", "data.image_size", "data.augmentation"),
        "Network": ("model.name", "model.pretrained", "model.weights"),
        "Loss": ("loss.name", "loss.class_weights"),
        "Training": ("train.epochs", "train.batch_size", "train.lr", "train.patience", "train.device"),
    },
    (
        "photos --out runs/1 --report",
        "--config cifar100_lt --data.root DIR --loss.name ce --seed 1 --out runs/ce-1",
        "--resume --out runs/ce-1 --train.epochs 90",
    ),
)


class Plan(NamedTuple):
    """What a command line asks for; of a new run on one's own images, the table of them."""

    config: Config
    folder: Path
    mode: Mode
    index: own.Index | None = None


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
    words = own.spelled_out(words)
    config, recipe = parse(words)
    if given and config.out is None:
        raise ValueError(f"--{given[0]} needs --out DIR, the folder of the run")
    _check_depth(config.model.name)
    mode: Mode = "overwrite" if given else "new"
    if launcher.rank() > 0:
        config, index = settled(config, words, lambda _: None)
        return Plan(config, Path(config.out or "runs"), mode, index)
    if config.out is not None:
        check_folder(path_of(config.out), mode)  # before minutes of looking at images
    config, index = settled(config, words, functools.partial(print, flush=True))
    if config.out is None:
        place = Path(config.data.train_list or config.data.root or recipe)
        name = recipe if recipe != own.RECIPE else place.name if place.is_dir() else place.stem
        folder = new_folder("-".join([name, config.loss.name, *_told_apart(config, words), f"seed{config.seed}"]))
        return Plan(dataclasses.replace(config, out=os.path.abspath(folder)), folder, "new", index)
    folder = path_of(config.out)
    return Plan(dataclasses.replace(config, out=os.path.abspath(folder)), folder, mode, index)


def settled(config: Config, words: Sequence[str], say: own.Say) -> tuple[Config, own.Index | None]:
    """Return the configuration with what one's own images ask for, and their table; others as they are.

    Args:
        config: what `parse` has made of the words.
        words: the command line.
        say: called with each line on the images.
    """
    config = _with_whole_paths(config)
    if config.data.name != "own" or config.data.index is not None:
        return config, None
    typed = given_options(words)
    given = {*typed}
    for name in take(words, "config")[0]:
        values = yaml.safe_load(_recipe_path(name).read_text(encoding="utf-8-sig")) if name != own.RECIPE else {}
        given |= {f"{section}.{option}" for section in SECTIONS for option in values.get(section) or ()}
    config, index = own.settle(config, given, typed, say)
    _refuse_ignored(config, typed)
    return config, index


def _with_whole_paths(config: Config) -> Config:
    """Let files and folders be found from any folder, also by whoever evaluates the run."""
    places = ("root", "train_list", "test_list", "index")
    given = {name: value for name in places if (value := getattr(config.data, name))}
    whole = {name: os.path.abspath(os.path.expanduser(value)) for name, value in given.items()}
    weights = config.model.weights and os.path.abspath(os.path.expanduser(config.model.weights))
    model = dataclasses.replace(config.model, weights=weights)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **whole), model=model)


def look_only(words: Sequence[str]) -> None:
    """Say what a run on one's own images would do."""
    words = own.spelled_out([word for word in words if word != "--dry_run"])
    config, _ = parse(words)
    if settled(config, words, functools.partial(print, flush=True))[1] is None:
        raise ValueError(
            "--dry_run looks at a folder or a list of images: give it as the first word (--print_config prints what "
            "other runs would do)"
        )


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


def _check_depth(name: str) -> None:
    """Raise ValueError for a CIFAR ResNet that nobody means: one whose depth ImageNet's have, too."""
    parameters = {"resnet50": 0.8, "resnet152": 2.4}.get(name)
    if parameters:
        raise ValueError(
            f"--model.name {name} would be the CIFAR ResNet of depth {name[6:]}, {parameters} M parameters: give "
            f"timm:{name} for ImageNet's, or resnet56 or resnet110 for small images"
        )


def print_config(words: Sequence[str]) -> None:
    """Print the whole configuration of a command line as YAML."""
    words = own.spelled_out([word for word in words if word != "--print_config"])
    config, _ = parse(words)
    if config.data.name == "own":
        config, _ = settled(config, words, lambda _: None)
    print(yaml.safe_dump(to_dict(config), sort_keys=False), end="")


def parse(words: Sequence[str], program: Program = TRAIN) -> tuple[Config, str]:
    """Return the configuration of a command line without flags, and the names of its recipes joined by a dash.

    Args:
        words: the command line, without the program's own flags and options.
        program: the program whose options --help lists and whose names are known.

    Raises:
        ValueError: an unknown option or recipe, a value that does not fit, an option that would be ignored.
        SystemExit: after --help.
    """
    given = given_options(words, program)
    names, rest = take(words, "config")  # recipes come first whatever the order: every override wins over them
    recipes = [_recipe_path(name) for name in names or [DEFAULT_RECIPE]]
    for recipe in recipes:
        _check_recipe(recipe)
    parser = _parser(recipes, program)
    if "help-all" in given:
        parser.print_help()
        sys.exit(0)
    if "help" in given or "-h" in words:
        print(_short_help(names or [DEFAULT_RECIPE], recipes, program))
        sys.exit(0)
    try:
        values = parser.parse_args(rest).as_dict()
    except ArgumentError as error:
        raise ValueError(_readable(error)) from None
    config = _config_of(values)
    if config.data.name != "own" or config.data.index is not None:  # else what they are read for is not chosen yet
        _refuse_ignored(config, given)
    return config, "-".join(recipe.stem for recipe in recipes)


def _refuse_ignored(config: Config, given: Sequence[str]) -> None:
    ignored = ignored_options(config)
    for name in given:
        if name in ignored:
            raise ValueError(f"--{name} would be ignored: {ignored[name]}; remove it")


def _parser(recipes: list[Path], program: Program) -> ArgumentParser:
    """Return a parser whose defaults are those of the recipes, the last one first."""
    parser = ArgumentParser(
        prog=typed(program.name),
        description=f"{program.does} Every option of a configuration can be given by its dotted name.",
        exit_on_error=False,
        allow_abbrev=False,
        default_config_files=[str(path) for path in recipes],
    )
    known = ", ".join(recipe_names())
    parser.add_argument(
        "--config", help=f"recipe ({known}) or YAML file, several one over the other; default {DEFAULT_RECIPE}"
    )
    if program is TRAIN:
        for name, meaning in ACTIONS.items():
            parser.add_argument(f"--{name}", action="store_true", help=meaning)
    parser.add_argument(
        "--out", type=str | None, default=None, help="run folder; default runs/RECIPE-LOSS-OPTIONS-seedSEED"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, batches and augmentation")
    for option, meaning in program.options.items():
        parser.add_argument(f"--{option}", help=meaning)
    for flag, meaning in program.flags.items():
        parser.add_argument(f"--{flag}", action="store_true", help=meaning)
    for name, section in SECTIONS.items():
        parser.add_class_arguments(section, name)
    return parser


def _config_of(values: Mapping[str, Any]) -> Config:
    """Return the configuration among what a parser has found."""
    return from_dict({name: value for name, value in values.items() if name in (*SECTIONS, "seed", "out")})


def _short_help(names: list[str], recipes: list[Path], program: Program) -> str:
    known = typed(program.name)
    place = "[DIR] " if program is TRAIN else ""
    usage = f"{known} {place}[--config RECIPE] [--SECTION.OPTION VALUE ...] [--out RUN]"
    defaults = dotted(_config_of(_parser(recipes, program).get_defaults().as_dict())) | {"config": " ".join(names)}
    own = {**program.flags, **program.options, **ACTIONS}
    shown = short_help(usage, program.does, program.shown, own, defaults, [f"{known} {e}" for e in program.examples])
    return "\n".join([shown, *wrapped("Recipes:", ", ".join(recipe_names()), left=9)])


def recipe_names() -> list[str]:
    """Return the names that --config knows without a path."""
    return sorted(str(path.relative_to(RECIPES).with_suffix("")) for path in RECIPES.rglob("*.yaml"))


def given_options(words: Sequence[str], program: Program = TRAIN) -> list[str]:
    """Return the options that were given, and refuse unknown ones with the nearest known name."""
    known = [*option_names(), *SECTIONS, *program.flags, *program.options, "config", "help", "help-all"]
    given = [word[2:].split("=")[0] for word in words if word.startswith("--")]
    for name in given:
        if name not in known:
            offered = [option for option in (*known, *ACTIONS) if option not in SECTIONS]
            raise ValueError(f"--{name} is not an option{nearest(name, offered, '--')}; --help-all lists them")
    return given


def take(words: Sequence[str], option: str) -> tuple[list[str], list[str]]:
    """Take every `--option X` and `--option=X` out of the words; return the values and the other words."""
    values, rest = [], []
    remaining = iter(words)
    for word in remaining:
        if word == f"--{option}":
            value = next(remaining, None)
            if value is None:
                needs = f"a recipe ({', '.join(recipe_names())}) or a YAML file" if option == "config" else "a value"
                raise ValueError(f"--{option} needs {needs}")
            values.append(value)
        elif word.startswith(f"--{option}="):
            values.append(word.split("=", 1)[1])
        else:
            rest.append(word)
    return values, rest


def _recipe_path(name: str) -> Path:
    path = RECIPES / f"{name}.yaml"
    if path.is_file():
        return path
    if not Path(name).is_file():
        known = recipe_names()
        raise ValueError(
            f"--config must be a YAML file or one of {', '.join(known)}; got {name!r}{nearest(name, known)}"
        )
    return Path(name)


def _check_recipe(path: Path) -> None:
    """Raise ValueError unless a file holds sections of options, and nothing that only the command line knows."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):  # a few can stand for gigabytes
            raise ValueError(f"{path} must write out what it repeats; got an alias (*name)")
        values = yaml.safe_load(text)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be YAML in UTF-8; {error}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path} must be YAML of sections and options; it is not: {error}") from None
    if not isinstance(values, Mapping):
        raise ValueError(f"{path} must hold sections ({', '.join(SECTIONS)}); got {_shown(values)}")
    for flag in {*FLAGS, *ACTIONS, "config"} & {*values}:
        raise ValueError(f"{path}: {flag} is an option of the command line alone; remove it there and give --{flag}")
    for name in SECTIONS:
        if name in values and not isinstance(values[name], Mapping):
            raise ValueError(f"{path}: {name} must hold options, as `name: value`; got {_shown(values[name])}")


def _shown(value: Any) -> str:
    return "nothing" if value is None else repr(value)[:60]


def _readable(error: ArgumentError) -> str:
    """Put the parser's message on one line in a reader's words; name the nearest option to an unknown key."""
    message = " ".join(str(error).split())
    unknown = re.search(r"Group '(\w+)' does not accept option '(\w+)'|Option '([\w.]+)' is not accepted", message)
    if unknown:
        name = unknown[3] or f"{unknown[1]}.{unknown[2]}"
        return f"{name} is not an option{nearest(name, option_names())}"
    section = re.search(r'Parser key "(\w+)": Unable to load config [\'"](.*?)[\'"]', message)
    if section:
        likely = f"; did you mean --{section[1]}.name?" if section[1] != "train" else ""
        return f"--{section[1]} must be a YAML file or a mapping of its options; got {section[2]!r}{likely}"
    stray = re.search(r"unrecognized arguments: (.*)", message)
    if stray:
        return f"every value needs the name of its option before it, as --train.epochs 5; got {stray[1]} without one"
    wrong = re.search(r'key "([\w.]+)": Expected an? (.+)\. Got value: (.*)', message)
    union = re.search(r'key "([\w.]+)": .*Subtypes: (\[.*?\]) Errors:.*Given value: (.*)', message)
    if union:
        found = re.findall(r"'(\w+)'|dict\[", union[2])
        types = " or ".join(name or "{name: number}" for name in found).replace("NoneType", "null")
        return f"{union[1]} must be of type {types}; got {union[3]}"
    if wrong:
        wanted = re.sub(r"<class '(\w+)'>", r"of type \1", wrong[2])
        wanted = re.sub(r"typing\.Literal\[(.*?)\]", r"one of \1", wanted)
        return f"{wrong[1]} must be {wanted}; got {wrong[3]}"
    return message


def _resumed(words: Sequence[str]) -> Plan:
    """Plan to continue a run: its own configuration, with what the words change."""
    outs, rest = take(words, "out")
    if not outs:
        raise ValueError("--resume needs --out DIR, the folder of the run")
    folder = path_of(outs[-1])
    check_folder(folder, "resume")
    if take(rest, "config")[0]:
        raise ValueError(f"--resume continues {folder} with its own {CONFIG}; remove --config")
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
