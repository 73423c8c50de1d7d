"""A trained run as an object that predicts: `allnc.load(RUN)`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from allnc.config import Config
from allnc.inference.guess import guessed_card
from allnc.inference.network import PredictingNetwork
from allnc.inference.transform import Source, Transform
from allnc.losses.build import LOSSES
from allnc.metrics import adjust_prior
from allnc.models import LongTailModel, build_model
from allnc.trainer.card import Card
from allnc.trainer.checkpoint import Weights, Which
from allnc.trainer.finished import finished_run
from allnc.trainer.prior import assumed_prior, wanted_prior
from allnc.trainer.runtime import pick_device

BATCH = 64  # images that pass the network at a time


@dataclass(frozen=True, kw_only=True)
class Restored:
    """A trained model as its checkpoint has it.

    Args:
        config: of the run; its files are where they lie from here.
        epoch: epochs done.
        card: what the run knows of its training images.
        model: on the device, in evaluation mode and in the memory format of the run.
        device: of the model.
        which: last or best: of which epoch the weights are.
    """

    config: Config
    epoch: int
    card: Card
    model: LongTailModel
    device: torch.device
    which: Which

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, "0", "1" ... where they have none."""
        return self.card.classes or tuple(map(str, range(len(self.card.class_counts))))

    @property
    def counts(self) -> Tensor:
        """Training images of each class, [C] int64; 0 where an older version did not note them."""
        return torch.tensor(self.card.class_counts)

    def prior(self, text: str) -> tuple[Tensor, Tensor]:
        """Return the class priors [C] that the logits assume, and that `text` names (`wanted_prior`).

        Raises:
            ValueError: the run has logits that cannot be adjusted, or `text` names no prior.
        """
        if int(self.counts.min()) == 0:
            raise ValueError("--prior needs a run that knows its class sizes; one of an older version does not")
        wanted = wanted_prior(text, self.counts, self.classes)
        return assumed_prior(self.config, self.counts, epoch=self.epoch, classes=self.classes), wanted


class Predictor:
    """A trained network with what it needs to predict (N images, c channels, H x W pixels, C classes).

    Attributes:
        model: module from normalised float32 images [N, c, H, W] (features [N, F] for a run on stored features) to
            logits [N, C] of the branch that predicts, `model.posthoc` included; the moving average's weights where the
            run has one. In evaluation mode.
        transform: maps a path, a PIL image or uint8 pixels to what the model takes, [c, H, W].
        classes: names of the classes, [C]; "0", "1" ... where they have none.
        config: configuration of the run.
        epoch: epochs done.
        card: what the run knows of its training images.
        device: where the model lies.
    """

    def __init__(self, restored: Restored, prior: str | None = None) -> None:
        config, card, model = restored.config, restored.card, restored.model
        self.config, self.card, self.device, self.epoch = config, card, restored.device, restored.epoch
        self.classes = restored.classes
        has_pixels, five = len(card.shape) == 3, config.data.test_crops == 5
        memory = torch.channels_last if config.train.channels_last and has_pixels else torch.contiguous_format
        self.model = PredictingNetwork(model, size=card.shape[-1] if five else None, memory=memory)
        self._transform = Transform(card, config.data) if has_pixels else None
        self._priors = None if prior is None else restored.prior(prior)

    @property
    def transform(self) -> Transform:
        """Maps an image to the pixels that the model takes.

        Raises:
            ValueError: the run was trained on stored features.
        """
        if self._transform is None:
            raise ValueError(
                f"the run must be one of images; it was trained on stored features of {self.card.channels} numbers "
                "each: give .model those that python -m allnc.features stores of your images, or train the encoder "
                "too (allnc.train --model.name timm:NAME)"
            )
        return self._transform

    def __call__(self, images: Source | Iterable[Source]) -> Tensor:
        """Return the probabilities of the classes for one image or several.

        Args:
            images: a path, PIL image or uint8 pixels as `transform` takes them, or any iterable of such; a tensor or
                array [N, c, h, w] is N of them.

        Returns:
            [N, C] float32 on the CPU; rows sum to 1.

        Raises:
            ValueError: no image, or one that cannot be read.
        """
        return self.probabilities(self.logits(images))

    predict = __call__

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the probabilities [n, C] of logits [n, C], under the class prior that was asked for, if any."""
        if self._priors is not None:
            logits = adjust_prior(logits, *self._priors)
        return logits.softmax(1)

    @torch.inference_mode()
    def logits(self, images: Source | Iterable[Source]) -> Tensor:
        """Return the logits [N, C], float32 on the CPU; arguments as `predict`."""
        several: Iterator[Any] = iter([images] if _is_one(images) else images)  # pyright: ignore
        parts: list[Tensor] = []
        while batch := list(islice(several, BATCH)):
            pixels = torch.stack([self.transform.pixels(image) for image in batch])
            parts.append(self.logits_of(pixels).cpu())
        if not parts:
            raise ValueError("images must hold at least one image; got none")
        return torch.cat(parts)

    @torch.inference_mode()
    def logits_of(self, pixels: Tensor) -> Tensor:
        """Return the logits [n, C] of pixels [n, c, H, W] uint8 as `transform.pixels` gives them, on the device."""
        return self.model(self.transform.normalised(pixels.to(self.device)))


def load(
    run: str | os.PathLike[str],
    *,
    which: Which | None = None,
    prior: str | None = None,
    device: str = "auto",
    root: str | None = None,
    pretrained: str | None = None,
    crops: int | None = None,
) -> Predictor:
    """Load a trained run, without its images.

    Args:
        run: its folder, or one with its last.safetensors alone.
        which: weights of the last or of the best epoch; None: the best of a run that stops early, else the last.
        prior: class prior of the probabilities: uniform, train or a CSV file of class name and weight; None: as the
            run has them.
        device: auto (a GPU where there is one), cpu or cuda.
        root: the images' folder or file, where it is not the run's (`data.root`); read of runs of older versions on
            files of arrays alone, whose weights do not know the mean and deviation of the pixels.
        pretrained: file of the pretrained weights, where it is not the run's (`model.weights`); read where the run
            left out the frozen ones alone.
        crops: 1 or 5 views of an image whose logits are averaged; None takes the run's (`data.test_crops`).

    Returns:
        The network, its transform and its classes.

    Raises:
        ValueError: there is no such run, it is damaged, or needs a file that is not there.

    Example:
        >>> run = load("runs/digits_lt-allnc-seed0")  # doctest: +SKIP
        >>> probabilities = run(["a.png", "b.png"])  # [2, C], of the classes run.classes  # doctest: +SKIP
    """
    restored = restore(run, which=which, device=device, root=root, pretrained=pretrained, crops=crops)
    return Predictor(restored, prior)


def restore(
    run: str | os.PathLike[str],
    *,
    which: Which | None = None,
    device: str = "auto",
    root: str | None = None,
    pretrained: str | None = None,
    crops: int | None = None,
) -> Restored:
    """Return the trained model of a run; arguments and errors as `load`."""
    folder = Path(run).expanduser()
    config, epoch, weights = finished_run(folder, which, root=root, crops=crops, pretrained=pretrained, device=device)
    place = pick_device(config.train)
    card = weights.card or guessed_card(config, weights, folder)
    network: Any = rebuild(config, card, weights).to(place)
    if config.train.channels_last and len(card.shape) == 3:
        network = network.to(memory_format=torch.channels_last)
    return Restored(config=config, epoch=epoch, card=card, model=network, device=place, which=weights.which)


def rebuild(config: Config, card: Card, weights: Weights) -> LongTailModel:
    """Return the model of a checkpoint, on the CPU in evaluation mode; torch's random state stays as it is."""
    entry = LOSSES[config.loss.name]
    with torch.random.fork_rng(devices=()):
        model = build_model(
            config.model,
            in_channels=card.channels,
            num_classes=len(card.class_counts),
            image_size=tuple(card.shape[1:]),
            head=entry.head(config.loss),
            two_branches=entry.two_branches,
            class_counts=torch.tensor(card.class_counts).clamp(min=1),
        )
    weights.fill(model)
    return model.eval()


def _is_one(images: object) -> bool:
    """Whether this is one image, not several."""
    if isinstance(images, (Tensor, np.ndarray)):
        return images.ndim < 4
    return isinstance(images, (str, os.PathLike, Image.Image))
