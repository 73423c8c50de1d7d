"""Light tuning: what trains, what stays to the bit, where the encoder starts, and which models cannot."""

from __future__ import annotations

import builtins
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from allnc.config import ModelConfig
from allnc.models import LongTailModel, added_parts_run, build_model, pixel_statistics
from allnc.models.tuning import ParallelAdapter, rank_of, sum_of_tensors

VIT, SIDE = "timm:test_vit", 160  # 64 columns, 6 blocks
CLASSES = 5
MODES = ["full", "head", "norm", "lora", "adapter"]


def build(name: str = VIT, mode: str = "full", *, classes: int = CLASSES, **options: Any) -> LongTailModel:
    torch.manual_seed(1)
    config = ModelConfig(name=name, tune=mode, **options)  # pyright: ignore[reportArgumentType]
    return build_model(config, in_channels=3, num_classes=classes)


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def images(count: int = 4, side: int = SIDE) -> torch.Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0))


def steps(model: LongTailModel, pixels: torch.Tensor, number: int = 2) -> None:
    """Train for some steps; a second one moves what the first has no gradient for, behind a matrix of zeros."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()
    for _ in range(number):
        labels = torch.arange(len(pixels)) % CLASSES
        nn.functional.cross_entropy(model(pixels).logits_rebalance, labels).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    ("mode", "parts", "number"),
    [
        ("head", ["classifier."], 2),
        # Each block's two, and the last one: 13 layers of a scale and a shift.
        ("norm", ["classifier.", "norm1.", "norm2.", "encoder.norm.", "encoder.fc_norm."], 2 + 26),
        ("lora", ["classifier.", ".lora_A.", ".lora_B."], 2 + 6 * 2 * 2),
        ("adapter", ["classifier.", ".mlp.norm.", ".mlp.down.", ".mlp.up.", ".mlp.scale"], 2 + 6 * 7),
    ],
)
def test_what_trains(mode: str, parts: list[str], number: int) -> None:
    names = trained(build(mode=mode))
    assert len(names) == number
    assert all(any(part in name for part in parts) for name in names)


def test_by_default_all_of_it_trains() -> None:
    model = build()
    assert trained(model) == {name for name, _ in model.named_parameters()} and model.frozen_names() == []


@pytest.mark.parametrize("mode", MODES)
def test_the_start_is_the_pretrained_function(mode: str) -> None:
    whole, tuned = build().eval(), build(mode=mode).eval()
    with torch.inference_mode():
        assert torch.equal(tuned(images()).features, whole(images()).features)


@pytest.mark.parametrize("mode", ["head", "norm", "lora", "adapter"])
def test_steps_move_all_that_trains_and_nothing_else(mode: str) -> None:
    model = build(mode=mode)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    total = model.frozen_sum()
    steps(model, images(), number=3)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == trained(model) and not moved & {*model.frozen_names()}
    assert {*before} == moved | {*model.frozen_names()}
    assert model.frozen_sum() == total


@pytest.mark.parametrize(("mode", "moves"), [("head", False), ("norm", True), ("full", True)])
def test_statistics_of_a_frozen_batch_norm_stay(mode: str, moves: bool) -> None:
    model = build("timm:resnet10t", mode)
    before = {name: value.clone() for name, value in model.encoder.named_buffers()}
    frozen = model.frozen_sum() if mode != "full" else ""
    steps(model, images(side=32), number=1)
    after = dict(model.encoder.named_buffers())
    assert all(torch.equal(after[name], value) != moves for name, value in before.items())
    kernels = [name for name in model.frozen_names() if name.endswith("conv1.weight")]
    assert bool(kernels) == (mode != "full") and bool(set(model.frozen_names()) & {f"encoder.{n}" for n in before}) == (
        mode == "head"
    )
    assert mode == "full" or model.frozen_sum() == frozen


def test_a_batch_norm_beside_adapters_stays() -> None:
    """A model with both: MaxViT has BatchNorm in its convolutions and attention of linear layers."""
    model = build("timm:maxvit_rmlp_pico_rw_256", "adapter").train()
    norms = [m for m in model.encoder.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
    assert norms and not any(module.training for module in norms)
    assert {name.rpartition(".")[2] for name in model.frozen_names()} >= {"running_mean", "running_var"}
    adapters = {name: m for name, m in model.encoder.named_modules() if isinstance(m, ParallelAdapter)}
    assert adapters and all(module.training for module in adapters.values())
    # The `mlp` of its relative positions leads from two coordinates to a number for each head: no place for one.
    assert not any("rel_pos" in name for name in adapters)


def test_with_the_head_alone_the_encoder_has_no_graph() -> None:
    model = build(mode="head").train()
    output = model(images())
    assert not output.features.requires_grad and output.logits_rebalance.requires_grad
    assert not model.encoder.training and model.classifier.training


def test_no_graph_reaches_below_the_first_part_that_trains() -> None:
    model = build(mode="adapter").train()
    seen: list[bool] = []
    model.encoder.blocks[0].attn.register_forward_hook(lambda *arguments: seen.append(arguments[2].requires_grad))  # pyright: ignore
    model.encoder.blocks[1].attn.register_forward_hook(lambda *arguments: seen.append(arguments[2].requires_grad))  # pyright: ignore
    model(images())
    assert seen == [False, True]


@pytest.mark.parametrize(
    ("classes", "blocks", "rank"), [(1000, 12, 32), (8142, 12, 256), (365, 12, 8), (5, 6, 1), (24, 12, 1), (48, 12, 2)]
)
def test_the_rank_is_that_of_lift(classes: int, blocks: int, rank: int) -> None:
    assert rank_of(ModelConfig(), classes, blocks) == rank
    assert rank_of(ModelConfig(tune_rank=3), classes, blocks) == 3


def test_the_rank_is_that_of_what_is_added() -> None:
    shapes = {name: p.shape for name, p in build(mode="adapter", tune_rank=3).named_parameters()}
    assert shapes["encoder.blocks.0.mlp.down.weight"] == (3, 64)
    lora = build(mode="lora", classes=200).encoder.get_submodule("blocks.0.attn.qkv")
    assert lora.lora_A["default"].weight.shape == (16, 64)  # 200 / 12 = 16.7  # pyright: ignore
    assert lora.scaling["default"] == 1.0  # pyright: ignore


def test_an_adapter_by_hand() -> None:
    adapter = ParallelAdapter(nn.Identity(), 2, 1)
    with torch.no_grad():
        adapter.down.weight.copy_(torch.tensor([[1.0, -1.0]]))
        adapter.up.weight.copy_(torch.tensor([[1.0], [10.0]]))
        adapter.scale.fill_(0.5)
        # Normalised, (3, 1) is (1, -1) but for epsilon; down 2, up (2, 20), half of it (1, 10).
        torch.testing.assert_close(adapter(torch.tensor([3.0, 1.0])), torch.tensor([4.0, 11.0]), rtol=1e-4, atol=0)
        torch.testing.assert_close(adapter(torch.tensor([1.0, 3.0])), torch.tensor([1.0, 3.0]))  # ReLU of -2


@pytest.mark.parametrize(
    ("name", "mode", "message"),
    [
        ("resnet10t", "adapter", r"model\.tune adapter needs a block with an MLP .*; timm:resnet10t has none: choose"),
        ("resnet10t", "lora", r"model\.tune lora needs a block with attention of linear layers .*; timm:resnet10t has"),
        ("test_nfnet", "norm", r"model\.tune norm needs a normalisation layer with a scale; timm:test_nfnet has none"),
    ],
)
def test_models_without_the_part(name: str, mode: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        build(f"timm:{name}", mode)
    assert "\n" not in str(caught.value)


def test_a_model_that_reads_weights_without_calling_their_layers() -> None:
    class Reader(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x, self.layer.weight)  # pyright: ignore[reportArgumentType]

    model = build(mode="lora")
    attention = model.encoder.get_submodule("blocks.2.attn")
    attention.qkv = Reader(attention.qkv)  # pyright: ignore[reportArgumentType]
    with (
        pytest.raises(ValueError, match=r"1 of 12 added parts would never train \(blocks\.2\.attn\.qkv"),
        torch.no_grad(),
        added_parts_run(model.encoder),
    ):
        model(images(1))


def test_lora_without_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def no_peft(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "peft":
            raise ImportError("No module named 'peft'")
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", no_peft)
    with pytest.raises(ValueError, match=r"model\.tune lora needs .* peft: pip install 'allnc\[peft\]'; .*No module"):
        build(mode="lora")
    assert "kernels" not in sys.modules


def test_the_sum_knows_names_shapes_types_and_values() -> None:
    base = {"a": torch.arange(4.0), "b": torch.tensor(1)}
    assert sum_of_tensors(base) == sum_of_tensors({"b": torch.tensor(1), "a": torch.arange(8.0)[:4]})
    others = [
        {"a": torch.arange(4.0), "c": torch.tensor(1)},
        {"a": torch.arange(4.0).view(2, 2), "b": torch.tensor(1)},
        {"a": torch.arange(4.0), "b": torch.tensor(2)},
        {"a": torch.arange(4.0).bfloat16(), "b": torch.tensor(1)},
        {"a": torch.arange(4.0)},
    ]
    assert len({sum_of_tensors(other) for other in [base, *others]}) == 6


def weights_file(path: Path, name: str = "test_vit", **options: Any) -> dict[str, torch.Tensor]:
    torch.manual_seed(7)
    state = timm.create_model(name, **options).state_dict()
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return state


@pytest.mark.parametrize("file", ["w.safetensors", "w.pth"])
@pytest.mark.parametrize("options", [{}, {"num_classes": 0}, {"num_classes": 7}], ids=["as published", "none", "own"])
def test_weights_of_a_file_are_taken_with_or_without_their_classifier(
    file: str, options: dict[str, Any], tmp_path: Path
) -> None:
    state = weights_file(tmp_path / file, **options)
    encoder = build(pretrained=True, weights=str(tmp_path / file)).encoder.state_dict()
    assert len(encoder) == len([name for name in state if not name.startswith("head.")])
    assert all(torch.equal(value, state[name]) for name, value in encoder.items())
    assert not torch.equal(build().encoder.state_dict()["pos_embed"], state["pos_embed"])


def test_weights_are_fitted_to_grey_images(tmp_path: Path) -> None:
    state = weights_file(tmp_path / "w.pth")
    config = ModelConfig(name=VIT, pretrained=True, weights=str(tmp_path / "w.pth"))
    encoder = build_model(config, in_channels=1, num_classes=CLASSES).encoder.state_dict()
    name = "patch_embed.proj.weight"
    torch.testing.assert_close(encoder[name], state[name].sum(1, keepdim=True))
    assert torch.equal(encoder["norm.weight"], state["norm.weight"])


@pytest.mark.parametrize("pretrained", [False, True])
def test_weights_that_timm_does_not_know(pretrained: bool) -> None:
    with pytest.raises(ValueError, match=r"weights that timm knows of test_vit; got 'bogus': it has r160_in1k"):
        build("timm:test_vit.bogus", pretrained=pretrained)


def test_a_classifier_that_is_no_tensor(tmp_path: Path) -> None:
    torch.save({"head.weight": 7}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"w\.pth cannot be read"):
        build(pretrained=True, weights=str(tmp_path / "w.pth"))


def test_group_norms_of_a_frozen_encoder_are_frozen() -> None:
    assert not any(p.requires_grad for p in build("timm:test_resnet", "head", norm="group").encoder.parameters())


def test_frozen_noise_rests() -> None:
    model = build("timm:swin_tiny_patch4_window7_224", "norm")
    model.train()
    drops = [module for module in model.encoder.modules() if type(module).__name__ == "DropPath"]
    assert drops and not any(module.training for module in drops)


def test_weights_that_do_not_fit_are_refused_whole(tmp_path: Path) -> None:
    def refused(message: str, name: str = VIT, file: str = "w.pth") -> None:
        with pytest.raises(ValueError, match=message) as caught:
            build(name, pretrained=True, weights=str(tmp_path / file))
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 500

    refused(r"model\.weights must be a file with weights of test_vit \(\.safetensors, \.pth\); .*w\.pth is missing")
    refused("is a folder", file=".")
    (tmp_path / "w.pth").write_bytes(b"no weights")
    refused(r"model\.weights must be a file with weights of test_vit; .*w\.pth cannot be read: ")
    (tmp_path / "w.safetensors").write_bytes(b"\x09")
    refused("cannot be read: ", file="w.safetensors")
    state = weights_file(tmp_path / "w.pth")
    refused(r"model\.weights must fit resnet10t; .*w\.pth does not: ", "timm:resnet10t")
    for name in ("norm.weight", "blocks.3.attn.qkv.bias"):  # timm itself leaves what is missing as it is
        torch.save({n: value for n, value in state.items() if n != name}, tmp_path / "w.pth")
        refused(rf'model\.weights must fit test_vit; .*Missing key.*"{name}"')
    torch.save(state | {"blocks.0.norm1.weight": torch.ones(3)}, tmp_path / "w.pth")
    refused(r"size mismatch for blocks\.0\.norm1\.weight")


def test_pixels_are_those_that_the_weights_were_trained_with() -> None:
    clip = "timm:vit_base_patch16_clip_quickgelu_224.openai"
    mean = (0.48145466, 0.4578275, 0.40821073)
    found = pixel_statistics(ModelConfig(name=clip, pretrained=True))
    assert found is not None and found[0] == mean and found[1] == (0.26862954, 0.26130258, 0.27577711)
    assert pixel_statistics(ModelConfig(name=VIT, pretrained=True)) == ((0.5,) * 3, (0.5,) * 3)
    assert pixel_statistics(ModelConfig(name=VIT)) is None
