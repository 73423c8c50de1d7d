"""Measuring a model: accuracy by shot on the test set, neural collapse on the training set, both in fp32.

Neither depends on the autocast type of training, so `python -m allnc.evaluate` gives the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from allnc.config import DataConfig
from allnc.data import ImageSet, plain_batches
from allnc.metrics import CollapseAccumulator, shot_accuracy
from allnc.models import LongTailModel, ModelOutput

BATCH = 500


@torch.inference_mode()
def outputs(
    model: LongTailModel, images: ImageSet, config: DataConfig, device: torch.device
) -> Iterator[tuple[ModelOutput, Tensor]]:
    """Yield the model's outputs and the labels for every image, without augmentation, in evaluation mode."""
    was_training = model.training
    model.eval()
    memory = torch.channels_last if _is_channels_last(model) else torch.contiguous_format
    for pixels, labels in plain_batches(images, config, BATCH, device):
        yield model(pixels.contiguous(memory_format=memory)), labels
    model.train(was_training)


@torch.inference_mode()
def check_images_fit(model: LongTailModel, images: ImageSet, config: DataConfig) -> None:
    """Raise ValueError unless the model takes images of the size that it will see; models say so in many ways."""
    side = config.image_size if images.images is None else images.images.shape[-1]
    first = next(model.parameters())
    was_training = model.training
    model.eval()
    try:
        model(torch.zeros(1, images.channels, side, side, dtype=first.dtype, device=first.device))
    except (RuntimeError, AssertionError, ValueError) as error:
        if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
            raise
        raise ValueError(
            f"model.name must be a model for {images.channels} x {side} x {side} images, or data.image_size of the "
            f"model's size; it fails: {error}"
        ) from error
    model.train(was_training)


def accuracy(
    model: LongTailModel, test: ImageSet, class_counts: Tensor, config: DataConfig, device: torch.device
) -> dict[str, float | None]:
    """Return accuracy, many, medium and few on the test set, in percent (None: no class in the group)."""
    predictions, labels = [], []
    for output, label in outputs(model, test, config, device):
        predictions.append(output.logits_rebalance.argmax(1))
        labels.append(label)
    return shot_accuracy(
        torch.cat(predictions).cpu(), torch.cat(labels).cpu(), class_counts, many=config.many, few=config.few
    )


def neural_collapse(
    model: LongTailModel, train: ImageSet, config: DataConfig, device: torch.device
) -> tuple[dict[str, float], Tensor]:
    """Return the collapse metrics of the training set and its class means [C, F]."""
    accumulator = CollapseAccumulator(train.num_classes, model.feature_dim, class_counts=train.class_counts)
    for output, labels in outputs(model, train, config, device):
        # On the CPU: the features are kept for NC4, and hundreds of thousands of them would crowd a GPU.
        accumulator.update(output.features.cpu(), labels.cpu(), output.logits_rebalance.cpu())
    return accumulator.compute(model.classifier_weight.detach().cpu()), accumulator.means


def _is_channels_last(model: torch.nn.Module) -> bool:
    kernels = (p for p in model.parameters() if p.ndim == 4 and min(p.shape[1:]) > 1)
    first = next(kernels, None)
    return first is not None and first.is_contiguous(memory_format=torch.channels_last)
