"""The network of a configuration: encoder, classifier heads, and the one head that the loss reads."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from allnc.config import FEATURE_MODELS, ModelConfig
from allnc.models.feature_heads import feature_encoder
from allnc.models.heads import NormalisedClassifier, Predictor, Projection
from allnc.models.normalisation import group_normalised
from allnc.models.resnet_cifar import CifarResNet


class ModelOutput(NamedTuple):
    """What the losses read (N activations, F features, C classes, D columns)."""

    features: Tensor  # [N, F]
    logits_uniform: Tensor  # [N, C]
    logits_rebalance: Tensor  # [N, C], those that predict; the same tensor when the heads are shared
    z: Tensor | None  # [N, D] unit rows (projection)
    h: Tensor | None  # [N, F] (predictor)


class LongTailModel(nn.Module):
    """Encoder with one or two classifiers and an optional projection or predictor.

    Args:
        encoder: module from images to features [N, F].
        feature_dim: width F.
        num_classes: number of classes C.
        config: heads and classifier.
        head: the head that the loss reads beside the classifier.
        heads: shared or separate classifiers; a loss with one branch shares.
    """

    def __init__(
        self,
        encoder: nn.Module,
        feature_dim: int,
        num_classes: int,
        config: ModelConfig,
        *,
        head: Literal["projection", "predictor"] | None,
        heads: Literal["shared", "separate"],
    ) -> None:
        super().__init__()
        self.feature_dim = feature_dim
        self.encoder = encoder
        self.classifier = _classifier(feature_dim, num_classes, config)
        self.uniform_classifier = _classifier(feature_dim, num_classes, config) if heads == "separate" else None
        hidden = config.projection_hidden or feature_dim
        self.projection = Projection(feature_dim, hidden, config.projection_dim) if head == "projection" else None
        self.predictor = Predictor(feature_dim) if head == "predictor" else None

    def forward(self, images: Tensor, *, train_uniform: bool = True) -> ModelOutput:
        """Return features, logits and heads of images [N, c, H, W].

        Args:
            images: [N, c, H, W].
            train_uniform: whether the loss trains the uniform branch's own classifier, if there is one; else its
                logits have no graph.
        """
        return self.heads(self.encoder(images), train_uniform=train_uniform)

    def heads(self, features: Tensor, *, train_uniform: bool = True) -> ModelOutput:
        """Return logits and heads of features [N, F], with these; `train_uniform` as in `forward`."""
        logits = uniform = self.classifier(features)
        if self.uniform_classifier is not None:
            with torch.set_grad_enabled(train_uniform and torch.is_grad_enabled()):
                uniform = self.uniform_classifier(features)
        z = self.projection(features) if self.projection is not None else None
        h = self.predictor(features) if self.predictor is not None else None
        return ModelOutput(features, uniform, logits, z, h)

    @property
    def classifier_weight(self) -> Tensor:
        """Class vectors of the classifier that predicts, [C, F]."""
        return self.classifier.weight

    @property
    def classifier_bias(self) -> Tensor | None:
        """Bias of the classifier that predicts, [C], if it has one."""
        return self.classifier.bias


def build_model(
    config: ModelConfig,
    *,
    in_channels: int,
    num_classes: int,
    head: Literal["projection", "predictor"] | None = None,
    two_branches: bool = True,
) -> LongTailModel:
    """Build the network of a configuration, with random weights from torch's global generator.

    Args:
        config: encoder and heads.
        in_channels: channels of the images; the width of stored features.
        num_classes: number of classes C.
        head: the head that the loss reads (`LossConfig.head`).
        two_branches: whether the loss has two branches; with one, separate heads would leave one untrained.

    Raises:
        ValueError: timm does not know the model, or it has no BatchNorm2d to put GroupNorm in its place.
    """
    if config.name.startswith("timm:"):
        encoder, feature_dim = _timm_encoder(config, in_channels)
    elif config.name in FEATURE_MODELS:
        encoder, feature_dim = feature_encoder(config.name, in_channels, config.mlp_hidden), in_channels
    else:
        depth = int(config.name.removeprefix("resnet"))
        encoder = CifarResNet(depth, width=config.width, in_channels=in_channels, shortcut=config.shortcut)
        feature_dim = encoder.num_features
    if config.norm == "group":
        encoder = group_normalised(encoder)
    heads = config.heads if two_branches else "shared"
    return LongTailModel(encoder, feature_dim, num_classes, config, head=head, heads=heads)


def _classifier(features: int, classes: int, config: ModelConfig) -> nn.Linear | NormalisedClassifier:
    if config.classifier == "normalised":
        return NormalisedClassifier(features, classes, scale=config.classifier_scale)
    return nn.Linear(features, classes)


def _timm_encoder(config: ModelConfig, in_channels: int) -> tuple[nn.Module, int]:
    import timm

    name = config.name.removeprefix("timm:")
    if not timm.is_model(name):
        near = timm.list_models(f"*{name}*")[:3] or timm.list_models(f"{name[:6]}*")[:3]
        hint = f"; near it: {', '.join(near)}" if near else ""
        raise ValueError(f"model.name must be a model that timm knows; got {name!r}{hint}")
    try:
        encoder = timm.create_model(name, pretrained=config.pretrained, num_classes=0, in_chans=in_channels)
    except Exception as error:  # timm's downloads raise what its network libraries raise
        if not config.pretrained:
            raise
        raise ValueError(
            f"model.pretrained could not get weights for {name}: {error}; set model.pretrained false to start anew"
        ) from error
    # Some architectures keep a wide layer before the classifier even without one.
    width: Any = getattr(encoder, "head_hidden_size", None) or encoder.num_features
    return encoder, int(width)
