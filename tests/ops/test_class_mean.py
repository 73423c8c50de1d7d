"""class_mean_ema on every backend that runs here, against float64 autograd of the formula as written."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from allnc import _extension, class_mean_ema
from allnc.ops._common import accumulation_dtype
from allnc.ops.class_mean import class_mean_ema_reference
from tests.cases import generator_of, make_class_mean_case
from tests.launches import Dispatches, opcheck_all
from tests.poison import poisoned_allocations
from tests.tolerances import assert_as_exact, assert_near

__all__ = ["poisoned_allocations"]  # a fixture: pytest finds it by name

CPP = pytest.param("cpp", marks=pytest.mark.skipif(not _extension.has_cpp(), reason="extension not built"))
CUDA = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not _extension.has_cuda(), reason="built without CUDA")],
)
BACKENDS = ["eager", CPP, CUDA]
CPU_BACKENDS = ["eager", CPP]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
GRADIENTS = ["exact", "straight_through"]


def device_of(backend: Any) -> str:
    return "cuda" if backend == "cuda" else "cpu"


def run(case: dict[str, Tensor], backend: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returned means, gradient of the features, and the state afterwards."""
    case = {name: tensor.to(device_of(backend)) for name, tensor in case.items()}
    features = case["features"].clone().requires_grad_()
    means, seen = case["means"].clone(), case["seen"].clone()
    value = class_mean_ema(features, case["labels"], means, seen, backend=backend, **options)
    value.backward(case["upstream"])
    assert features.grad is not None
    return value.detach().cpu(), features.grad.cpu(), means.cpu(), seen.cpu()


def run_reference(case: dict[str, Tensor], dtype: torch.dtype, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Means, gradient and seen of the reference with features in `dtype`."""
    state = accumulation_dtype(dtype)
    features = case["features"].to(dtype).clone().requires_grad_()
    value, seen, _ = class_mean_ema_reference(
        features, case["labels"], case["means"].to(state), case["seen"], **options
    )
    value.backward(case["upstream"].to(state))
    assert features.grad is not None
    return value.detach(), features.grad, seen


def check(
    case: dict[str, Tensor], backend: Any, *, deterministic: bool = False, floor: float = 0.0, **options: Any
) -> None:
    """Value, gradient and state; `floor` for values that may be zero by cancellation of features of this size."""
    dtype = case["features"].dtype
    value, grad, means, seen = run(case, backend, deterministic=deterministic, **options)
    eager_value, eager_grad, _ = run_reference(case, dtype, **options)
    exact_value, exact_grad, exact_seen = run_reference(case, torch.float64, **options)
    assert_as_exact(value, eager_value, exact_value, floor=floor)
    assert_as_exact(grad, eager_grad, exact_grad)
    assert grad.dtype == dtype and value.dtype == accumulation_dtype(dtype)
    assert torch.equal(means, value), "the state is the returned value"
    assert torch.equal(seen, exact_seen)


@pytest.mark.parametrize("backend", BACKENDS)
def test_hand_computed(backend: Any) -> None:
    """Class 0 seen: 0.75·4 + 0.25·mean(1, 3) = 3.5; class 1 new: 6; class 2 absent; the last row ignored."""
    device = device_of(backend)
    features = torch.tensor([[1.0, -2.0], [6.0, 0.0], [3.0, -4.0], [9.0, 9.0]], device=device, requires_grad=True)
    labels = torch.tensor([0, 1, 0, -100], device=device)
    means = torch.tensor([[4.0, 5.0], [8.0, 8.0], [7.0, 7.0]], device=device)
    seen = torch.tensor([True, False, True], device=device)
    value = class_mean_ema(features, labels, means, seen, momentum=0.75, backend=backend)
    assert value.tolist() == [[3.5, 3.0], [6.0, 0.0], [7.0, 7.0]]
    assert means.tolist() == value.tolist()
    assert seen.tolist() == [True, True, True]
    (value * torch.tensor([[8.0], [5.0], [3.0]], device=device)).sum().backward()
    assert features.grad is not None  # (1 - 0.75)·8/2 = 1 for the rows of class 0, 1·5/1 for class 1
    assert features.grad.tolist() == [[1.0, 1.0], [5.0, 5.0], [1.0, 1.0], [0.0, 0.0]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_straight_through_has_the_gradient_of_the_batch_mean(backend: Any) -> None:
    case = make_class_mean_case()
    exact_value, exact_grad, *_ = run(case, backend, momentum=0.75)
    value, grad, *_ = run(case, backend, momentum=0.75, gradient="straight_through")
    assert torch.equal(value, exact_value)
    was_seen = case["seen"][case["labels"]]
    assert_near(grad[was_seen], exact_grad[was_seen] / 0.25)
    assert torch.equal(grad[~was_seen], exact_grad[~was_seen])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_against_float64(backend: Any, gradient: Any, dtype: torch.dtype) -> None:
    for n, f, c in [(41, 24, 7), (300, 130, 3), (5, 1, 40)]:
        check(make_class_mean_case(n, f, c, dtype=dtype), backend, gradient=gradient)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_heavy_class(backend: Any, dtype: torch.dtype) -> None:
    """Thousands of rows of one class: float16 sums would overflow, and the sum is made of several parts."""
    labels = torch.zeros(5000, dtype=torch.int64)
    labels[::500] = 2
    check(make_class_mean_case(5000, 40, 4, dtype=dtype, labels=labels), backend)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize(("n", "f", "c"), [(0, 3, 2), (3, 0, 2), (0, 0, 2)])
def test_nothing_to_add(backend: Any, n: int, f: int, c: int) -> None:
    features = torch.ones(n, f, requires_grad=True)
    labels = torch.full((n,), 1)
    means, seen = torch.full((c, f), 5.0), torch.arange(c) == 0
    value = class_mean_ema(features, labels, means, seen, backend=backend)
    value.sum().backward()
    assert value.tolist() == means.tolist() == [[5.0] * f] * c
    assert seen.tolist() == [True, n > 0]
    assert features.grad is not None and features.grad.shape == (n, f)
    with pytest.raises(ValueError, match="means must have at least one row"):
        class_mean_ema(features, labels, means[:0], seen[:0], backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_long_sum_keeps_its_digits(backend: Any) -> None:
    """65,536 rows near 10: added up one by one, their mean would be off by 80 units in the last place."""
    others = torch.arange(65_536) % 64 != 0
    for labels in (others.long(), others.long().where(others, -100)):
        features = 10 + torch.randn(len(labels), 8, generator=generator_of(7))
        want = torch.stack([features[labels == c].double().sum(0) / max(1, int((labels == c).sum())) for c in (0, 1)])
        device = device_of(backend)
        means, seen = torch.zeros(2, 8, device=device), torch.zeros(2, dtype=torch.bool, device=device)
        got = class_mean_ema(features.to(device), labels.to(device), means, seen, backend=backend)
        assert (got.cpu().double() - want).abs().max() < 1e-5


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(0, 70),
    f=st.integers(1, 40),
    c=st.integers(1, 12),
    dtype=st.sampled_from(DTYPES),
    gradient=st.sampled_from(GRADIENTS),
    momentum=st.sampled_from([0.0, 0.5, 0.99]),
    ignore_index=st.sampled_from([-100, 0]),
    data=st.data(),
)
def test_any_shape_and_labels(
    backend: Any,
    n: int,
    f: int,
    c: int,
    dtype: torch.dtype,
    gradient: Any,
    momentum: float,
    ignore_index: int,
    data: Any,
) -> None:
    choices = st.sampled_from([*range(c), ignore_index])
    labels = torch.tensor(data.draw(st.lists(choices, min_size=n, max_size=n)), dtype=torch.int64)
    case = make_class_mean_case(n, f, c, dtype=dtype, labels=labels)
    check(case, backend, floor=2.0, gradient=gradient, momentum=momentum, ignore_index=ignore_index)


def draw_labels(n: int, c: int, distribution: str, generator: torch.Generator) -> Tensor:
    if distribution == "one class":
        return torch.full((n,), c // 2)
    if distribution == "all distinct":  # as far as the classes go
        return torch.randperm(max(n, c), generator=generator)[:n] % c
    if distribution == "half absent":
        return torch.randint(0, c, (n,), generator=generator) // 2
    if distribution == "all ignored":
        return torch.full((n,), -100)
    share = torch.arange(1, c + 1).double() ** -1.5  # long tail
    labels = torch.multinomial(share, n, replacement=True, generator=generator) if n else torch.zeros(0).long()
    return labels.masked_fill(torch.rand(n, generator=generator) < 0.1, -100)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    n=st.sampled_from([0, 1, 63, 64, 65, 128, 129, 257, 700]),
    f=st.sampled_from([1, 8, 40, 129]),
    c=st.sampled_from([1, 2, 17, 130, 2100]),
    distribution=st.sampled_from(["one class", "all distinct", "half absent", "all ignored", "long tail"]),
    dtype=st.sampled_from(DTYPES),
    deterministic=st.booleans(),
)
def test_any_distribution_of_labels(
    backend: Any, n: int, f: int, c: int, distribution: str, dtype: torch.dtype, deterministic: bool
) -> None:
    labels = draw_labels(n, c, distribution, torch.Generator().manual_seed(n + c))
    check(make_class_mean_case(n, f, c, dtype=dtype, labels=labels), backend, deterministic=deterministic, floor=2.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_special_values(backend: Any) -> None:
    """Infinity and NaN reach their own class only; an ignored row reaches none, whatever it holds."""
    case = make_class_mean_case(6, 8, 4, labels=torch.tensor([0, 1, 2, 0, -100, 2]))
    case["features"][0, 3], case["features"][1, 2], case["features"][4] = torch.inf, torch.nan, torch.nan
    value, *_ = run(case, backend)
    assert value[0, 3].isinf() and value[1, 2].isnan()
    value[0, 3] = value[1, 2] = 0
    assert value.isfinite().all()


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("bits", [0x0001, 0x03FF, 0x0400, 0x7BFF, 0x8001, 0xFBFF, 0x7C00, 0xFC00])
def test_float16_is_widened_exactly(backend: Any, bits: int) -> None:
    """Smallest and largest subnormals and normals, negative ones and the infinities."""
    features = torch.tensor([bits], dtype=torch.int32).to(torch.uint16).view(torch.float16).repeat(1, 40)
    means, seen = torch.zeros(1, 40), torch.zeros(1, dtype=torch.bool)
    value = class_mean_ema(features, torch.zeros(1, dtype=torch.int64), means, seen, backend=backend)
    assert torch.equal(value, features.float())


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows(backend: Any) -> None:
    case = make_class_mean_case(0, 5, 3)
    value, grad, means, seen = run(case, backend)
    assert torch.equal(value, case["means"]) and torch.equal(means, case["means"])
    assert torch.equal(seen, case["seen"]) and grad.shape == (0, 5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_returned_value_is_not_the_state(backend: Any) -> None:
    case = {k: v.to(device_of(backend)) for k, v in make_class_mean_case().items()}
    means, seen = case["means"], case["seen"]
    versions = means._version, seen._version
    value = class_mean_ema(case["features"], case["labels"], means, seen, backend=backend)
    assert means._version > versions[0] and seen._version > versions[1], "autograd knows of the change"
    kept = value.clone()
    class_mean_ema(case["features"] + 1, case["labels"], means, seen, backend=backend)
    assert torch.equal(value, kept) and not torch.equal(means, kept)


@pytest.mark.parametrize("backend", BACKENDS)
def test_returned_value_may_be_changed_in_place(backend: Any) -> None:
    case = {k: v.to(device_of(backend)) for k, v in make_class_mean_case().items()}
    want = run(case, backend)[1]
    features, means, seen = case["features"].clone().requires_grad_(), case["means"], case["seen"]
    value = class_mean_ema(features, case["labels"], means, seen, backend=backend)
    kept = means.clone()
    value.mul_(2).backward(case["upstream"])
    assert torch.equal(means, kept)
    assert features.grad is not None and torch.equal(features.grad.cpu(), 2 * want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_after_the_next_update(backend: Any) -> None:
    """The gradient is that of the state before the batch, however often the state was updated since."""
    case = {k: v.to(device_of(backend)) for k, v in make_class_mean_case().items()}
    want = run(case, backend)[1]
    features = case["features"].clone().requires_grad_()
    means, seen = case["means"], case["seen"]
    value = class_mean_ema(features, case["labels"], means, seen, backend=backend)
    class_mean_ema(case["features"], case["labels"], means, seen, backend=backend)
    value.backward(case["upstream"])
    assert features.grad is not None and torch.equal(features.grad.cpu(), want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_non_contiguous(backend: Any, dtype: torch.dtype) -> None:
    case = {k: v.to(device_of(backend)) for k, v in make_class_mean_case(40, 24, 5, dtype=dtype).items()}
    value, grad, *_ = run(case, backend, deterministic=True)
    views = {
        "transposed": case["features"].t().contiguous().t(),
        "every other row": torch.stack([case["features"], case["features"] * 0], 1).flatten(0, 1)[::2],
        "columns of a wider tensor": torch.nn.functional.pad(case["features"], (3, 2))[:, 3:-2],
    }
    for name, view in views.items():
        features = view.detach().requires_grad_()
        state = torch.stack([case["means"], case["means"]], 2)[..., 0], case["seen"].repeat(2, 1).t()[:, 0]
        labels = case["labels"].repeat_interleave(2)[::2]
        got = class_mean_ema(features, labels, *state, deterministic=True, backend=backend)
        got.backward(case["upstream"].t().contiguous().t())
        assert torch.equal(got.cpu(), value) and torch.equal(state[0].cpu(), value), name
        assert features.grad is not None and torch.equal(features.grad.cpu(), grad), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_deterministic_is_bit_equal(backend: Any) -> None:
    labels = torch.randint(0, 3, (4000,)).where(torch.rand(4000) < 0.5, 0)
    case = make_class_mean_case(4000, 33, 3, labels=labels)
    first = run(case, backend, deterministic=True)
    for _ in range(5):
        again = run(case, backend, deterministic=True)
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


@pytest.mark.skipif(not _extension.has_cpp(), reason="extension not built")
def test_cpp_does_not_depend_on_the_number_of_threads() -> None:
    case = make_class_mean_case(3000, 33, 5)
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            results.append(run(case, "cpp"))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def test_deterministic_follows_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    original = torch.ops.allnc.class_mean_ema

    def spy(*args: Any) -> Any:
        asked.append(args[6])
        return original(*args)

    monkeypatch.setattr(torch.ops.allnc, "class_mean_ema", spy)
    case = make_class_mean_case()
    state = case["features"], case["labels"], case["means"], case["seen"]
    class_mean_ema(*state)
    torch.use_deterministic_algorithms(True)
    try:
        class_mean_ema(*state)
        class_mean_ema(*state, deterministic=False)
    finally:
        torch.use_deterministic_algorithms(False)
    assert asked == [False, True, False]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("poisoned_allocations")
def test_every_output_element_is_written(backend: Any) -> None:
    for n, f, c in [(41, 24, 7), (0, 3, 2), (600, 17, 2)]:
        case = make_class_mean_case(n, f, c)
        case["labels"][::5] = -100
        check(case, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_gradcheck(backend: Any, gradient: Any) -> None:
    case = {k: v.to(device_of(backend)) for k, v in make_class_mean_case(9, 5, 4, dtype=torch.float64).items()}

    def function(features: Tensor) -> Tensor:
        state = case["means"].clone(), case["seen"].clone()
        return class_mean_ema(features, case["labels"], *state, gradient=gradient, backend=backend)

    features = case["features"].requires_grad_()
    if gradient == "exact":
        assert torch.autograd.gradcheck(function, (features,))
        return
    case["seen"].zero_()  # straight-through gradients are true ones where a class is seen first
    assert torch.autograd.gradcheck(function, (features,))


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: Any) -> None:
    with Dispatches() as ops:
        run(make_class_mean_case(9, 5, 4, dtype=torch.bfloat16), backend, deterministic=True)
    assert {"class_mean_ema", "class_mean_ema_backward"} <= set(opcheck_all(ops))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_without_a_graph_break(backend: Any) -> None:
    case = {k: v.to(device_of(backend)) for k, v in make_class_mean_case().items()}
    want_value, want_grad, want_means, want_seen = run(case, backend)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(features: Tensor, means: Tensor, seen: Tensor) -> Tensor:
        return class_mean_ema(features * 1, case["labels"], means, seen, backend=backend)

    features = case["features"].clone().requires_grad_()
    means, seen = case["means"].clone(), case["seen"].clone()
    value = step(features, means, seen)
    value.backward(case["upstream"])
    assert features.grad is not None
    assert_near(value.detach().cpu(), want_value)
    assert_near(means.cpu(), want_means)
    assert torch.equal(seen.cpu(), want_seen)
    assert_near(features.grad.cpu(), want_grad)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_changes_nothing(backend: Any) -> None:
    case = make_class_mean_case()
    want = run(case, backend, deterministic=True)
    with torch.autocast(device_of(backend), dtype=torch.bfloat16):
        got = run(case, backend, deterministic=True)
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": torch.zeros(41)}, r"features must have shape \[N, F\]; got \[41\]"),
        ({"features": torch.zeros(41, 24, dtype=torch.int32)}, "features must be float16.*got torch.int32"),
        (
            {"features": torch.zeros(41, 24).double()},
            "means must be torch.float64 for torch.float64 features; got",
        ),
        ({"means": torch.zeros(7, 24).half()}, "means must be torch.float32 .*got torch.float16"),
        ({"means": torch.zeros(7, 23)}, r"means must have shape \[C, 24\]; got \[7, 23\]"),
        ({"means": torch.zeros(7, 24, requires_grad=True)}, "means must not require a gradient"),
        ({"labels": torch.zeros(40, dtype=torch.int64)}, r"labels must have shape \[41\]; got \[40\]"),
        ({"labels": torch.zeros(41)}, "labels must be int64; got torch.float32"),
        ({"labels": torch.full((41,), 7)}, r"labels must be in \[0, 7\).*got 7"),
        ({"labels": torch.full((41,), -1)}, r"labels must be in \[0, 7\).*got -1"),
        ({"seen": torch.zeros(7)}, "seen must be a bool tensor; got torch.float32"),
        ({"seen": torch.zeros(6, dtype=torch.bool)}, r"seen must have shape \[7\]; got \[6\]"),
        ({"means": torch.zeros(7, 24, device="meta")}, "all tensors must be on one device"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\); got 1.0"),
        ({"gradient": "none"}, "gradient must be one of 'exact', 'straight_through'; got 'none'"),
        ({"backend": "triton"}, "class_mean_ema has no backend 'triton'"),
        ({"backend": "cuda"}, "runs on CUDA tensors; got cpu"),
    ],
)
def test_wrong_arguments(change: dict[str, Any], message: str) -> None:
    case: dict[str, Any] = make_class_mean_case()
    del case["upstream"]
    before = case["means"].clone()
    with pytest.raises(ValueError, match=message):
        class_mean_ema(**{**case, **change})
    assert torch.equal(case["means"], before), "a refused call leaves the state alone"


@pytest.mark.skipif(not _extension.has_cpp(), reason="extension not built")
def test_the_extension_checks_its_own_arguments() -> None:
    case = make_class_mean_case()
    arguments = [case["features"], case["labels"], case["means"], case["seen"], 0.9, -100, False]
    for position, wrong, message in [
        (1, torch.full((41,), 7), r"labels must be in \[0, 7\).*got 7"),
        (2, torch.zeros(7, 23), "means must have size 24 in dimension 1; got 23"),
        (3, torch.zeros(7), "seen must have ScalarType"),
        (4, 1.5, r"momentum must be in \[0, 1\); got 1.5"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            torch.ops.allnc_C.class_mean_ema_forward(*[*arguments[:position], wrong, *arguments[position + 1 :]])
