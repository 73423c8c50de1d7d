"""The cases of run.py under pytest-benchmark: `pytest benchmarks --benchmark-only`."""

from __future__ import annotations

import pytest
import torch
from cases import OPS, PROVIDERS, Shape, make_case
from run import difference

SHAPE = Shape(N=2048, D=128, C=100, F=256)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("op", OPS)
def test_loss(benchmark, op: str, provider: str, backward: bool) -> None:
    case = make_case(op, SHAPE, DEVICE)
    if provider not in case.providers:
        pytest.skip(f"{op} has no provider {provider}")
    if case.providers[provider].unusable:
        pytest.skip(case.providers[provider].unusable)
    assert not difference(case, provider, "float32")
    benchmark.group = f"{op} {'forward+backward' if backward else 'forward'}"
    step = case.step(provider, backward=backward)

    def run() -> None:
        step()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(run, rounds=10, warmup_rounds=2)
