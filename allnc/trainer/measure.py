"""Measuring a model: predictions for the test set, neural collapse on the training set, both in fp32.

Neither depends on the autocast type of training, so `python -m allnc.evaluate` gives the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from allnc.config import DataConfig
from allnc.data import FeatureSet, ImageSet, plain_batches
from allnc.metrics import CollapseAccumulator, LayerCollapse, adjust_prior, collapse_of
from allnc.metrics.accumulate import merged_over, predictions_of
from allnc.models import LongTailModel, ModelOutput, added_parts_run
from allnc.trainer.predictions import Predictions
from allnc.trainer.processes import Processes

BATCH = 500
FEATURE_BATCH = 4096  # rows of stored features are small; what a batch costs by its classes is shared by more of them
MOST_OF_A_CLASS = 100  # images whose features start a class vector, as LIFT
ENCODER, CLASSIFIER = "encoder", "classifier"  # names in LongTailModel


@torch.inference_mode()
def outputs(
    model: LongTailModel, images: ImageSet, config: DataConfig, device: torch.device
) -> Iterator[tuple[ModelOutput, Tensor]]:
    """Yield the model's outputs and the labels for every image, without augmentation, in evaluation mode."""
    for pixels, labels in plain_images(model, images, config, device):
        yield model(pixels), labels


def plain_images(
    model: LongTailModel, images: ImageSet, config: DataConfig, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield every image as the model takes it, without augmentation, with labels; the model is in evaluation mode."""
    for (pixels,), labels in _plain_views(model, images, config, device, crops=1):
        yield pixels, labels


class PlainImages:
    """What `plain_images` yields, again and again."""

    def __init__(self, model: LongTailModel, images: ImageSet, config: DataConfig, device: torch.device) -> None:
        self.what = model, images, config, device

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return plain_images(*self.what)


def _plain_views(
    model: LongTailModel, images: ImageSet, config: DataConfig, device: torch.device, *, crops: int
) -> Iterator[tuple[list[Tensor], Tensor]]:
    """Yield one or five plain views of every image and the labels; the model is in evaluation mode meanwhile."""
    was_training = model.training
    model.eval()
    memory = torch.channels_last if _is_channels_last(model) else torch.contiguous_format
    batch = FEATURE_BATCH if isinstance(images, FeatureSet) else BATCH
    for pixels, labels in plain_batches(images, config, batch, device, margin=crops == 5):
        views = five_crops(pixels, config.image_size) if crops == 5 else [pixels]
        yield [view.contiguous(memory_format=memory) for view in views], labels
    model.train(was_training)


@torch.inference_mode()
def check_images_fit(model: LongTailModel, images: ImageSet, config: DataConfig) -> None:
    """Raise ValueError unless the model takes images of the size that it will see; models say so in many ways."""
    shape = images.shape(config)
    first = next(model.parameters())
    was_training = model.training
    model.eval()
    with added_parts_run(model.encoder):
        try:
            model(torch.zeros(1, *shape, dtype=first.dtype, device=first.device))
        except (RuntimeError, AssertionError, ValueError) as error:
            if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
                raise
            raise ValueError(
                f"model.name must be a model for {' x '.join(map(str, shape))} images, or data.image_size of the "
                f"model's size; it fails: {error}"
            ) from error
    model.train(was_training)


def predictions(
    model: LongTailModel,
    test: ImageSet,
    config: DataConfig,
    device: torch.device,
    processes: Processes,
    priors: tuple[Tensor, Tensor] | None = None,
) -> Predictions:
    """Return what the model predicts for every image of the test set, alike on all processes.

    Args:
        model: the model.
        test: the images that are measured.
        config: how they are read.
        device: of the model.
        processes: each predicts its share.
        priors: the class prior that the logits assume and the one they are adjusted to, [C] each; None: not adjusted.
    """
    parts = []
    for logits, labels in _test_logits(model, _own(test, processes), config, device):
        parts.append(Predictions.of(logits if priors is None else adjust_prior(logits, *priors), labels))
    own = Predictions.joined(parts) if parts else None  # fewer images than processes
    return Predictions.joined([part for part in processes.gather(own) if part is not None])


@torch.inference_mode()
def _test_logits(
    model: LongTailModel, test: ImageSet, config: DataConfig, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the logits [n, C], the mean over crops where the configuration wants it, and the labels of every image."""
    for views, labels in _plain_views(model, test, config, device, crops=config.test_crops):
        yield torch.stack([model(view).logits_rebalance for view in views]).mean(0), labels


def five_crops(pixels: Tensor, size: int) -> list[Tensor]:
    """Return centre and corners [n, c, size, size] of images [n, c, S, S] with S >= size; the first is the centre."""
    edge = pixels.shape[-1] - size
    middle = round(edge / 2)  # as torchvision's CenterCrop
    places = [(middle, middle), (0, 0), (0, edge), (edge, 0), (edge, edge)]
    return [pixels[:, :, top : top + size, left : left + size] for top, left in places]


@torch.inference_mode()
def features_by_class(
    model: LongTailModel,
    train: ImageSet,
    config: DataConfig,
    device: torch.device,
    processes: Processes,
    *,
    seed: int,
) -> Tensor:
    """Return the mean features [C, F] of at most 100 images of each class, without augmentation, as float32.

    The seed decides which images, not the number of processes; all of them return the same.
    """
    order = np.random.RandomState(seed).permutation(len(train))
    order = order[np.argsort(train.labels.numpy()[order], kind="stable")]  # class after class
    labels_in_order = train.labels.numpy()[order]
    place_in_class = np.arange(len(order)) - np.searchsorted(labels_in_order, labels_in_order)
    some = train.select(order[place_in_class < MOST_OF_A_CLASS])
    sums = torch.zeros(train.num_classes, model.feature_dim, dtype=torch.float64)
    for output, labels in outputs(model, _own(some, processes), config, device):
        sums.index_add_(0, labels.cpu(), output.features.cpu().double())
    total = torch.stack(processes.gather(sums)).sum(0)
    return (total / some.class_counts.clamp(min=1)[:, None]).float().to(device)


def neural_collapse(
    model: LongTailModel, train: ImageSet, config: DataConfig, device: torch.device, processes: Processes
) -> tuple[dict[str, float], Tensor]:
    """Return the collapse metrics of the training set, with train_accuracy in percent, and its class means [C, F]."""
    right = torch.zeros((), dtype=torch.int64)
    accumulator = CollapseAccumulator(train.num_classes, model.feature_dim, class_counts=train.class_counts)
    own = _own(train, processes)
    again = isinstance(own, FeatureSet)  # a second pass is cheap then, and keeping float32 copies of all is not
    for output, labels in outputs(model, own, config, device):
        # On the CPU: the features are kept for NC4, and hundreds of thousands of them would crowd a GPU.
        logits, labels = output.logits_rebalance.cpu(), labels.cpu()
        accumulator.update(output.features.cpu(), labels, None if again else logits)
        right += (logits.argmax(1) == labels).sum()
    if processes.size > 1:
        accumulator = _merged(accumulator, train, processes)
    if again:
        for output, _ in outputs(model, own, config, device):
            accumulator.count_disagreement(output.features.cpu(), predictions_of(output.logits_rebalance).cpu())
        accumulator.nearest = sum(processes.gather(accumulator.nearest), torch.zeros_like(accumulator.nearest))
    share = float(sum(processes.gather(right), torch.zeros_like(right))) / len(train)
    measures = accumulator.compute(model.predicting_vectors.detach().cpu())
    return {**measures, "train_accuracy": 100 * share}, accumulator.means


def blocks_of(encoder: nn.Module) -> list[str]:
    """Name the parts of an encoder that run one after the other, and the encoder itself: its children that multiply by
    a matrix, or theirs where they stand in a row."""
    names = []
    for name, child in encoder.named_children():
        in_a_row = isinstance(child, nn.Sequential) and len(child) > 0
        parts = {f"{name}.{part}": block for part, block in child.named_children()} if in_a_row else {name: child}
        names += [f"{ENCODER}.{part}" for part, block in parts.items() if any(p.ndim > 1 for p in block.parameters())]
    return [*names, ENCODER]


def short_name(layer: str) -> str:
    """The name of a layer in records and pictures."""
    return "features" if layer == ENCODER else layer.removeprefix(f"{ENCODER}.")


def collapse_of_layers(
    model: LongTailModel,
    train: ImageSet,
    config: DataConfig,
    device: torch.device,
    processes: Processes,
    layers: Sequence[str] | Literal["all"],
    ood: Iterable[Any] | None = None,
    *,
    spectral: bool = True,
) -> dict[str, LayerCollapse]:
    """Return the collapse of a model's layers on the training set, alike on all processes.

    Args:
        model: the model, in evaluation mode meanwhile.
        train: its training set, of which each process measures its share.
        config: how images are read.
        device: of the model.
        processes: those that share the run.
        layers: names in the model, as `collapse_of` takes them.
        ood: batches of images of no class, for NC5; each process sees all of them.
        spectral: also the measures of spectra, which take long for many classes or features.

    Raises:
        ValueError: a layer that is not there or cannot be measured.
    """
    return collapse_of(
        model,
        PlainImages(model, _own(train, processes), config, device),
        layers=layers,
        class_counts=train.class_counts,
        classifier=CLASSIFIER,
        weight=model.predicting_vectors,
        logits=lambda output: output.logits_rebalance,
        channels_last=_has_channels_last(model.encoder),
        spectral=spectral,
        ood=ood,
        gather=processes.gather if processes.size > 1 else None,
    )


def check_blocks(model: LongTailModel, images: ImageSet, config: DataConfig, device: torch.device) -> None:
    """Raise ValueError unless the collapse of the encoder's blocks can be measured: not every one returns a tensor."""
    two = torch.zeros(2, *images.shape(config), device=device)
    try:
        collapse_of(
            model,
            [(two, torch.arange(2))],
            layers=blocks_of(model.encoder),
            class_counts=[1, 1],
            nc4=False,
            spectral=False,
        )
    except ValueError as error:
        raise ValueError(f"train.collapse_layers must be false for this model: {error}") from error


def _has_channels_last(encoder: nn.Module) -> bool:
    """Whether timm says that the encoder's blocks return [N, h, w, c]."""
    return str(getattr(encoder, "output_fmt", "")) in ("NHWC", "Format.NHWC")


def _own(images: ImageSet, processes: Processes) -> ImageSet:
    """Return the images that this process measures; all processes together measure each once."""
    return images if processes.size == 1 else images.select(np.arange(len(images))[processes.share(len(images))])


def _merged(own: CollapseAccumulator, train: ImageSet, processes: Processes) -> CollapseAccumulator:
    """Return what all processes have seen, alike on all of them."""
    merged = merged_over(processes.gather, own, class_counts=train.class_counts)
    for features, predictions in own.kept:  # NC4 wants the means of all
        merged.count_disagreement(features, predictions)
    merged.nearest = sum(processes.gather(merged.nearest), torch.zeros_like(merged.nearest))
    return merged


def _is_channels_last(model: torch.nn.Module) -> bool:
    kernels = (p for p in model.parameters() if p.ndim == 4 and min(p.shape[1:]) > 1)
    first = next(kernels, None)
    return first is not None and first.is_contiguous(memory_format=torch.channels_last)
