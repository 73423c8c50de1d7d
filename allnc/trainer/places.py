"""Where a run's files lie now: seen from another folder, or after run and images have moved; without torch."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from allnc.config import Config, DataConfig
from allnc.trainer.own import with_index

_ANYWHERE = os.path.abspath(os.sep)


def placed(config: Config, folder: Path, given: Collection[str] = ()) -> Config:
    """Return a run's configuration with paths that are found from here.

    A path that leads to something stays as it is. Another one is looked for where it would be if it had moved together
    with the run: an absolute one at the same place relative to the run folder as before; a relative one, which starts
    from the folder that the run was started in, from the folder from which `out` leads to the run's own. The table of
    own images is the one in the run folder.

    Args:
        config: the run's.
        folder: where the run lies now.
        given: dotted options that somebody has given, which stay as they are.
    """
    before, start = _old_folder(config), _started_in(config.out, folder)

    def moved(path: str) -> str:
        if path.startswith("~") or os.path.exists(path):
            return path
        candidate = None
        if not os.path.isabs(path):
            candidate = None if start is None else os.path.join(start, path)
        elif before is not None and os.path.commonpath([before, path]) != _ANYWHERE:  # else they never lay together
            candidate = os.path.normpath(os.path.join(folder.absolute(), os.path.relpath(path, before)))
        return candidate if candidate is not None and os.path.exists(candidate) else path

    def with_moved(name: str, *options: str) -> Any:
        section = getattr(config, name)
        paths = {option: getattr(section, option) for option in options if f"{name}.{option}" not in given}
        return dataclasses.replace(section, **{option: moved(path) for option, path in paths.items() if path})

    data, model = with_moved("data", "root", "train_list", "test_list"), with_moved("model", "weights")
    config = dataclasses.replace(config, data=data, model=model)
    return config if "data.index" in given else with_index(config, folder)


def check_root(data: DataConfig) -> None:
    """Raise ValueError where the images' place is a relative one that is not there, with the reason and the remedy."""
    if data.root and not os.path.isabs(data.root) and not os.path.exists(os.path.expanduser(data.root)):
        raise ValueError(
            f"data.root must lead to the images; got {data.root}, which starts from the folder that the run was "
            "started in and is not found from here: give its place by --data.root, or other images by --data"
        )


def _old_folder(config: Config) -> str | None:
    """Return the run's folder at the time of training, absolute; None where nothing says it."""
    if config.out is not None and os.path.isabs(config.out):
        return config.out
    index = config.data.index  # lies in it
    return os.path.dirname(index) if index is not None and os.path.isabs(index) else None


def _started_in(out: str | None, folder: Path) -> Path | None:
    """Return the folder from which `out` leads to the run's folder; None where none does."""
    if out is None or os.path.isabs(out):
        return None
    words, here = Path(os.path.normpath(out)).parts, folder.resolve().parts
    if not words or words[0] == ".." or here[-len(words) :] != words:
        return None
    return Path(*here[: -len(words)])
