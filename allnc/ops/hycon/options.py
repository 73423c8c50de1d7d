"""What a call of HyCon holds: its tensors (`Batch`) and its settings (`Options`), and the checks of both.

Legend: N activations, D columns, C classes.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

from torch import Tensor

from allnc._checks import check_choice
from allnc.ops._common import (
    FLOATING,
    check_floating,
    check_labels,
    check_no_tangent,
    check_same_device,
    check_seen,
    check_shape,
    debug_checks,
)

Balance = Literal["class", "none"]
Reduction = Literal["mean", "sum", "none"]

# With the constant shift every exponent is S - 1/τ >= -2/τ. At 64 the smallest term is e^-64 = 1.6e-28, which leaves a
# factor of 1e10 for the column weights before float32 (1.2e-38) loses it.
_SHIFT_LIMIT = 64.0


class Batch(NamedTuple):
    """The tensors of a contrast."""

    z: Tensor  # [N, D] unit rows
    labels: Tensor  # [N] int64
    means: Tensor | None = None  # [C, D], any length
    seen: Tensor | None = None  # [C] bool; None for all
    anchor_weight: Tensor | None = None  # [N] >= 0; None for 1


class Options(NamedTuple):
    """The settings of a contrast, as `hycon` explains them."""

    temperature: float | Tensor = 0.1
    mean_weight: float = 1.0
    balance: Balance = "class"
    reduction: Reduction = "mean"
    ignore_index: int = -100

    @property
    def shifted(self) -> bool:
        """Whether exp(S - 1/τ) stays in range, so that no running maximum is needed; False for τ not known here."""
        return not isinstance(self.temperature, Tensor) and 2.0 / self.temperature <= _SHIFT_LIMIT


def check_hycon(batch: Batch, options: Options, *, least_rows: int = 1) -> None:
    """Raise ValueError or TypeError with name, expected and got for what `hycon` cannot take."""
    z, labels, means, seen, anchor_weight = batch
    check_floating("z", z)
    check_shape("z", z, ("N", "D"))
    num_rows, dim = z.shape
    if num_rows < least_rows or dim == 0:
        raise ValueError(f"z must have at least one row and one column; got {list(z.shape)}")
    check_labels(labels, num_rows)
    check_choice("balance", options.balance, get_args(Balance))
    check_choice("reduction", options.reduction, get_args(Reduction))
    if means is not None:
        check_floating("means", means)
        check_shape("means", means, ("C", dim))
        if len(means) == 0:
            raise ValueError(f"means must have at least one row, or be None; got {list(means.shape)}")
        if seen is not None:
            check_seen(seen, len(means))
    elif seen is not None:
        raise ValueError("seen must be None when means is None; got a tensor. Pass the means it describes")
    if anchor_weight is not None:
        check_floating("anchor_weight", anchor_weight)
        check_shape("anchor_weight", anchor_weight, (num_rows,))
    tau = options.temperature if isinstance(options.temperature, Tensor) else None
    if tau is not None:
        check_floating("temperature", tau)
        if tau.numel() != 1:
            raise ValueError(f"temperature must hold one value; got shape {list(tau.shape)}")
    elif not 0 < options.temperature < math.inf:  # pyright: ignore[reportGeneralTypeIssues]
        raise ValueError(f"temperature must be > 0; got {options.temperature}")
    if not 0 <= options.mean_weight < math.inf:
        raise ValueError(f"mean_weight must be >= 0; got {options.mean_weight}")
    check_same_device(z=z, labels=labels, means=means, seen=seen, anchor_weight=anchor_weight, temperature=tau)
    check_no_tangent("hycon", z, means, anchor_weight, tau)
    if debug_checks():
        norms = z.detach()[labels != options.ignore_index].double().norm(dim=1)
        if not bool(((norms - 1).abs() < 2e-2).all()):
            worst = float(norms[(norms - 1).abs().argmax()])
            raise ValueError(f"z must have unit rows; got a row of norm {worst:.4g}. Use F.normalize(z, dim=1)")


def agreed_facts(batch: Batch, options: Options) -> dict[str, float | None]:
    """What must be the same on every rank of a group, by name."""
    z, _, means, seen, anchor_weight = batch
    return {
        "D": z.shape[1],
        "z's type (float16 0, bfloat16 1, float32 2, float64 3)": FLOATING.index(z.dtype),
        "the number of means": None if means is None else len(means),
        "seen's presence": float(seen is not None),
        "temperature": None if isinstance(options.temperature, Tensor) else options.temperature,
        "mean_weight": options.mean_weight,
        "balance (class 0, none 1)": get_args(Balance).index(options.balance),
        "anchor_weight's presence": float(anchor_weight is not None),
        "reduction (mean 0, sum 1, none 2)": get_args(Reduction).index(options.reduction),
        "ignore_index": options.ignore_index,
    }
