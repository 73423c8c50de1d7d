"""The command `allnc`, which is also `python -m allnc`: one name for allnc's programs, each in a module of its own."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from allnc._command import MISTAKE, answer
from allnc._version import __version__

# What a person types -> the module whose `main` answers, and what it is for.
COMMANDS: dict[str, tuple[str, str]] = {
    "train": ("allnc.train", "train a classifier on your images or a data set, or continue a run"),
    "evaluate": ("allnc.evaluate", "measure a run: accuracy by class size, neural collapse by layer"),
    "predict": ("allnc.predict", "classes and probabilities of images"),
    "export": ("allnc.export", "a trained network for other programs: safetensors, torch, ONNX"),
    "report": ("allnc.report.__main__", "one HTML page about runs, with the images that were confused"),
    "plot": ("allnc.plot.__main__", "draw one run or several side by side"),
    "sweep": ("allnc.sweep.__main__", "compare methods on data sets and seeds, with intervals"),
    "features": ("allnc.features", "store the features of every image once, to train heads on them"),
    "theory": ("allnc.theory.__main__", "predicted against found: minimisers, saddles, imbalance"),
    "info": ("allnc.info", "versions, what was built, which backends can run here"),
}
EXAMPLES = """\
Examples:
  allnc train                       scikit-learn's digits, long-tailed: ten seconds
  allnc train photos --out runs/1   a folder with a folder for each class
  allnc predict runs/1 new/*.jpg    what is on images
  allnc report runs/1               what was learned, and what was not"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 0, 2 for a mistake of the user, 130 after Ctrl-C."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("--help", "-h", "help"):
        print(_help(), file=sys.stdout if words else sys.stderr)
        return 0 if words else MISTAKE
    if words[0] == "--version":
        print(f"allnc {__version__}")
        return 0
    if words[0] not in COMMANDS:
        return answer("allnc", lambda: _refuse(words[0]))
    return import_module(COMMANDS[words[0]][0]).main(words[1:])


def _help() -> str:
    listed = [f"  {name:10}{does}" for name, (_, does) in COMMANDS.items()]
    lines = (
        "usage: allnc COMMAND [options]",
        "",
        "All-around Neural Collapse: image classifiers for long-tailed data.",
        "",
        *listed,
        "",
        "allnc COMMAND --help explains a command, allnc --version says which this is.",
        "",
        EXAMPLES,
    )
    return "\n".join(lines)


def _refuse(word: str) -> None:
    if word.startswith("-"):
        raise ValueError(f"a command comes first, such as allnc train {word}; got {word}; allnc --help lists them")
    near = difflib.get_close_matches(word, COMMANDS, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    if os.path.isdir(word):
        is_run = os.path.isfile(os.path.join(word, "config.yaml"))
        does = f"a run: allnc report {word} shows it" if is_run else f"a folder: allnc train {word} trains on it"
        hint = f", but {does}"
    raise ValueError(f"{word} is not a command{hint}; allnc --help lists them")


if __name__ == "__main__":
    sys.exit(main())
