"""Where a run's files lie, seen from another folder than the one that it was started in; without torch."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from allnc.config import Config, DataConfig


def placed(config: Config, folder: Path) -> Config:
    """Return a run's configuration with relative paths that are found from here.

    A relative path starts from the folder that the run was started in. That is the folder from which `out` leads to the
    run's own, wherever both have been moved together. A path that leads to something from here stays as it is.

    Args:
        config: the run's.
        folder: where the run lies now.
    """
    start = _started_in(config.out, folder)
    if start is None:
        return config

    def moved(section: Any, *names: str) -> Any:
        changes = {}
        for name in names:
            path = getattr(section, name)
            if path and not os.path.isabs(path) and not path.startswith("~") and not os.path.exists(path):
                candidate = start / path
                changes[name] = str(candidate) if candidate.exists() else path
        return dataclasses.replace(section, **changes)

    data = moved(config.data, "root", "train_list", "test_list")
    return dataclasses.replace(config, data=data, model=moved(config.model, "weights"))


def check_root(data: DataConfig) -> None:
    """Raise ValueError where the images' place is a relative one that is not there, with the reason and the remedy."""
    if data.root and not os.path.isabs(data.root) and not os.path.exists(os.path.expanduser(data.root)):
        raise ValueError(
            f"data.root must lead to the images; got {data.root}, which starts from the folder that the run was "
            "started in and is not found from here: give its place by --data.root, or other images by --data"
        )


def _started_in(out: str | None, folder: Path) -> Path | None:
    """Return the folder from which `out` leads to the run's folder; None where none does."""
    if out is None or os.path.isabs(out):
        return None
    words, here = Path(os.path.normpath(out)).parts, folder.resolve().parts
    if not words or words[0] == ".." or here[-len(words) :] != words:
        return None
    return Path(*here[: -len(words)])
