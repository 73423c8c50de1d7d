"""allnc.load: the trainer's own logits bit for bit, from files, images and tensors, by old and new checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import allnc
from allnc.config import Config, DataConfig, LossConfig, ModelConfig
from allnc.inference.predictor import rebuild
from allnc.models import build_model
from allnc.trainer import measure
from allnc.trainer.card import Card
from allnc.trainer.checkpoint import Weights, save
from allnc.trainer.places import placed
from allnc.trainer.run import Run
from tests.inference.conftest import CLASSES, SIDE, on_arrays, on_files, saved
from tests.trainer.test_training import TINY, changed


def trainers_logits(run: Run) -> torch.Tensor:
    parts = measure._test_logits(run.measured, run.measured_set, run.config.data, run.device)
    return torch.cat([logits for logits, _ in parts])


ON_FILES: dict[str, dict[str, Any]] = {
    "crop": {},
    "five crops": {"data": {"test_crops": 5}, "train": {"channels_last": True}},
    "whole and grey": {"data": {"fit": "whole", "channels": 1, "image_size": 20}},
    "timm": {"model": {"name": "timm:test_efficientnet", "classifier": "normalised"}, "train": {"ema_decay": 0.5}},
}


@pytest.mark.parametrize("settings", ON_FILES.values(), ids=ON_FILES.keys())
def test_files_give_the_trainers_logits(settings: dict[str, Any], tree: Path, tmp_path: Path) -> None:
    run = saved(on_files(tree, **settings), tmp_path)
    loaded = allnc.load(tmp_path, device="cpu")
    paths = list(run.measured_set.paths)
    with torch.inference_mode():
        logits = loaded.model(torch.stack([loaded.transform(path) for path in paths]))
    assert torch.equal(logits, trainers_logits(run)) and loaded.classes == tuple(sorted(CLASSES))
    probabilities = loaded(paths)
    assert torch.equal(probabilities, logits.softmax(1)) and torch.equal(probabilities, loaded.predict(paths))
    torch.testing.assert_close(loaded(Image.open(paths[0])), probabilities[:1])


ON_DIGITS: dict[str, dict[str, Any]] = {
    "two heads, autocast": {
        "model": {"heads": "separate", "classifier": "normalised"},
        "train": {"precision": "bf16", "channels_last": True},
    },
    "etf": {"model": {"classifier": "etf"}, "loss": {"name": "etf_dr"}},
    "adjusted post hoc": {"model": {"posthoc": "logit_adjusted"}, "loss": {"name": "ce"}},
    "tau": {"model": {"posthoc": "tau_normalised"}, "loss": {"name": "ce"}},
    "second stage": {"train": {"retrain_epochs": 2}},
}


@pytest.mark.parametrize("settings", ON_DIGITS.values(), ids=ON_DIGITS.keys())
def test_images_in_memory_give_the_trainers_logits(settings: dict[str, Any], tmp_path: Path) -> None:
    run = saved(changed(TINY, **settings), tmp_path)
    loaded = allnc.load(str(tmp_path), device="cpu")
    images = run.measured_set.images
    assert images is not None and loaded.classes == tuple("0123456789")
    with torch.inference_mode():
        assert torch.equal(loaded.logits_of(images), trainers_logits(run))
    one = images[3]
    grey = one[0].numpy()
    torch.testing.assert_close(loaded(one), loaded(images[:5])[3:4])
    assert torch.equal(loaded(one), loaded(grey)) and torch.equal(loaded(one), loaded(Image.fromarray(grey)))


def test_an_image_of_another_size_is_cut_to_the_middle(arrays: Path, tmp_path: Path) -> None:
    saved(on_arrays(arrays), tmp_path)
    loaded = allnc.load(tmp_path, device="cpu")
    wide = np.zeros((24, 100), np.uint8)
    wide[:, 32:68] = 200  # 32 of 100 columns are of the aspect 12:16, and the filter reaches 2 further
    assert loaded.transform.pixels(Image.fromarray(wide)).unique().tolist() == [200]
    assert loaded.transform.pixels(np.stack([wide] * 3, 2)).shape == (1, 12, 16)
    with pytest.raises(ValueError, match=r"uint8 tensors of 1 x 12 x 16; got \[1, 12, 16\] of type torch.float32"):
        loaded(torch.zeros(1, 12, 16))
    with pytest.raises(ValueError, match="at least one image; got none"):
        loaded([])


def without_card(folder: Path) -> None:
    """Make a run folder that of an older version."""
    path = folder / "last.safetensors"
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        notes = {name: text for name, text in file.metadata().items() if name != "card"}
    save_file(tensors, path, notes)
    (folder / "checkpoint.json").unlink()


def test_checkpoints_of_older_versions_load(tree: Path, arrays: Path, tmp_path: Path) -> None:
    for name, config in (("files", on_files(tree)), ("digits", TINY), ("arrays", on_arrays(arrays))):
        run = saved(config, tmp_path / name)
        without_card(tmp_path / name)
        loaded = allnc.load(tmp_path / name, device="cpu")
        images = run.measured_set.paths if name == "files" else run.measured_set.images
        assert torch.equal(loaded.logits(list(images)), trainers_logits(run))  # pyright: ignore[reportArgumentType]
        assert loaded.classes == (tuple(CLASSES) if name == "arrays" else tuple(map(str, range(len(loaded.classes)))))
    moved = tmp_path / "moved.npz"
    moved.write_bytes(arrays.read_bytes())
    arrays_of_another_place = changed(on_arrays(arrays), data={"root": str(tmp_path / "gone.npz")})
    card = allnc.load(tmp_path / "arrays").card
    run = saved(on_arrays(arrays), tmp_path / "old")
    save(tmp_path / "old", arrays_of_another_place, epoch=0, model=Weights(run.model.state_dict()), training={})
    with pytest.raises(ValueError, match=r"must know the mean and deviation of its pixels.*--data\.root"):
        allnc.load(tmp_path / "old")
    assert allnc.load(tmp_path / "old", root=str(moved)).card.mean == card.mean


def test_a_run_on_features_takes_features(tmp_path: Path) -> None:
    config = Config(
        data=DataConfig(name="features", root="gone", augmentation="none", views=1),
        model=ModelConfig(name="mlp"),
        loss=LossConfig(name="ce"),
    )
    card = Card(classes=("a", "b"), class_counts=(5, 2), mean=(), std=(), channels=6, shape=(6,))
    from allnc.models import build_model

    model = build_model(config.model, in_channels=6, num_classes=2, two_branches=False)
    save(tmp_path, config, epoch=0, model=Weights(model.state_dict(), card=card), training={})
    loaded = allnc.load(tmp_path, device="cpu")
    rows = torch.randn(4, 6)
    with torch.inference_mode():
        assert torch.equal(loaded.model(rows), model.eval()(rows).logits_rebalance)
    with pytest.raises(ValueError, match="must be one of images; it was trained on stored features of 6 numbers"):
        loaded.transform("a.png")


def test_loading_leaves_the_random_state_alone_and_refuses_what_is_no_run(run_of_files: Path, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    allnc.load(run_of_files)
    assert torch.equal(before, torch.get_rng_state())
    with pytest.raises(ValueError, match="RUN_DIR must be a run folder"):
        allnc.load(tmp_path)
    with pytest.raises(ValueError, match=r"--model\.weights would be ignored"):
        allnc.load(run_of_files, pretrained="w.safetensors")
    with pytest.raises(ValueError, match=r"train\.device|device must be"):
        allnc.load(run_of_files, device="tpu")


def test_the_card_says_what_the_run_knows(run_of_files: Path) -> None:
    with safe_open(run_of_files / "last.safetensors", "pt") as file:
        card = json.loads(file.metadata()["card"])
    assert card["classes"] == sorted(CLASSES) and sorted(card["class_counts"]) == [4, 8, 12]
    assert card["shape"] == [3, SIDE, SIDE] and card["channels"] == len(card["mean"]) == len(card["std"]) == 3


def test_relative_places_are_found_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = tmp_path / "project"
    (project / "data").mkdir(parents=True)
    (project / "runs" / "one").mkdir(parents=True)
    config = Config(data=DataConfig(name="arrays", root="data"), out="runs/one")
    monkeypatch.chdir(tmp_path)
    assert placed(config, Path("project/runs/one")).data.root == str(project / "data")
    assert placed(config, Path("elsewhere/one")).data.root == "data"  # the run was moved alone
    (tmp_path / "data").mkdir()
    assert placed(config, Path("project/runs/one")).data.root == "data"  # as it says, where it is there


@pytest.mark.parametrize("out", ["out", "index"])
def test_what_has_moved_with_the_run_is_found(out: str, tmp_path: Path) -> None:
    """The old place of the run is known by an absolute `out`, or by the table of its images."""
    old, new = tmp_path / "old", tmp_path / "new"
    run = new / "runs" / "one"
    run.mkdir(parents=True)
    table = str(old / "runs" / "one" / "images.tsv") if out == "index" else None
    (run / "images.tsv").touch()
    data = DataConfig(name="own", fit="whole", root=str(old / "photos"), train_list=str(old / "a.csv"), index=table)
    model = ModelConfig(name="timm:resnet18", pretrained=True, weights=str(old / "w.pth"))
    config = Config(data=data, model=model, out=str(old / "runs" / "one") if out == "out" else "one")
    assert placed(config, run).data.root == str(old / "photos")  # the images have not moved
    (new / "photos").mkdir()
    for name in ("a.csv", "w.pth"):
        (new / name).touch()
    found = placed(config, run)
    assert (found.data.root, found.data.train_list) == (str(new / "photos"), str(new / "a.csv"))
    assert (found.model.weights, found.data.index) == (str(new / "w.pth"), str(run / "images.tsv"))
    assert placed(config, run, ["data.root"]).data.root == str(old / "photos")  # given: as it is
    (old / "photos").mkdir(parents=True)
    assert placed(config, run).data.root == str(old / "photos")  # still there
    assert placed(config, tmp_path / "alone").data.root == str(old / "photos")


def test_a_timm_network_of_a_fixed_size_is_rebuilt_for_its_images() -> None:
    config = Config(model=ModelConfig(name="timm:vit_tiny_patch16_224"), loss=LossConfig(name="ce"))
    model = build_model(config.model, in_channels=3, num_classes=2, image_size=(32, 32)).eval()
    card = Card(classes=None, class_counts=(3, 2), mean=(0.5,) * 3, std=(0.5,) * 3, channels=3, shape=(3, 32, 32))
    again = rebuild(config, card, Weights(model.state_dict()))
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again(images).logits_rebalance, model(images).logits_rebalance)
