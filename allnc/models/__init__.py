"""Networks: CIFAR ResNets, timm's models, and the heads on top."""

from allnc.models.build import LongTailModel, ModelOutput, build_model
from allnc.models.heads import NormalisedClassifier, Predictor, Projection
from allnc.models.resnet_cifar import CifarResNet

__all__ = [
    "CifarResNet",
    "LongTailModel",
    "ModelOutput",
    "NormalisedClassifier",
    "Predictor",
    "Projection",
    "build_model",
]
