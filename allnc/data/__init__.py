"""Images: long-tailed subsets, sources, augmented views, samplers and loaders.

A name below is imported when it is first asked for: `allnc.data.own` looks at images before torch is imported.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from allnc.data.feature_loader import loader_for
    from allnc.data.features import FeatureSet
    from allnc.data.loader import Batch, TrainLoader, plain_batches
    from allnc.data.longtail import class_sizes, subset
    from allnc.data.mixing import Mixture, mixtures, remix_labels
    from allnc.data.samplers import BalancedSampler, class_probabilities
    from allnc.data.sources import ImageSet, load

__all__ = [
    "BalancedSampler",
    "Batch",
    "FeatureSet",
    "ImageSet",
    "Mixture",
    "TrainLoader",
    "class_probabilities",
    "class_sizes",
    "load",
    "loader_for",
    "mixtures",
    "plain_batches",
    "remix_labels",
    "subset",
]
_MODULES = {
    "feature_loader": ("loader_for",),
    "features": ("FeatureSet",),
    "loader": ("Batch", "TrainLoader", "plain_batches"),
    "longtail": ("class_sizes", "subset"),
    "mixing": ("Mixture", "mixtures", "remix_labels"),
    "samplers": ("BalancedSampler", "class_probabilities"),
    "sources": ("ImageSet", "load"),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            value = getattr(import_module(f"{__name__}.{module}"), name)
            globals()[name] = value  # later accesses are those of a plain attribute
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
