"""checkpoint.json: the epochs done, the sums of the two files, the configuration, and what was changed on resuming.

The command line reads it before torch is imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from allnc._sealed import sealed, unsealed
from allnc.config import Config
from allnc.trainer.folder import CHECKPOINT
from allnc.trainer.options import dotted, from_dict, to_dict

FORMAT = 1
# What a resumed run may change: how it optimises from here on, and where its files lie. Everything else decides what
# the weights and the state mean.
CHANGEABLE = (
    "train.",
    "data.root",
    "data.train_list",
    "data.test_list",
    "data.index",
    "data.workers",
    "data.download",
    "model.weights",
    "loss.backend",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What checkpoint.json holds.

    Args:
        epoch: epochs done.
        config: the configuration under which the last of them was trained.
        files: SHA-256 of each file of the checkpoint, by name.
        changes: options changed on resuming, as {"epoch", "option", "from", "to"}.
    """

    epoch: int
    config: Config
    files: dict[str, str]
    changes: tuple[dict[str, Any], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return what checkpoint.json holds, with the SHA-256 of all the rest of it."""
        return sealed(
            {
                "format": FORMAT,
                "epoch": self.epoch,
                "files": self.files,
                "changes": list(self.changes),
                "config": to_dict(self.config),
            }
        )


def read_manifest(folder: Path) -> Manifest | None:
    """Return what a run folder's checkpoint.json says; None when there is none yet.

    Raises:
        ValueError: the file is damaged, or of another version.
    """
    path = folder / CHECKPOINT
    if not path.exists():
        return None
    try:
        values = unsealed(path.read_bytes(), FORMAT)
        return Manifest(
            epoch=int(values["epoch"]),
            config=from_dict(values["config"]),
            files=dict(values["files"]),
            changes=tuple(values["changes"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} must be the description of a checkpoint; it cannot be read: {reason}") from error


def changes_on_resuming(before: Manifest, after: Config) -> list[dict[str, Any]]:
    """Return the options in which a resumed run differs from its checkpoint.

    Raises:
        ValueError: one of them may not change in the middle of a run.
    """
    old, new = dotted(before.config), dotted(after)
    changed = [name for name in new if name != "out" and old[name] != new[name]]
    fixed = [name for name in changed if not name.startswith(CHANGEABLE)]
    if fixed:
        listing = ", ".join(f"{name} {old[name]} (now {new[name]})" for name in fixed)
        raise ValueError(f"a resumed run must keep {listing}; only train.* and where the files lie may change")
    if after.train.epochs < before.epoch:
        raise ValueError(f"train.epochs must be >= {before.epoch}, the epochs done; got {after.train.epochs}")
    stages = before.config.train.feature_epochs, after.train.feature_epochs
    if stages[0] != stages[1] and min(stages) < before.epoch:
        raise ValueError(
            f"train.epochs - train.retrain_epochs must stay {stages[0]} after {before.epoch} epochs, of which the "
            f"first {min(stages[0], before.epoch)} trained all of the network; got {stages[1]}"
        )
    if after.train.epochs == before.epoch:  # nothing is left to train
        idle = [name for name in changed if name.startswith("train.") and name not in ("train.device", "train.threads")]
        if idle:
            raise ValueError(
                f"the run has done its {before.epoch} epochs: raise train.epochs, or remove {', '.join(idle)}"
            )
        return []
    return [{"epoch": before.epoch, "option": name, "from": old[name], "to": new[name]} for name in changed]
