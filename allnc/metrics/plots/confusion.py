"""The confusion matrix of a run as a picture, as long as its classes are few enough for one.

Legend: N images, C classes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from matplotlib.colors import to_rgb
from torch import Tensor

from allnc.metrics.plots.style import BLUE, RED, new_figure, save

MOST_CLASSES = 100  # of more, cells are smaller than the dots of a screen; allnc.report draws groups of them
_ANNOTATED_CLASSES, _NAMED_CLASSES = 15, 60  # up to so many cells carry their numbers, and rows their names
_LONGEST = 16  # letters of a name


def plot_confusion(
    labels: Tensor,
    predictions: Tensor,
    path: str | os.PathLike[str],
    *,
    class_counts: Tensor | Sequence[int],
    classes: Sequence[str] = (),
) -> None:
    """Draw which classes are taken for which, in percent of the images of the true class.

    Right answers are blue, mistakes red and by the square root of their share, so that few of them are seen too.
    Classes are in the order of their sizes, from many to few training images.

    Args:
        labels: [N] int64, true classes.
        predictions: [N] int64.
        path: .png or .svg file to write.
        class_counts: [C] training images of each class, C <= 100.
        classes: [C] names; empty where they have none.

    Raises:
        ValueError: more than 100 classes, labels and predictions of different shapes, or classes out of range.
    """
    counts = torch.as_tensor(class_counts).cpu()
    num_classes = len(counts)
    if num_classes > MOST_CLASSES:
        raise ValueError(f"class_counts must have at most {MOST_CLASSES} classes for one picture; got {num_classes}")
    if labels.shape != predictions.shape or labels.dim() != 1:
        raise ValueError(
            f"labels and predictions must have the same shape [N]; got {list(labels.shape)}, {list(predictions.shape)}"
        )
    both = torch.cat([labels, predictions]).cpu()
    if len(both) and not 0 <= int(both.min()) <= int(both.max()) < num_classes:
        raise ValueError(f"labels and predictions must be in [0, {num_classes}), the length of class_counts")
    order = torch.argsort(counts, descending=True, stable=True)
    number = torch.bincount(labels.cpu() * num_classes + predictions.cpu(), minlength=num_classes**2)
    number = number.view(num_classes, num_classes)[order][:, order].double()
    share = number / number.sum(1, keepdim=True).clamp(min=1)  # [C, C]
    colours = torch.empty(num_classes, num_classes, 4, dtype=torch.float64)
    colours[..., :3], colours[..., 3] = torch.tensor(to_rgb(RED)), share.sqrt()
    diagonal = torch.arange(num_classes)
    colours[diagonal, diagonal, :3] = torch.tensor(to_rgb(BLUE), dtype=torch.float64)
    colours[diagonal, diagonal, 3] = share.diagonal()

    side = 6.0 if num_classes <= 30 else 9.0
    figure = new_figure(side, side, square=True)
    axis = figure.subplots()
    axis.imshow(colours.numpy(), interpolation="nearest")
    axis.set_xlabel("predicted class")
    axis.set_ylabel("true class")
    axis.set_title("Confusions, % of the images of the true class", fontsize=11)
    if num_classes <= _NAMED_CLASSES:
        names = [_clipped(str(classes[c] if classes else c)) for c in order.tolist()]
        font = 9 if num_classes <= 30 else 7
        axis.set_yticks(range(num_classes), names, fontsize=font)
        axis.set_xticks(range(num_classes), names, fontsize=font, rotation=90 if max(map(len, names)) > 2 else 0)
    else:  # positions, not class numbers, as the classes are sorted
        axis.set_xlabel("predicted class, by its rank in training images")
        axis.set_ylabel("true class, by its rank in training images")
    if num_classes <= _ANNOTATED_CLASSES:
        for row, column in number.nonzero().tolist():
            colour = "white" if colours[row, column, 3] > 0.6 else "black"
            text = f"{100 * share[row, column]:.0f}"
            axis.text(column, row, text, ha="center", va="center", fontsize=8, color=colour)
    save(figure, path)


def _clipped(name: str) -> str:
    """A name that matplotlib takes as it is: without formulas' dollar signs, line ends, or bytes that are no text."""
    name = name if name.isprintable() else ascii(name)
    name = name if len(name) <= _LONGEST else name[: _LONGEST - 1] + "…"
    return name.replace("$", r"\$")
