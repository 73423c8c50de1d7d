"""Collapse measures: a collapsed network, hand-computed clouds, offsets, merging, and minority collapse."""

from __future__ import annotations

import doctest
import importlib
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from allnc.metrics import CollapseAccumulator, collapse, ideal_angle, measures, pairwise_angles
from tests.ops.test_p2p import simplex


def _clouds(num_classes: int = 5, dim: int = 7, rows: int = 300, dtype: torch.dtype = torch.float64):
    """Features of unequal class sizes around random means, labels, a classifier."""
    labels = torch.multinomial(0.5 ** torch.arange(num_classes).double(), rows, replacement=True)
    labels[:num_classes] = torch.arange(num_classes)
    means = 2 * torch.randn(num_classes, dim, dtype=torch.float64)
    features = means[labels] + torch.randn(rows, dim, dtype=torch.float64)
    return features.to(dtype), labels, torch.randn(num_classes, dim, dtype=torch.float64)


def _by_definition(features: Tensor, labels: Tensor, center: str, within: str) -> tuple[float, float, float]:
    """NC1 with an explicit pseudo-inverse, trace ratio and CDNV, loop by loop."""
    classes = labels.unique().tolist()
    rows = [features[labels == c] for c in classes]
    means = torch.stack([r.mean(0) for r in rows])
    scatters = [(r - r.mean(0)).T @ (r - r.mean(0)) for r in rows]
    if within == "classes":
        sigma_w = torch.stack([s / len(r) for s, r in zip(scatters, rows, strict=True)]).mean(0)
    else:
        sigma_w = torch.stack(scatters).sum(0) / len(features)
    M = means - (means.mean(0) if center == "class" else features.mean(0))
    sigma_b = M.T @ M / len(classes)
    nc1 = torch.trace(sigma_w @ torch.linalg.pinv(sigma_b, rtol=1e-10)) / len(classes)
    variance = [torch.trace(s) / len(r) for s, r in zip(scatters, rows, strict=True)]
    pairs = [(i, j) for i in range(len(classes)) for j in range(len(classes)) if i != j]
    cdnv = sum((variance[i] + variance[j]) / (2 * (means[i] - means[j]).square().sum()) for i, j in pairs)
    return float(nc1), float(torch.trace(sigma_w) / torch.trace(sigma_b)), float(cdnv) / len(pairs)


@pytest.mark.parametrize("module", ["accumulate", "angles"])
def test_docstring_examples(module: str) -> None:
    results = doctest.testmod(importlib.import_module(f"allnc.metrics.{module}"))
    assert results.attempted > 0 and results.failed == 0


@pytest.mark.parametrize("center", ["class", "samples"])
@pytest.mark.parametrize("within", ["classes", "pooled"])
def test_spread_against_its_definition(center, within) -> None:
    features, labels, weight = _clouds()
    measures = collapse(features, labels, weight, center=center, within=within)
    nc1, trace_ratio, cdnv = _by_definition(features, labels, center, within)
    assert math.isclose(measures["nc1"], nc1, rel_tol=1e-9)
    assert math.isclose(measures["trace_ratio"], trace_ratio, rel_tol=1e-12)
    assert math.isclose(measures["cdnv"], cdnv, rel_tol=1e-12)


def test_nearest_class_mean_against_its_definition() -> None:
    """Distances, not products: the class means have very different lengths."""
    features, labels, weight = _clouds()
    features = features * (1 + labels[:, None])
    bias = torch.randn(5, dtype=torch.float64)
    means = [features[labels == c].mean(0) for c in range(5)]
    nearest = torch.stack([(features - mean).square().sum(1) for mean in means]).argmin(0)
    disagreeing = ((features @ weight.T + bias).argmax(1) != nearest).double().mean()
    measured = collapse(features, labels, weight, bias)["nc4"]
    assert 0 < measured < 1 and math.isclose(measured, float(disagreeing))
    logits = torch.nn.functional.one_hot(nearest, 5).double()
    assert collapse(features, labels, weight, logits=logits)["nc4"] == 0


def test_conventions_differ() -> None:
    """With unequal classes the four conventions are four numbers: none may be an alias of another."""
    features, labels, weight = _clouds()
    centers, withins = ("class", "samples"), ("classes", "pooled")
    values = {
        collapse(features, labels, weight, center=c, within=w)["nc1"]  # pyright: ignore[reportArgumentType]
        for c in centers
        for w in withins
    }
    assert len(values) == 4


def test_hand_computed_unequal_classes() -> None:
    """Class 0: 0, 2; class 1: 9, 9, 9, 9. Means 1 and 9; global mean 5 (of classes) or 38/6 (of samples)."""
    features = torch.tensor([[0.0], [2.0], [9.0], [9.0], [9.0], [9.0]])
    labels = torch.tensor([0, 0, 1, 1, 1, 1])
    weight = torch.tensor([[-1.0], [2.0]])
    measures = collapse(features, labels, weight, bias=torch.tensor([0.0, -4.5]))
    # Σ_W = (1 + 0)/2, Σ_B = 16: NC1 = 0.5/16/2.
    assert math.isclose(measures["nc1"], 0.5 / 16 / 2)
    assert math.isclose(measures["trace_ratio"], 0.5 / 16)
    assert math.isclose(measures["cdnv"], (1 + 0) / (2 * 64))
    assert math.isclose(measures["equinorm_weights"], 0.5 / 1.5)
    assert math.isclose(measures["cosine_mean_means"], -1) and measures["nc2_means"] < 1e-12
    # W/‖W‖ = (-1, 2)/√5, M/‖M‖ = (-1, 1)/√2.
    want = math.hypot(1 / math.sqrt(2) - 1 / math.sqrt(5), 2 / math.sqrt(5) - 1 / math.sqrt(2))
    assert math.isclose(measures["nc3"], want)
    # Logits (-f, 2f - 4.5): at 2 the prediction is class 0 (-2 > -0.5 is false: class 1), the nearest mean 0.
    assert math.isclose(measures["nc4"], 1 / 6)

    samples = collapse(features, labels, weight, center="samples", within="pooled")
    # Σ_W = 2/6; m = 1 - 38/6 and 9 - 38/6 = -16/3 and 8/3: Σ_B = (256/9 + 64/9)/2 = 160/9.
    assert math.isclose(samples["trace_ratio"], (2 / 6) / (160 / 9))
    assert math.isclose(samples["nc1"], (2 / 6) / (160 / 9) / 2)


@pytest.mark.parametrize("dim", [4, 9])
def test_collapsed_network_measures_zero(dim: int) -> None:
    etf = simplex(5, dim)
    labels = torch.arange(5).repeat(3)
    measures = collapse(3 * etf[labels] + 30, labels, 0.2 * etf)
    zero = ["nc1", "trace_ratio", "cdnv", "nc2_means", "nc2_weights", "nc3", "nc3_product", "nc3_cosine"]
    zero += [f"{name}_{of}" for name in ("equinorm", "cosine_std", "equiangular") for of in ("means", "weights")]
    assert all(abs(measures[name]) < 1e-7 for name in zero), measures
    assert math.isclose(measures["cosine_mean_means"], -1 / 4, rel_tol=1e-9)
    biased = collapse(3 * etf[labels] + 30, labels, 0.2 * etf, logits=etf[labels] @ etf.T)
    assert biased["nc4"] == 0
    assert collapse(etf[labels], labels, etf.roll(1, 0))["nc4"] == 1


def test_an_offset_changes_nothing() -> None:
    """float32 features with an offset of 30; sums of squares in one float32 pass would be far off."""
    features, labels, weight = _clouds(rows=4000, dtype=torch.float32)
    features = features * 0.02
    shifted = features + 30
    plain = collapse(shifted.double() - 30, labels, weight, logits=features @ weight.T.float())
    moved = collapse(shifted, labels, weight, logits=features @ weight.T.float())
    for name, value in plain.items():
        assert math.isclose(moved[name], value, rel_tol=1e-9, abs_tol=1e-12), name
    accumulator = CollapseAccumulator(5, 7)
    for rows in range(0, 4000, 128):
        accumulator.update(shifted[rows : rows + 128], labels[rows : rows + 128])
    streamed = accumulator.compute(weight)
    assert math.isclose(streamed["nc1"], plain["nc1"], rel_tol=1e-9)
    own = shifted[labels == 0]
    raw = float((own.square().sum(0) / len(own) - own.mean(0).square()).sum())
    exact = float((own.double() - own.double().mean(0)).square().sum() / len(own))
    assert abs(raw / exact - 1) > 0.01  # why it is not done so


@pytest.mark.parametrize("within", ["classes", "pooled"])
@pytest.mark.parametrize("announced", [False, True])
def test_batches_and_ranks_equal_the_whole(within, announced: bool) -> None:
    features, labels, weight = _clouds()
    order = labels.argsort()  # batches that miss classes, and classes that arrive late
    features, labels = features[order], labels[order]
    logits = features @ weight.T
    counts = torch.bincount(labels, minlength=5) if announced else None
    ranks = [CollapseAccumulator(5, 7, class_counts=counts, within=within) for _ in range(3)]
    for index, rows in enumerate(torch.arange(len(labels)).split(23)):
        ranks[index % 3].update(features[rows], labels[rows], logits[rows])
    ranks[0].merge(ranks[1])
    ranks[0].merge(ranks[2])
    whole = collapse(features, labels, weight, within=within)
    merged = ranks[0].compute(weight)
    assert merged.keys() == whole.keys()
    for name, value in whole.items():
        assert math.isclose(merged[name], value, rel_tol=1e-9, abs_tol=1e-12), name


def test_state_travels_as_tensors() -> None:
    """What ranks would gather: merge the states, take the second pass, add up "nearest"."""
    features, labels, weight = _clouds()
    halves = [CollapseAccumulator(5, 7) for _ in range(2)]
    halves[0].update(features[:100], labels[:100])
    halves[1].update(features[100:], labels[100:])
    total = CollapseAccumulator(5, 7)
    for half in halves:
        total.merge_state(half.state())
    predictions = (features @ weight.T).argmax(1)
    assert "nc4" not in total.compute(weight)
    total.count_disagreement(features[:100], predictions[:100])
    total.count_disagreement(features[100:], predictions[100:])
    saved = CollapseAccumulator(5, 7)
    saved.merge_state(total.state())
    assert saved.compute(weight) == total.compute(weight)
    whole = collapse(features, labels, weight)
    assert all(math.isclose(v, whole[k], rel_tol=1e-9, abs_tol=1e-12) for k, v in total.compute(weight).items())
    assert whole["nc4"] > 0


def test_minority_collapse() -> None:
    """Two rare classes' means move together at constant noise: NC1 explodes, the trace ratio hardly moves."""
    etf = torch.eye(10, dtype=torch.float64)[:, :]
    labels = torch.arange(10).repeat_interleave(200)
    noise = 0.05 * torch.randn(2000, 10, dtype=torch.float64)
    values = []
    for apart in (1.0, 0.02):
        means = etf.clone()
        middle = means[8:].mean(0)
        means[8:] = middle + apart * (means[8:] - middle)
        values.append(collapse(means[labels] + noise, labels, etf))
    assert values[1]["nc1"] > 50 * values[0]["nc1"]
    assert 0.8 < values[1]["trace_ratio"] / values[0]["trace_ratio"] < 1.3
    assert values[1]["nc2_means"] > 3 * values[0]["nc2_means"]


def test_absent_classes_are_left_out() -> None:
    features, labels, weight = _clouds()
    wide = torch.cat((weight[:2], torch.zeros(2, 7), weight[2:]))
    moved = torch.where(labels < 2, labels, labels + 2)  # classes 2 and 3 have no sample
    bias = torch.tensor([0.0, 0, -1e9, -1e9, 0, 0, 0])
    measures, want = collapse(features, moved, wide, bias), collapse(features, labels, weight)
    assert measures["classes"] == 5
    assert all(math.isclose(measures[k], v, rel_tol=1e-9, abs_tol=1e-12) for k, v in want.items())
    with pytest.raises(ValueError, match="at least two classes to measure collapse; got 1"):
        collapse(features[labels == 0], labels[labels == 0], weight)


def test_coinciding_means_are_infinite_not_nan() -> None:
    labels = torch.tensor([0, 0, 1, 1])
    measures = collapse(torch.tensor([[1.0], [-1.0], [1.0], [-1.0]]), labels, torch.tensor([[1.0], [-1.0]]))
    assert measures["nc1"] == measures["trace_ratio"] == measures["cdnv"] == math.inf
    assert not any(math.isnan(v) for v in measures.values())


def test_more_classes_than_room() -> None:
    """Four vectors in a plane: a square is a tight frame, cosines 0, 0, -1; floor sqrt(2/(2·3))."""
    square = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    labels = torch.arange(4)
    measures = collapse(square, labels, square)
    assert math.isclose(measures["tight_frame_floor"], math.sqrt(1 / 3))
    assert math.isclose(measures["cosine_rms_means"], math.sqrt(1 / 3))
    assert measures["cosine_max_means"] == 0
    assert math.isclose(measures["energy_means"], (4 / math.sqrt(2) + 2 / 2) / 6)
    assert "tight_frame_floor" not in collapse(square[:3], labels[:3], square[:3])


def test_angles() -> None:
    vectors = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0], [0.0, 0.0]])
    angles = pairwise_angles(vectors, centre=False)
    assert torch.allclose(angles[:3, :3], torch.tensor([[0.0, 90, 180], [90, 0, 90], [180, 90, 0]]).double())
    assert bool(angles[3].isnan().all() and angles[:, 3].isnan().all())
    etf = pairwise_angles(4 * simplex(10, 12) + 30, centre=True)
    off = ~torch.eye(10, dtype=torch.bool)
    assert torch.allclose(etf[off], torch.tensor(ideal_angle(10), dtype=torch.float64))


FEATURES, LABELS, WEIGHT = torch.randn(6, 3), torch.arange(6) % 2, torch.randn(2, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: collapse(FEATURES, LABELS + 1, WEIGHT), r"labels must be in \[0, 2\); got 2"),
        (lambda: collapse(FEATURES, LABELS, WEIGHT[:, :2]), r"weight must have shape \[C, 3\]; got \[2, 2\]"),
        (
            lambda: collapse(FEATURES, LABELS, WEIGHT, bias=torch.zeros(3)),
            r"bias must have shape \[2\]; got \[3\]",
        ),
        (lambda: collapse(FEATURES, LABELS, WEIGHT, logits=FEATURES), r"logits must have shape \[6, 2\]"),
        (lambda: collapse(FEATURES, LABELS, WEIGHT, center="mean"), "center must be one of"),  # pyright: ignore
        (lambda: collapse(FEATURES, LABELS, WEIGHT, within="all"), "within must be one of"),  # pyright: ignore
        (lambda: collapse(FEATURES.int(), LABELS, WEIGHT), "features must be float16"),
        (lambda: CollapseAccumulator(1, 4), "num_classes must be >= 2; got 1"),
        (
            lambda: CollapseAccumulator(8142, 2048),
            "class_counts must be given for 8142 classes of 2048 features",
        ),
        (
            lambda: CollapseAccumulator(2, 3).compute(WEIGHT),
            "at least two classes to measure collapse; got 0",
        ),
        (lambda: _announced_wrongly(), "got 4 announced and 3 seen of class 0"),
        (lambda: CollapseAccumulator(2, 3).merge(CollapseAccumulator(2, 4)), "must have shape"),
        (lambda: pairwise_angles(LABELS, centre=True), "vectors must be float16"),
        (lambda: ideal_angle(1), "num_classes must be >= 2; got 1"),
    ],
)
def test_errors_say_what_to_do(call, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def _announced_wrongly() -> None:
    accumulator = CollapseAccumulator(2, 3, class_counts=[4, 3])
    accumulator.update(FEATURES, LABELS)
    accumulator.compute(WEIGHT)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e61])
@pytest.mark.parametrize("name", ["features", "weight", "bias", "logits"])
def test_what_cannot_be_measured_is_named(name: str, value: float) -> None:
    features, labels, weight = _clouds()
    floats = {"features": features, "weight": weight, "bias": torch.randn(5), "logits": torch.randn(300, 5)}
    dtype = torch.float64 if math.isfinite(value) else torch.float32
    arguments: dict[str, Any] = {key: x.to(dtype) for key, x in floats.items()}
    arguments[name][-1] = value
    arguments = {key: x for key, x in arguments.items() if key == name or key in ("features", "weight")}
    if name == "logits" and not math.isnan(value):
        assert 0 <= collapse(labels=labels, **arguments)["nc4"] <= 1  # -inf rules a class out
        return
    wanted = "must not be NaN" if name == "logits" else "must be finite, at most 1e\\+60 in size; got"
    with pytest.raises(ValueError, match=f"{name} {wanted}"):
        collapse(labels=labels, **arguments)


def test_a_batch_that_is_refused_leaves_no_trace() -> None:
    features, labels, weight = _clouds()
    good, bad = CollapseAccumulator(5, 7), CollapseAccumulator(5, 7)
    for accumulator in (good, bad):
        accumulator.update(features, labels, features @ weight.T)
    with pytest.raises(ValueError, match="features must be finite"):
        bad.update(features.where(labels[:, None] != 2, math.nan), labels, features @ weight.T)
    with pytest.raises(ValueError, match=r"logits must not be NaN; got 1 of 300 rows"):
        bad.update(features, labels, (features @ weight.T).index_fill(0, torch.tensor([4]), math.nan))
    assert bad.compute(weight) == good.compute(weight)
    with pytest.raises(ValueError, match="weight must be finite"):
        good.compute(weight * math.nan)
    with pytest.raises(ValueError, match=r"state\['means'\] must be finite"):
        good.merge_state({**bad.state(), "means": bad.means * math.nan})
    with pytest.raises(ValueError, match="features must be finite"):
        good.count_disagreement(features * math.inf, labels)
    assert bad.compute(weight) == good.compute(weight)


@pytest.mark.parametrize("length", [1e-50, 1e-20, 1e20, 1e50])
def test_measures_do_not_depend_on_the_unit(length: float) -> None:
    features, labels, weight = _clouds()
    want = collapse(features, labels, weight)
    for got in (collapse(features * length, labels, weight), collapse(features, labels, weight * length)):
        for name in want.keys() - {"nc4"}:
            assert math.isclose(got[name], want[name], rel_tol=1e-9, abs_tol=1e-12), name


@pytest.mark.parametrize("num_classes", [2, 9, 40])
def test_pairs_by_blocks_are_the_same(num_classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With blocks of a row or two, whose sums must be those of one block."""
    features, labels, weight = _clouds(num_classes, dim=7, rows=500)
    features[labels == 1] = features[labels == 0].mean(0) + 1e-5  # a pair of classes nearly at one place
    want = collapse(features, labels, weight)
    monkeypatch.setattr(measures, "_BLOCK_ENTRIES", 2 * num_classes - 1)
    got = collapse(features, labels, weight)
    assert got.keys() == want.keys() and ("energy_means" in got) == (num_classes > 8)
    for name, wanted in want.items():
        near = 1e-4 if name == "energy_means" else 1e-9  # the inverse of a distance that is formed of a cosine near 1
        assert math.isclose(got[name], wanted, rel_tol=near, abs_tol=1e-12), name
    means = torch.stack([features[labels == c].mean(0) for c in range(num_classes)])
    variance = torch.stack([(features[labels == c] - means[c]).square().sum(1).mean() for c in range(num_classes)])
    first, second = torch.triu_indices(num_classes, num_classes, 1)
    cdnv = ((variance[first] + variance[second]) / (2 * torch.pdist(means).square())).mean()
    assert math.isclose(got["cdnv"], float(cdnv), rel_tol=1e-9)


def test_crowding_against_its_definition() -> None:
    features, labels, weight = _clouds(12, dim=4, rows=500)
    got = collapse(features, labels, weight)
    unit = torch.nn.functional.normalize(weight, dim=1)
    first, second = torch.triu_indices(12, 12, 1)
    cosines = (unit @ unit.T)[first, second]
    wanted = {
        "cosine_mean": cosines.mean(),
        "cosine_std": cosines.std(correction=0),
        "equiangular": (cosines + 1 / 11).abs().mean(),
        "cosine_max": cosines.max(),
        "cosine_rms": cosines.square().mean().sqrt(),
        "energy": torch.pdist(unit).reciprocal().mean(),
    }
    for name, value in wanted.items():
        assert math.isclose(got[f"{name}_weights"], float(value), rel_tol=1e-12), name
    gram = weight @ weight.T
    etf = (torch.eye(12, dtype=torch.float64) - 1 / 12) / math.sqrt(11)
    assert math.isclose(got["nc2_weights"], float((gram / gram.norm() - etf).norm()), rel_tol=1e-12)


@pytest.mark.parametrize("centre", [True, False])
def test_angles_of_vectors_of_any_length(centre: bool) -> None:
    vectors = torch.randn(6, 5, dtype=torch.float64)
    want = pairwise_angles(vectors, centre=centre)
    for length in (1e-200, 1e200, 1e307):
        assert torch.allclose(pairwise_angles(vectors * length, centre=centre), want, rtol=1e-12)
    assert pairwise_angles(vectors[:1].repeat(3, 1), centre=True).isnan().all()  # at the centre: no direction
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match="vectors must be finite"):
            pairwise_angles(vectors.index_fill(0, torch.tensor([2]), value), centre=centre)
