"""CIFAR ResNets: published sizes, shapes, shortcuts."""

from __future__ import annotations

import pytest
import torch

from allnc.models import CifarResNet
from allnc.models.resnet_cifar import PadShortcut


@pytest.mark.parametrize(("depth", "parameters"), [(20, 269_722), (32, 464_154), (44, 658_586), (56, 853_018)])
def test_parameters_are_the_published_ones(depth: int, parameters: int) -> None:
    classifier = 64 * 10 + 10
    assert sum(p.numel() for p in CifarResNet(depth).parameters()) + classifier == parameters


@pytest.mark.parametrize("shortcut", ["A", "B"])
@pytest.mark.parametrize(("channels", "size", "width"), [(1, 28, 4), (3, 32, 8), (1, 8, 4), (2, 33, 4)])
def test_any_channels_and_size(shortcut: str, channels: int, size: int, width: int) -> None:
    model = CifarResNet(8, width=width, in_channels=channels, shortcut="A" if shortcut == "A" else "B")
    features = model(torch.randn(2, channels, size, size))
    assert features.shape == (2, 4 * width) == (2, model.num_features)
    assert (features >= 0).all()


def test_shortcut_a_takes_every_second_pixel_between_zero_channels() -> None:
    x = torch.arange(1.0, 33.0).view(1, 2, 4, 4)
    y = PadShortcut(2, 4, stride=2)(x)
    assert torch.equal(y[0, 1], torch.tensor([[1.0, 3.0], [9.0, 11.0]]))
    assert torch.equal(y[0, 2], torch.tensor([[17.0, 19.0], [25.0, 27.0]]))
    assert not y[0, 0].any() and not y[0, 3].any()


@pytest.mark.parametrize("depth", [2, 18, 21])
def test_depths_that_do_not_exist(depth: int) -> None:
    with pytest.raises(ValueError, match=f"depth must be 6n \\+ 2 .*; got {depth}"):
        CifarResNet(depth)


@pytest.mark.parametrize("dim", [2, 100])
def test_a_linear_layer_gives_any_number_of_features(dim: int) -> None:
    model = CifarResNet(8, width=4, in_channels=1, feature_dim=dim)
    features = model(torch.randn(6, 1, 8, 8))
    assert features.shape == (6, dim) == (6, model.num_features)
    assert (features < 0).any()
