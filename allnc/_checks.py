"""Checks of numbers and names, for constructors, configurations and ops; only the standard library is imported."""

from __future__ import annotations

import math
from collections.abc import Sequence


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(repr(c) for c in choices)}; got {value!r}")


def check_integer(name: str, value: object, *, minimum: int) -> None:
    """Raise TypeError or ValueError unless `value` is an integer >= minimum."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer; got {value!r}")
    if value < minimum:
        raise ValueError(f"{name} must be >= {minimum}; got {value}")


def check_interval(
    name: str,
    value: object,
    low: float,
    high: float = math.inf,
    *,
    open_low: bool = False,
    open_high: bool = False,
) -> None:
    """Raise TypeError or ValueError unless `value` is a finite number in the interval."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number; got {value!r}")
    above = value > low if open_low else value >= low
    below = value < high if open_high else value <= high
    if above and below and -math.inf < value < math.inf:  # not math.isfinite, which torch.compile cannot trace
        return
    if high == math.inf:
        wanted = f"> {low:g}" if open_low else f">= {low:g}"
    else:
        wanted = f"in {'(' if open_low else '['}{low:g}, {high:g}{')' if open_high else ']'}"
    raise ValueError(f"{name} must be {wanted}; got {value}")
