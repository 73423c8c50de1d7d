"""Measures by shot group: a hand-computed case, subsets, minority collapse, blocks."""

from __future__ import annotations

import math
from itertools import combinations_with_replacement

import pytest
import torch

from allnc.metrics import Moments, by_shot, collapse, measures, pairwise_angles, shot_groups
from tests.metrics.test_collapse import _clouds
from tests.ops.test_p2p import simplex

COUNTS = [10, 300, 5, 200, 50, 4]  # classes of a group are not side by side
FEW = [0, 2, 5]


def mean_angles(angles: torch.Tensor) -> dict[str, float | None]:
    """Mean angle between the classes of each pair of shot groups, pair by pair."""
    groups = {name: mask.nonzero().flatten().tolist() for name, mask in shot_groups(COUNTS).items()}
    blocks: dict[str, float | None] = {}
    for (first, rows), (second, columns) in combinations_with_replacement(groups.items(), 2):
        values = [float(angles[c, d]) for c in rows for d in columns if c != d and not bool(angles[c, d].isnan())]
        blocks[f"{first}-{second}"] = sum(values) / len(values) if values else None
    return blocks


def test_by_hand() -> None:
    """One many-shot class at (2, 0), two few-shot ones at (-1, 1) and (-1, -1), with variances 1, 2 and 4."""
    moments = Moments(
        counts=torch.tensor([4.0, 2.0, 1.0]),
        means=torch.tensor([[2.0, 0.0], [-1.0, 1.0], [-1.0, -1.0]]).double() + 5,
        traces=torch.tensor([4.0, 4.0, 4.0]),
    )
    weight = torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, 2.0]])
    found = by_shot(moments, [200, 5, 3], weight=weight)
    assert found["many"] == {
        "classes": 1,
        "norm_means": pytest.approx(2),
        "norm_std_means": 0,
        "norm_weights": 3,
        "norm_std_weights": 0,
        "nc3_cosine": pytest.approx(0),
    }
    assert found["few"]["norm_means"] == pytest.approx(math.sqrt(2))
    assert (found["few"]["norm_weights"], found["few"]["norm_std_weights"]) == (1.5, 0.5)
    assert found["few"]["nc3_cosine"] == pytest.approx(1 - (1 - 1) / 2)  # cosines 1/sqrt 2 and -1/sqrt 2
    assert set(found["medium"].values()) == {0, None} and set(found["medium-few"].values()) == {0, None}
    assert found["many-many"]["pairs"] == 0 and found["many-many"]["angle_means"] is None
    # The two few-shot classes: variance 3 on average, their own between-class trace 1; apart by 2.
    few = found["few-few"]
    assert (few["pairs"], few["trace_ratio"], few["cdnv"]) == (1, pytest.approx(3), pytest.approx(6 / (2 * 4)))
    assert (few["cosine_means"], few["angle_means"]) == (pytest.approx(0, abs=1e-12), pytest.approx(90))
    assert (few["cosine_weights"], few["angle_weights"]) == (1, 0)  # minority collapse
    # Both are at distance sqrt 10 of the many-shot class.
    across = found["many-few"]
    assert across["pairs"] == 2 and across["cosine_means"] == pytest.approx(-math.sqrt(0.5))
    assert across["angle_means"] == pytest.approx(135) and across["angle_weights"] == pytest.approx(90)
    assert across["cdnv"] == pytest.approx((3 / 20 + 5 / 20) / 2)
    assert across["trace_ratio"] == pytest.approx(((1 + 2) / 2 + (1 + 4) / 2) / 2 / 5)


def _moments(features, labels, num_classes: int) -> Moments:
    means = torch.stack([features[labels == c].mean(0) for c in range(num_classes)])
    traces = [(features[labels == c] - means[c]).square().sum() for c in range(num_classes)]
    return Moments(torch.bincount(labels).double(), means, torch.stack(traces))


def test_a_group_is_measured_as_if_alone_and_blocks_as_angles() -> None:
    features, labels, weight = _clouds(6)
    moments = _moments(features, labels, 6)
    found = by_shot(moments, COUNTS, weight=weight)
    rank = torch.full((6,), -1)
    rank[FEW] = torch.arange(3)
    own = rank[labels] >= 0
    alone = collapse(features[own], rank[labels[own]], weight[FEW])
    assert found["few-few"]["trace_ratio"] == pytest.approx(alone["trace_ratio"])
    assert found["few-few"]["cdnv"] == pytest.approx(alone["cdnv"])
    assert found["few-few"]["cosine_weights"] == pytest.approx(alone["cosine_mean_weights"])
    for of, rows, centre in (("means", moments.means, True), ("weights", weight, False)):
        for name, angle in mean_angles(pairwise_angles(rows, centre=centre)).items():
            assert found[name][f"angle_{of}"] == (None if angle is None else pytest.approx(angle)), name
    whole = collapse(features, labels, weight)
    pairs = [name for name in found if "-" in name and found[name]["pairs"]]
    for ours, theirs in (("cdnv", "cdnv"), ("cosine_means", "cosine_mean_means")):
        total = sum(found[name][ours] * found[name]["pairs"] for name in pairs)  # type: ignore[operator]
        assert total / 15 == pytest.approx(whole[theirs])
    assert sum(found[name]["pairs"] for name in pairs) == 15  # type: ignore[misc]


def test_absent_classes_and_vectors_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels, weight = _clouds(6)
    moments = _moments(features, labels, 6)
    without = by_shot(Moments(*(t[:5] for t in moments)), COUNTS[:5], weight=weight[:5])
    counts = moments.counts.clone()
    counts[5] = 0
    monkeypatch.setattr(measures, "_BLOCK_ENTRIES", 11)  # blocks of two rows
    got = by_shot(moments._replace(counts=counts), COUNTS, weight=weight)
    for name, block in without.items():
        assert got[name] == pytest.approx(block), name
    weight[0] = 0
    zero = by_shot(moments, COUNTS, weight=weight)["few-few"]
    cosine = torch.nn.functional.cosine_similarity(weight[2], weight[5], dim=0)
    assert zero["cosine_weights"] == pytest.approx(float(cosine)) and zero["pairs"] == 3


def test_ideal_simplex_has_the_ideal_angle_in_every_block() -> None:
    etf = simplex(6, 8)
    moments = Moments(torch.ones(6), 3 * etf + 100, torch.zeros(6))
    for name, block in by_shot(moments, COUNTS, weight=etf).items():
        if "-" in name and block["pairs"]:
            for of in ("means", "weights"):
                assert block[f"angle_{of}"] == pytest.approx(math.degrees(math.acos(-1 / 5)), abs=1e-6)
            assert block["cdnv"] == block["trace_ratio"] == 0


def test_errors_say_what_to_do() -> None:
    moments = Moments(torch.ones(3), torch.randn(3, 2), torch.ones(3))
    with pytest.raises(ValueError, match=r"moments.means must have shape \[2, F\]"):
        by_shot(moments, [5, 3])
    with pytest.raises(ValueError, match="at least two classes"):
        by_shot(moments._replace(counts=torch.tensor([1.0, 0.0, 0.0])), [5, 3, 2])
    with pytest.raises(ValueError, match="center must be one of"):
        by_shot(moments, [5, 3, 2], center="mean")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="weight must have shape"):
        by_shot(moments, [5, 3, 2], weight=torch.ones(3, 3))
