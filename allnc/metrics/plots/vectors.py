"""The class means and class vectors of a run, which several pictures show.

Legend: C classes, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from allnc.metrics.angles import check_finite
from allnc.ops._common import check_floating, check_shape


class ClassVectors(NamedTuple):
    """Class means and classifier of one run.

    Args:
        means: [C, F] floating; a row of zeros stands for a class without a mean.
        weight: [C, F] floating, the vectors of the classifier.
        label: name of the run.
        class_counts: [C] training images of each class; None where nothing is known of them.
        many: classes with more training images than this are many-shot.
        few: classes with fewer training images than this are few-shot.
    """

    means: Tensor
    weight: Tensor
    label: str = ""
    class_counts: Tensor | Sequence[int] | None = None
    many: int = 100
    few: int = 20

    @property
    def there(self) -> Tensor:
        """[C] bool: the classes that have a mean."""
        return (self.means != 0).any(1)

    @property
    def counts(self) -> Tensor | None:
        """[C] float64 on the CPU, or None."""
        return None if self.class_counts is None else torch.as_tensor(self.class_counts).double().cpu()

    @property
    def imbalance(self) -> float:
        """Largest over smallest class size; 1 where nothing is known of them."""
        counts = self.counts
        return 1.0 if counts is None else float(counts.max() / counts.min().clamp(min=1))


def check_vectors(runs: Sequence[ClassVectors]) -> int:
    """Return the number of classes C.

    Raises:
        TypeError, ValueError: no run, shapes that do not fit or another number of classes than in another run, or
            entries that are not finite.
    """
    if not runs:
        raise ValueError("runs must hold at least one run; got none")
    for run in runs:
        of_run = f" of {run.label}" if run.label else ""
        check_floating(f"means{of_run}", run.means)
        check_shape(f"means{of_run}", run.means, ("C", "F"))
        check_floating(f"weight{of_run}", run.weight)
        check_shape(f"weight{of_run}", run.weight, tuple(run.means.shape))
        check_finite(f"means{of_run}", run.means)
        check_finite(f"weight{of_run}", run.weight)
        if run.counts is not None:
            check_shape(f"class_counts{of_run}", run.counts, (len(run.means),))
    for what, numbers in (
        ("classes", [len(run.means) for run in runs]),
        ("classes that have a mean", [int(run.there.sum()) for run in runs]),
    ):
        if len(set(numbers)) > 1:
            got = ", ".join(f"{number} in {run.label}" for number, run in zip(numbers, runs, strict=True))
            raise ValueError(f"runs in one picture must have the same number of {what}; got {got}: draw them apart")
    return len(runs[0].means)
