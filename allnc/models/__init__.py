"""Networks: CIFAR ResNets, timm's models, and the heads on top."""

from allnc.models.build import LongTailModel, ModelOutput, build_model, renew_classifier
from allnc.models.etf import ETFClassifier
from allnc.models.heads import NormalisedClassifier, Predictor, Projection
from allnc.models.pretrained import pixel_statistics
from allnc.models.resnet_cifar import CifarResNet
from allnc.models.tuning import added_parts_run, sum_of_tensors

__all__ = [
    "CifarResNet",
    "ETFClassifier",
    "LongTailModel",
    "ModelOutput",
    "NormalisedClassifier",
    "Predictor",
    "Projection",
    "added_parts_run",
    "build_model",
    "pixel_statistics",
    "renew_classifier",
    "sum_of_tensors",
]
