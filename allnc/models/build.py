"""The network of a configuration: encoder, classifier heads, and the one head that the loss reads."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from allnc.config import FEATURE_MODELS, ModelConfig
from allnc.models.etf import ETFClassifier
from allnc.models.feature_heads import feature_encoder
from allnc.models.heads import NormalisedClassifier, Predictor, Projection
from allnc.models.normalisation import group_normalised
from allnc.models.posthoc import posthoc
from allnc.models.pretrained import timm_encoder
from allnc.models.resnet_cifar import CifarResNet
from allnc.models.tuning import frozen_names, rest, sum_of_tensors, tune


class ModelOutput(NamedTuple):
    """What the losses read (N activations, F features, C classes, D columns)."""

    features: Tensor  # [N, F]
    logits_uniform: Tensor  # [N, C]
    logits_rebalance: Tensor  # [N, C], those that predict; the same tensor when the heads are shared
    z: Tensor | None  # [N, D] unit rows (projection)
    h: Tensor | None  # [N, F] (predictor)
    prototypes: Tensor | None = None  # [C, D] unit rows (class vectors through a projection of their own)


class LongTailModel(nn.Module):
    """Encoder with one or two classifiers and an optional projection or predictor.

    Args:
        encoder: module from images to features [N, F], frozen already where `config.tune` asks for it.
        feature_dim: width F.
        num_classes: number of classes C.
        config: heads and classifier.
        head: the head that the loss reads beside the classifier; prototypes is a projection of the features and one
            of the class vectors of the classifier that predicts.
        heads: shared or separate classifiers; a loss with one branch shares.
        class_counts: [C] training images of each class, >= 1, for `config.posthoc` logit_adjusted.
    """

    def __init__(
        self,
        encoder: nn.Module,
        feature_dim: int,
        num_classes: int,
        config: ModelConfig,
        *,
        head: Literal["projection", "predictor", "prototypes"] | None,
        heads: Literal["shared", "separate"],
        class_counts: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.feature_dim, self.tune = feature_dim, config.tune
        self.encoder = encoder
        self.classifier = _classifier(feature_dim, num_classes, config)
        self.uniform_classifier = _classifier(feature_dim, num_classes, config) if heads == "separate" else None
        self.posthoc = posthoc(config, class_counts)
        self.features_rest = False
        hidden = config.projection_hidden or feature_dim
        self.projection = self.prototypes = None
        if head in ("projection", "prototypes"):
            self.projection = Projection(feature_dim, hidden, config.projection_dim)
        if head == "prototypes":
            self.prototypes = Projection(feature_dim, hidden, config.projection_dim)
        self.predictor = Predictor(feature_dim) if head == "predictor" else None

    def forward(self, images: Tensor, *, train_uniform: bool = True) -> ModelOutput:
        """Return features, logits and heads of images [N, c, H, W].

        Args:
            images: [N, c, H, W].
            train_uniform: whether the loss trains the uniform branch's own classifier, if there is one; else its
                logits have no graph.
        """
        # Without a graph up to the first part that trains.
        return self.heads(self.encoder(images), train_uniform=train_uniform)

    def heads(self, features: Tensor, *, train_uniform: bool = True) -> ModelOutput:
        """Return logits and heads of features [N, F], with these; `train_uniform` as in `forward`.

        In evaluation mode the logits that predict are those of `model.posthoc`.
        """
        logits = uniform = self.classifier(features)
        if self.uniform_classifier is not None and not self.features_rest:
            with torch.set_grad_enabled(train_uniform and torch.is_grad_enabled()):
                uniform = self.uniform_classifier(features)
        if self.posthoc is not None and not self.training:
            logits = self.posthoc(features, logits, self.classifier.weight)
        if self.features_rest:  # no loss reads the other heads any more
            return ModelOutput(features, uniform, logits, None, None, None)
        z = self.projection(features) if self.projection is not None else None
        h = self.predictor(features) if self.predictor is not None else None
        prototypes = self.prototypes(self.classifier.weight) if self.prototypes is not None else None
        return ModelOutput(features, uniform, logits, z, h, prototypes)

    def train(self, mode: bool = True) -> LongTailModel:
        """Set training mode, except where the encoder is frozen or all but the classifier rests."""
        super().train(mode)
        rest(self.encoder, self.tune)
        if self.features_rest:
            for part in self.children():
                part.train(mode and part is self.classifier)
        return self

    def rest_features(self) -> None:
        """Let all but the classifier that predicts be in evaluation mode from here on, and the other heads be idle."""
        self.features_rest = True
        self.train(self.training)

    def frozen_names(self) -> list[str]:
        """Return the entries of the state that training never changes."""
        return [f"encoder.{name}" for name in frozen_names(self.encoder, self.tune)]

    def frozen_sum(self) -> str:
        """Return the SHA-256 of the tensors that training never changes."""
        state = self.state_dict()
        return sum_of_tensors({name: state[name] for name in self.frozen_names()})

    def start_classifier(self, class_means: Tensor) -> None:
        """Let the class vectors be the unit class means, in both classifiers where there are two.

        Args:
            class_means: [C, F]; a mean of zero stays zero.
        """
        for classifier in (self.classifier, self.uniform_classifier):
            if classifier is not None:
                with torch.no_grad():
                    classifier.weight.copy_(F.normalize(class_means, dim=1))

    @property
    def classifier_weight(self) -> Tensor:
        """Class vectors of the classifier that predicts, [C, F], as they are trained."""
        return self.classifier.weight

    @property
    def class_vectors(self) -> Tensor:
        """What the classifier that predicts compares features with, [C, F]: its weight, or the unit rows of it."""
        if isinstance(self.classifier, NormalisedClassifier):
            return self.classifier.class_vectors
        return self.classifier.weight

    @property
    def predicting_vectors(self) -> Tensor:
        """Class vectors that predict in evaluation mode, [C, F]: the classifier's, after `model.posthoc`."""
        return self.class_vectors if self.posthoc is None else self.posthoc.class_vectors(self.class_vectors)

    @property
    def classifier_bias(self) -> Tensor | None:
        """Bias of the classifier that predicts, [C], if it has one."""
        return self.classifier.bias


def build_model(
    config: ModelConfig,
    *,
    in_channels: int,
    num_classes: int,
    image_size: tuple[int, ...] = (),
    head: Literal["projection", "predictor", "prototypes"] | None = None,
    two_branches: bool = True,
    class_counts: Tensor | None = None,
) -> LongTailModel:
    """Build the network of a configuration, with random weights from torch's global generator.

    Args:
        config: encoder and heads.
        in_channels: channels of the images; the width of stored features.
        num_classes: number of classes C.
        image_size: height and width of the images, for timm models of a fixed size; (): the model's own.
        head: the head that the loss reads (`LossConfig.head`).
        two_branches: whether the loss has two branches; with one, separate heads would leave one untrained.
        class_counts: [C] training images of each class, >= 1, for `config.posthoc` logit_adjusted.

    Raises:
        ValueError: timm does not know the model, its weights are not to be had or do not fit, it cannot be tuned as
            asked, or has no BatchNorm2d to put GroupNorm in its place.
    """
    if config.name.startswith("timm:"):
        encoder, feature_dim = timm_encoder(config, in_channels, image_size)
    elif config.name in FEATURE_MODELS:
        encoder, feature_dim = feature_encoder(config.name, in_channels, config.mlp_hidden), in_channels
    else:
        depth = int(config.name.removeprefix("resnet"))
        encoder = CifarResNet(
            depth,
            width=config.width,
            in_channels=in_channels,
            shortcut=config.shortcut,
            feature_dim=config.feature_dim,
        )
        feature_dim = encoder.num_features
    if config.norm == "group":
        encoder = group_normalised(encoder)
    if config.name.startswith("timm:"):
        tune(encoder, config, num_classes)
    heads = config.heads if two_branches else "shared"
    return LongTailModel(encoder, feature_dim, num_classes, config, head=head, heads=heads, class_counts=class_counts)


def renew_classifier(model: LongTailModel, config: ModelConfig, *, seed: int) -> None:
    """Give the classifier that predicts new random weights, in place, the same on every device.

    Args:
        model: built from `config`.
        config: of the model.
        seed: decides the weights alone; the global generators stay as they are.
    """
    with torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(seed)
        fresh = _classifier(model.feature_dim, model.classifier_weight.shape[0], config)
    model.classifier.load_state_dict(fresh.state_dict())


def _classifier(features: int, classes: int, config: ModelConfig) -> nn.Linear | NormalisedClassifier | ETFClassifier:
    if config.classifier == "etf":
        return ETFClassifier(features, classes, scale=config.classifier_scale)
    if config.classifier == "normalised":
        return NormalisedClassifier(features, classes, scale=config.classifier_scale)
    return nn.Linear(features, classes)
