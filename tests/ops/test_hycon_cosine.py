"""Cosine HyCon: the op against its pair-of-views reference in float64, stop-gradients, masks and errors."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from allnc.ops.hycon_cosine import hycon_cosine, hycon_cosine_reference
from tests.launches import Dispatches, opcheck_all
from tests.tolerances import assert_as_exact, assert_near


def _case(
    num_views: int, num_images: int, num_classes: int, dim: int, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """h, f, labels alike in all views, means."""
    generator = torch.Generator().manual_seed(seed)
    rows = num_views * num_images

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    labels = torch.randint(num_classes, (num_images,), generator=generator).repeat(num_views)
    return (
        random(rows, dim).requires_grad_(),
        random(rows, dim).requires_grad_(),
        labels,
        random(num_classes, dim),
    )


@settings(max_examples=50, deadline=None)
@given(
    data=st.data(),
    num_views=st.integers(1, 4),
    num_images=st.integers(1, 6),
    num_classes=st.integers(1, 5),
    dim=st.integers(1, 8),
)
def test_matches_reference(data: st.DataObject, num_views: int, num_images: int, num_classes: int, dim: int) -> None:
    """Value and gradients for any shape, mask of seen classes and ignored images."""
    h, f, labels, means = _case(num_views, num_images, num_classes, dim, data.draw(st.integers(0, 999)))
    seen = torch.tensor(data.draw(st.lists(st.booleans(), min_size=num_classes, max_size=num_classes)))
    ignored = torch.tensor(data.draw(st.lists(st.booleans(), min_size=num_images, max_size=num_images)))
    labels = labels.masked_fill(ignored.repeat(num_views), -100)
    got = hycon_cosine(h, f, labels, means, num_views=num_views, seen=seen)
    want = hycon_cosine_reference(h, f, labels, means, num_views=num_views, seen=seen)
    assert_near(got, want, floor=2.0)  # the sum of two cosines
    grads = torch.autograd.grad(got, (h, f), materialize_grads=True)
    wanted = torch.autograd.grad(want, (h, f), materialize_grads=True)
    for rows, g, w in zip((h, f), grads, wanted, strict=True):
        steepest = float(1 / rows.detach().norm(dim=1).min())  # in one column all cosines are flat: their terms cancel
        assert_near(g, w, growth=10, floor=steepest)


def test_hand_computed() -> None:
    """Two images, two views: cosines 0.6 and 0 with the other view, 0.8 with the class means."""
    f = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0], [0.0, 5.0]])
    h = torch.tensor([[3.0, 4.0], [1.0, 0.0], [3.0, 4.0], [1.0, 0.0]])
    means = torch.tensor([[8.0, 6.0], [-6.0, 8.0], [7.0, 7.0]])
    labels = torch.tensor([0, 1, 0, 1])
    value = hycon_cosine(h, f, labels, means)
    assert math.isclose(float(value), -(0.6 + 0.6) / 4 - 0.8, rel_tol=1e-6)
    unseen = hycon_cosine(h, f, labels, means, seen=torch.zeros(3, dtype=torch.bool))
    assert math.isclose(float(unseen), -0.3, rel_tol=1e-6)
    one_view = hycon_cosine(h, f, labels, means, num_views=1)
    assert math.isclose(float(one_view), -0.8, rel_tol=1e-6)


def test_other_view_is_the_same_image() -> None:
    """Rows are view-major: image b's views are rows b and B + b, not neighbours."""
    f = torch.eye(4).repeat(2, 1)
    value = hycon_cosine(f, f, torch.zeros(8, dtype=torch.int64), torch.ones(1, 4), seen=torch.zeros(1).bool())
    assert float(value) == -1.0


def test_targets_are_constants() -> None:
    """No gradient reaches the means, and none reaches f through the first term."""
    h, f, labels, means = _case(2, 5, 3, 4)
    means.requires_grad_()
    value = hycon_cosine(h, f, labels, means, seen=torch.zeros(3, dtype=torch.bool))
    grad_f, grad_means = torch.autograd.grad(value, (f, means), allow_unused=True)
    assert grad_means is None
    assert bool((grad_f == 0).all())
    value = hycon_cosine(h, f, labels, means)
    assert bool((torch.autograd.grad(value, (h,))[0] != 0).any())


@pytest.mark.parametrize("num_views", [1, 2, 3])
def test_gradcheck(num_views: int) -> None:
    h, f, labels, means = _case(num_views, 3, 4, 5)
    seen = torch.tensor([True, True, False, True])
    fixed = f.detach()

    def first(h: Tensor) -> Tensor:
        return hycon_cosine(h, fixed, labels, means, num_views=num_views, seen=seen)

    def second(f: Tensor) -> Tensor:  # with the first term's target held fixed, as sg does
        value = hycon_cosine(h.detach(), f, labels, means, num_views=num_views, seen=seen)
        return value - hycon_cosine(
            h.detach(), f.detach(), labels, means, num_views=num_views, seen=torch.zeros_like(seen)
        )

    assert torch.autograd.gradcheck(first, (h,))
    assert torch.autograd.gradcheck(second, (f,))


def test_opcheck() -> None:
    h, f, labels, means = _case(2, 3, 4, 5)
    with Dispatches() as ops:
        hycon_cosine(h, f, labels, means, seen=torch.tensor([True, True, False, True])).backward()
    opcheck_all(ops)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_types_are_as_good_as_eager(dtype: torch.dtype) -> None:
    h, f, labels, means = _case(2, 20, 4, 16)
    results = []
    for cast, function in (
        (dtype, hycon_cosine),
        (dtype, hycon_cosine_reference),
        (torch.float64, hycon_cosine_reference),
    ):
        own_h, own_f = (t.detach().to(dtype).to(cast).requires_grad_() for t in (h, f))
        value = function(own_h, own_f, labels, means.to(dtype).to(cast))
        results.append([value, *torch.autograd.grad(value, (own_h, own_f))])
    assert results[0][0].dtype == torch.float32
    assert results[0][1].dtype == dtype
    for got, eager, reference in zip(*results, strict=True):
        assert_as_exact(got, eager, reference)


def test_strides_mixed_types_and_autocast() -> None:
    h, f, labels, means = _case(2, 6, 3, 4)
    want = hycon_cosine(h, f, labels, means)
    strided = torch.stack((h, f), 2)  # columns of each are two apart
    assert_near(hycon_cosine(strided[..., 0], strided[..., 1], labels, means), want)
    assert hycon_cosine(h.to(torch.bfloat16), f, labels, means).dtype == torch.float64
    single = (h.detach().float().requires_grad_(), f.detach().float().requires_grad_())
    plain = hycon_cosine(*single, labels, means)
    with torch.autocast("cpu", torch.bfloat16):
        cast = hycon_cosine(*single, labels, means)
        grads = torch.autograd.grad(cast, single)
    assert torch.equal(plain, cast)
    assert all(torch.equal(g, w) for g, w in zip(grads, torch.autograd.grad(plain, single), strict=True))


def test_zero_rows_and_ignored_rows_are_harmless() -> None:
    h, f, labels, means = (t.detach().clone() for t in _case(2, 4, 3, 5))
    labels[:] = torch.tensor([0, -100, 1, 2]).repeat(2)
    f[[1, 5]] = torch.nan
    h[0], f[2], means[2] = 0, 0, 0
    h, f = h.requires_grad_(), f.requires_grad_()
    value = hycon_cosine(h, f, labels, means)
    assert math.isfinite(value.item())
    assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(value, (h, f)))
    nothing = hycon_cosine(h, f, torch.full_like(labels, -100), means)
    assert nothing.item() == 0


def test_compiles_without_a_break() -> None:
    h, f, labels, means = _case(2, 6, 3, 4)
    compiled = torch.compile(hycon_cosine, fullgraph=True, backend="aot_eager")
    value, want = compiled(h, f, labels, means), hycon_cosine(h, f, labels, means)
    assert_near(value, want)
    for g, w in zip(torch.autograd.grad(value, (h, f)), torch.autograd.grad(want, (h, f)), strict=True):
        assert_near(g, w)


X, LABELS, MEANS = torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64), torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((X.long(), X, LABELS, MEANS), {}, "h must be float16"),
        ((X, X[:3], LABELS, MEANS), {}, r"f must have shape \[4, 3\]; got \[3, 3\]"),
        ((X, X, LABELS, MEANS[:, :2]), {}, r"means must have shape \[C, 3\]; got \[2, 2\]"),
        ((X[:0], X[:0], LABELS[:0], MEANS), {}, "h must have at least one row"),
        ((X, X, LABELS.int(), MEANS), {}, "labels must be int64"),
        ((X, X, LABELS + 2, MEANS), {}, r"labels must be in \[0, 2\).*; got 2"),
        (
            (X, X, LABELS, MEANS),
            {"num_views": 3},
            "h must have a multiple of num_views = 3 rows; got 4. Stack",
        ),
        ((X, X, LABELS, MEANS), {"num_views": 0}, "num_views must be >= 1; got 0"),
        ((X, X, LABELS, MEANS), {"seen": torch.ones(3).bool()}, r"seen must have shape \[2\]"),
        ((X, X, torch.tensor([0, 0, 1, 1]), MEANS), {}, "the 2 views of an image must have one label; got rows that"),
        ((X, X.to("meta"), LABELS, MEANS), {}, "all tensors must be on one device"),
    ],
)
def test_errors_say_what_to_do(arguments: tuple, options: dict, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        hycon_cosine(*arguments, **options)
