"""Pictures of collapse as PNG or SVG files, of one run or of several side by side; they load matplotlib.

Colours are safe for colour-blind readers, lines and points differ in their markers as well, and whatever several runs
share (a colour scale, an axis) is one for all of them. Figures are drawn without pyplot, so that no display and no
global state is touched.
"""

from allnc.metrics.plots.confusion import MOST_CLASSES, plot_confusion
from allnc.metrics.plots.curves import (
    COSINES,
    DRIFT,
    DUALITY,
    GEOMETRY,
    compare_curves,
    plot_curves,
    plot_layer_curves,
    plot_layers,
)
from allnc.metrics.plots.heatmaps import plot_angles
from allnc.metrics.plots.simplex import Scene, animate_scenes, plot_scenes
from allnc.metrics.plots.sizes import plot_class_sizes
from allnc.metrics.plots.style import appearance, new_figure, save
from allnc.metrics.plots.vectors import ClassVectors

__all__ = [
    "COSINES",
    "DRIFT",
    "DUALITY",
    "GEOMETRY",
    "MOST_CLASSES",
    "ClassVectors",
    "Scene",
    "animate_scenes",
    "appearance",
    "compare_curves",
    "new_figure",
    "plot_angles",
    "plot_class_sizes",
    "plot_confusion",
    "plot_curves",
    "plot_layer_curves",
    "plot_layers",
    "plot_scenes",
    "save",
]
