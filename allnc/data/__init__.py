"""Images: long-tailed subsets, sources, augmented views, samplers and loaders."""

from allnc.data.loader import Batch, TrainLoader, plain_batches
from allnc.data.longtail import class_sizes, subset
from allnc.data.samplers import class_probabilities
from allnc.data.sources import ImageSet, load

__all__ = [
    "Batch",
    "ImageSet",
    "TrainLoader",
    "class_probabilities",
    "class_sizes",
    "load",
    "plain_batches",
    "subset",
]
