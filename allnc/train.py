"""Train a model: `python -m allnc.train [--config RECIPE|FILE] [--train.epochs 5 --loss.name ce ...]`."""

from __future__ import annotations

import dataclasses
import difflib
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml
from jsonargparse import ArgumentError, ArgumentParser
from rich.console import Console

from allnc.config import SECTIONS, Config
from allnc.trainer.options import from_dict, ignored_options, option_names, to_dict

RECIPES = Path(__file__).parent / "recipes"
DEFAULT_RECIPE = "digits_lt"
FLAGS = {
    "resume": "continue the run in --out DIR with its own configuration",
    "overwrite": "start again in --out DIR, deleting the run that is there",
}
RUN_FILES = (
    "config.yaml",
    "metrics.jsonl",
    "summary.json",
    "last.safetensors",
    "state.pt",
    "events.*",
    "plots/*.png",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, 2 for a mistake of the user, 130 after Ctrl-C."""
    errors = Console(stderr=True)
    try:
        words = list(sys.argv[1:] if arguments is None else arguments)
        if "--print_config" in words:
            words.remove("--print_config")
            print(yaml.safe_dump(to_dict(parse(words)[0]), sort_keys=False), end="")
            return 0
        config, folder, resume = plan(words)
        # torch takes seconds to import: mistakes in the arguments are answered before.
        from allnc.trainer.loop import train

        train(config, folder, Console(), resume=resume)
    except (ValueError, ArgumentError) as error:
        errors.print(f"allnc.train: error: {error}", style="red", soft_wrap=True, markup=False, highlight=False)
        return 2
    except KeyboardInterrupt:
        errors.print("stopped; --out DIR --resume continues after the last whole epoch", highlight=False)
        return 130
    return 0


def plan(words: list[str]) -> tuple[Config, Path, bool]:
    """Return configuration, run folder and whether to resume, from the words of a command line.

    Raises:
        ValueError: options that contradict each other, the folder or the configuration.
    """
    flags = {flag for flag in FLAGS if f"--{flag}" in words}
    words = [word for word in words if word not in [f"--{flag}" for flag in FLAGS]]
    config, recipe = parse(words)
    if flags and config.out is None:
        raise ValueError(f"--{min(flags)} needs --out DIR, the folder of the run")
    if flags == set(FLAGS):
        raise ValueError("--resume and --overwrite exclude each other: choose one")
    if "resume" in flags:
        return _resumed(words, Path(str(config.out)))
    if config.out is None:
        stem = f"{recipe}-{config.loss.name}-seed{config.seed}"
        names = [stem] + [f"{stem}-{n}" for n in range(2, 10_000)]
        folder = next(f for f in (Path("runs") / name for name in names) if not f.exists())
    else:
        folder = Path(config.out)
        _clear(folder, overwrite="overwrite" in flags)
    return dataclasses.replace(config, out=str(folder)), folder, False


def parse(words: list[str]) -> tuple[Config, str]:
    """Return the configuration of a command line without flags, and the name of its recipe.

    Raises:
        ValueError: an unknown option or recipe, a value that does not fit, an option that would be ignored.
        SystemExit: after --help.
    """
    given = _given(words)
    recipes, rest = _split_config(words)
    parser = _parser([_recipe_path(name) for name in recipes or [DEFAULT_RECIPE]])
    try:
        values = parser.parse_args(rest).as_dict()
    except ArgumentError as error:
        raise ValueError(_readable(error)) from None
    config = from_dict({name: value for name, value in values.items() if name in (*SECTIONS, "seed", "out")})
    ignored = ignored_options(config)
    for name in given:
        if name in ignored:
            raise ValueError(f"--{name} would be ignored: {ignored[name]}; remove it")
    return config, Path((recipes or [DEFAULT_RECIPE])[-1]).stem


def _parser(recipes: list[Path]) -> ArgumentParser:
    """Return a parser whose defaults are those of the recipes, the last one first."""
    parser = ArgumentParser(
        prog="python -m allnc.train",
        description=__doc__,
        exit_on_error=False,
        allow_abbrev=False,
        default_config_files=[str(path) for path in recipes],
    )
    known = ", ".join(recipe_names())
    parser.add_argument("--config", help=f"recipe ({known}) or YAML file; default {DEFAULT_RECIPE}")
    parser.add_argument("--print_config", action="store_true", help="print the whole configuration and stop")
    parser.add_argument("--out", type=str | None, default=None, help="run folder; default runs/RECIPE-LOSS-seedSEED")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, batches and augmentation")
    for flag, meaning in FLAGS.items():
        parser.add_argument(f"--{flag}", action="store_true", help=meaning)
    for name, section in SECTIONS.items():
        parser.add_class_arguments(section, name)
    return parser


def recipe_names() -> list[str]:
    """Return the names that --config knows without a path."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def _given(words: list[str]) -> list[str]:
    """Return the options that were given, and refuse unknown ones with the nearest known name."""
    known = [*option_names(), *SECTIONS, *FLAGS, "config", "help"]
    given = [word[2:].split("=")[0] for word in words if word.startswith("--")]
    for name in given:
        if name not in known:
            raise ValueError(f"--{name} is not an option{_nearest(name, known, '--')}; --help lists them")
    return given


def _split_config(words: list[str]) -> tuple[list[str], list[str]]:
    """Take `--config X` out: recipes come first whatever the order, so that every override wins over them."""
    recipes, rest, index = [], [], 0
    while index < len(words):
        if words[index] == "--config":
            if index + 1 == len(words):
                raise ValueError(f"--config needs a recipe ({', '.join(recipe_names())}) or a YAML file")
            recipes.append(words[index + 1])
            index += 1
        elif words[index].startswith("--config="):
            recipes.append(words[index].removeprefix("--config="))
        else:
            rest.append(words[index])
        index += 1
    return recipes, rest


def _recipe_path(name: str) -> Path:
    path = RECIPES / f"{name}.yaml"
    if path.is_file():
        return path
    if not Path(name).is_file():
        known = recipe_names()
        raise ValueError(
            f"--config must be a YAML file or one of {', '.join(known)}; got {name!r}{_nearest(name, known)}"
        )
    return Path(name)


def _nearest(name: str, known: list[str], prefix: str = "") -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {prefix}{near[0]}?" if near else ""


def _readable(error: ArgumentError) -> str:
    """Put the parser's message on one line in a reader's words; name the nearest option to an unknown key."""
    message = " ".join(str(error).split())
    unknown = re.search(r"Group '(\w+)' does not accept option '(\w+)'|Option '([\w.]+)' is not accepted", message)
    if unknown:
        name = unknown[3] or f"{unknown[1]}.{unknown[2]}"
        return f"{name} is not an option{_nearest(name, option_names())}"
    wrong = re.search(r'key "([\w.]+)": Expected an? (.+)\. Got value: (.*)', message)
    union = re.search(r'key "([\w.]+)": .*Subtypes: (\[.*?\]) Errors:.*Given value: (.*)', message)
    if union:
        types = " or ".join(re.findall(r"'(\w+)'", union[2])).replace("NoneType", "null")
        return f"{union[1]} must be of type {types}; got {union[3]}"
    if wrong:
        wanted = re.sub(r"<class '(\w+)'>", r"of type \1", wrong[2])
        wanted = re.sub(r"typing\.Literal\[(.*?)\]", r"one of \1", wanted)
        return f"{wrong[1]} must be {wanted}; got {wrong[3]}"
    return message


def _resumed(words: list[str], folder: Path) -> tuple[Config, Path, bool]:
    others = [name for name in _given(words) if name != "out"]
    if others:
        raise ValueError(f"--resume continues {folder} with its own config.yaml; remove --{', --'.join(others)}")
    saved = folder / "config.yaml"
    if not saved.is_file():
        raise ValueError(f"--out must be a run folder to resume; got {folder}, which has no config.yaml")
    config, _ = parse(["--config", str(saved)])
    return dataclasses.replace(config, out=str(folder)), folder, True


def _clear(folder: Path, *, overwrite: bool) -> None:
    """Make sure that a run can start in a folder: new, empty, or a run that may be deleted."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"--out must be a folder; got the file {folder}")
    if (folder / "config.yaml").is_file():
        if not overwrite:
            raise ValueError(
                f"--out must be a new folder; {folder} holds a run: give --resume to continue it, "
                "--overwrite to replace it"
            )
        for pattern in RUN_FILES:
            for path in folder.glob(pattern):
                path.unlink()
    elif any(folder.iterdir()):
        raise ValueError(f"--out must be a new or an empty folder; {folder} holds other files")


if __name__ == "__main__":
    sys.exit(main())
