"""A trained run as an object that predicts: `allnc.load(RUN)`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from allnc.config import FEATURE_MODELS, SMALL_SETS, Config, DataConfig
from allnc.inference.network import PredictingNetwork
from allnc.inference.places import placed
from allnc.inference.transform import Source, Transform
from allnc.losses.build import LOSSES
from allnc.models import LongTailModel, build_model
from allnc.trainer.card import Card
from allnc.trainer.checkpoint import Weights, load_weights
from allnc.trainer.runtime import pick_device

BATCH = 64  # images that pass the network at a time


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

    def __init__(
        self, config: Config, epoch: int, card: Card, model: LongTailModel, device: torch.device, *, crops: int = 1
    ) -> None:
        self.config, self.epoch, self.card, self.device = config, epoch, card, device
        side = config.data.image_size if crops == 5 else None
        channels_last = config.train.channels_last and len(card.shape) == 3
        memory = torch.channels_last if channels_last else torch.contiguous_format
        whole = model.to(device).to(memory_format=memory)  # pyright: ignore[reportCallIssue]
        self.model = PredictingNetwork(whole, size=side, memory=memory)
        self.classes = card.classes or tuple(map(str, range(len(card.class_counts))))
        self._transform = None
        if len(card.shape) == 3:
            small = in_memory(config.data)
            self._transform = Transform(card.shape, card.mean, card.std, in_memory=small, margin=crops == 5)

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
        return self.logits(images).softmax(1)

    predict = __call__

    @torch.inference_mode()
    def logits(self, images: Source | Iterable[Source]) -> Tensor:
        """Return the logits [N, C], float32 on the CPU; arguments as `predict`."""
        several = iter([images] if _is_one(images) else images)  # pyright: ignore[reportArgumentType]
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
    root: str | None = None,
    weights: str | None = None,
    device: str = "auto",
    crops: int | None = None,
) -> Predictor:
    """Load a trained run, without its images.

    Args:
        run: its folder, or one with its last.safetensors alone.
        root: the images' folder or file, where it is not the run's (`data.root`); read of runs of older versions on
            files of arrays alone, whose weights do not know the mean and deviation of the pixels.
        weights: file of the pretrained weights, where it is not the run's (`model.weights`); read where the run left
            out the frozen ones alone.
        device: auto (a GPU where there is one), cpu or cuda.
        crops: 1 or 5 views of an image whose logits are averaged; None takes the run's (`data.test_crops`).

    Returns:
        The network, its transform and its classes.

    Raises:
        ValueError: there is no such run, it is damaged, or needs a file that is not there.

    Example:
        >>> run = load("runs/digits_lt-allnc-seed0")  # doctest: +SKIP
        >>> probabilities = run(["a.png", "b.png"])  # [2, C], of the classes run.classes  # doctest: +SKIP
    """
    folder = Path(run).expanduser()
    config, epoch, state = load_weights(folder)
    if weights is not None and state.frozen is None:
        raise ValueError(f"--model.weights would be ignored: {folder} holds every weight; remove it")
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda; got {device!r}")
    config = placed(config, folder)
    data = dataclasses.replace(
        config.data, root=root or config.data.root, test_crops=crops or config.data.test_crops
    )
    model = dataclasses.replace(state.model(config.model), weights=weights or config.model.weights)
    config = dataclasses.replace(
        config, data=data, model=model, train=dataclasses.replace(config.train, device=device)  # pyright: ignore
    )
    place = pick_device(config.train)
    card = state.card or _guessed_card(config, state, folder)
    network = rebuild(config, card, state)
    return Predictor(config, epoch, card, network, place, crops=config.data.test_crops)


def rebuild(config: Config, card: Card, weights: Weights) -> LongTailModel:
    """Return the model of a checkpoint, on the CPU in evaluation mode; torch's random state stays as it is."""
    entry = LOSSES[config.loss.name]
    with torch.random.fork_rng(devices=()):
        model = build_model(
            config.model,
            in_channels=card.channels,
            num_classes=len(card.class_counts),
            head=entry.head(config.loss),
            two_branches=entry.two_branches,
            class_counts=torch.tensor(card.class_counts).clamp(min=1),
        )
    weights.fill(model)
    return model.eval()


def in_memory(config: DataConfig) -> bool:
    """Whether a run's images are small ones in memory, all of one size."""
    return config.name in SMALL_SETS


def _guessed_card(config: Config, weights: Weights, folder: Path) -> Card:
    """Return what a checkpoint of an older version, which has no card, tells all the same."""
    data, vectors = config.data, weights.get("classifier.weight")
    if vectors is None:
        raise ValueError(f"{folder} must hold the weights of a classifier; they have none")
    counts = (0,) * len(vectors)  # not known
    if config.model.name in FEATURE_MODELS:
        width = vectors.shape[1]
        return Card(classes=None, class_counts=counts, mean=(), std=(), channels=width, shape=(width,))
    from allnc.data.arrays import read_arrays
    from allnc.data.sources import IMAGENET_MEAN, IMAGENET_STD, MEAN_STD

    if data.name == "arrays":
        try:
            train, _ = read_arrays(data)
        except ValueError as error:
            raise ValueError(
                f"{folder} must know the mean and deviation of its pixels, which its version of allnc took from the "
                f"file of the images; {error}: name that file by --data.root"
            ) from error
        card = Card.of(train, data)
        known = data.mean is not None and data.std is not None
        return dataclasses.replace(card, mean=data.mean, std=data.std) if known else card
    mean, std = MEAN_STD.get(data.name, (IMAGENET_MEAN, IMAGENET_STD))
    if data.mean is not None and data.std is not None:
        mean, std = data.mean, data.std
    side = {"digits": 8, "fashion_mnist": 28, "cifar10": 32, "cifar100": 32}.get(data.name, data.image_size)
    return Card(
        classes=None, class_counts=counts, mean=mean, std=std, channels=len(mean), shape=(len(mean), side, side)
    )


def _is_one(images: object) -> bool:
    """Whether this is one image, not several."""
    if isinstance(images, (Tensor, np.ndarray)):
        return images.ndim < 4
    return isinstance(images, (str, os.PathLike, Image.Image))
