"""Which epoch's weights are the best: by balanced accuracy on validation images, never on test images.

Neither torch nor numpy is imported.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

SCORE = "balanced"  # mean of all classes' accuracies: rare classes count as much as frequent ones


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """The best epoch so far.

    Args:
        score: its balanced accuracy in percent; None before the first measurement.
        epoch: epochs done then.
        measured: epochs done at the last measurement.
    """

    score: float | None = None
    epoch: int = 0
    measured: int = 0

    def after(self, epoch: int, score: float) -> Selection:
        """Return the selection after a measurement; of equal ones the first is the best."""
        if self.score is None or score > self.score:
            return Selection(score=score, epoch=epoch, measured=epoch)
        return replace(self, measured=epoch)

    def stops(self, patience: int | None) -> bool:
        """Whether so many epochs have been without a better measurement."""
        return patience is not None and self.score is not None and self.measured - self.epoch >= patience

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return asdict(self)
