"""The short help of the programs whose command line is a configuration: what people use, on one screen."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args, get_origin, get_type_hints

from allnc.config import SECTIONS

_WIDTH = 112
# Option -> what stands for its value ("": its choices), and what it is.
_MEANING: dict[str, tuple[str, str]] = {
    "config": ("RECIPE", "recipe or YAML file; several lie one over the other"),
    "out": ("RUN", "folder of all that is written"),
    "seed": ("N", "of weights, batches and augmentation"),
    "data.name": ("NAME", "digits, fashion_mnist, cifar10, cifar100, image_list, arrays, features or own"),
    "data.root": ("DIR", "folder, or file, of the images"),
    "data.validation": ("SHARE", "of each class, held out and measured instead of the test images"),
    "data.image_size": ("N", "side in pixels that the network sees, of large images"),
    "data.augmentation": ("NAME", "none, shift_rotate, crop_flip_cutout, autoaugment, resized_crop ..."),
    "data.workers": ("N", "processes that decode images"),
    "model.name": ("NAME", "resnet8, resnet20 ... for small images, or timm:NAME, as timm:resnet50"),
    "model.pretrained": ("BOOL", "start a timm model from its published weights"),
    "model.weights": ("FILE", "those weights, where there is no network"),
    "loss.name": ("", ""),
    "loss.class_weights": ("W", "auto or {name: weight}, for ce, focal, ldam and mse"),
    "train.epochs": ("N", "passes over the training images"),
    "train.batch_size": ("N", "images in a step, of all processes together"),
    "train.lr": ("RATE", "peak learning rate"),
    "train.patience": ("N", "stop after so many epochs without a better balanced accuracy on validation images"),
    "train.device": ("", ""),
    "run": ("DIR", ""),
    "passes": ("N", ""),
    "shard_rows": ("N", ""),
}


def short_help(
    usage: str,
    does: str,
    groups: Mapping[str, Sequence[str]],
    own: Mapping[str, str],
    defaults: Mapping[str, Any],
    examples: Sequence[str],
) -> str:
    """Return the help that fits on a screen.

    Args:
        usage: the line that says what to type, without its options.
        does: what the program does, a sentence.
        groups: heading -> options, dotted names or names of `own`.
        own: options of this program alone, and what each means.
        defaults: dotted name -> value where nothing is given.
        examples: command lines.
    """
    program = usage.split(" [")[0]
    lines = [f"usage: {usage}", "", *textwrap.wrap(does, _WIDTH), ""]
    for heading, names in groups.items():
        lines.append(f"{heading}:")
        for name in names:
            kind, meaning = _MEANING.get(name, ("", ""))
            text = own.get(name) or meaning or "one of " + ", ".join(_choices(name))
            default = defaults.get(name)
            if default is not None:
                text += f" [{str(default).lower() if isinstance(default, bool) else default}]"
            lines += wrapped(f"  --{name} {kind}".rstrip(), text)
    lines += ["", "Examples:", *(f"  {example}" for example in examples), ""]
    lines.append(f"In brackets: what holds where nothing is given. Every option: {program} --help-all")
    return "\n".join(lines)


def _choices(option: str) -> tuple[str, ...]:
    """Return the values of an option that has a few."""
    section, _, name = option.partition(".")
    hints = get_type_hints(SECTIONS[section])
    assert name in {field.name for field in dataclasses.fields(SECTIONS[section])}
    assert get_origin(hints[name]) is Literal
    return get_args(hints[name])


def wrapped(name: str, text: str, *, left: int = 30) -> list[str]:
    """Return a name and a text in two columns, the first of which is `left` characters wide."""
    lines, line = [], name.ljust(left - 1)
    for word in text.split():
        if len(line) + 1 + len(word) > _WIDTH:
            lines.append(line)
            line = " " * (left - 1)
        line += f" {word}"
    return [*lines, line]
