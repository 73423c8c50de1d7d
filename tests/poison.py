"""Fresh memory that shows when it is read: fixtures for tests of code that leaves its results uninitialised at first.

Import one where it is wanted (`from tests.poison import poisoned_memory`) and ask for it by
`pytest.mark.usefixtures("poisoned_memory")` on a test, or on a file by `pytestmark`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

POISON = -(2**31) + 7  # of integers: as an index far out of range, as a count absurd


def poison(tensor: Tensor) -> Tensor:
    """The tensor filled with NaN; integers with POISON, or the least that their type holds; bool with True."""
    if tensor.is_floating_point():
        return tensor.fill_(math.nan)
    return tensor.fill_(True if tensor.dtype == torch.bool else max(POISON, torch.iinfo(tensor.dtype).min))


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty, torch.empty_like and Tensor.new_empty, as Python code calls them, give poison."""

    def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            return poison(make(*args, **kwargs))

        return made

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
    assert torch.empty(3).isnan().all()


@pytest.fixture
def poisoned_allocations(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Memory that C++ code allocates through torch is poison too. Ops run in their deterministic mode meanwhile."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
