"""AllNC, its parts and the long-tail baselines as modules. They hold state; the ops do the work."""

from allnc.losses.allnc import AllNC
from allnc.losses.base import ClassMeans, LossOutput, class_weights
from allnc.losses.build import Classification, build_loss
from allnc.losses.contrastive import Contrastive
from allnc.losses.gbbn import GBBN
from allnc.losses.hycon import HyCon, HyConCosine
from allnc.losses.longtail import LDAM, ClassBalanced, CrossEntropy, Focal, LogitAdjusted, long_tail_loss
from allnc.losses.p2p import P2P, P2PTerms
from allnc.losses.prototype_contrast import PrototypeContrast
from allnc.losses.regression import DotRegression, MeanSquaredError

__all__ = [
    "GBBN",
    "LDAM",
    "P2P",
    "AllNC",
    "ClassBalanced",
    "ClassMeans",
    "Classification",
    "Contrastive",
    "CrossEntropy",
    "DotRegression",
    "Focal",
    "HyCon",
    "HyConCosine",
    "LogitAdjusted",
    "LossOutput",
    "MeanSquaredError",
    "P2PTerms",
    "PrototypeContrast",
    "build_loss",
    "class_weights",
    "long_tail_loss",
]
