"""Batches of stored features, by the interface of TrainLoader."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from allnc.data.features import FeatureSet
from allnc.data.loader import Batch, TrainLoader
from allnc.data.samplers import generator
from allnc.data.sources import ImageSet


class FeatureLoader(TrainLoader):
    """Epochs of batches of features; the views of an image in a step are different passes, drawn for each anew.

    Batches are float16, as they are stored, until `pixels` widens what the model takes.

    Raises:
        ValueError: as TrainLoader, or more views than passes are stored.
    """

    set: FeatureSet

    def _open(self) -> None:
        views, passes = self.config.views, self.set.stored.passes
        if views > passes:
            raise ValueError(
                f"data.views must be <= {passes}, the passes that are stored in data.root, because the views of an "
                f"image are different passes; got {views}: allnc.features --passes {views} stores as many"
            )
        self.in_memory = True

    def pixels(self, images: Tensor) -> Tensor:
        """Return the network's input for rows of a batch, float32."""
        return images.float() if images.dtype == torch.float16 else images

    def _batches(self, epoch: int) -> Iterator[Batch]:
        views, num_rebalance = self.config.views, self.num_own if self.two_batches else 0
        random = generator(self.seed, "augment", epoch)
        for index in self.indices(epoch):
            own = index[self.plan.own]  # [B + R] of this process
            passes = self._passes(random, len(index))[:, self.plan.own].flatten()
            rows = self.set.stored.rows(self.set.positions[own].repeat(views), passes)
            labels = self.set.labels[own].repeat(views)
            yield Batch(rows.to(self.device), labels.to(self.device), self.num_own, num_rebalance)

    def _passes(self, random: torch.Generator, images: int) -> Tensor:
        """Draw different passes for the views of each image, [V, images]."""
        return torch.rand(self.set.stored.passes, images, generator=random).argsort(0)[: self.config.views]


def loader_for(images: ImageSet) -> type[TrainLoader]:
    """Return the kind of loader that makes batches of a training set, of images or of features."""
    return FeatureLoader if isinstance(images, FeatureSet) else TrainLoader
