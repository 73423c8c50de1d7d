"""Training that has diverged: the loss or the weights stopped being numbers, or no step can be made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from allnc.trainer.run import Run

LEAST_SCALE = 2.0**-14  # of a float16 loss, which begins with 2^16


class DivergenceError(ValueError):
    """The loss or the weights stopped being numbers."""


def check_loss(run: Run, sums: Mapping[str, Tensor], step: int) -> None:
    """Raise DivergenceError unless loss and gradients are numbers.

    Args:
        run: in the epoch after the epochs done.
        sums: the loss and its parts, added up over the steps of the epoch.
        step: steps of the epoch done.
    """
    epoch = run.epoch + 1
    if run.scaler.is_enabled() and run.scaler.get_scale() < LEAST_SCALE:  # halved at every overflow: no step was made
        raise DivergenceError(
            f"gradients must fit in float16; they overflow at every scale by epoch {epoch}, step {step}"
        )
    if torch.isfinite(sums["loss"]):
        return
    broken = [name for name, value in sums.items() if name != "loss" and not torch.isfinite(torch.as_tensor(value))]
    raise DivergenceError(
        f"the loss must stay finite; got {float(sums['loss'])} by epoch {epoch}, step {step}"
        f"{' in ' + ', '.join(broken) if broken else ''}"
    )


def check_weights(run: Run) -> None:
    """Raise DivergenceError unless all of the model, of the class means and of the optimiser is finite."""
    tensors = {**run.model.state_dict(), **{f"loss.{n}": t for n, t in run.loss.state_dict().items()}}
    if run.average is not None:
        tensors |= {f"average.{n}": t for n, t in run.measured.state_dict().items()}
    for index, values in run.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{n}": t for n, t in values.items() if isinstance(t, Tensor)}
    broken = [name for name, t in tensors.items() if t.is_floating_point() and not bool(t.isfinite().all())]
    if broken:
        raise DivergenceError(
            f"the weights must stay finite; after epoch {run.epoch}, {len(broken)} of {len(tensors)} tensors are "
            f"not ({broken[0]} ...)"
        )
