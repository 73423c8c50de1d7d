"""Run folders as they are named on a command line: whether they are runs, and what they are called.

Neither torch nor matplotlib is imported: mistakes are answered before they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from allnc.trainer.folder import is_run


def check_runs(folders: Sequence[Path]) -> None:
    """Raise ValueError unless each is the folder of a run."""
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"RUN must be the folder of a run; got {folder}, which is no folder")
        if not is_run(folder):
            raise ValueError(f"RUN must be the folder of a run; got {folder}, which has no config.yaml of a run")


def labels_of(folders: Sequence[Path], labels: Sequence[str] | None) -> list[str]:
    """Return the names of the runs in the pictures: those given, or of the folders, whole where they would be the same.

    Raises:
        ValueError: another number of names than of runs, or the same name twice.
    """
    if labels is None:
        names = [folder.resolve().name for folder in folders]
        labels = names if len(set(names)) == len(names) else [str(folder) for folder in folders]
        if len(set(labels)) < len(labels):
            raise ValueError("RUN must be different folders; got one twice")
    if len(labels) != len(folders):
        raise ValueError(f"--labels must name each of the {len(folders)} runs; got {len(labels)} names")
    if len(set(labels)) < len(labels):
        raise ValueError(f"--labels must be different names; got {' '.join(labels)}")
    return list(labels)
