"""The network: section `model` of a configuration."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from allnc._checks import check_interval
from allnc.config.fields import check_fields

FEATURE_MODELS = ("linear", "mlp")  # what trains on stored features instead of images


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The network: an encoder and the heads that the loss asks for.

    Args:
        name: resnetD, the CIFAR ResNet of depth D = 6n + 2 (8, 20, 32, 44, 56 ...), or timm:NAME; for data.name
            features, linear (the features go to the heads as they are) or mlp (a residual layer pair before them).
        width: channels of the first of the three stages of a CIFAR ResNet, >= 1 (features have 4 x width).
        feature_dim: CIFAR ResNet only: number F of features, >= 1, by a linear layer after the last stage, such as 2
            for a picture, or 128 so that an etf classifier has room for 100 classes; None: no such layer.
        shortcut: CIFAR ResNet only: A pads with zero channels (as He et al.), B projects with a 1 x 1
            convolution.
        mlp_hidden: mlp only: width between its two layers, >= 1; None takes that of the features.
        norm: batch keeps the encoder's own normalisation; group puts GroupNorm in the place of each BatchNorm2d, so
            that no image sees another and train.micro_batch changes nothing.
        pretrained: start a timm model from its published weights, which timm downloads unless `weights` names them.
        weights: file with the weights of the timm model, as timm saves or publishes them (.safetensors or .pth), for
            machines without a network; read with `pretrained` only.
        tune: what of a timm model trains beside the heads. full: all of it. head: nothing; the encoder runs without a
            graph. norm: scale and shift of its normalisation layers (LIFT's ln_tuning), whose running statistics then
            move, too. lora: low-rank updates beside the linear layers of its attention (Hu et al., ICLR 2022; needs
            Hugging Face's peft). adapter: a bottleneck beside the MLP of each block (AdaptFormer, Chen et al., NeurIPS
            2022). What does not train keeps its statistics, too, as BatchNorm in evaluation mode.
        tune_rank: columns of the bottleneck or of the low-rank update, >= 1; None takes 2^floor(log2(C / 2L)), at least
            1, for C classes and L adapted blocks, as LIFT, so that what is added is not larger than the classifier.
        heads: shared, one classifier for both branches; separate, one each (the re-balancing one predicts).
        classifier: linear, normalised (scaled cosine between features and class vectors), or etf (the same with class
            vectors that are a random simplex and do not train, for at least C - 1 features).
        classifier_scale: factor of the cosine of a normalised or etf classifier, > 0.
        classifier_init: random, or class_means: before the first epoch, each class vector of a normalised classifier
            becomes the unit mean of its class's features, over at most 100 plain training images. A pretrained encoder
            separates the classes already; random vectors would first move, and what is tuned with them, and rare
            classes, which have few steps, would move least (LIFT, section 4.3).
        posthoc: what is done to the trained classifier before it predicts: none; logit_adjusted, the logits minus
            posthoc_tau times the log of the class frequencies (Menon et al., ICLR 2021); tau_normalised, the class
            vectors of a linear classifier divided by their length to the power posthoc_tau, without bias (Kang et al.,
            ICLR 2020). It trains nothing: the model does it whenever it is measured or loaded to predict.
        posthoc_tau: strength of posthoc, > 0; 1 is full strength.
        projection_hidden: hidden width of the projection head (softmax HyCon); None takes the feature width.
        projection_dim: width D of the projection (softmax HyCon).
    """

    name: str = "resnet20"
    width: int = 16
    feature_dim: int | None = None
    shortcut: Literal["A", "B"] = "A"
    mlp_hidden: int | None = None
    pretrained: bool = False
    norm: Literal["batch", "group"] = "batch"
    weights: str | None = None
    tune: Literal["full", "head", "norm", "lora", "adapter"] = "full"
    tune_rank: int | None = None
    heads: Literal["shared", "separate"] = "shared"
    classifier: Literal["linear", "normalised", "etf"] = "linear"
    classifier_scale: float = 16.0
    classifier_init: Literal["random", "class_means"] = "random"
    posthoc: Literal["none", "logit_adjusted", "tau_normalised"] = "none"
    posthoc_tau: float = 1.0
    projection_hidden: int | None = None
    projection_dim: int = 128

    def __post_init__(self) -> None:
        check_fields("model", self)
        check_interval("model.width", self.width, 1, math.inf)
        if self.feature_dim is not None:
            check_interval("model.feature_dim", self.feature_dim, 1, math.inf)
        check_interval("model.classifier_scale", self.classifier_scale, 0, math.inf, open_low=True)
        if self.projection_hidden is not None:
            check_interval("model.projection_hidden", self.projection_hidden, 1, math.inf)
        check_interval("model.projection_dim", self.projection_dim, 1, math.inf)
        if self.mlp_hidden is not None:
            check_interval("model.mlp_hidden", self.mlp_hidden, 1, math.inf)
        if self.pretrained and self.norm == "group":
            raise ValueError("model.norm must be batch with model.pretrained, whose weights are made for it; got group")
        if self.tune_rank is not None:
            check_interval("model.tune_rank", self.tune_rank, 1, math.inf)
        if self.classifier == "etf" and self.heads == "separate":
            raise ValueError("model.heads must be shared with model.classifier etf, which has nothing to learn in two")
        if self.classifier_init == "class_means" and self.classifier != "normalised":
            raise ValueError(
                f"model.classifier_init class_means needs model.classifier normalised; got {self.classifier}, whose "
                "logits would depend on the length of the features"
            )
        check_interval("model.posthoc_tau", self.posthoc_tau, 0, math.inf, open_low=True)
        if self.posthoc == "tau_normalised" and self.classifier != "linear":
            raise ValueError(
                f"model.posthoc tau_normalised needs model.classifier linear; got {self.classifier}, whose class "
                "vectors have length 1 and which has no bias: nothing would change"
            )
        if self.name.startswith("timm:") and len(self.name) > 5:
            return
        depth = self.name.removeprefix("resnet")
        resnet = self.name.startswith("resnet") and depth.isdecimal() and int(depth) >= 8 and int(depth) % 6 == 2
        if not resnet and self.name not in FEATURE_MODELS:
            raise ValueError(
                f"model.name must be resnetD with D = 6n + 2 (resnet8, resnet20, resnet32 ...), timm:NAME, or for "
                f"features linear or mlp; got {self.name!r} (the large-image ResNet-50 is timm:resnet50)"
            )
