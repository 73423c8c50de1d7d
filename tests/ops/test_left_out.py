"""What takes no part is never read: rows that are ignored and classes without a mean may hold NaN or infinity.

Value and gradients are, bit for bit, those of finite numbers in their place, and their own gradients are 0. That finite
numbers there do not count either is tested beside each op.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from allnc import all_around, class_mean_ema, hycon, hycon_cosine, p2p
from allnc.ops._common import Backend
from allnc.ops.all_around import all_around_reference
from allnc.ops.hycon import hycon_reference
from tests.cases import generator_of, make_case, make_class_mean_case, value_and_gradients
from tests.ops.test_hycon import CPU_BACKENDS
from tests.tolerances import assert_near

VALUES = torch.tensor([math.nan, math.inf, -math.inf])
SEEN = torch.tensor([True, False, True, False, False, True])


def check(
    function: Callable[..., Any], case: dict[str, Any], rows: tuple[str, ...], classes: tuple[str, ...], **options: Any
) -> None:
    """`function` of the case with VALUES, in turn, in the ignored rows of `rows` and the unseen classes of `classes`.

    NaN or infinity takes the place of one entry, so that none is recognised by its row being all alike.
    """
    ignored: Any = case["labels"] == -100 if "labels" in case else None
    want = value_and_gradients(function, case, **options)
    left_out: dict[str, Any] = dict.fromkeys(rows, ignored) | dict.fromkeys(classes, ~SEEN)
    poisoned = {name: x.clone() for name, x in {**case, **options}.items() if isinstance(x, Tensor)}
    for name, which in left_out.items():
        count = int(which.sum())
        assert count >= len(VALUES)
        values = VALUES.repeat(-(-count // len(VALUES)))[:count]
        poisoned[name].view(len(which), -1)[which, -1] = values.to(poisoned[name].dtype)
    got = value_and_gradients(function, {**case, **options, **poisoned})
    for name, wanted in want.items():
        assert wanted.isfinite().all(), name
        assert torch.equal(got[name], wanted), name
    for name, which in left_out.items():
        assert name not in got or not got[name][which].any(), name


def ignored_rows(case: dict[str, Any]) -> dict[str, Any]:
    case["labels"][::4] = -100
    return case


CONTRASTS: dict[str, dict[str, Any]] = {
    "the losses' own": {},
    "without balance": {"balance": "none"},
    "cold": {"temperature": 0.01},
    "sum": {"reduction": "sum"},
    "values": {"reduction": "none"},
    "learnable temperature": {"temperature": torch.tensor(0.2)},
    "anchor weights": {"anchor_weight": torch.linspace(0.5, 2, 37)},
}


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONTRASTS)
def test_hycon(backend: Backend, dtype: torch.dtype, name: str) -> None:
    options = CONTRASTS[name]
    rows = ("z", *(["anchor_weight"] if "anchor_weight" in options else []))
    case = ignored_rows(make_case(c=6, dtype=dtype))
    function = functools.partial(hycon, backend=backend)
    check(function, case, rows, ("means",), seen=SEEN, **options)
    check(function, {"z": case["z"], "labels": case["labels"]}, rows, (), **options)
    check(hycon_reference, case, rows, ("means",), seen=SEEN, **options)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_hycon_of_wide_rows_and_in_deterministic_mode(backend: Backend) -> None:
    case = ignored_rows(make_case(n=29, d=300, c=6))
    check(functools.partial(hycon, backend=backend), case, ("z",), ("means",), seen=SEEN)
    torch.use_deterministic_algorithms(True)
    try:
        check(functools.partial(hycon, backend=backend), ignored_rows(make_case(c=6)), ("z",), ("means",), seen=SEEN)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("ignored", [1, 36, 37], ids=["one", "all but one", "all"])
def test_hycon_equals_that_of_the_other_rows_alone(backend: Backend, ignored: int) -> None:
    case = make_case(c=6)
    case["labels"][37 - ignored :] = -100
    case["z"][37 - ignored :] = math.nan
    kept = {"z": case["z"][: 37 - ignored], "labels": case["labels"][: 37 - ignored], "means": case["means"]}
    got = value_and_gradients(hycon, case, backend=backend)
    assert not got["z"][37 - ignored :].any()
    if ignored == 37:
        assert not any(x.any() for x in got.values())
        return
    want = value_and_gradients(hycon_reference, kept, dtype=torch.float64)
    for name in ("value", "means"):
        assert_near(got[name], want[name], floor=1.0 if ignored == 36 else 0.0)
    assert_near(got["z"][: 37 - ignored], want["z"], floor=1.0 if ignored == 36 else 0.0)


def test_hycon_checks_the_length_of_the_rows_that_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALLNC_DEBUG", "1")
    case = ignored_rows(make_case())
    case["z"][case["labels"] == -100] = math.nan
    hycon(**case)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("target", ["etf", "softmax"])
def test_all_around(backend: Backend, target: str) -> None:
    case = ignored_rows(make_case(37, 19, 6, 8))
    options = {"seen": SEEN, "target": target}
    for function in (functools.partial(all_around, backend=backend), all_around_reference):
        check(function, case, ("z",), ("proj_means", "means", "weights"), **options)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("target", ["etf", "softmax"])
def test_p2p(backend: Backend, target: str) -> None:
    case = make_case(c=6, f=8)
    pair = {"x": case["means"], "y": case["weights"]}
    check(functools.partial(p2p, backend=backend), pair, (), ("x", "y"), seen=SEEN, target=target)
    check(functools.partial(p2p, backend=backend), {"x": pair["x"]}, (), ("x",), seen=SEEN, target=target)


def test_hycon_cosine() -> None:
    case = make_case(n=36, d=8, c=6)
    labels = torch.randint(0, 6, (18,), generator=generator_of(1))
    labels[::4] = -100
    rows = {"h": case["z"], "f": case["z"].flip(0), "labels": labels.repeat(2)}
    check(hycon_cosine, {**rows, "means": case["means"]}, ("h", "f"), ("means",), seen=SEEN)


@pytest.mark.parametrize("backend", CPU_BACKENDS[:2])
def test_class_mean_ema(backend: Backend) -> None:
    case = make_class_mean_case(c=7)
    case["labels"][::4] = -100
    results = []
    for value in (1.0, *VALUES.tolist()):
        features, means, seen = case["features"].clone(), case["means"].clone(), case["seen"].clone()
        features[::4, -1] = value
        means[~seen] = value  # whose first mean replaces it
        features.requires_grad_()
        new = class_mean_ema(features, case["labels"], means, seen, backend=backend)
        new[seen].backward(case["upstream"][seen])
        assert features.grad is not None and not features.grad[::4].any()
        results.append((new.detach()[seen], means[seen], features.grad))
    for result in results[1:]:
        for got, want in zip(result, results[0], strict=True):
            assert want.isfinite().all() and torch.equal(got, want)
