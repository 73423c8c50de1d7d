"""The state of a run: what its checkpoint holds after an epoch, and how a run goes on from there.

How the files of a checkpoint are written and read is in checkpoint.py.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from allnc.data import FeatureSet
from allnc.models import LongTailModel
from allnc.trainer import checkpoint
from allnc.trainer.card import Card
from allnc.trainer.manifest import changes_on_resuming
from allnc.trainer.optim import configure
from allnc.trainer.retrain import prepare_retraining
from allnc.trainer.run import Run
from allnc.trainer.runtime import random_state, restore_random_state
from allnc.trainer.selection import Selection


def save(run: Run, folder: Path, *, best: bool = False) -> None:
    """Write the checkpoint of the epochs done, whose last one may be the best."""
    training = {
        "loss": run.loss.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "scaler": run.scaler.state_dict(),
        "random": random_state(),
        "class_counts": run.counts,
        "features": _fingerprint(run),
        "seconds": run.seconds,
        "selection": run.selection.state(),
        "recipe": run.recipe,
        "class_means": run.class_means if run.config.train.collapse_every else None,
    }
    if run.average is not None:
        training["model"] = _saved(run, run.model)
    frozen = run.frozen_sum if _left_out(run) else None
    model = checkpoint.Weights(_saved(run, run.measured), frozen, Card.of(run.train_set, run.config.data))
    checkpoint.save(folder, run.config, epoch=run.epoch, model=model, training=training, changes=run.changes, best=best)


def restore(run: Run, folder: Path) -> None:
    """Continue from the checkpoint in a run folder.

    Raises:
        ValueError: there is none, it is damaged, or configuration or training set are not those of the run.
    """
    manifest, weights, state = checkpoint.load(folder)
    run.changes = (*manifest.changes, *changes_on_resuming(manifest, run.config))
    if not torch.equal(state["class_counts"], run.counts):
        wrong = int((state["class_counts"] != run.counts).nonzero()[0])
        raise ValueError(
            f"a resumed run must have the training images it began with; class {wrong} has "
            f"{int(run.counts[wrong])}, and had {int(state['class_counts'][wrong])}"
        )
    if state.get("features") not in (None, _fingerprint(run)):  # None: of files, or of a version that did not look
        what = "features" if isinstance(run.train_set, FeatureSet) else "images"
        raise ValueError(f"a resumed run must have the {what} it began with; data.root holds others")
    run.load_model(weights, manifest.epoch)
    run.model.load_state_dict(_whole(run, state.get("model", weights), weights))
    if manifest.epoch > run.config.train.feature_epochs:
        prepare_retraining(run)
    run.loss.load_state_dict(state["loss"])
    if manifest.config.train.optimizer == run.config.train.optimizer:  # else the new one starts without a past
        run.optimizer.load_state_dict(state["optimizer"])
    configure(run.optimizer, run.config.train)  # the state has the old settings
    if run.scaler.is_enabled() and state["scaler"]:
        run.scaler.load_state_dict(state["scaler"])
    restore_random_state(state["random"])
    run.seconds = state["seconds"]
    run.selection = Selection(**state.get("selection", {}))  # an older version selected nothing
    run.recipe = state.get("recipe")  # nor did it note the recipe
    run.class_means = state.get("class_means")  # nor how far class means move


def _fingerprint(run: Run) -> str | None:
    """What a resumed run must find again where its set is in memory or stored: of images, their files may move."""
    known = isinstance(run.train_set, FeatureSet) or run.train_set.images is not None
    return run.train_set.fingerprint() if known else None


def _left_out(run: Run) -> list[str]:
    """Name what a checkpoint does not hold: pretrained weights that stay frozen, unless the run wants all saved."""
    config = run.config
    return run.model.frozen_names() if config.model.pretrained and config.train.save == "tuned" else []


def _saved(run: Run, model: LongTailModel) -> dict[str, Tensor]:
    """Return what a checkpoint holds of the model, or of its moving average."""
    state = model.state_dict()
    for name in _left_out(run):
        del state[name]
    return state


def _whole(run: Run, saved: dict[str, Tensor], weights: checkpoint.Weights) -> dict[str, Tensor]:
    """Add the model's own frozen tensors where the checkpoint of these weights leaves them out."""
    own, absent = run.model.state_dict(), [] if weights.frozen is None else run.model.frozen_names()
    return {name: own[name] for name in absent} | saved
