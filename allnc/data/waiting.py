"""How much of an epoch is spent waiting for images."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from typing import TypeVar

T = TypeVar("T")
MUCH = 0.05  # share of the time from which on the loader is called the limit


class Waiting:
    """Times an iterator of batches: how long it is waited for, and how long its user works with what it gave.

    The first batch of an epoch counts as neither: before it, processes start and caches fill.
    """

    def __init__(self) -> None:
        self.waited = self.worked = 0.0  # seconds, of the last epoch
        self.images = 0

    def watch(self, batches: Iterator[T], size: int) -> Iterator[T]:
        """Yield an epoch's batches of `size` images each."""
        self.waited, self.worked, self.images = 0.0, 0.0, -size
        asked = time.perf_counter()
        for batch in batches:
            given = time.perf_counter()
            self.waited += given - asked if self.images >= 0 else 0.0
            self.images += size
            yield batch
            asked = time.perf_counter()
            self.worked += asked - given if self.images > 0 else 0.0

    @property
    def share(self) -> float:
        """Share of the last epoch that was spent waiting, in [0, 1]; NaN for an epoch of one batch."""
        total = self.waited + self.worked
        return self.waited / total if total else math.nan

    def advice(self, workers: int) -> str | None:
        """Say in one line that the loader is the limit, and what helps; None where it is not."""
        if not self.share >= MUCH:
            return None
        return (
            f"the loader is the limit: the model waits {self.share:.0%} of the time; it gets "
            f"{self.images / (self.waited + self.worked):,.0f} images/s and could use "
            f"{self.images / max(self.worked, 1e-9):,.0f}: raise data.workers (now {workers}; "
            f"{os.cpu_count()} cores here), store the images smaller, or lower train.threads"
        )
