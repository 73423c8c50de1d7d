"""The batches of an epoch, mixed where `train.mixup` wants it, the same on any number of processes.

A mixed image has no class: contrast and class means would compare with a class what is half another's. So only losses
of logits and labels alone take mixtures; Config refuses the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import Tensor

from allnc.data import Batch, Mixture, mixtures, remix_labels

if TYPE_CHECKING:
    from allnc.trainer.run import Run


def batches(run: Run) -> Iterator[Batch]:
    """Yield the batches of the epoch that comes next; a second stage has plain ones."""
    plain, config = run.loader.epoch(run.epoch), run.config
    if config.train.mixup == 0 or run.retrains:
        yield from plain
        return
    drawn = mixtures(config.train.mixup, config.train.batch_size, seed=config.seed, epoch=run.epoch)
    for batch, mixture in zip(plain, drawn, strict=False):
        yield mixed(run, batch, mixture)


def mixed(run: Run, batch: Batch, mixture: Mixture) -> Batch:
    """Mix every image of a batch with another, maybe of another process: each view with the same view of the other."""
    share, views = mixture.share, run.config.data.views
    size, own = len(mixture.partners), mixture.partners[run.processes.share(len(mixture.partners))]

    def of_partners(values: Tensor) -> Tensor:
        by_image = values.unflatten(0, (views, -1)).transpose(0, 1)  # [B, V, ...] of this process
        return run.processes.rows_of_all(by_image, size)[own.to(values.device)].transpose(0, 1).flatten(0, 1)

    partners = run.loader.pixels(of_partners(batch.images))  # bytes travel where images are bytes
    images = share * run.loader.pixels(batch.images) + (1 - share) * partners
    labels, other = batch.labels, of_partners(batch.labels)
    if run.config.train.remix:
        labels, other = remix_labels(labels, other, share, run.counts)
    return batch._replace(images=images, labels=labels, other_labels=other, share=share)
