"""P2P: the op against its pairwise reference in float64, its closed form, its masks and its limits."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from allnc import _extension
from allnc.ops import p2p as public_p2p
from allnc.ops.p2p import (
    Blocks,
    Target,
    centred_unit,
    centred_units,
    p2p,
    p2p_blocks,
    p2p_reference,
    p2p_values,
    pair_form,
)
from allnc.ops.p2p.pairings import p2p_pairings
from tests.backends import needs_interpreter
from tests.launches import count_launches
from tests.tolerances import assert_as_exact, error

FORMS = ("pairwise", "closed", "softmax")
cpp = pytest.param("cpp", marks=pytest.mark.skipif(not _extension.has_cpp(), reason="extension not built"))
on_cpu = pytest.mark.parametrize("backend", ["eager", cpp])
cpp_only = pytest.mark.skipif(not _extension.has_cpp(), reason="extension not built")
# Forms and what computes them; the closed form is always made of torch operations.
in_torch = pytest.mark.parametrize("form", ["pairwise", "softmax", "closed"])


CENTRES = st.sampled_from((True, False, (True, False), (False, True)))


def _leaves(num_classes: int, dim: int, *, with_y: bool, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (num_classes, dim)
    rows = [torch.randn(shape, generator=generator, dtype=torch.float64) + 1 for _ in range(1 + with_y)]
    return [r.requires_grad_() for r in rows]


def _grads(value: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(value, leaves))


def pair_value(
    x: Tensor, y: Tensor | None, seen: Tensor, form: str, temperature: float, backend: str = "eager"
) -> Tensor:
    blocks = "own" if y is None else "cross"
    return p2p_blocks(x, y, seen, blocks=blocks, form=form, temperature=temperature, backend=backend).reshape(())


def simplex(num_classes: int, dim: int) -> Tensor:
    """A simplex ETF of unit rows in dim >= num_classes - 1 columns.  [C, F] float64"""
    basis = torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64))[0]
    factor = torch.linalg.svd(torch.eye(num_classes, dtype=torch.float64) - 1 / num_classes)[0][:, :-1]
    return math.sqrt(num_classes / (num_classes - 1)) * factor @ basis[: num_classes - 1]


@on_cpu
@settings(max_examples=60, deadline=None)
@given(data=st.data(), num_classes=st.integers(1, 12), dim=st.integers(1, 40), with_y=st.booleans())
def test_matches_reference(backend, data: st.DataObject, num_classes: int, dim: int, with_y: bool) -> None:
    """Value and gradients for any shape, any mask, among them none, one, two and all classes seen, and any centring."""
    seen = torch.tensor(data.draw(st.lists(st.booleans(), min_size=num_classes, max_size=num_classes)))
    target = data.draw(st.sampled_from(("auto", "etf", "softmax")))
    leaves = _leaves(num_classes, dim, with_y=with_y, seed=data.draw(st.integers(0, 999)))
    options = {"target": target, "temperature": 0.3, "seen": seen, "centre": data.draw(CENTRES)}
    got = p2p(*leaves, **options, backend=backend)
    want = p2p_reference(*leaves, **options)
    assert error(got, want) < 1e-12
    # With few columns a row can lie close to the centre, where the slope of its direction is unbounded.
    for g, w in zip(_grads(got, leaves), _grads(want, leaves), strict=True):
        assert error(g, w) < 1e-11 * max(1.0, float(w.abs().max()))


@in_torch
def test_all_blocks_equal_the_single_pairs(form: str) -> None:
    """Values and gradients of (x, x), (y, y) and (x, y) at once; gradcheck and opcheck of the op that has them."""
    leaves = _leaves(5, 3, with_y=True)
    seen = torch.tensor([True, True, False, True, True])

    def at_once(*rows: Tensor) -> Tensor:
        x, y = (centred_unit(r, seen) for r in rows)
        return p2p_blocks(x, y, seen, blocks="all", form=form, temperature=0.2)

    def one_by_one(*rows: Tensor) -> Tensor:
        x, y = (centred_unit(r, seen) for r in rows)
        pairs = ((x, None), (y, None), (x, y))
        return torch.stack([pair_value(*pair, seen, form, 0.2) for pair in pairs])

    weight = torch.tensor([0.7, 1.3, -0.4], dtype=torch.float64)
    got, want = at_once(*leaves), one_by_one(*leaves)
    assert error(got, want) < 1e-13
    for g, w in zip(_grads(got @ weight, leaves), _grads(want @ weight, leaves), strict=True):
        assert error(g, w) < 1e-13
    assert torch.autograd.gradcheck(at_once, leaves)
    rows = [centred_unit(leaf, seen).detach() for leaf in leaves]
    torch.library.opcheck(torch.ops.allnc.p2p_blocks.default, (*rows, seen, "all", form, 0.2, True, "eager"))


@pytest.mark.parametrize("num_seen", [0, 1, 2, 6])
@pytest.mark.parametrize("target", ["etf", "softmax"])
@pytest.mark.parametrize("with_y", [False, True])
@on_cpu
def test_few_seen_classes(backend, num_seen: int, target: str, with_y: bool) -> None:
    """0 with a zero gradient below two classes; the reference's value otherwise; never NaN."""
    leaves = _leaves(6, 4, with_y=with_y)
    seen = torch.arange(6) >= 6 - num_seen
    value = p2p(*leaves, target=target, seen=seen, backend=backend)  # pyright: ignore[reportArgumentType]
    grads = _grads(value, leaves)
    if num_seen < 2:
        assert value == 0
        assert all(bool((g == 0).all()) for g in grads)
    else:
        assert error(value, p2p_reference(*leaves, target=target, seen=seen)) < 1e-12  # pyright: ignore[reportArgumentType]
        assert all(bool((g[~seen] == 0).all()) for g in grads)


@pytest.mark.parametrize("shape", [(7, 3), (7, 6), (5, 9), (40, 12)])
@pytest.mark.parametrize("with_y", [False, True])
def test_closed_form_equals_pairwise(shape: tuple[int, int], with_y: bool) -> None:
    leaves = _leaves(*shape, with_y=with_y)
    seen = torch.arange(shape[0]) != 2
    values = []
    for form in ("closed", "pairwise"):
        rows = [centred_unit(leaf, seen) for leaf in leaves]
        values.append(pair_value(rows[0], rows[1] if with_y else None, seen, form, 0.1))
    assert error(values[0], values[1]) < 1e-12
    for closed, pairwise in zip(_grads(values[0], leaves), _grads(values[1], leaves), strict=True):
        assert error(closed, pairwise) < 1e-12


@on_cpu
def test_hand_computed(backend) -> None:
    """Three points 0, 0, 3 on a line: centred -1, -1, 2, so unit -1, -1, 1."""
    x = torch.tensor([[0.0], [0.0], [3.0]], dtype=torch.float64)
    e = math.e
    squared = (2 * (1 + 0.5) ** 2 + 4 * (-1 + 0.5) ** 2) / 9  # pairs (1,2); (1,3) and (2,3); each twice
    assert math.isclose(float(p2p(x, backend=backend, target="etf")), squared, rel_tol=1e-14)
    with_itself = (2 * math.log(e + 1 / e) + math.log(2 / e)) / 3
    assert math.isclose(float(p2p(x, backend=backend, target="softmax", temperature=1.0)), with_itself, rel_tol=1e-14)
    opposed = (2 * math.log(1 + e**2) + math.log(2 * e**2)) / 3  # own cosine -1 is taken off every exponent
    assert math.isclose(float(p2p(x, -x, backend=backend, target="softmax", temperature=1.0)), opposed, rel_tol=1e-14)
    diagonal = (3 * (-1 - 1) ** 2 + 2 * (-1 + 0.5) ** 2 + 4 * (1 + 0.5) ** 2) / 9
    assert math.isclose(float(p2p(x, -x, backend=backend, target="etf")), diagonal, rel_tol=1e-14)


@pytest.mark.parametrize(("num_classes", "dim"), [(2, 1), (4, 3), (10, 9), (10, 64)])
@on_cpu
def test_simplex_is_the_minimum(backend, num_classes: int, dim: int) -> None:
    """An ETF of any scale and offset costs nothing and has no slope."""
    x = (7 * simplex(num_classes, dim) + 30).requires_grad_()
    value = p2p(x, x.detach() * 2 - 5, target="etf", backend=backend) + p2p(x, backend=backend)
    assert abs(value.item()) < 1e-12
    assert float(_grads(value, [x])[0].abs().max()) < 1e-9


def test_auto_target_follows_the_room() -> None:
    assert pair_form("auto", (10, 11))[0] == "pairwise"
    assert pair_form("auto", (10, 9))[0] == "closed"
    assert pair_form("auto", (10, 8))[0] == "softmax"
    assert pair_form("etf", (10, 8))[0] == "closed"
    assert pair_form("softmax", (10, 64))[0] == "softmax"


def test_the_form_with_fewer_operations_is_chosen() -> None:
    """Closed against pairwise: F < C for one side, 3/4 C for a pair and 7/4 C for all blocks."""
    limits: dict[Blocks, int] = {"own": 1000, "cross": 750, "all": 1750}
    for blocks, limit in limits.items():
        assert pair_form("etf", (1000, limit - 1), blocks=blocks) == ("closed", "eager")
        assert pair_form("etf", (1000, limit + 1), blocks=blocks) == ("pairwise", "eager")
    # In C++ pairwise needs fewer, and closed costs more than its products where matrices are small.
    limits = {"own": 732, "cross": 741, "all": 1495}
    for blocks, limit in limits.items():
        assert pair_form("etf", (1000, limit), blocks=blocks, backend="cpp") == ("closed", "eager")
        assert pair_form("etf", (1000, limit + 1), blocks=blocks, backend="cpp") == ("pairwise", "cpp")
    assert pair_form("etf", (100, 50), blocks="all", backend="cpp") == ("pairwise", "cpp")
    assert pair_form("auto", (1000, 64), blocks="all", backend="cpp") == ("softmax", "cpp")
    assert pair_form("auto", (100, 2048), blocks="all", backend="triton") == ("pairwise", "triton")
    assert pair_form("auto", (1000, 64), blocks="all", backend="triton") == ("softmax", "triton")
    assert pair_form("etf", (1000, 512), blocks="all", backend="triton") == ("closed", "eager")
    assert pair_form("softmax", (8142, 2048), blocks="all", backend="triton") == ("softmax", "eager")


@in_torch
@pytest.mark.parametrize("with_y", [False, True])
def test_gradcheck_and_opcheck(form: str, with_y: bool) -> None:
    leaves = _leaves(5, 3, with_y=with_y)
    seen = torch.tensor([True, True, False, True, True])

    def value(*rows: Tensor) -> Tensor:
        units = [centred_unit(r, seen) for r in rows]
        return pair_value(units[0], units[1] if with_y else None, seen, form, 0.2)

    assert torch.autograd.gradcheck(value, leaves)
    rest = (seen, "cross" if with_y else "own", form, 0.2)
    rows = [centred_unit(leaf, seen).detach() for leaf in leaves]
    for with_gradient in (False, True):
        arguments = (rows[0], rows[1] if with_y else None, *rest, with_gradient, "eager")
        torch.library.opcheck(torch.ops.allnc.p2p_blocks.default, arguments)
        kept = torch.ops.allnc.p2p_blocks(*arguments)[1]
    torch.library.opcheck(
        torch.ops.allnc.p2p_blocks_backward.default,
        (torch.ones(1, dtype=torch.float64), kept, rows[0], rows[1] if with_y else None, *rest, "eager"),
    )


@cpp_only
@pytest.mark.parametrize("blocks", ["own", "cross", "all"])
@pytest.mark.parametrize("target", ["etf", "softmax"])
@pytest.mark.parametrize("centre", [(True, True), (False, True)])
def test_values_of_rows(blocks: Blocks, target: Target, centre: tuple[bool, bool]) -> None:
    """The C++ op that takes rows as they are: gradcheck, opcheck, mixed types, and the values of single pairs."""
    leaves = _leaves(5, 12, with_y=True)
    seen = torch.tensor([True, True, False, True, True])
    sides = leaves[:1] if blocks == "own" else leaves
    options = {"target": target, "temperature": 0.2, "backend": "cpp", "centre": centre}

    def values(x: Tensor, y: Tensor | None = None) -> Tensor:
        return p2p_values(x, y, seen, blocks=blocks, **options)

    assert torch.autograd.gradcheck(values, sides)
    form, by = pair_form(target, (5, 12), blocks=blocks, backend="cpp")
    assert by == "cpp"
    for types in ((torch.float64, torch.float64), (torch.float32, torch.bfloat16)):
        arguments = [leaf.detach().to(t) for leaf, t in zip(sides, types, strict=False)]
        arguments += [None] * (2 - len(arguments))
        for with_gradient in (True, False):
            rest = (seen, *centre, blocks, form, 0.2, with_gradient)
            torch.library.opcheck(torch.ops.allnc.p2p_values.default, (*arguments, *rest))
    pairs = {"own": [(0, None)], "cross": [(0, 1)], "all": [(0, None), (1, None), (0, 1)]}[blocks]
    rest = {"target": target, "temperature": 0.2, "seen": seen}
    want = [
        p2p_reference(leaves[a], None if b is None else leaves[b], centre=(centre[a], centre[b or 0]), **rest)
        for a, b in pairs
    ]
    assert error(values(*sides), torch.stack(want)) < 1e-12


@cpp_only
def test_value_without_a_gradient() -> None:
    seen = torch.ones(5, dtype=torch.bool)
    x = _leaves(5, 6, with_y=False)[0]
    with torch.no_grad():
        quiet = p2p_values(x, None, seen, blocks="own", target="etf", temperature=0.1, backend="cpp")
    assert torch.equal(quiet, p2p_values(x, None, seen, blocks="own", target="etf", temperature=0.1, backend="cpp"))


def _assert_matches_reference(num_classes: int, backend: str) -> None:
    for target, dim in (("softmax", 4), ("etf", num_classes)):
        for with_y in (False, True):
            leaves = _leaves(num_classes, dim, with_y=with_y)
            seen = torch.arange(num_classes) % 7 != 2
            got = p2p(*leaves, target=target, seen=seen, backend=backend)  # pyright: ignore[reportArgumentType]
            want = p2p_reference(*leaves, target=target, seen=seen)  # pyright: ignore[reportArgumentType]
            assert error(got, want) < 1e-12
            for g, w in zip(_grads(got, leaves), _grads(want, leaves), strict=True):
                assert error(g, w) < 1e-10 * float(w.abs().max())


def test_eager_rows_are_chunked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same whatever number of rows is held at a time."""
    monkeypatch.setattr(sys.modules[pair_form.__module__], "_CHUNK_ENTRIES", 3 * 11)  # allnc.ops.p2p is the function
    _assert_matches_reference(11, "eager")


@cpp_only
@pytest.mark.parametrize("num_classes", [128, 700, 900])
def test_cpp_rows_are_chunked(num_classes: int) -> None:
    """One, two and four chunks of rows, of which residuals of a side with itself are a triangle."""
    _assert_matches_reference(num_classes, "cpp")


@cpp_only
def test_cpp_of_thousands_of_classes() -> None:
    """They take more rows at a time."""
    x, y = _leaves(4100, 3, with_y=True)
    for target in ("etf", "softmax"):
        values = [
            p2p_values(x, y, torch.ones(4100).bool(), blocks="all", target=target, temperature=0.1, backend=backend)
            for backend in ("cpp", "eager")
        ]
        got, want = (_grads(value.sum(), [x, y]) for value in values)
        assert error(values[0], values[1]) < 1e-10 * float(values[1].detach().abs().max())
        assert all(error(g, w) < 1e-10 * float(w.abs().max()) for g, w in zip(got, want, strict=True))


@on_cpu
@pytest.mark.parametrize("target", ["etf", "softmax"])
def test_pairings_with_fixed_means(backend, target: Target) -> None:
    """No gradient of the means is formed where they have none, and nothing else changes."""
    means, weights = _leaves(9, 12, with_y=True)
    options = {"target": target, "backend": backend}
    want = p2p_pairings(means, weights, **options)
    want_grad = _grads(want.sum(), [weights])[0]
    got = p2p_pairings(means.detach(), weights, **options)
    assert error(got, want) < 1e-12 and error(_grads(got.sum(), [weights])[0], want_grad) < 1e-12
    with torch.no_grad():
        assert error(p2p_pairings(means, weights, **options), want) < 1e-12


@cpp_only
@settings(max_examples=60, deadline=None)
@given(data=st.data(), num_classes=st.integers(1, 12), dim=st.integers(1, 40), with_y=st.booleans())
def test_cpp_unit_rows(data: st.DataObject, num_classes: int, dim: int, with_y: bool) -> None:
    """Rows and gradients equal those of torch operations; rows of unseen classes are not read."""
    seen = torch.tensor(data.draw(st.lists(st.booleans(), min_size=num_classes, max_size=num_classes)))
    leaves = _leaves(num_classes, dim, with_y=with_y, seed=data.draw(st.integers(0, 999)))
    centre = (data.draw(st.booleans()), data.draw(st.booleans()))
    garbage = [leaf.detach().where(seen[:, None], torch.nan).requires_grad_() for leaf in leaves]
    weights = torch.randn(2, num_classes, dim, dtype=torch.float64)

    def units(rows: list[Tensor], backend: str) -> list[Tensor]:
        u, v = centred_units(rows[0], rows[1] if with_y else None, seen, backend=backend, centre=centre)
        assert (v is not None) == with_y
        return [u] if v is None else [u, v]

    def total(rows: list[Tensor]) -> Tensor:
        return torch.stack([(u * w).sum() for u, w in zip(rows, weights, strict=False)]).sum()

    got, want = units(garbage, "cpp"), units(leaves, "eager")
    for u, v in zip(got, want, strict=True):
        assert error(u, v) < 1e-13
    for g, w in zip(_grads(total(got), garbage), _grads(total(want), leaves), strict=True):
        assert error(g, w) < 1e-11 * max(1.0, float(w.abs().max()))


@cpp_only
@pytest.mark.parametrize("dtypes", [(torch.float32,), (torch.bfloat16, torch.float32), (torch.float16, torch.float64)])
def test_cpp_unit_ops_pass_opcheck(dtypes: tuple[torch.dtype, ...]) -> None:
    sides = [leaf.detach().to(t) for leaf, t in zip(_leaves(5, 3, with_y=True), dtypes, strict=False)]
    x, y = sides + [None] * (2 - len(sides))
    seen = torch.tensor([True, True, False, True, True])
    arguments = (x, y, seen, True, False, "cpp")
    torch.library.opcheck(torch.ops.allnc.centred_unit.default, arguments)
    u, v, scale = torch.ops.allnc.centred_unit(*arguments)
    v = None if y is None else v
    arguments = (u, v, u, v, scale, seen, True, False, dtypes[0], dtypes[-1], "cpp")
    torch.library.opcheck(torch.ops.allnc.centred_unit_backward.default, arguments)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("target", ["etf", "softmax"])
@on_cpu
def test_types_are_as_good_as_eager(backend, dtype: torch.dtype, target: Target) -> None:
    x, y = torch.randn(2, 12, 20).to(dtype)
    results = []
    for cast, function, options in (
        (dtype, p2p, {"backend": backend}),
        (dtype, p2p_reference, {}),
        (torch.float64, p2p_reference, {}),
    ):
        leaves = [x.to(cast).requires_grad_(), y.to(cast).requires_grad_()]
        value = function(*leaves, target=target, **options)
        results.append([value, *_grads(value, leaves)])
    assert results[0][0].dtype == torch.float32
    assert results[0][1].dtype == dtype
    for got, eager, reference in zip(*results, strict=True):
        assert_as_exact(got, eager, reference)


@on_cpu
def test_mixed_types_strides_and_autocast(backend) -> None:
    x, y = torch.randn(20, 12), torch.randn(12, 20, dtype=torch.float64)
    want = p2p_reference(x.T.contiguous(), y)
    got = p2p(x.T, y, backend=backend)  # columns of a transposed matrix, float32 with float64
    assert got.dtype == torch.float64
    assert error(got, want) < 1e-12
    leaf = x.T.contiguous().requires_grad_()
    plain = p2p(leaf, target="softmax", backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        cast = p2p(leaf, target="softmax", backend=backend)
        cast_grad = _grads(cast, [leaf])[0]
    assert torch.equal(plain, cast)
    assert torch.equal(_grads(plain, [leaf])[0], cast_grad)
    everyone = torch.ones(12, dtype=torch.bool)
    unit = centred_unit(leaf.detach(), everyone)
    for form in FORMS if backend == "eager" else FORMS[::2]:
        with torch.autocast("cpu", torch.bfloat16):
            cast = pair_value(unit, None, everyone, form, 0.1, backend)
        assert torch.equal(cast, pair_value(unit, None, everyone, form, 0.1, backend))


@on_cpu
def test_unseen_rows_are_never_read(backend) -> None:
    x = torch.randn(6, 4, dtype=torch.float64)
    seen = torch.arange(6) != 3
    x[3] = torch.nan
    for target in ("etf", "softmax"):
        leaf = x.clone().requires_grad_()
        value = p2p(leaf, target=target, seen=seen, backend=backend)
        assert error(value, p2p_reference(x[seen], target=target)) < 1e-12
        assert bool(_grads(value, [leaf])[0].isfinite().all())


@on_cpu
def test_row_at_the_centre_has_no_direction(backend) -> None:
    """A row equal to the mean up to rounding must not become a unit row of noise with a huge gradient."""
    x = torch.randn(4, 8) + 1000
    x = torch.cat((x, x.mean(0, keepdim=True) + 3e-4)).requires_grad_()  # some roundings off
    seen = torch.ones(5, dtype=torch.bool)
    assert bool((centred_units(x, None, seen, backend=backend)[0][4] == 0).all())
    assert float(_grads(p2p(x, target="etf", backend=backend), [x])[0].abs().max()) < 10
    same = torch.ones(5, 8, requires_grad=True)
    value = p2p(same, target="softmax", backend=backend)
    assert math.isfinite(value.item()) and bool((_grads(value, [same])[0] == 0).all())


@on_cpu
def test_rows_as_they_are_have_a_direction_at_any_centre(backend) -> None:
    """What lies at the centre, or is short, is compared too; a row of zeros has no direction and no gradient."""
    x = torch.randn(4, 8) + 1000
    x = torch.cat((x, x.mean(0, keepdim=True), 1e-6 * x[:1], torch.zeros(1, 8))).requires_grad_()
    seen = torch.ones(7, dtype=torch.bool)
    lengths = centred_units(x, None, seen, backend=backend, centre=(False, False))[0].norm(dim=1)
    assert bool((lengths[:6] - 1).abs().max() < 1e-5) and lengths[6] == 0
    gradient = _grads(p2p(x, target="etf", centre=False, backend=backend), [x])[0]
    assert bool(gradient.isfinite().all()) and not gradient[6].any() and bool(gradient[:6].any(1).all())


@on_cpu
def test_nan_is_not_hidden(backend) -> None:
    x = torch.randn(4, 8)
    x[1, 2] = torch.nan
    assert math.isnan(float(p2p(x, target="etf", backend=backend))) and math.isnan(
        float(p2p(x, target="softmax", backend=backend))
    )


@pytest.mark.parametrize(("shape", "with_y"), [((10, 16), True), ((10, 9), False), ((20, 9), True)])
@on_cpu
def test_compiles_without_a_break(backend, shape: tuple[int, int], with_y: bool) -> None:
    seen = torch.arange(shape[0]) != 1
    leaves = [leaf.detach().float().requires_grad_() for leaf in _leaves(*shape, with_y=with_y)]
    compiled = torch.compile(
        lambda x, y=None: p2p(x, y, seen=seen, backend=backend), fullgraph=True, backend="aot_eager"
    )
    value = compiled(*leaves)
    want = p2p(leaves[0], leaves[1] if with_y else None, seen=seen)
    assert error(value, want) < 1e-6
    for g, w in zip(_grads(value, leaves), _grads(want, leaves), strict=True):
        assert error(g, w) < 1e-6


@needs_interpreter
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("target", ["etf", "softmax"])
@pytest.mark.parametrize("with_y", [False, True])
def test_triton_is_as_good_as_eager(dtype: torch.dtype, target: Target, with_y: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    rows = [(torch.randn(21, 34, generator=generator) + 1).to(dtype), torch.randn(21, 34, generator=generator)]
    seen = torch.arange(21) % 5 != 2
    results = []
    for cast, function, options in (
        (None, p2p, {"backend": "triton"}),
        (None, p2p_reference, {}),
        (torch.float64, p2p_reference, {}),
    ):
        leaves = [r.to(cast or r.dtype, copy=True).requires_grad_() for r in rows[: 1 + with_y]]
        value = function(*leaves, target=target, seen=seen, **options)
        results.append([value, *_grads(value, leaves)])
    assert results[0][1].dtype == dtype
    for got, eager, reference in zip(*results, strict=True):
        assert_as_exact(got, eager, reference)


@needs_interpreter
@settings(max_examples=8, deadline=None)
@given(data=st.data(), num_classes=st.integers(1, 12), dim=st.integers(1, 10), with_y=st.booleans())
def test_triton_matches_reference(data: st.DataObject, num_classes: int, dim: int, with_y: bool) -> None:
    seen = torch.tensor(data.draw(st.lists(st.booleans(), min_size=num_classes, max_size=num_classes)))
    options = {"target": data.draw(st.sampled_from(("auto", "etf", "softmax"))), "centre": data.draw(CENTRES)}
    exact = _leaves(num_classes, dim, with_y=with_y, seed=data.draw(st.integers(0, 999)))
    leaves = [leaf.detach().float().requires_grad_() for leaf in exact]
    got = p2p(*leaves, **options, temperature=0.3, seen=seen, backend="triton")
    same = p2p(*leaves, **options, temperature=0.3, seen=seen, backend="eager")
    want = p2p_reference(*exact, **options, temperature=0.3, seen=seen)
    assert_as_exact(got, same, want, floor=1.0)  # 0 for two classes: a difference of cosines
    for g, s, w in zip(_grads(got, leaves), _grads(same, leaves), _grads(want, exact), strict=True):
        assert_as_exact(g, s, w, floor=max(1.0, float(w.abs().max()) ** 2))


@needs_interpreter
@pytest.mark.parametrize(("form", "blocks"), [("pairwise", "all"), ("softmax", "cross"), ("softmax", "own")])
def test_triton_ops_pass_opcheck(form: str, blocks: str) -> None:
    leaves = [leaf.detach().float() for leaf in _leaves(5, 3, with_y=True)]
    seen = torch.tensor([True, True, False, True, True])
    sides = (leaves[0], None if blocks == "own" else leaves[1])
    arguments = (*sides, seen, True, False, "triton")
    torch.library.opcheck(torch.ops.allnc.centred_unit.default, arguments)
    u, v, scale = torch.ops.allnc.centred_unit(*arguments)
    v = None if blocks == "own" else v
    arguments = (u, v, u, v, scale, seen, True, False, torch.float32, torch.float32, "triton")
    torch.library.opcheck(torch.ops.allnc.centred_unit_backward.default, arguments)
    rest = (seen, blocks, form, 0.2)
    sides = (u, v)
    torch.library.opcheck(torch.ops.allnc.p2p_blocks.default, (*sides, *rest, True, "triton"))
    values, kept = torch.ops.allnc.p2p_blocks(*sides, *rest, True, "triton")
    arguments = (torch.ones_like(values), kept, *sides, *rest, "triton")
    torch.library.opcheck(torch.ops.allnc.p2p_blocks_backward.default, arguments)


@needs_interpreter
@pytest.mark.parametrize("target", ["etf", "softmax"])
def test_triton_compiles_without_a_break(target) -> None:
    seen = torch.arange(10) != 1
    leaves = [leaf.detach().float().requires_grad_() for leaf in _leaves(10, 16, with_y=True)]

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return p2p(x, y, target=target, seen=seen, backend="triton")

    value, want = torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves), loss(*leaves)
    assert torch.equal(value, want)
    for g, w in zip(_grads(value, leaves), _grads(want, leaves), strict=True):
        assert torch.equal(g, w)


@needs_interpreter
def test_triton_backend_runs_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward two launches for the rows and two for the value, backward one and two."""
    launched = count_launches(monkeypatch)
    leaves = [leaf.detach().float().requires_grad_() for leaf in _leaves(6, 9, with_y=True)]
    value = p2p(*leaves, backend="triton")
    forward = ["unit_sums_kernel", "unit_rows_kernel", "p2p_fwd_kernel", "p2p_finish_kernel"]
    assert launched == forward
    _grads(value, leaves)
    assert launched[len(forward) :] == ["p2p_bwd_kernel", "unit_bwd_sums_kernel", "unit_bwd_rows_kernel"]


X = torch.zeros(4, 3)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((X.int(),), {}, "x must be float16"),
        (([1.0],), {}, "x must be a torch.Tensor"),
        ((X[0],), {}, r"x must have shape \[C, F\]; got \[3\]"),
        ((X[:0],), {}, "x must have at least one row"),
        ((X, X[:, :2]), {}, r"y must have shape \[4, 3\]; got \[4, 2\]"),
        ((X,), {"seen": torch.ones(3, dtype=torch.bool)}, r"seen must have shape \[4\]"),
        ((X,), {"seen": torch.ones(4)}, "seen must be a bool tensor"),
        ((X,), {"target": "simplex"}, "target must be one of 'auto', 'etf', 'softmax'; got 'simplex'"),
        ((X,), {"temperature": 0.0}, "temperature must be > 0; got 0.0"),
        ((X,), {"temperature": torch.tensor(0.1)}, "temperature must be a float"),
        ((X,), {"centre": None}, "centre must be True, False or two of them, .* got None"),
        ((X, X), {"centre": ("no", "no")}, r"centre must be True, False or two of them, .* got \('no', 'no'\)"),
        ((X,), {"backend": "cuda"}, "p2p has no backend 'cuda'"),
        ((X, X.double()), {"backend": "triton"}, "p2p: backend 'triton' does not take float64"),
        ((X, X.to("meta")), {}, "all tensors must be on one device"),
    ],
)
def test_errors_say_what_to_do(arguments: tuple, options: dict, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        public_p2p(*arguments, **options)
