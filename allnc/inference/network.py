"""The part of a trained model that predicts: encoder, classifier, and what is done to it post hoc.

Legend: N images, c channels, H, W height and width, F features, C classes.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from allnc.models import LongTailModel, NormalisedClassifier
from allnc.models.etf import ETFClassifier
from allnc.models.posthoc import PosthocAdjustment, TauNormalisation
from allnc.trainer.measure import five_crops


class PredictingNetwork(nn.Module):
    """A model's logits of the branch that predicts, as the trainer measures them; heads that only train are left out.

    Args:
        model: the trained model, whose parts this one shares.
        size: side of the five crops whose logits are averaged (`data.test_crops 5`); None takes images as they are.
        memory: format in which the model is measured.
    """

    def __init__(self, model: LongTailModel, *, size: int | None, memory: torch.memory_format) -> None:
        super().__init__()
        self.encoder, self.classifier, self.posthoc = model.encoder, model.classifier, model.posthoc
        self.size, self.memory = size, memory
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits [N, C] of normalised float images [N, c, H, W], or of features [N, F]."""
        if self.size is None:
            return self._logits(images)
        return torch.stack([self._logits(view) for view in five_crops(images, self.size)]).mean(0)

    def _logits(self, images: Tensor) -> Tensor:
        features = self.encoder(images.contiguous(memory_format=self.memory) if images.ndim == 4 else images)
        logits = self.classifier(features)
        if self.posthoc is not None and not self.training:
            logits = self.posthoc(features, logits, self.classifier.weight)
        return logits


class PlainNetwork(nn.Module):
    """The same function in plain torch modules, for other programs: an encoder and one linear layer.

    What is done to the classifier stands in its weight and bias: logits = linear(features, weight, bias), of features
    at unit length where `normalises`.

    Args:
        network: evaluated on the CPU; it is copied.
        mean, std: of pixels scaled to [0, 1], by channel: the network then takes uint8 images [N, c, H, W] and
            normalises them itself; None: normalised float32 images, or features.
    """

    mean: Tensor
    std: Tensor
    weight: Tensor
    bias: Tensor | None

    def __init__(
        self, network: PredictingNetwork, statistics: tuple[tuple[float, ...], tuple[float, ...]] | None
    ) -> None:
        super().__init__()
        self.encoder = _merged(copy.deepcopy(network.encoder)).cpu().to(memory_format=torch.contiguous_format)
        weight, bias, self.normalises = folded_classifier(network)
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.size, self.raw = network.size, statistics is not None
        for name, values in zip(("mean", "std"), statistics or ((), ()), strict=True):  # on the scale of uint8
            self.register_buffer(name, torch.tensor(values)[:, None, None] * 255 if self.raw else None)
        self.requires_grad_(False)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits, [N, C] float32."""
        if self.raw:
            images = (images.float() - self.mean) / self.std
        if self.size is None:
            return self._logits(images)
        return torch.stack([self._logits(view) for view in five_crops(images, self.size)]).mean(0)

    def _logits(self, images: Tensor) -> Tensor:
        features = self.encoder(images)
        features = F.normalize(features, dim=1) if self.normalises else features
        return F.linear(features, self.weight, self.bias)


def folded_classifier(network: PredictingNetwork) -> tuple[Tensor, Tensor | None, bool]:
    """Return weight [C, F], bias [C] or None, and whether features are brought to unit length before them."""
    classifier, posthoc = network.classifier, network.posthoc
    weight, bias = classifier.weight, classifier.bias
    normalises = isinstance(classifier, (NormalisedClassifier, ETFClassifier))
    if isinstance(classifier, NormalisedClassifier):
        weight = classifier.class_vectors
    if normalises:
        weight = classifier.scale * weight
    if isinstance(posthoc, TauNormalisation):
        weight, bias = posthoc.class_vectors(weight), None
    if isinstance(posthoc, PosthocAdjustment):
        shift = -posthoc.tau * posthoc.log_prior
        bias = shift if bias is None else bias + shift
    return weight.detach().cpu().clone(), None if bias is None else bias.detach().cpu().clone(), normalises


def _merged(encoder: nn.Module) -> nn.Module:
    """Put the low-rank updates of peft into the layers that they stand beside."""
    for name, module in list(encoder.named_modules()):
        layer: Any = module
        if hasattr(layer, "lora_A") and hasattr(layer, "merge"):
            layer.merge()
            parent = encoder.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], layer.get_base_layer())
    return encoder
