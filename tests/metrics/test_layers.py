"""Collapse of layers: against `collapse` on the same features, what hooks leave behind, errors."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from allnc.metrics import CollapseAccumulator, by_shot, collapse, collapse_of, layers, nc5


class Small(nn.Module):
    """Convolution, in-place ReLU, pooling, dropout, classifier; a module that runs twice and one that never does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3)
        self.bn = nn.BatchNorm2d(6)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.drop = nn.Dropout(0.5)
        self.twice = nn.Identity()
        self.never = nn.Linear(2, 2)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn(self.conv(self.twice(self.twice(x)))))
        return self.fc(self.drop(self.pool(x).flatten(1)))


def batches(rows: int = 90, size: int = 32) -> list[tuple[Tensor, Tensor]]:
    labels = torch.arange(rows) % 7 % 4
    images = torch.randn(rows, 2, 5, 5) + labels[:, None, None, None]
    return list(zip(images.split(size), labels.split(size), strict=True))


def same(got: dict[str, float], wanted: dict[str, float], rel: float = 1e-9) -> None:
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert math.isclose(got[name], value, rel_tol=rel, abs_tol=1e-10), name


def test_layers_are_measured_as_their_features() -> None:
    model, data = Small().eval(), batches()
    model.bn.running_mean, model.bn.running_var = torch.randn(6), torch.rand(6) + 0.5
    found = collapse_of(model, data, layers=["pool", "conv", "bn", "drop"], num_classes=4, classifier="fc")
    assert list(found) == ["conv", "bn", "pool", "drop"]  # as they run
    images, labels = (torch.cat(parts) for parts in zip(*data, strict=True))
    with torch.no_grad():
        conv = model.conv(images)
        bn = model.bn(conv.clone())
        pool = bn.relu().mean((2, 3))
        logits = model.fc(pool)
    for name in ("pool", "drop"):
        wanted = collapse(pool, labels, model.fc.weight, logits=logits, spectral=True)
        same(found[name].measures, wanted, rel=1e-5)  # the mean over positions in float32 or float64
        assert found[name].weight is not None
    for name, output in (("conv", conv), ("bn", bn)):  # the ReLU writes into the latter
        wanted = collapse(output.double().mean((2, 3)), labels, model.fc.weight, logits=logits, spectral=True)
        of_weight = ("weight", "nc3", "mir", "hdr")
        same(found[name].measures, {k: v for k, v in wanted.items() if not any(word in k for word in of_weight)})
        assert found[name].weight is None
        assert "norm_weights" not in by_shot(found[name].moments, [50, 30, 10, 2])["many"]


def test_flattened_positions_and_tokens() -> None:
    model, data = nn.Sequential(nn.Unflatten(1, (3, 4)), nn.Flatten(), nn.Linear(12, 4)), []
    data = [(torch.randn(40, 12), torch.arange(40) % 4)]
    wanted = collapse(data[0][0], data[0][1], torch.ones(4, 12), spectral=True)
    for positions, width in (("mean", 4), ("flatten", 12)):
        layer = collapse_of(
            model,
            data,
            layers=["0"],
            num_classes=4,
            positions=positions,  # pyright: ignore[reportArgumentType]
        )["0"]
        assert layer.moments.means.shape == (4, width)
    assert layer.measures["nc1"] == pytest.approx(wanted["nc1"])
    tokens = collapse(data[0][0].view(40, 3, 4).mean(1), data[0][1], torch.ones(4, 4))
    assert collapse_of(model, data, layers=["0"], num_classes=4)["0"].measures["nc1"] == pytest.approx(tokens["nc1"])


def test_channels_may_come_last() -> None:
    rows, labels = torch.randn(40, 12), torch.arange(40) % 4
    wanted = collapse(rows.view(40, 2, 2, 3).mean((1, 2)), labels, torch.ones(4, 3))
    model = nn.Sequential(nn.Unflatten(1, (2, 2, 3)), nn.Flatten(), nn.Linear(12, 4))
    settings: dict[str, Any] = {"layers": ["0"], "num_classes": 4, "spectral": False}
    last = collapse_of(model, [(rows, labels)], channels_last=True, **settings)["0"]
    assert last.moments.means.shape == (4, 3) and last.measures["nc1"] == pytest.approx(wanted["nc1"])
    assert "vci" not in last.measures
    assert collapse_of(model, [(rows, labels)], **settings)["0"].moments.means.shape == (4, 2)


def test_rows_that_the_next_layer_overwrites() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(inplace=True), nn.Linear(5, 4))
    data = [(torch.randn(40, 3), torch.arange(40) % 4)]
    moments = collapse_of(model, data, layers=["0"], num_classes=4)["0"].moments
    with torch.no_grad():
        wanted = torch.stack([model[0](data[0][0])[data[0][1] == c].mean(0) for c in range(4)])
    assert torch.allclose(moments.means.float(), wanted, atol=1e-6)


def test_all_layers_that_can_be_measured() -> None:
    found = collapse_of(Small(), batches(), layers="all", classifier="fc")
    assert list(found) == ["conv", "bn", "relu", "pool", "drop", "fc"]  # not twice, not never
    assert [name for name, layer in found.items() if "nc3" in layer.measures] == ["relu", "pool", "drop"]
    assert all(0 <= layer.measures["nc4"] <= 1 for layer in found.values())


def test_outputs_of_other_kinds_and_the_class_vectors_that_are_given() -> None:
    class Output(NamedTuple):
        features: Tensor
        logits: Tensor

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Linear(3, 5), nn.Linear(5, 4)

        def forward(self, x: Tensor) -> Output:
            features = self.inner(x)
            return Output(features, self.head(features))

    model, data = Wrapped(), [(torch.randn(40, 3), torch.arange(40) % 4)]
    weight = torch.randn(4, 5)
    arguments: dict[str, Any] = {"layers": ["inner"], "classifier": "head", "weight": weight}
    with pytest.raises(ValueError, match=r"logits must be \[N, C\]; got Output. Give logits="):
        collapse_of(model, data, **arguments)
    found = collapse_of(model, data, logits=lambda output: output.logits, **arguments)["inner"]
    output = model(data[0][0])
    same(found.measures, collapse(output.features, data[0][1], weight, logits=output.logits, spectral=True), rel=1e-6)
    without = collapse_of(model, iter(data), nc4=False, **arguments)["inner"].measures
    assert without.keys() == found.measures.keys() - {"nc4"}


def test_images_of_no_class() -> None:
    model, data = Small().eval(), batches()
    other = torch.randn(20, 2, 5, 5) * 3
    with torch.no_grad():
        outside = model.conv(other).mean((2, 3))
    for ood in ([other[:8], other[8:]], [(other, torch.zeros(20))]):
        layer = collapse_of(model, data, layers=["conv"], num_classes=4, ood=ood)["conv"]
        wanted = nc5(layer.moments.means, outside)
        for name, value in wanted.items():
            assert layer.measures[name] == pytest.approx(value, rel=1e-5)


def _stumble(*_: object) -> None:
    raise RuntimeError("stumbled")


@pytest.mark.parametrize("stumbles", [False, True])
def test_nothing_is_left_behind(stumbles: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Modes of every module, random numbers and hooks, also after an error and with a loader that shuffles."""
    model = Small().train()
    model.bn.eval()  # rests, while the rest trains
    modes = [module.training for module in model.modules()]
    statistics = model.bn.running_mean.clone()  # type: ignore[union-attr]
    images, labels = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), 30, shuffle=True)
    if stumbles:
        monkeypatch.setattr(CollapseAccumulator, "count_disagreement", _stumble)
    before = torch.get_rng_state()
    try:
        collapse_of(model, loader, layers="all", classifier="fc")
        assert not stumbles
    except RuntimeError as error:
        assert stumbles and "stumbled" in str(error)
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(model.bn.running_mean, statistics)  # type: ignore[arg-type]
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
    assert torch.is_grad_enabled()


def test_moments_are_plain_tensors() -> None:
    moments = collapse_of(Small(), batches(), layers=["pool"], num_classes=4)["pool"].moments
    moments.means.add_(1).requires_grad_().sum().backward()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: collapse_of(Small(), batches(), layers=["pol"], num_classes=4), "got 'pol'. Near it: 'pool'"),
        (lambda: collapse_of(nn.Sequential(Small()), [], layers=["fc"], num_classes=4), "got 'fc'. Near it: .*'0.fc'"),
        (lambda: collapse_of(Small(), [], layers=["pool"], classifier="head"), "got 'head'. Near it"),
        (lambda: collapse_of(nn.Linear(2, 2), [], layers=["x"], num_classes=2), "none: the model has no layers"),
        (lambda: collapse_of(Small(), batches(), layers=["twice"], num_classes=4), "'twice' cannot: .* more than once"),
        (lambda: collapse_of(Small(), batches(), layers=["never"], num_classes=4), "'never' cannot: it does not run"),
        (lambda: collapse_of(Small(), batches(), layers=["pool"]), "num_classes must be given"),
        (lambda: collapse_of(Small(), batches(), layers=["pool"], classifier="pool"), "weight must be given: .*'pool'"),
        (lambda: collapse_of(Small(), iter(batches()), layers=["pool"], num_classes=4), "must be iterated twice"),
        (lambda: collapse_of(Small(), [], layers=["pool"], num_classes=4), "at least one batch"),
        (lambda: collapse_of(Small(), batches(), layers=[], num_classes=4), "at least one layer"),
        (
            lambda: collapse_of(Small(), batches(), layers=["pool"], num_classes=4, positions="max"),  # pyright: ignore
            "positions must be one of",
        ),
        (lambda: collapse_of(Small(), batches(), layers=["pool"], num_classes=3), r"labels must be in \[0, 3\); got 3"),
        (lambda: collapse_of(nn.Sequential(Split()), batches(), layers=["0"], num_classes=4), "it returns tuple"),
        (lambda: collapse_of(nn.Sequential(Halve()), batches(), layers=["0"], num_classes=4), "16 rows for 32 images"),
    ],
)
def test_errors_say_what_to_do(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


class Split(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


class Halve(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[::2]


def test_features_that_would_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "_MOST_ENTRIES", 50 * 50)
    with pytest.raises(ValueError, match=r"its 54 features would need a matrix of .* average over positions"):
        collapse_of(Small(), batches(), layers=["conv"], num_classes=4, positions="flatten")


def test_processes_with_shares_have_the_measures_of_all_images() -> None:
    """Three threads as processes, of which one has no images: each has what one process has of all."""
    model, data = Small(), batches()
    counts = torch.cat([labels for _, labels in data]).bincount()
    settings: dict[str, Any] = {"layers": "all", "class_counts": counts, "classifier": "fc"}
    wanted = collapse_of(model, data, **settings)
    shares, barrier = ([data[0]], [], data[1:]), threading.Barrier(3)
    passed: list[Any] = [None] * 3

    def work(rank: int) -> dict[str, Any]:
        def gather(value: Any) -> list[Any]:
            passed[rank] = value
            barrier.wait(60)
            found = list(passed)
            barrier.wait(60)
            return found

        return collapse_of(copy.deepcopy(model), shares[rank], gather=gather, **settings)

    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(work, range(3)))
    for found in results:
        assert list(found) == list(wanted)
        for name, layer in found.items():
            same(layer.measures, wanted[name].measures)
            assert (layer.weight is None) == (wanted[name].weight is None)


def test_processes_must_see_the_same_layers() -> None:
    model, data = Small(), batches()

    def gather(value: Any) -> list[Any]:
        return [value, (set(), ["bn"])]

    with pytest.raises(ValueError, match=r"all processes must see the same layers; got \['bn'\] and \['conv'\]"):
        collapse_of(model, data, layers=["conv"], num_classes=4, gather=gather)
