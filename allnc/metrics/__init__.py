"""Accuracy by shot group and neural collapse. Plots are in `allnc.metrics.plots`, which loads matplotlib."""

from allnc.metrics.accumulate import CollapseAccumulator
from allnc.metrics.accuracy import shot_accuracy, shot_groups
from allnc.metrics.angles import angle_blocks, ideal_angle, pairwise_angles
from allnc.metrics.collapse import collapse

__all__ = [
    "CollapseAccumulator",
    "angle_blocks",
    "collapse",
    "ideal_angle",
    "pairwise_angles",
    "shot_accuracy",
    "shot_groups",
]
