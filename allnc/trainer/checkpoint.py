"""Checkpoints: files that belong together, and one that says so.

last.safetensors holds the model with its configuration, for evaluation and other programs (without the pretrained
weights that stay frozen, of which it has the SHA-256, see TrainConfig.save); state.pt what only a resumed training
needs; best.safetensors, where validation images are held out, what last.safetensors was after the best epoch.
checkpoint.json names the epoch and the SHA-256 of all, and makes the checkpoint exist:

    1. the files are written beside their places and are on the disk;
    2. checkpoint.json is replaced in one step: before it the old checkpoint counts, from here on the new one;
    3. both files are moved to their places.

Whoever reads after a death between 2 and 3 finds the new files beside their places, and `roll_forward` finishes step 3.
A file that is damaged, or of another epoch, has another sum and is refused.
"""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor

from allnc._sealed import sum_of
from allnc.config import Config, ModelConfig
from allnc.trainer.card import Card
from allnc.trainer.folder import (
    BEST,
    CHECKPOINT,
    STATE,
    WEIGHTS,
    check_trained,
    sync,
    temporary_of,
    write_json,
    write_temporary,
)
from allnc.trainer.manifest import Manifest, read_manifest
from allnc.trainer.options import from_dict, to_dict
from allnc.trainer.places import placed

if TYPE_CHECKING:
    from allnc.models import LongTailModel

Which = Literal["last", "best"]


class Weights(dict[str, Tensor]):
    """State of a model as a checkpoint has it.

    Args:
        tensors: by name.
        frozen: SHA-256 of the frozen tensors that are not among them (`LongTailModel.frozen_sum`); None: all are here.
        card: what is known of the training images; None in files of older versions.
        which: best for those of best.safetensors, else last.
    """

    def __init__(
        self,
        tensors: dict[str, Tensor],
        frozen: str | None = None,
        card: Card | None = None,
        which: Which = "last",
    ) -> None:
        super().__init__(tensors)
        self.frozen, self.card = frozen, card
        self.which: Which = which

    def model(self, config: ModelConfig) -> ModelConfig:
        """Return the configuration of a model that takes them: pretrained only where they are not all here."""
        return config if self.frozen is not None else dataclasses.replace(config, pretrained=False)

    def fill(self, model: LongTailModel, frozen_sum: str | None = None) -> None:
        """Put them into a model, beside its own frozen tensors where they leave these out.

        Args:
            model: built from the run's configuration.
            frozen_sum: the model's `frozen_sum()`, where it is known already.

        Raises:
            ValueError: they do not fit the model, or were tuned beside other frozen weights than the model has.
        """
        if self.frozen is not None:
            found = frozen_sum or model.frozen_sum()
            if found != self.frozen:
                raise ValueError(
                    "the pretrained weights must be those that the checkpoint was tuned with, of which it holds no "
                    f"copy: their SHA-256 is {self.frozen[:16]}..., got {found[:16]}...; name their file by "
                    "--model.weights"
                )
        own, absent = model.state_dict(), [] if self.frozen is None else model.frozen_names()
        try:
            model.load_state_dict({name: own[name] for name in absent} | self)
        except RuntimeError as error:  # torch lists every name and shape
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"the checkpoint's weights must fit the model of its configuration: {reason}") from None


def save(
    folder: Path,
    config: Config,
    *,
    epoch: int,
    model: dict[str, Tensor],
    training: dict[str, Any],
    changes: tuple[dict[str, Any], ...] = (),
    best: bool = False,
) -> None:
    """Write the checkpoint of an epoch; at whatever moment the process dies, the folder has this one or the last.

    Args:
        folder: run folder.
        config: configuration of the run.
        epoch: epochs done.
        model: the model's state, or `Weights` that are a part of it.
        training: everything else that `resume` needs: tensors, numbers, strings and containers of them.
        changes: options changed on resuming, see `Manifest`.
        best: whether the epoch is the best one so far; else the folder's best.safetensors stays.
    """
    tensors = {name: value.detach().cpu().contiguous() for name, value in model.items()}
    state = io.BytesIO()  # torch's own writer would turn a full disk into a RuntimeError
    torch.save(training, state)
    notes = {"config": json.dumps(to_dict(config)), "epoch": str(epoch)}
    if isinstance(model, Weights):
        notes |= {} if model.frozen is None else {"frozen": model.frozen}
        notes |= {} if model.card is None else {"card": model.card.to_json()}
    files = {WEIGHTS: to_bytes(tensors, notes), STATE: state.getvalue()}
    sums = {name: sum_of(data) for name, data in files.items()}
    if best:
        files[BEST], sums[BEST] = files[WEIGHTS], sums[WEIGHTS]
    elif (before := read_manifest(folder)) is not None and BEST in before.files:
        sums[BEST] = before.files[BEST]
    if not best:
        temporary_of(folder / BEST).unlink(missing_ok=True)  # of an epoch that died before it counted
    for name, data in files.items():
        write_temporary(folder / name, data)
    sync(folder)
    manifest = Manifest(epoch=epoch, config=config, files=sums, changes=changes)
    write_json(folder / CHECKPOINT, manifest.to_json())
    for name in files:
        temporary_of(folder / name).replace(folder / name)
    sync(folder)


def roll_forward(folder: Path) -> None:
    """Move the files of a checkpoint to their places, where a process died before it did."""
    manifest = read_manifest(folder)
    for name, wanted in manifest.files.items() if manifest else ():
        waiting = temporary_of(folder / name)
        if waiting.is_file() and sum_of(waiting.read_bytes()) == wanted:
            waiting.replace(folder / name)
    sync(folder)


def load(folder: Path) -> tuple[Manifest, Weights, dict[str, Any]]:
    """Return description, model state and training state of a run folder's checkpoint.

    Raises:
        ValueError: there is no checkpoint, or it is damaged.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        older = f": an older version of allnc wrote {STATE}" if (folder / STATE).is_file() else ""
        raise ValueError(
            f"out must be a run folder with a checkpoint to resume; got {folder} without {CHECKPOINT}{older}; "
            "--overwrite starts the run again"
        )
    _, _, model = _model(folder, WEIGHTS, _read(folder, WEIGHTS, manifest))
    data = _read(folder, STATE, manifest)
    try:
        return manifest, model, torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # a broken pickle raises whatever its bytes happen to mean
        raise ValueError(f"{folder / STATE} must be a checkpoint; it cannot be read: {error}") from error


def load_weights(folder: Path, which: Which | None = None) -> tuple[Config, int, Weights]:
    """Return configuration, epochs done and model state of a run folder, or of one with last.safetensors alone.

    Args:
        folder: run folder; the configuration has its files where they lie now (`placed`).
        which: of the last epoch or of the best one on validation images; None: the best one of a run that selects by
            itself (train.patience), else the last one.

    Raises:
        ValueError: there is no such file, or it is damaged.
    """
    manifest = read_manifest(folder)
    while manifest is not None:
        name = _file_of(folder, which, manifest)
        try:
            config, epoch, weights = _model(folder, name, _read(folder, name, manifest))
            return placed(config, folder), epoch, weights
        except ValueError:
            before, manifest = manifest, read_manifest(folder)
            if manifest == before:  # else a run has saved the next one meanwhile
                raise
    check_trained(folder)
    if which == "best":
        raise ValueError(
            f"--weights best needs a run folder with {CHECKPOINT}; got {folder}, of which only the last is known"
        )
    config, epoch, weights = _model(folder, WEIGHTS, (folder / WEIGHTS).read_bytes())
    return placed(config, folder), epoch, weights


def _file_of(folder: Path, which: Which | None, manifest: Manifest) -> str:
    """Return the name of the file with the weights that are wanted."""
    if which is None:
        which = "best" if manifest.config.train.patience is not None and BEST in manifest.files else "last"
    if which == "best" and BEST not in manifest.files:
        if manifest.config.data.validation == 0:
            raise ValueError(
                f"--weights best needs a run with data.validation, whose images choose it; {folder} held none out, and "
                "the test images must not choose"
            )
        raise ValueError(
            f"--weights best needs a run that has measured its validation images; {folder} has no {BEST}, because it "
            f"has not by epoch {manifest.epoch}, or an older version of allnc trained it"
        )
    return BEST if which == "best" else WEIGHTS


def _read(folder: Path, name: str, manifest: Manifest) -> bytes:
    """Return the bytes of a file of the checkpoint, from beside its place or from there.

    In this order, because it may be moved there meanwhile: only a newer checkpoint can then hide it.
    """
    path = folder / name
    fault = "is missing"
    for candidate in (temporary_of(path), path):
        try:
            data = candidate.read_bytes()
        except FileNotFoundError:
            continue
        if sum_of(data) == manifest.files.get(name):
            return data
        if candidate == path:
            fault = "is damaged, or of another epoch (its SHA-256 differs)"
    epoch = "the best epoch" if name == BEST else f"epoch {manifest.epoch}"
    raise ValueError(f"{path} {fault}; {CHECKPOINT} names the file of {epoch}")


def _model(folder: Path, name: str, data: bytes) -> tuple[Config, int, Weights]:
    """Return configuration, epochs done and model state from the bytes of last.safetensors or best.safetensors."""
    path = folder / name
    try:
        tensors = from_bytes(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])  # the format's own layout
        notes = header.get("__metadata__", {})
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} must be a checkpoint; it cannot be read: {error}") from error
    if not {"config", "epoch"} <= set(notes):
        raise ValueError(f"{path} must hold a configuration in its metadata; it does not: another program wrote it")
    try:
        config = from_dict(json.loads(notes["config"]))
        card = Card.from_json(notes["card"]) if "card" in notes else None
        which: Which = "best" if name == BEST else "last"
        return config, int(notes["epoch"]), Weights(tensors, notes.get("frozen"), card, which)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} must hold a configuration in its metadata; it cannot be read: {error}") from error
