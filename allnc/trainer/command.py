"""The command line of training: from words to a configuration and a run folder, every mistake on one line.

Neither torch nor numpy is imported: mistakes are answered before they are.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from allnc._command import typed
from allnc.config import SECTIONS, Config
from allnc.trainer.help import short_help, wrapped
from allnc.trainer.names import nearest
from allnc.trainer.options import dotted, from_dict, ignored_options, option_names

RECIPES = Path(__file__).parents[1] / "recipes"
DEFAULT_RECIPE = "digits_lt"
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


def parse(words: Sequence[str], program: Program = TRAIN, *, waits: bool = False) -> tuple[Config, str]:
    """Return the configuration of a command line without flags, and the names of its recipes joined by a dash.

    Args:
        words: the command line, without the program's own flags and options.
        program: the program whose options --help lists and whose names are known.
        waits: whether options that would be ignored are left to who chooses the others.

    Raises:
        ValueError: an unknown option or recipe, a value that does not fit, an option that would be ignored.
        SystemExit: after --help.
    """
    given = given_options(words, program)
    names, rest = take(words, "config")  # recipes come first whatever the order: every override wins over them
    recipes = [recipe_path(name) for name in names or [DEFAULT_RECIPE]]
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
    own = config.data.name == "own" and config.data.index is None  # what options are read for is not chosen yet
    if not own and not waits:
        refuse_ignored(config, given)
    return config, "-".join(recipe.stem for recipe in recipes)


def refuse_ignored(config: Config, given: Sequence[str]) -> None:
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


def recipe_path(name: str) -> Path:
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
