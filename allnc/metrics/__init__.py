"""Accuracy by shot group and by class, calibration, class priors, neural collapse. `plots` loads matplotlib."""

from allnc.metrics.accumulate import CollapseAccumulator
from allnc.metrics.accuracy import shot_accuracy, shot_groups
from allnc.metrics.angles import ideal_angle, pairwise_angles
from allnc.metrics.calibration import calibration_error
from allnc.metrics.collapse import collapse
from allnc.metrics.drift import drift
from allnc.metrics.layers import LayerCollapse, collapse_of
from allnc.metrics.measures import Moments
from allnc.metrics.ood import nc5
from allnc.metrics.per_class import PerClass, per_class
from allnc.metrics.prior import adjust_prior
from allnc.metrics.shots import by_shot
from allnc.metrics.spectrum import effective_rank, ideal_mir

__all__ = [
    "CollapseAccumulator",
    "LayerCollapse",
    "Moments",
    "PerClass",
    "adjust_prior",
    "by_shot",
    "calibration_error",
    "collapse",
    "collapse_of",
    "drift",
    "effective_rank",
    "ideal_angle",
    "ideal_mir",
    "nc5",
    "pairwise_angles",
    "per_class",
    "shot_accuracy",
    "shot_groups",
]
