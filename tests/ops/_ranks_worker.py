"""One of several processes of tests/ops/test_ranks.py: runs every case in groups of 1 to W ranks, saves results.

python -m tests.ops._ranks_worker RANK WORLD FOLDER BACKEND...
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from allnc import all_around, class_mean_ema, hycon
from tests.cases import generator_of, make_case, value_and_gradients
from tests.processes import rank_main

N, D, C = 61, 19, 7

# How many of the N rows each rank of a group brings.
SIZES = {1: [61], 2: [40, 21], 3: [1, 37, 23], 4: [20, 0, 33, 8]}

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "without means": {"means": None, "balance": "none"},
    "small temperature": {"temperature": 0.01},
    "learnable temperature": {"temperature": torch.tensor(0.2)},
    "weights, seen, sum": {"anchor_weight": True, "seen": True, "reduction": "sum", "mean_weight": 2.5},
    "values": {"reduction": "none"},
    "bfloat16": {"dtype": torch.bfloat16},
    "float64": {"dtype": torch.float64},
}


def rows_and_options(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Per-row tensors (z, labels, maybe anchor_weight) and everything else, the same in every process."""
    options = dict(CASES[name])
    rows = make_case(N, D, C, dtype=options.pop("dtype", torch.float32), seed=3)
    rows["labels"][::9] = -100
    options = {"means": rows.pop("means"), **options}
    if options.pop("anchor_weight", False):
        rows["anchor_weight"] = torch.rand(N, generator=generator_of(4))
    if options.pop("seen", False):
        options["seen"] = torch.arange(C) != 2
    return rows, options


def run(rows: dict[str, Tensor], options: dict[str, Any], **keywords: Any) -> dict[str, Tensor]:
    """Value, and gradients with respect to z, the means and the temperature where there are such."""
    return value_and_gradients(hycon, rows, **options, **keywords)


def all_around_case() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Per-row tensors and those that are the same on every rank, in float64."""
    case = make_case(N, D, C, 23, dtype=torch.float64, seed=5)
    case["labels"][::9] = -100
    rows = {name: case.pop(name) for name in ("z", "labels")}
    return rows, case


def class_means(features: Tensor, labels: Tensor, group: Any = None, **options: Any) -> dict[str, Tensor]:
    """Value, state and this rank's gradient after two updates; each rank's loss is a W-th of one on the value."""
    features = features.detach().clone().requires_grad_()
    means = torch.zeros(C, features.shape[1], dtype=features.dtype)
    seen = torch.arange(C) == 1
    for _ in range(2):
        value = class_mean_ema(features, labels, means, seen, group=group, **options)
    upstream = torch.randn(value.shape, generator=generator_of(6), dtype=value.dtype)
    (value * upstream).sum().div(1 if group is None else group.size()).backward()
    assert features.grad is not None
    return {"value": value.detach(), "means": means, "seen": seen, "features": features.grad}


def message_of(function, *arguments: Any, **keywords: Any) -> str:
    try:
        function(*arguments, **keywords)
    except (RuntimeError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def _all_around_with(target: Any, group: Any) -> None:
    rows, options = all_around_case()
    all_around(**rows, **options, target=target, group=group)


def wrong_calls(rank: int, group: dist.ProcessGroup) -> dict[str, str]:
    """What each rank is told when rank 1 alone gives a wrong or another argument."""
    rows, options = rows_and_options("plain")
    wrong = dict(rows, labels=rows["labels"].int()) if rank == 1 else rows
    unlike = {**options, "temperature": 0.2 if rank == 1 else 0.1}
    os.environ["ALLNC_DEBUG"] = "1"
    means = message_of(hycon, **rows, means=(2 if rank == 1 else 1) * options["means"], group=group)
    os.environ["ALLNC_DEBUG"] = "0"
    return {
        "means": means,
        "labels": message_of(hycon, **wrong, **options, group=group),
        "temperature": message_of(hycon, **rows, **unlike, group=group),
        "empty": message_of(hycon, rows["z"][:0], rows["labels"][:0], group=group),
        "not a group": message_of(hycon, rows["z"], rows["labels"], group="world"),
        "class means": message_of(class_means, rows["z"], rows["labels"] + (100 if rank == 1 else 0), group),
        "target": message_of(_all_around_with, "etf" if rank == 1 else "softmax", group),
        "still in step": message_of(hycon, **rows, **options, group=group),
    }


def work(rank: int, world: int, backends: list[str]) -> dict[Any, Any]:
    results: dict[Any, Any] = {}
    for size, sizes in SIZES.items():
        group: Any = dist.new_group(list(range(size)))
        if rank >= size:
            results["outside"] = message_of(hycon, torch.ones(1, 1), torch.zeros(1).long(), group=group)
            continue
        start = sum(sizes[:rank])
        own = slice(start, start + sizes[rank])
        for name in CASES:
            rows, options = rows_and_options(name)
            local = {k: v[own] for k, v in rows.items()}
            for backend in backends:
                if backend != "triton" or rows["z"].dtype != torch.float64:
                    results[size, name, backend] = run(local, options, group=group, backend=backend)
        rows, options = all_around_case()
        local = {k: v[own] for k, v in rows.items()}
        results[size, "all_around"] = value_and_gradients(all_around, local, **options, group=group)
        for gradient in ("exact", "straight_through"):
            results[size, gradient] = class_means(local["z"], local["labels"], group, gradient=gradient)
        if size == world:
            results["wrong calls"] = wrong_calls(rank, group)
    return results


if __name__ == "__main__":
    rank_main(work)
