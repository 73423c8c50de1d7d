"""Checkpoints that are whole or absent: written beside their place, synced, then moved there.

last.safetensors holds the model alone with its configuration, for evaluation and other programs. state.pt
holds all
that training needs, the model included: an interruption between the two files then cannot mix two epochs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from allnc.config import Config
from allnc.trainer.options import from_dict, to_dict

WEIGHTS, STATE = "last.safetensors", "state.pt"


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file, then put it in the place of `path` in one step."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, values: Any) -> None:
    """Write JSON that a reader never sees half of."""
    write_atomic(path, lambda p: p.write_text(json.dumps(values, indent=2) + "\n"))


def save(folder: Path, config: Config, *, epoch: int, model: dict[str, Tensor], training: dict[str, Any]) -> None:
    """Write the checkpoint of an epoch.

    Args:
        folder: run folder.
        config: configuration of the run.
        epoch: epochs done.
        model: the model's state.
        training: everything else that `resume` needs: tensors, numbers, strings and containers of them.
    """
    tensors = {name: value.detach().cpu().contiguous() for name, value in model.items()}
    notes = {"config": json.dumps(to_dict(config)), "epoch": str(epoch)}
    state = {"epoch": epoch, "model": tensors, **training}
    write_atomic(folder / STATE, lambda p: torch.save(state, p))
    write_atomic(folder / WEIGHTS, lambda p: p.write_bytes(to_bytes(tensors, notes)))


def load_state(folder: Path) -> dict[str, Any]:
    """Return what `save` wrote for training.

    Raises:
        ValueError: there is no checkpoint, or it is broken.
    """
    path = folder / STATE
    if not path.is_file():
        raise ValueError(f"out must be a run folder with a checkpoint to resume; got {folder} without {STATE}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken pickle raises whatever its bytes happen to mean
        raise ValueError(f"{path} must be a checkpoint; it cannot be read: {error}") from error


def load_weights(folder: Path) -> tuple[Config, int, dict[str, Tensor]]:
    """Return configuration, epochs done and model state of a run folder.

    Raises:
        ValueError: there is no checkpoint, or it is broken.
    """
    path = folder / WEIGHTS
    if not path.is_file():
        raise ValueError(f"RUN_DIR must be a run folder with {WEIGHTS}; got {folder} without it")
    try:
        with safe_open(path, framework="pt") as file:
            notes = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} must be a checkpoint; it cannot be read: {error}") from error
    if "config" not in notes:
        raise ValueError(f"{path} must hold a configuration in its metadata; it does not: another program wrote it")
    return from_dict(json.loads(notes["config"])), int(notes["epoch"]), tensors
