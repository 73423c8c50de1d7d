"""Lightly tuned runs: what the checkpoint leaves out, evaluating, resuming, other weights, class means, five crops."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import save_file
from torch.nn import functional as F
from torchvision.transforms import v2

from allnc import evaluate
from allnc.config import Config, DataConfig, LossConfig, ModelConfig, TrainConfig
from allnc.data import ImageSet, load, plain_batches
from allnc.trainer import loop, measure, state
from allnc.trainer.checkpoint import Weights, load_weights
from allnc.trainer.command import parse
from allnc.trainer.processes import Processes
from allnc.trainer.run import Run
from tests.trainer.test_training import changed, no_plots, quiet, records, stop_after

__all__ = ["no_plots"]  # a fixture for every test
SIZES, SIDE, CPU = (12, 8, 4), 112, torch.device("cpu")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree of images, whose classes have colours, and two files of weights."""
    root = tmp_path_factory.mktemp("tuning")
    random = np.random.RandomState(0)
    for part, counts in (("train", SIZES), ("val", (4, 4, 4))):
        for label, count in enumerate(counts):
            (root / part / f"class{label}").mkdir(parents=True)
            for index in range(count):
                pixels = random.randint(0, 120, (64, 48, 3), dtype=np.uint8)
                pixels[:, :, label] += 90
                Image.fromarray(pixels).save(root / part / f"class{label}" / f"{index}.png")
    for seed in (1, 2):
        torch.manual_seed(seed)
        save_file(timm.create_model("test_vit").state_dict(), root / f"{seed}.safetensors")
    return root


def configuration(place: Path, mode: str, **sections: dict[str, Any]) -> Config:
    data = DataConfig(
        name="image_folder", root=str(place), image_size=SIDE, augmentation="crop_flip", views=1, workers=0, few=6
    )
    model = ModelConfig(
        name="timm:test_vit",
        pretrained=True,
        weights=str(place / "1.safetensors"),
        tune=mode,  # pyright: ignore[reportArgumentType]
        classifier="normalised",
        classifier_scale=25.0,
    )
    train = TrainConfig(
        epochs=2, batch_size=8, lr=0.05, precision="fp32", device="cpu", threads=1, collapse_every=0, warmup_epochs=0
    )
    config = Config(data=data, model=model, loss=LossConfig(name="logit_adjusted"), train=train)
    return changed(config, **sections)


def start(config: Config) -> Run:
    run = Run(config)
    run.start_classifier()
    return run


@pytest.mark.parametrize("mode", ["head", "norm", "lora", "adapter"])
def test_a_tuned_checkpoint_evaluates_alike(mode: str, place: Path, tmp_path: Path) -> None:
    config = configuration(place, mode)
    config = changed(config, train={"epochs": 1})
    summary = loop.train(config, tmp_path / "run", quiet())
    _, _, weights = load_weights(tmp_path / "run")
    run = Run(config)
    assert weights.frozen == run.model.frozen_sum()
    assert {*weights} == {*run.model.state_dict()} - {*run.model.frozen_names()}
    run.load_model(weights, 1)
    measured = run.measure_accuracy()
    assert measured == {name: summary[name] for name in measured}

    run.config = changed(config, train={"save": "whole"})
    state.save(run, tmp_path)
    _, _, all_weights = load_weights(tmp_path)
    assert all_weights.frozen is None and {*all_weights} == {*run.model.state_dict()}
    assert all(torch.equal(all_weights[name], value) for name, value in weights.items())


def test_the_command_evaluates_beside_the_right_weights_only(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = changed(configuration(place, "adapter"), train={"epochs": 1})
    loop.train(config, tmp_path, quiet())
    other, moved = str(place / "2.safetensors"), shutil.copy(place / "1.safetensors", tmp_path / "moved.safetensors")
    assert evaluate.main([str(tmp_path), "--model.weights", str(moved)]) == 0
    capsys.readouterr()
    assert evaluate.main([str(tmp_path), "--model.weights", other]) == 2
    error = capsys.readouterr().err
    assert "the pretrained weights must be those that the checkpoint was tuned with" in error and error.count("\n") == 1
    with pytest.raises(ValueError, match="the pretrained weights must be those"):
        loop.train(changed(config, train={"epochs": 2}, model={"weights": other}), tmp_path, quiet(), mode="resume")
    run = Run(changed(config, train={"save": "whole"}))
    state.save(run, tmp_path)
    assert evaluate.main([str(tmp_path)]) == 0
    capsys.readouterr()
    assert evaluate.main([str(tmp_path), "--model.weights", other]) == 2
    assert "--model.weights would be ignored" in capsys.readouterr().err


def test_resuming_gives_the_same_bits_where_the_weights_have_moved(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configuration(place, "adapter", model={"classifier_init": "class_means"})
    loop.train(config, tmp_path / "straight", quiet())
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(1, patch)
        loop.train(config, tmp_path / "parts", quiet())
    moved = shutil.copy(place / "1.safetensors", tmp_path / "moved.safetensors")
    resumed = loop.train(changed(config, model={"weights": str(moved)}), tmp_path / "parts", quiet(), mode="resume")
    (_, _, ours), (_, _, theirs) = load_weights(tmp_path / "straight"), load_weights(tmp_path / "parts")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert [change["option"] for change in resumed["changes"]] == ["model.weights"]
    assert [r["loss"] for r in records(tmp_path / "straight")] == [r["loss"] for r in records(tmp_path / "parts")]


@pytest.mark.parametrize(("before", "after"), [("tuned", "whole"), ("whole", "tuned")])
def test_what_is_saved_may_change_on_resuming(
    before: str, after: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configuration(place, "adapter", train={"save": before, "ema_decay": 0.5})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(1, patch)
        loop.train(config, tmp_path / "run", quiet())
    changed_config = changed(config, train={"save": after})
    loop.train(changed_config, tmp_path / "run", quiet(), mode="resume")
    _, epoch, weights = load_weights(tmp_path / "run")
    assert epoch == 2 and (weights.frozen is None) == (after == "whole")


def test_processes_with_other_weights_are_named(place: Path) -> None:
    """Where a batch passes in parts, no other machine's weights would take the place of one's own."""

    class Two(Processes):
        def gather(self, value: Any) -> list[Any]:
            return [value, {**value, "weights": "others"}]

    run = Run(configuration(place, "adapter", train={"micro_batch": 2}), processes=Two(0, 2))
    with pytest.raises(ValueError, match="every process must have the same weights; rank 1 has others"):
        run.connect()


def test_random_weights_that_stay_frozen_are_saved(place: Path, tmp_path: Path) -> None:
    config = configuration(place, "head", model={"pretrained": False, "weights": None})
    summary = loop.train(config, tmp_path, quiet())
    _, _, weights = load_weights(tmp_path)
    assert weights.frozen is None
    run = Run(dataclasses.replace(config, seed=5))
    run.load_model(weights, 2)
    assert run.measure_accuracy()["accuracy"] == summary["accuracy"]


def test_the_optimiser_sees_what_trains(place: Path) -> None:
    run = start(configuration(place, "adapter"))
    owned = [p for group in run.optimizer.param_groups for p in group["params"]]
    assert len(owned) == len(set(owned)) == len([p for p in run.model.parameters() if p.requires_grad])
    assert all(p.requires_grad for p in owned)


@pytest.mark.parametrize("hycon", ["softmax", "cosine"])
@pytest.mark.parametrize("mode", ["head", "adapter"])
def test_allnc_trains_a_tuned_model(hycon: str, mode: str, place: Path) -> None:
    config = configuration(place, mode, data={"views": 2})
    loss = LossConfig(hycon=hycon, backend="eager")  # pyright: ignore[reportArgumentType]
    run = start(dataclasses.replace(config, loss=loss))
    run.model.train()
    before = {name: p.clone() for name, p in run.model.named_parameters()}
    for index, batch in enumerate(run.loader.epoch(0)):
        parts = loop.train_step(run, batch, progress=index / 4)
        assert all(torch.isfinite(value) for value in parts.values())
    still = {name for name, p in run.model.named_parameters() if torch.equal(p, before[name])}
    assert still == {name for name, p in run.model.named_parameters() if not p.requires_grad}


def test_class_vectors_start_as_class_means(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "MOST_OF_A_CLASS", 5)
    run = Run(configuration(place, "head", model={"classifier_init": "class_means"}))
    state = torch.get_rng_state()
    run.start_classifier()
    assert torch.equal(torch.get_rng_state(), state), "the images that are shown do not depend on it"
    features, labels = [], []
    for output, label in measure.outputs(run.model, run.train_set, run.config.data, CPU):
        features.append(output.features)
        labels.append(label)
    features, labels = torch.cat(features), torch.cat(labels)
    weight = run.model.classifier_weight
    torch.testing.assert_close(weight.norm(dim=1), torch.ones(3))
    smallest = F.normalize(features[labels == 2].mean(0), dim=0)  # all four of its images
    torch.testing.assert_close(weight[2], smallest, rtol=1e-5, atol=1e-6)
    for label in (0, 1):  # five of twelve and of eight
        own = F.normalize(features[labels == label].mean(0), dim=0)
        assert not torch.allclose(weight[label], own, atol=1e-5) and weight[label] @ own > 0.9


def test_a_new_run_begins_with_them(place: Path, tmp_path: Path) -> None:
    parts = {"model": {"classifier_init": "class_means"}, "train": {"epochs": 1, "lr": 1e-9, "eval_every": 9}}
    config = configuration(place, "head", **parts)
    loop.train(config, tmp_path, quiet())
    torch.testing.assert_close(
        load_weights(tmp_path)[2]["classifier.weight"], start(config).model.classifier_weight.data
    )


def test_class_means_are_the_same_for_any_number_of_processes(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes of a group that is played here: each measures its part, and gathers the other's."""
    monkeypatch.setattr(measure, "MOST_OF_A_CLASS", 4)
    run = Run(configuration(place, "head"))
    alone = measure.features_by_class(run.model, run.train_set, run.config.data, CPU, Processes(), seed=3)
    all_of_two = [o.features[y == 2] for o, y in measure.outputs(run.model, run.train_set, run.config.data, CPU)]
    torch.testing.assert_close(alone[2], torch.cat(all_of_two).mean(0), rtol=1e-5, atol=1e-6)
    assert (alone.norm(dim=1) / alone[2].norm()).sub(1).abs().max() < 0.3  # means, not sums over more images

    parts: list[torch.Tensor] = []

    class Half(Processes):
        def gather(self, value: Any) -> list[Any]:
            parts.append(value)
            return parts

    for rank in (0, 1):
        together = measure.features_by_class(run.model, run.train_set, run.config.data, CPU, Half(rank, 2), seed=3)
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-7)  # pyright: ignore[reportPossiblyUnbound]


def test_five_crops_by_hand() -> None:
    pixels = torch.arange(36.0).view(1, 1, 6, 6)
    corners = [crop[0, 0, 0, 0].item() for crop in measure.five_crops(pixels, 4)]
    assert corners == [7, 0, 2, 12, 14]
    assert all(crop.shape == (1, 1, 4, 4) for crop in measure.five_crops(pixels, 4))


def test_five_crops_average_logits_of_accuracy_alone(place: Path) -> None:
    config = configuration(place, "head", data={"test_crops": 5})
    run = Run(config)
    one = list(plain_batches(run.measured_set, config.data, 5, CPU))
    five = list(plain_batches(run.measured_set, config.data, 5, CPU, margin=True))
    for (plain, labels), (square, same) in zip(one, five, strict=True):
        assert square.shape[-2:] == (SIDE * 8 // 7,) * 2 and torch.equal(labels, same)
        assert torch.equal(measure.five_crops(square, SIDE)[0], plain)
    crops = measure.five_crops(torch.cat([square for square, _ in five]), SIDE)
    reference = v2.FiveCrop(SIDE)(torch.cat([square for square, _ in five]))
    assert all(torch.equal(a, b) for a, b in zip(crops, (reference[4], *reference[:4]), strict=True))
    run.model.eval()
    with torch.inference_mode():
        mean = sum(run.model(crop).logits_rebalance for crop in crops) / 5
    logits = torch.cat([part for part, _ in measure._test_logits(run.model, run.measured_set, config.data, CPU)])
    torch.testing.assert_close(logits, mean, rtol=1e-5, atol=1e-5)
    collapse = run.measure_collapse()[0]
    assert collapse == Run(changed(config, data={"test_crops": 1})).measure_collapse()[0]


def test_the_command_takes_five_crops(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop.train(configuration(place, "head", train={"epochs": 1}), tmp_path, quiet())
    seen: list[int] = []
    five_crops = measure.five_crops
    monkeypatch.setattr(measure, "five_crops", lambda pixels, size: seen.append(size) or five_crops(pixels, size))
    assert evaluate.main([str(tmp_path), "--data.test_crops", "5"]) == 0 and seen == [SIDE]


def test_pixels_are_normalised_as_the_weights_want_it_and_the_run_notes_it(place: Path, tmp_path: Path) -> None:
    half = (0.5, 0.5, 0.5)
    run = Run(configuration(place, "head"))
    assert (run.config.data.mean, run.config.data.std) == (half, half)
    assert run.train_set.mean == run.measured_set.mean == run.train_set.std == half
    white = torch.cat([pixels for pixels, _ in plain_batches(run.measured_set, run.config.data, 20, CPU)])
    assert white.min() >= -1 and white.max() <= 1
    loop.train(configuration(place, "head", train={"epochs": 1}), tmp_path, quiet())
    assert load_weights(tmp_path)[0].data.mean == half
    assert "  mean:\n  - 0.5\n" in (tmp_path / "config.yaml").read_text()
    random = Run(configuration(place, "head", model={"pretrained": False, "weights": None}))
    assert random.config.data.mean is None and random.train_set.mean == load(random.config.data)[0].mean != half
    given = Run(configuration(place, "head", data={"mean": (0.1, 0.2, 0.3), "std": (1.0, 1.0, 1.0)}))
    assert given.train_set.mean == (0.1, 0.2, 0.3)


def test_as_many_means_as_channels() -> None:
    pixels = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    grey = ImageSet(labels=torch.arange(2), num_classes=2, mean=(0.5,), std=(0.5,), images=pixels)
    config = Config(
        data=DataConfig(mean=(0.5,) * 3, std=(0.5,) * 3), train=TrainConfig(batch_size=2, device="cpu", threads=1)
    )
    with pytest.raises(ValueError, match=r"data\.mean and data\.std must have 1 numbers, one for each channel; got 3"):
        Run(config, images=(grey, grey))


def test_the_headline_says_how_much_trains(place: Path, tmp_path: Path) -> None:
    told = io.StringIO()
    loop.train(configuration(place, "head", train={"epochs": 1}), tmp_path, Console(file=told, width=300))
    assert "model.tune head: 192 of 306,432 parameters train" in told.getvalue()


def test_a_model_of_another_size_is_one_line(place: Path) -> None:
    fixed = {"name": "timm:vit_tiny_patch16_224", "pretrained": False, "weights": None}
    small = {"image_size": 12}  # less than a patch
    with pytest.raises(ValueError, match=r"model\.name must be a model for 3 x 12 x 12 images") as caught:
        Run(configuration(place, "lora", model=fixed, data=small))
    assert "added parts" not in str(caught.value)


@pytest.mark.parametrize("recipe", ["imagenet_lt_vit", "inat18_vit", "places_lt_vit"])
def test_the_recipes_train_a_small_model(recipe: str, place: Path, tmp_path: Path) -> None:
    lists = []
    for part in ("train", "val"):
        lines = [f"{path.relative_to(place)} {path.parent.name[-1]}\n" for path in sorted(place.glob(f"{part}/*/*"))]
        (tmp_path / f"{part}.txt").write_text("".join(lines))
        lists.append(str(tmp_path / f"{part}.txt"))
    words = ["--data.root", str(place), "--data.train_list", lists[0], "--data.test_list", lists[1]]
    words += ["--data.image_size", str(SIDE), "--data.workers", "0", "--model.name", "timm:test_vit"]
    words += ["--model.weights", str(place / "1.safetensors"), "--train.epochs", "1", "--train.batch_size", "8"]
    words += ["--train.device", "cpu", "--train.threads", "1", "--train.precision", "fp32"]
    config, _ = parse(["--config", recipe, *words])
    assert config.loss.name == "logit_adjusted" and config.data.test_crops == 5 and config.model.tune == "adapter"
    summary = loop.train(config, tmp_path / "run", quiet())
    assert summary["accuracy"] is not None and isinstance(load_weights(tmp_path / "run")[2], Weights)
    losses = [record["loss"] for record in records(tmp_path / "run")]
    assert len(losses) == 1 and all(np.isfinite(losses))
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["epochs"] == 1
