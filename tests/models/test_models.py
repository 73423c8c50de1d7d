"""Models of a configuration: which heads are built, what comes out, timm encoders."""

from __future__ import annotations

import socket
import time
import urllib.request

import pytest
import torch
from torch.nn import functional as F

from allnc.config import LossConfig, ModelConfig
from allnc.losses.build import LOSSES
from allnc.models import ETFClassifier, LongTailModel, NormalisedClassifier, build_model

SMALL = ModelConfig(name="resnet8", width=4, projection_dim=6)


def build(config: ModelConfig = SMALL, *, head: str | None = None, two_branches: bool = True) -> LongTailModel:
    return build_model(
        config,
        in_channels=1,
        num_classes=5,
        head=head,  # pyright: ignore[reportArgumentType]
        two_branches=two_branches,
    )


@pytest.mark.parametrize(
    ("loss", "z", "h"),
    [
        (LossConfig(hycon="softmax"), True, False),
        (LossConfig(hycon="cosine"), False, True),
        (LossConfig(hycon="none"), False, False),
        (LossConfig(name="ce", hycon="cosine"), False, False),
    ],
)
def test_only_the_heads_that_the_loss_reads_are_built(loss: LossConfig, z: bool, h: bool) -> None:
    model = build(head=LOSSES[loss.name].head(loss))
    assert (model.projection is not None, model.predictor is not None) == (z, h)
    output = model(torch.randn(3, 1, 12, 12))
    assert output.features.shape == (3, 16) and output.logits_rebalance.shape == (3, 5)
    assert (output.z is not None, output.h is not None) == (z, h)
    if output.z is not None:
        assert output.z.shape == (3, 6)
        torch.testing.assert_close(output.z.norm(dim=1), torch.ones(3))
    if output.h is not None:
        assert output.h.shape == (3, 16)


def test_shared_heads_are_one_and_separate_heads_two() -> None:
    images = torch.randn(2, 1, 12, 12)
    shared = build()(images)
    assert shared.logits_uniform is shared.logits_rebalance
    config = ModelConfig(name="resnet8", width=4, heads="separate")
    model = build(config)
    output = model(images)
    assert not torch.equal(output.logits_uniform, output.logits_rebalance)
    expected = F.linear(output.features, model.classifier_weight, model.classifier_bias)
    torch.testing.assert_close(output.logits_rebalance, expected)  # the weight that P2P and the metrics see predicts
    assert build(config, two_branches=False).uniform_classifier is None


def test_normalised_classifier_by_hand() -> None:
    classifier = NormalisedClassifier(2, 2, scale=10)
    with torch.no_grad():
        classifier.weight.copy_(torch.tensor([[2.0, 0.0], [3.0, 3.0]]))
    logits = classifier(torch.tensor([[0.0, 5.0], [1.0, 0.0]]))
    torch.testing.assert_close(logits, torch.tensor([[0.0, 10 / 2**0.5], [10.0, 10 / 2**0.5]]))
    assert build(ModelConfig(name="resnet8", classifier="normalised")).classifier_bias is None


@pytest.mark.parametrize(("features", "classes"), [(2, 3), (16, 5), (64, 10)])
def test_etf_classifier_is_a_simplex_that_does_not_train(features: int, classes: int) -> None:
    classifier = ETFClassifier(features, classes, scale=10.0)
    want = torch.full((classes, classes), -1 / (classes - 1)).fill_diagonal_(1.0)
    torch.testing.assert_close(classifier.weight @ classifier.weight.T, want, atol=1e-6, rtol=0)
    assert not list(classifier.parameters()) and set(classifier.state_dict()) == {"weight"}
    logits = classifier(3 * classifier.weight)  # logits are 10 times the cosine
    torch.testing.assert_close(logits, 10 * want, atol=1e-5, rtol=0)


def test_prototypes_are_the_class_vectors_through_a_projection_of_their_own() -> None:
    model = build(head="prototypes")
    output = model(torch.randn(3, 1, 12, 12))
    assert output.prototypes.shape == (5, 6) and output.z.shape == (3, 6)
    torch.testing.assert_close(output.prototypes.norm(dim=1), torch.ones(5))
    output.prototypes[:, 0].sum().backward()
    reached = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert reached == {"classifier", "prototypes"}


def test_etf_classifier_is_in_the_model_and_needs_its_width() -> None:
    model = build(ModelConfig(name="resnet8", width=1, classifier="etf", classifier_scale=8.0))  # 4 features
    assert model(torch.randn(2, 1, 12, 12)).logits_rebalance.abs().max() <= 8.0
    assert "classifier.weight" in model.state_dict() and model.classifier_bias is None
    with pytest.raises(ValueError, match=r"needs at least C - 1 = 3 features for 4 classes; got 2: take a wider"):
        ETFClassifier(2, 4, scale=1.0)


def test_a_timm_encoder_takes_any_channels() -> None:
    model = build(ModelConfig(name="timm:resnet10t"), head="projection")
    assert model(torch.randn(2, 1, 32, 32)).features.shape == (2, model.feature_dim) == (2, 512)


def test_a_timm_encoder_with_a_wide_layer_before_the_classifier() -> None:
    model = build(ModelConfig(name="timm:mobilenetv3_small_050")).eval()
    assert model(torch.randn(2, 1, 32, 32)).features.shape == (2, model.feature_dim)


def test_a_timm_encoder_of_a_fixed_size_is_built_for_the_images() -> None:
    config = ModelConfig(name="timm:vit_tiny_patch16_224", projection_dim=6)
    model = build_model(config, in_channels=1, num_classes=3, image_size=(32, 48))
    assert model(torch.randn(2, 1, 32, 48)).features.shape == (2, 192)
    assert model.encoder.pos_embed.shape == (1, 1 + 2 * 3, 192)
    own = build_model(config, in_channels=1, num_classes=3, image_size=(224, 224))
    assert own.encoder.pos_embed.shape == (1, 1 + 14 * 14, 192)


def test_a_timm_encoder_that_takes_the_images_is_left_as_it_is() -> None:
    """Checkpoints of runs with another size have the model's own position embeddings."""
    config = ModelConfig(name="timm:test_vit")
    state = build_model(config, in_channels=1, num_classes=3, image_size=(32, 32)).state_dict()
    own = build_model(config, in_channels=1, num_classes=3).state_dict()
    assert {name: value.shape for name, value in state.items()} == {name: value.shape for name, value in own.items()}


def test_weights_without_a_network_are_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*arguments: object, **options: object) -> None:
        raise OSError("Network is unreachable")

    monkeypatch.setattr(socket, "create_connection", unreachable)
    monkeypatch.setattr(urllib.request, "getproxies", dict)
    start = time.perf_counter()
    with pytest.raises(ValueError, match=r"no connection to .* \(Network is unreachable\); name a file of"):
        build(ModelConfig(name="timm:resnet10t", pretrained=True))
    assert time.perf_counter() - start < 5


def test_an_unknown_timm_model() -> None:
    with pytest.raises(ValueError, match=r"model\.name must be a model that timm knows; got 'resnet5000'; near it: "):
        build(ModelConfig(name="timm:resnet5000"))


def test_gradients_reach_every_weight() -> None:
    model = build(ModelConfig(name="resnet8", width=4, heads="separate", projection_dim=6), head="projection")
    output = model(torch.randn(4, 1, 12, 12))
    assert output.z is not None
    (output.logits_uniform.sum() + output.logits_rebalance.square().sum() + output.z[:, 0].sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
