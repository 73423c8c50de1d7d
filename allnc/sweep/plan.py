"""A sweep file becomes runs, each with its whole configuration, before the first one starts.

    baseline: logit_adjusted             # differences are to this method
    seeds: [0, 1, 2]
    options: {train.threads: 1}          # of every run
    data:
      digits: {config: digits_lt}        # a recipe, or several one over the other
      fashion: {config: fashion_lt, data.max_per_class: 600, ratios: [10, 100]}  # fashion_10 and fashion_100
    methods:
      logit_adjusted: {loss.name: logit_adjusted, seeds: [0, 1, 2, 3, 4]}  # more seeds than others
      allnc: {}

Options have their dotted names; those of a method win over those of the data set, which win over `options`. Neither
torch nor numpy is imported.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from allnc.config import Config
from allnc.trainer.command import parse
from allnc.trainer.options import OF_A_MACHINE, dotted, ignored_options

_KEYS = {"baseline", "seeds", "options", "data", "methods"}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")


class Job(NamedTuple):
    """One run of a sweep."""

    data: str
    method: str
    seed: int
    config: Config
    words: tuple[str, ...]  # its command line, without --out

    @property
    def name(self) -> str:
        return f"{self.data} {self.method} seed {self.seed}"


class Sweep(NamedTuple):
    """What a sweep file asks for; data sets and methods in the order of the file."""

    baseline: str
    data: tuple[str, ...]
    methods: tuple[str, ...]
    jobs: tuple[Job, ...]  # seed after seed, so that an early table compares all methods


def read_sweep(path: Path) -> Sweep:
    """Read a sweep file and build the configuration of every run.

    Raises:
        ValueError: the file is not a sweep, or a run's options do not fit; the message names method and data set.
        OSError: it cannot be read.
    """
    values = _mapping(f"{path}", _yaml(path), known=_KEYS)
    for key in _KEYS - {"options"}:
        if key not in values:
            raise ValueError(f"{path} must have {', '.join(sorted(_KEYS))}; {key} is missing")
    everywhere = _options(f"{path}: options", values.get("options") or {})
    data = _data_sets(path, values["data"])
    methods = _mapping(f"{path}: methods", values["methods"])
    if values["baseline"] not in methods:
        raise ValueError(f"{path}: baseline must be one of the methods; got {values['baseline']!r}")
    jobs = []
    for method, entry in methods.items():
        entry = dict(_mapping(f"{path}: methods.{_named(method)}", entry or {}))
        seeds = _seeds(f"{path}: methods.{method}.seeds", entry.pop("seeds", values["seeds"]))
        only = entry.pop("data", list(data))
        for name in only if isinstance(only, list) else [only]:
            if name not in data:
                raise ValueError(f"{path}: methods.{method}.data must name data sets ({', '.join(data)}); got {name!r}")
            own = dict(data[name])
            recipes = [*own.pop("config"), *_names(f"{path}: methods.{method}.config", entry.get("config", []))]
            options = everywhere | own | _options(f"{path}: methods.{method}", {**entry, "config": None})
            jobs += _jobs(path, name, method, seeds, recipes, options)
    jobs.sort(key=lambda job: job.seed)
    return Sweep(values["baseline"], tuple(data), tuple(methods), tuple(jobs))


def read_options(config: Config) -> dict[str, Any]:
    """Return the options that decide a run's numbers: those that it reads, without seed and places of a machine.

    Two runs with the same ones are the same run, whatever the others say.
    """
    idle = {*ignored_options(config), *OF_A_MACHINE, "seed"}
    return {name: value for name, value in dotted(config).items() if name not in idle}


def same_options(recorded: Mapping[str, Any], config: Config) -> bool:
    """Whether a run that was recorded with these options is one of this configuration.

    An option that allnc did not have then counts as recorded with its default, which does what was done before. One
    that was recorded although the configuration never reads it decides nothing.
    """
    defaults, own = dotted(Config()), read_options(config)
    return not {*recorded} - {*own, *ignored_options(config)} and all(
        recorded.get(name, defaults[name]) == own[name] for name in own
    )


def _jobs(
    path: Path, data: str, method: str, seeds: list[int], recipes: list[str], options: dict[str, Any]
) -> list[Job]:
    words = [word for recipe in recipes for word in ("--config", recipe)]
    words += [f"--{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in options.items()]
    try:
        config, _ = parse(words)
    except ValueError as error:
        raise ValueError(f"{path}: {method} on {data}: {error}") from None
    if config.data.name == "own" and config.data.index is None:
        raise ValueError(
            f"{path}: {method} on {data}: one's own images must have a split that all runs share: train on them once "
            "(allnc train DIR), and give the config.yaml of that run as config"
        )
    return [
        Job(data, method, seed, dataclasses.replace(config, seed=seed), (*words, f"--seed={seed}")) for seed in seeds
    ]


def _data_sets(path: Path, values: Any) -> dict[str, dict[str, Any]]:
    """Return the options of each data set, `config` as a list of recipes among them."""
    sets: dict[str, dict[str, Any]] = {}
    for name, entry in _mapping(f"{path}: data", values).items():
        entry = dict(_mapping(f"{path}: data.{_named(name)}", entry))
        if "config" not in entry:
            raise ValueError(f"{path}: data.{name} must have config, the recipe of the data set")
        recipes = _names(f"{path}: data.{name}.config", entry.pop("config"))
        ratios = entry.pop("ratios", None)
        options = {"config": recipes, **_options(f"{path}: data.{name}", entry)}
        if ratios is None:
            _once(path, name, sets)
            sets[name] = options
            continue
        for ratio in ratios if isinstance(ratios, list) else [ratios]:
            if not isinstance(ratio, (int, float)) or isinstance(ratio, bool):
                raise ValueError(f"{path}: data.{name}.ratios must be a list of numbers; got {ratios!r}")
            _once(path, f"{name}_{ratio:g}", sets)
            sets[f"{name}_{ratio:g}"] = options | {"data.imbalance_ratio": ratio}
    return sets


def _once(path: Path, name: str, sets: Mapping[str, Any]) -> None:
    if name in sets:
        raise ValueError(f"{path}: every data set must have a name of its own; {name} is there twice")


def _yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path} must be a sweep file in YAML; it is not: {error}") from None


def _mapping(where: str, values: Any, known: set[str] | None = None) -> Mapping[str, Any]:
    if not isinstance(values, Mapping) or not all(isinstance(key, str) for key in values):
        raise ValueError(f"{where} must hold `name: value`; got {repr(values)[:60]}")
    for key in values:
        if known is not None and key not in known:
            raise ValueError(f"{where} must have {', '.join(sorted(known))}; got {key!r}")
    return values


def _named(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(f"names of data sets and methods must be of letters, digits and _.+-; got {name!r}")
    return name


def _options(where: str, values: Any) -> dict[str, Any]:
    """Return dotted options; which ones there are, the command line says."""
    options = {name: value for name, value in _mapping(where, values).items() if name != "config"}
    for name in options:
        if "." not in name:
            raise ValueError(f"{where} must hold dotted options, such as loss.name; got {name!r}")
    return options


def _names(where: str, values: Any) -> list[str]:
    values = values if isinstance(values, list) else [values]
    if not all(isinstance(value, str) for value in values):
        raise ValueError(f"{where} must be a recipe or a list of recipes; got {values!r}")
    return values


def _seeds(where: str, values: Any) -> list[int]:
    if not (isinstance(values, list) and values and all(type(value) is int and value >= 0 for value in values)):
        raise ValueError(f"{where} must be a list of numbers >= 0; got {values!r}")
    if len(set(values)) != len(values):
        raise ValueError(f"{where} must name each seed once; got {values!r}")
    return values
