"""What options ask of each other.

A run's own images decide some options once they have been looked at (data.name own without data.index: allnc/trainer/
own.py chooses what was not given). A contradiction with one of those is none yet, and each says which they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from allnc.config.data import SMALL_SETS
from allnc.config.loss import COMPARING, CONTRASTIVE
from allnc.config.model import FEATURE_MODELS

if TYPE_CHECKING:
    from allnc.config import Config


class Contradiction(NamedTuple):
    """Options that do not go together.

    Attributes:
        message: what is asked, what was given, and what to do.
        by_images: options among them that one's own images may decide.
    """

    message: str
    by_images: tuple[str, ...] = ()


def contradictions(config: Config) -> Iterator[Contradiction]:
    """Yield what does not go together in a configuration whose sections are each in order."""
    yield from _of_losses(config)
    yield from _of_classifiers(config)
    yield from _of_networks(config)
    yield from _of_images(config)
    yield from _of_epochs(config)


def _of_losses(config: Config) -> Iterator[Contradiction]:
    loss = config.loss
    if loss.name == "allnc" and loss.contrast == "cosine" and config.data.views != 2:
        yield Contradiction(f"data.views must be 2 with loss.hycon cosine; got {config.data.views}")
    if loss.name in CONTRASTIVE and loss.classification_weight == 0:
        if loss.hycon_weight == 0:
            yield Contradiction(
                "loss.classification_weight or loss.hycon_weight must be > 0, or nothing trains; got 0 for both"
            )
        if config.train.retrain_epochs == 0:
            yield Contradiction(
                "loss.classification_weight 0 needs train.retrain_epochs >= 1, as the classifier then trains in the "
                "second stage alone; got 0"
            )
    if config.train.mixup > 0 and loss.name in COMPARING:
        yield Contradiction(
            f"train.mixup needs a loss of logits and labels alone; got loss.name {loss.name}, which compares images of "
            "the same class, and a mixed image has none: set train.mixup 0, or another loss"
        )


def _of_classifiers(config: Config) -> Iterator[Contradiction]:
    loss, model, train = config.loss, config.model, config.train
    needs = {"etf_dr": ("etf",), "ntce": ("normalised", "etf"), "nonl": ("normalised", "etf")}.get(loss.name)
    if needs is not None and model.classifier not in needs:
        yield Contradiction(
            f"model.classifier must be {' or '.join(needs)} with loss.name {loss.name}; got {model.classifier}"
        )
    if model.classifier == "etf" and (model.name == "linear" or model.tune == "head"):
        yield Contradiction("model.classifier etf needs an encoder that trains, as it does not; got a frozen one")
    if train.retrain_epochs and model.classifier == "etf":
        yield Contradiction("train.retrain_epochs needs a model.classifier that trains, linear or normalised; got etf")
    adjusts = loss.name in ("logit_adjusted", "bcl", "proco")
    adjusts = adjusts or (loss.name == "allnc" and loss.rebalance == "logit_adjusted")
    balanced = train.retrain_epochs > 0 or (adjusts and loss.tau > 0)
    if model.posthoc == "logit_adjusted" and balanced:
        yield Contradiction(
            "model.posthoc logit_adjusted needs a classifier that was trained without any balancing; got loss.name "
            f"{loss.name} and train.retrain_epochs {train.retrain_epochs}, which would balance it twice"
        )


def _of_networks(config: Config) -> Iterator[Contradiction]:
    data, model = config.data, config.model
    if (data.name == "features") != (model.name in FEATURE_MODELS):
        yield Contradiction(
            f"model.name must be {' or '.join(FEATURE_MODELS)} with data.name features, and only then; got "
            f"{model.name} with data.name {data.name}"
        )
    if not model.name.startswith("timm:"):
        if model.pretrained:
            yield Contradiction(
                f"model.pretrained needs a timm:NAME model; got {model.name}, which has no published weights",
                by_images=("model.name",),
            )
        if model.tune != "full":
            yield Contradiction(
                f"model.tune must be full with model.name {model.name}, which has no pretrained part; got {model.tune}",
                by_images=("model.name",),
            )
    if model.pretrained and data.channels != 3:
        yield Contradiction("data.channels must be 3 with model.pretrained, whose weights are of colour images; got 1")


def _of_images(config: Config) -> Iterator[Contradiction]:
    """What data.fit asks, and what is possible for images in files that are not held in memory."""
    data = config.data
    if data.fit == "whole" and data.test_crops != 1:
        yield Contradiction(
            f"data.test_crops must be 1 with data.fit whole, which cuts nothing; got {data.test_crops}",
            by_images=("data.fit",),
        )
    if data.name in SMALL_SETS:
        return
    if data.in_memory and data.fit != "whole":
        yield Contradiction(
            f"data.fit must be whole with data.in_memory true; got {data.fit}",
            by_images=("data.in_memory", "data.fit"),
        )
    if data.augmentation == "autoaugment" and not data.in_memory:
        yield Contradiction(
            f"data.augmentation must be none, resized_crop, crop_flip or randaugment with data.name {data.name}; got "
            "autoaugment, which is for small images held in memory",
            by_images=("data.augmentation", "data.in_memory"),
        )
    if data.augmentation in ("shift_rotate", "crop_flip_cutout") and data.fit != "whole":
        yield Contradiction(
            f"data.augmentation must be none, resized_crop, crop_flip or randaugment with data.name {data.name}; got "
            f"{data.augmentation}, which is for small images: with data.fit whole, and their data.image_size",
            by_images=("data.augmentation", "data.fit"),
        )


def _of_epochs(config: Config) -> Iterator[Contradiction]:
    train = config.train
    if train.patience is not None and config.data.validation == 0:
        yield Contradiction(
            f"train.patience needs validation images; got {train.patience} without any: set data.validation, such as "
            "0.1",
            by_images=("data.validation",),
        )
    if train.retrain_epochs >= train.epochs:
        yield Contradiction(
            f"train.retrain_epochs must be in [0, {train.epochs}), less than train.epochs; got {train.retrain_epochs}",
            by_images=("train.epochs",),
        )
