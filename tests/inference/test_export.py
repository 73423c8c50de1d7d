"""allnc.export: files that a program without allnc loads, with the run's logits; what differs is not written."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

import allnc
from allnc import export as command
from allnc.config import Config, DataConfig, LossConfig, ModelConfig
from allnc.inference import export as exporting
from allnc.inference.network import PlainNetwork
from allnc.losses.build import LOSSES
from allnc.models import build_model
from allnc.trainer.card import Card
from allnc.trainer.checkpoint import Weights, save
from tests.inference.conftest import on_files, saved

CARD = Card(
    classes=("a", "b", "c"),
    class_counts=(9, 4, 2),
    mean=(0.5, 0.4, 0.3),
    std=(0.2, 0.2, 0.3),
    channels=3,
    shape=(3, 64, 64),
)

# What somebody without allnc writes.
READER = """
import json, sys
sys.modules["allnc"] = None
folder, wanted = sys.argv[1], sys.argv[2]
import numpy as np, onnxruntime, timm, torch
from safetensors.torch import load_file
from torch.nn import functional as F

with np.load(wanted) as file:
    raw, images, logits = torch.from_numpy(file["raw"]), torch.from_numpy(file["images"]), file["logits"]

session = onnxruntime.InferenceSession(folder + "/raw.onnx")
said = json.loads(session.get_modelmeta().custom_metadata_map["allnc"])
for number in (1, len(raw)):
    got = session.run(["logits"], {"images": raw[:number].numpy()})[0]
    np.testing.assert_allclose(got, logits[:number], rtol=1e-5, atol=1e-5)

extra = {"allnc": ""}
program = torch.export.load(folder + "/model.pt2", extra_files=extra).module()
np.testing.assert_allclose(program(images).numpy(), logits, rtol=1e-5, atol=1e-5)
assert json.loads(extra["allnc"])["classes"] == said["classes"]

state = load_file(folder + "/model.safetensors")
with open(folder + "/model.json") as file:
    described = json.load(file)
encoder = timm.create_model(described["timm"], num_classes=0)
encoder.load_state_dict({k[8:]: v for k, v in state.items() if k.startswith("encoder.")})
with torch.inference_mode():
    features = encoder.eval()(images)
    assert described["features_at_unit_length"]
    got = F.linear(F.normalize(features), state["classifier.weight"], state.get("classifier.bias"))
np.testing.assert_allclose(got.numpy(), logits, rtol=1e-5, atol=1e-5)
mean, std = (torch.tensor(described[name])[:, None, None] for name in ("mean", "std"))
torch.testing.assert_close((raw / 255 - mean) / std, images)
print(json.dumps(said["classes"]))
"""


def test_every_format_is_read_without_allnc(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = {"name": "timm:test_resnet", "classifier": "normalised"}
    saved(on_files(tree, model=model, data={"image_size": 40}), tmp_path)
    assert command.main([str(tmp_path), "--format", "safetensors"]) == 0
    assert command.main([str(tmp_path), "--format", "torch"]) == 0
    assert command.main([str(tmp_path), "--format", "onnx", "--raw", "--out", str(tmp_path / "raw.onnx")]) == 0
    assert capsys.readouterr().out.count("largest difference from the run") == 3
    loaded = allnc.load(tmp_path, device="cpu")
    paths = sorted(map(str, tree.glob("test/*/*.png")))
    raw = torch.stack([loaded.transform.pixels(path) for path in paths])
    images, logits = loaded.transform.normalised(raw), loaded.logits(paths)
    np.savez(tmp_path / "wanted.npz", raw=raw.numpy(), images=images.numpy(), logits=logits.numpy())
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", READER, str(tmp_path), str(tmp_path / "wanted.npz")],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == list(loaded.classes)


def untrained(folder: Path, model: ModelConfig, loss: LossConfig, *, leave_out: bool = False, crops: int = 1) -> None:
    """Save a network whose tuned parts do something."""
    data = DataConfig(name="image_folder", root="gone", image_size=64, augmentation="none", test_crops=crops)
    config, entry = Config(data=data, model=model, loss=loss), LOSSES[loss.name]
    network = build_model(
        model,
        in_channels=3,
        num_classes=3,
        head=entry.head(loss),
        two_branches=entry.two_branches,
        class_counts=torch.tensor(CARD.class_counts),
    )
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    state, frozen = network.state_dict(), None
    if leave_out:
        frozen = network.frozen_sum()
        for name in network.frozen_names():
            del state[name]
    save(folder, config, epoch=1, model=Weights(state, frozen, CARD), training={})


NETWORKS: dict[str, tuple[dict[str, Any], str]] = {
    "linear": ({}, "ce"),
    "two heads": ({"classifier": "normalised", "heads": "separate"}, "allnc"),
    "etf": ({"classifier": "etf"}, "etf_dr"),
    "post hoc": ({"posthoc": "logit_adjusted", "posthoc_tau": 0.7}, "ce"),
    "post hoc, normalised": ({"posthoc": "logit_adjusted", "classifier": "normalised"}, "ce"),
    "tau": ({"posthoc": "tau_normalised", "posthoc_tau": 0.7}, "ce"),
}


@pytest.mark.parametrize(("model", "loss"), NETWORKS.values(), ids=NETWORKS.keys())
def test_what_is_done_to_the_classifier_stands_in_one_layer(model: dict[str, Any], loss: str, tmp_path: Path) -> None:
    untrained(tmp_path, ModelConfig(name="resnet8", width=4, **model), LossConfig(name=loss), crops=5)  # pyright: ignore
    loaded = allnc.load(tmp_path, device="cpu")
    plain = PlainNetwork(loaded.model, (CARD.mean, CARD.std))
    raw = torch.randint(0, 256, (3, 3, 73, 73), dtype=torch.uint8)
    with torch.inference_mode():
        wanted = loaded.model(loaded.transform.normalised(raw))
        torch.testing.assert_close(plain(raw), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tune", ["head", "norm", "lora", "adapter"])
def test_light_tuning_without_its_frozen_weights(tune: Any, tmp_path: Path) -> None:
    weights = tmp_path / "vit.safetensors"
    save_file(timm.create_model("test_vit").state_dict(), weights)
    model = ModelConfig(name="timm:test_vit", pretrained=True, weights=str(weights), tune=tune)
    run = tmp_path / "run"
    run.mkdir()
    untrained(run, model, LossConfig(name="ce"), leave_out=True)
    loaded = allnc.load(run, device="cpu")
    plain = PlainNetwork(loaded.model, None)
    assert not any("lora" in name for name in plain.state_dict())
    images = torch.randn(2, 3, 160, 160)
    with torch.inference_mode():
        torch.testing.assert_close(plain(images), loaded.model(images), rtol=1e-5, atol=1e-5)
        assert torch.equal(loaded.model(images), loaded.model(images))  # the export has merged a copy
    moved = weights.rename(tmp_path / "moved.safetensors")
    with pytest.raises(ValueError, match=r"vit\.safetensors is missing"):
        allnc.load(run)
    again = allnc.load(run, device="cpu", pretrained=str(moved))
    with torch.inference_mode():
        assert torch.equal(again.model(images), loaded.model(images))


def test_an_export_is_on_the_disk_before_it_takes_its_place(
    run_of_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights and what they mean are both synced, and then the weights are the first to be replaced."""
    steps: list[str] = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: steps.append("sync") or fsync(descriptor))
    monkeypatch.setattr(Path, "replace", lambda self, target: steps.append(target.name) or replace(self, target))
    exporting.export(allnc.load(run_of_files, device="cpu"), "safetensors", tmp_path / "m.safetensors")
    assert steps == ["sync", "sync", "m.safetensors", "m.json", "sync"]  # the last one is the folder


def test_what_differs_is_not_written(run_of_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    predictor, read = allnc.load(run_of_files, device="cpu"), exporting._read_safetensors

    def another(path: Path, network: PlainNetwork) -> Any:
        network = read(path, network)  # pyright: ignore[reportAssignmentType]
        return lambda images: 1.001 * network(images)

    path = tmp_path / "m.safetensors"
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="must give the run's logits; they differ by"):
        patch.setattr(exporting, "_read_safetensors", another)
        exporting.export(predictor, "safetensors", path)
    assert not list(tmp_path.iterdir())
    done = exporting.export(predictor, "safetensors", path)
    assert done.relative < 1e-5 and sorted(tmp_path.iterdir()) == sorted(done.files)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--format", "onnx", "--out", "model.pt2"], "--out must end in .onnx with --format onnx"),
        (["--format", "safetensors", "--raw"], "--raw needs --format torch or onnx"),
        (["--format", "torch", "--out", "gone/model.pt2"], "--out must be in a folder that is there"),
        (["--format", "torch"], "must be a run folder with last.safetensors"),
    ],
)
def test_mistakes(words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([str(tmp_path), *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_files_that_are_there_stay_and_onnx_is_asked_for(
    run_of_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(run_of_files), "--format", "safetensors", "--out", str(tmp_path / "m.safetensors")]
    (tmp_path / "m.json").write_text("mine")
    assert command.main(words) == 2 and (tmp_path / "m.json").read_text() == "mine"
    assert "m.json is there: give --overwrite to replace it" in capsys.readouterr().err
    assert command.main([*words, "--overwrite"]) == 0
    assert json.loads((tmp_path / "m.json").read_text())["shape"] == ["N", 3, 32, 32]
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert command.main([str(run_of_files), "--format", "onnx", "--out", str(tmp_path / "m.onnx")]) == 2
    assert "pip install 'allnc[export]'" in capsys.readouterr().err


def test_a_run_on_features_takes_features(tmp_path: Path) -> None:
    config = Config(
        data=DataConfig(name="features", root="gone", augmentation="none", views=1),
        model=ModelConfig(name="mlp"),
        loss=LossConfig(name="ce"),
    )
    card = dataclasses.replace(CARD, mean=(), std=(), channels=6, shape=(6,))
    model = build_model(config.model, in_channels=6, num_classes=3, two_branches=False)
    save(tmp_path, config, epoch=0, model=Weights(model.state_dict(), card=card), training={})
    predictor = allnc.load(tmp_path, device="cpu")
    done = exporting.export(predictor, "safetensors", tmp_path / "m.safetensors")
    assert done.relative < 1e-6
    described = json.loads((tmp_path / "m.json").read_text())
    assert described["shape"] == ["N", 6] and "mean" not in described
    with pytest.raises(ValueError, match="--raw needs a run on images"):
        exporting.export(predictor, "torch", tmp_path / "m.pt2", raw=True)
