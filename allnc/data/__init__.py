"""Images: long-tailed subsets, sources, augmented views, samplers and loaders."""

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
