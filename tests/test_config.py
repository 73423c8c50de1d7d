"""Configuration and command line: recipes, overrides, ranges, refusals, run folders."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from allnc.config import Config, DataConfig, LossConfig, ModelConfig, TrainConfig
from allnc.train import main
from allnc.trainer.command import parse, recipe_names
from allnc.trainer.manifest import Manifest
from allnc.trainer.optim import peak_rate
from allnc.trainer.options import from_dict, ignored_options, option_names, to_dict
from allnc.trainer.planning import plan

RECIPES = ["cifar100_lt", "cifar10_lt", "cyrillic_lt", "digits_lt", "fashion_lt", "features", "imagenet_lt"]
RECIPES += ["imagenet_lt_vit", "inat18", "inat18_vit", "kana_lt", "own_images", "places_lt", "places_lt_vit"]


def test_every_recipe_parses() -> None:
    assert recipe_names() == sorted([*RECIPES, "batch/1024", "batch/4096"])
    for name in RECIPES:
        config, stem = parse(["--config", name])
        assert stem == name
        assert from_dict(to_dict(config)) == config


def test_recipes_share_their_budget_with_the_baseline() -> None:
    for name in RECIPES:
        ours, baseline = parse(["--config", name])[0], parse(["--config", name, "--loss.name", "ce"])[0]
        assert dataclasses.replace(baseline, loss=ours.loss) == ours


@pytest.mark.parametrize("name", ["imagenet_lt", "inat18", "places_lt"])
@pytest.mark.parametrize("size", [1024, 4096])
def test_a_larger_batch_is_a_recipe_over_another(name: str, size: int) -> None:
    small, _ = parse(["--config", name])
    large, stem = parse(["--config", name, "--config", f"batch/{size}"])
    assert stem == f"{name}-{size}" and large.train.batch_size == size
    assert peak_rate(large.train) == pytest.approx(peak_rate(small.train) * size / small.train.batch_size)
    assert (large.data, large.model, large.loss) == (small.data, small.model, small.loss)


def test_overrides_win_whatever_their_place() -> None:
    before, _ = parse(["--train.epochs", "5", "--config", "fashion_lt", "--loss.name=ce"])
    after, _ = parse(["--config=fashion_lt", "--loss.name", "ce", "--train.epochs=5"])
    assert before == after
    assert (before.train.epochs, before.loss.name, before.data.max_per_class) == (5, "ce", 1500)


def test_no_argument_is_the_digits_recipe() -> None:
    config, recipe = parse([])
    assert (recipe, config.data.name, config.data.imbalance_ratio) == ("digits_lt", "digits", 20)


def test_the_whole_help_lists_options_and_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help-all"])
    shown = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 0
    for name in option_names():
        assert f"--{name} " in shown
    assert "digits_lt, fashion_lt" in shown and "share of the old class mean kept at each step" in shown


def test_print_config_is_a_config_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["--config", "cifar10_lt", "--train.lr", "1e-2", "--print_config"]) == 0
    path = tmp_path / "mine.yaml"
    path.write_text(capsys.readouterr().out)
    again, recipe = parse(["--config", str(path)])
    assert (again, recipe) == (parse(["--config", "cifar10_lt", "--train.lr", "0.01"])[0], "mine")
    assert again.train.milestones == (160, 180)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--loss.ema_momentum", "1.5"], "loss.ema_momentum must be in [0, 1); got 1.5"),
        (["--loss.temperature", "0"], "loss.temperature must be > 0; got 0"),
        (["--loss.gamma", "0"], "loss.gamma must be > 0; got 0"),
        (["--loss.tau", "-1"], "loss.tau must be >= 0; got -1"),
        (["--loss.label_smoothing", "1"], "loss.label_smoothing must be in [0, 1); got 1"),
        (["--loss.name", "ldam", "--loss.drw", "1.5"], "loss.drw must be in [0, 1); got 1.5"),
        (["--loss.drw", "0.8"], "--loss.drw would be ignored: loss.name is allnc, which re-balances by itself"),
        (["--loss.name", "logit_adjusted", "--loss.drw", "0.8"], "--loss.drw would be ignored: loss.name is logit_"),
        (["--loss.name", "focal", "--loss.tau", "2"], "--loss.tau would be ignored: loss.name is focal"),
        (["--loss.rebalance", "ce", "--loss.tau", "2"], "--loss.tau would be ignored: loss.rebalance is ce"),
        (["--loss.rebalance", "ldam", "--loss.label_smoothing", "0.1"], "would be ignored: loss.rebalance is ldam"),
        (["--loss.name", "supcon", "--loss.tau", "2"], "--loss.tau would be ignored: loss.name is supcon"),
        (["--loss.name", "bcl", "--loss.balance", "none"], "--loss.balance would be ignored: loss.name is bcl"),
        (
            ["--loss.name=proco", "--loss.hycon_weight=0", "--model.projection_dim=9"],
            "--model.projection_dim would be ignored: loss.hycon_weight is 0",
        ),
        (["--loss.classification_weight", "0.5"], "would be ignored: loss.name is allnc, which weighs its contrast by"),
        (["--loss.name", "ce", "--loss.classification_weight", "0.5"], "classification_weight would be ignored"),
        (["--loss.classification_weight", "-1"], "loss.classification_weight must be >= 0; got -1"),
        (
            ["--loss.name", "bcl", "--loss.classification_weight", "0"],
            "loss.classification_weight 0 needs train.retrain_epochs >= 1",
        ),
        (
            ["--loss.name=supcon", "--loss.classification_weight=0", "--loss.hycon_weight=0"],
            "loss.classification_weight or loss.hycon_weight must be > 0, or nothing trains; got 0 for both",
        ),
        (["--loss.name", "etf_dr"], "model.classifier must be etf with loss.name etf_dr; got normalised"),
        (["--loss.name", "nonl", "--model.classifier", "linear"], "must be normalised or etf with loss.name nonl"),
        (
            ["--model.classifier", "etf", "--model.heads", "separate"],
            "model.heads must be shared with model.classifier",
        ),
        (["--model.classifier", "etf", "--loss.p2p_weights", "2"], "--loss.p2p_weights would be ignored: model.class"),
        (
            ["--loss.p2p_means=0", "--loss.p2p_weights=0", "--loss.p2p_duality=0", "--loss.p2p_target=etf"],
            "--loss.p2p_target would be ignored: every weight of P2P is 0",
        ),
        (["--train.epochs", "0"], "train.epochs must be >= 1; got 0"),
        (["--train.epochs", "x"], "train.epochs must be of type int; got x"),
        (["--train.epoch", "5"], "--train.epoch is not an option; did you mean --train.epochs?"),
        (["--loss.name", "foo"], "loss.name must be one of 'allnc', 'ce',"),
        (["--config", "digit_lt"], "got 'digit_lt'; did you mean digits_lt?"),
        (["--config"], "--config needs a recipe"),
        (["--model.name", "resnet21"], "model.name must be resnetD with D = 6n + 2"),
        (["--model.pretrained", "true"], "model.pretrained needs a timm:NAME model; got resnet8"),
        (["--model.tune", "lora"], "model.tune must be full with model.name resnet8, which has no pretrained part"),
        (["--model.name", "timm:test_vit", "--model.weights", "x"], "ignored: model.pretrained is false"),
        (["--model.name", "timm:test_vit", "--model.tune", "head", "--model.tune_rank", "2"], "model.tune is head"),
        (["--train.save", "whole"], "--train.save would be ignored: no pretrained weights stay frozen"),
        (["--model.tune_rank", "0"], "model.tune_rank must be >= 1; got 0"),
        (["--model.classifier_init=class_means", "--model.classifier=linear"], "needs model.classifier normalised"),
        (["--data.test_crops", "5"], "data.test_crops must be 1 with data.name digits; got 5: for large images only"),
        (["--data.test_crops", "3"], "data.test_crops must be 1 or 5; got 3"),
        (["--data.mean", "[0.5]"], "data.mean and data.std must be given together"),
        (["--data.mean", "[0.5]", "--data.std", "[0]"], "data.std must be > 0; got 0"),
        (["--data.mean", "[0.5]", "--data.std", "[0.5, 1]"], "must have a number for each channel"),
        (["--data.augmentation", "crop_flip"], "got crop_flip, which is for large images"),
        (["--data.many", "5"], "data.many must be >= 20; got 5"),
        (["--data.views", "3", "--loss.hycon", "cosine"], "data.views must be 2 with loss.hycon cosine; got 3"),
        (["--data.augmentation", "randaugment"], "got randaugment, which is for large images"),
        (
            ["--train.milestones", "[3]"],
            "train.milestones must be given with train.schedule step, and only then",
        ),
        (["--loss.name", "ce", "--loss.alpha", "2"], "--loss.alpha would be ignored: loss.name is ce"),
        (["--data.workers", "2"], "--data.workers would be ignored"),
        (["--resume"], "--resume needs --out DIR"),
        (["--config", "image_list.yaml"], "--config must be a YAML file or one of"),
        (
            ["stray"],
            "the first word must be a folder of images, a list of them or a file of arrays; got 'stray', which is",
        ),
        (["--train.epochs", "5", "stray"], "every value needs the name of its option before it"),
        (["--lr", "1"], "--lr is not an option; did you mean --train.lr?"),
        (["--epochs", "1"], "did you mean --train.epochs?"),
        (["--data.rot", "x"], "did you mean --data.root?"),
        (["--batch-size", "8"], "did you mean --train.batch_size?"),
        (["--batch=8"], "did you mean --train.batch_size?"),
        (["--num-workers", "8"], "did you mean --data.workers?"),
        (["--name", "ce"], "did you mean --data.name, --model.name or --loss.name?"),
        (["--print-config"], "did you mean --print_config?"),
        (["--zzzz", "8"], "--zzzz is not an option; --help-all lists them"),
        (["--model", "resnet20"], "--model must be a YAML file or a mapping of its options; got 'resnet20'; did you"),
        (["--loss.class_weights", "auto"], "--loss.class_weights would be ignored: loss.name is allnc"),
        (["--loss.name=ce", "--loss.class_weights=aut"], "must be of type auto or {name: number} or null; got aut"),
        (["--loss.name=ce", '--loss.class_weights={"a": -1}'], "loss.class_weights of 'a' must be >= 0; got -1"),
        (["--loss.name=ce", "--loss.class_weights=auto", "--loss.drw=0.5"], "loss.drw and loss.class_weights exclude"),
        (["--model.name", "resnet50"], "--model.name resnet50 would be the CIFAR ResNet of depth 50, 0.8 M parameters"),
    ],
)
def test_mistakes_are_answered_on_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and "Traceback" not in error


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train:\n  epoch: 3\n", "train.epoch is not an option; did you mean train.epochs?"),
        ("trains:\n  epochs: 3\n", "trains.epochs is not an option; did you mean train.epochs?"),
        ("train: [\n", "must be YAML of sections and options; it is not: while parsing"),
        ("loss:\n  ema_momentum: 3\n", "loss.ema_momentum must be in [0, 1); got 3"),
        ("train:\n", "train must hold options, as `name: value`; got nothing"),
        ("train: [1, 2]\n", "train must hold options, as `name: value`; got [1, 2]"),
        ("", "must hold sections (data, model, loss, train); got nothing"),
        ("- 1\n", "must hold sections (data, model, loss, train); got [1]"),
        ("resume: true\n", "resume is an option of the command line alone"),
        ("overwrite: false\n", "overwrite is an option of the command line alone"),
        ("config: digits_lt\n", "config is an option of the command line alone"),
        ("train:\n  lr: [1]\n", "train.lr must be"),
        ("1: 2\n", "Key must be a string, got: 1"),
    ],
)
def test_mistakes_in_a_file_are_answered(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ValueError) as caught:
        parse(["--config", str(path)])
    assert message in str(caught.value)


def test_run_folders_are_new_unless_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert plan(["--seed", "3"])[1] == Path("runs/digits_lt-allnc-seed3")
    Path("runs/digits_lt-ce-seed0").mkdir(parents=True)
    assert plan(["--loss.name", "ce"])[1] == Path("runs/digits_lt-ce-seed0-2")
    assert plan(["--out", "~/x"])[1:3] == (tmp_path / "home" / "x", "new")
    run = Path("mine")
    run.mkdir()
    assert plan(["--out", "mine"])[1] == run
    assert plan(["--out", "mine"]).recipe == "digits_lt"
    assert plan(["--config=fashion_lt", "--config", "batch/1024", "--out", "x"]).recipe == "fashion_lt + batch/1024"
    config = Config(seed=7)
    (run / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
    with pytest.raises(ValueError, match="holds a run: give --resume to continue it"):
        plan(["--out", "mine"])
    with pytest.raises(ValueError, match="has none yet: --overwrite starts the run again"):
        plan(["--out", "mine", "--resume"])
    assert plan(["--out", "mine", "--overwrite"])[1:3] == (run, "overwrite")
    (run / "checkpoint.json").write_text(json.dumps(Manifest(epoch=3, config=config, files={}).to_json()))
    assert plan(["--resume", "--out=mine"])[:3] == (
        dataclasses.replace(config, out=str(tmp_path / "mine")),
        run,
        "resume",
    )


def test_what_a_resumed_run_may_change(tmp_path: Path) -> None:
    config = Config(seed=7)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
    (tmp_path / "checkpoint.json").write_text(json.dumps(Manifest(epoch=3, config=config, files={}).to_json()))
    words = ["--resume", "--out", str(tmp_path)]
    changed = plan([*words, "--train.lr", "0.01", "--train.epochs=40", "--loss.backend", "eager"]).config
    assert (changed.train.lr, changed.train.epochs, changed.loss.backend, changed.seed) == (0.01, 40, "eager", 7)
    for more, message in (
        (["--seed", "1"], r"must keep seed 7 \(now 1\)"),
        (["--loss.alpha", "0"], r"must keep loss\.alpha 1\.0 \(now 0\.0\)"),
        (["--train.epochs", "2"], r"train\.epochs must be >= 3, the epochs done; got 2"),
        (["--config", "digits_lt"], "remove --config"),
    ):
        with pytest.raises(ValueError, match=message):
            plan([*words, *more])
    edited = to_dict(config) | {"model": {"width": 8}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(edited))
    with pytest.raises(ValueError, match=r"must keep model\.width 16 \(now 8\)"):
        plan(words)
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(ValueError, match=r"has no config\.yaml of a run"):
        plan(words)


def test_ignored_options_are_real_options() -> None:
    configs = [
        Config(loss=LossConfig(name="ce")),
        Config(loss=LossConfig(name="focal", hycon="none", p2p_target="etf", horizon=0)),
        Config(model=ModelConfig(name="timm:resnet18"), data=DataConfig(imbalance="none")),
        Config(train=TrainConfig(schedule="step", milestones=(3,))),
        Config(loss=LossConfig(name="proco", hycon="none")),
    ]
    for config in configs:
        assert set(ignored_options(config)) <= set(option_names())
    assert "loss.focal_gamma" not in ignored_options(configs[1]) and "loss.gamma" in ignored_options(configs[1])
    assert "train.milestones" not in ignored_options(configs[3])
    names = ("name", "hycon_weight", "classification_weight", "temperature", "tau", "ema_momentum", "backend")
    loss_options = {name for name in option_names() if name.startswith("loss.")}
    assert loss_options - set(ignored_options(configs[4])) == {f"loss.{name}" for name in names}
    assert "model.projection_dim" not in ignored_options(configs[4])
    p2p_on_duality = LossConfig(p2p_means=0, p2p_weights=0)  # p2p_duality is null: 1 where there is a simplex
    assert "loss.p2p_target" not in ignored_options(Config(loss=p2p_on_duality))
    assert "loss.p2p_target" in ignored_options(Config(loss=dataclasses.replace(p2p_on_duality, alpha=0)))


def test_from_dict_refuses_unknown_keys() -> None:
    with pytest.raises(ValueError, match=r"loss.ema_moment is not an option; did you mean loss.ema_momentum\?"):
        from_dict({"loss": {"ema_moment": 0.5}})


def test_literals_are_checked_without_the_parser() -> None:
    with pytest.raises(ValueError, match=r"train\.precision must be one of auto, fp32, bf16, fp16; got 'fp8'"):
        TrainConfig(precision="fp8")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        (TrainConfig, {"lr": "a"}, "train.lr must be of type float; got 'a'"),
        (TrainConfig, {"lr": 1e300}, "train.lr must be a number that float32 holds; got 1e+300"),
        (TrainConfig, {"lr": float("nan")}, "train.lr must be > 0; got nan"),
        (TrainConfig, {"epochs": 2.5}, "train.epochs must be of type int; got 2.5"),
        (TrainConfig, {"epochs": 10**30}, "train.epochs must be at most 4294967295"),
        (TrainConfig, {"milestones": ("a",)}, "train.milestones must be of type list of int; got ('a',)"),
        (TrainConfig, {"threads": True}, "train.threads must be of type int or null; got True"),
        (DataConfig, {"root": 3}, "data.root must be of type str or null; got 3"),
        (Config, {"data": None}, "data must be a DataConfig; got None"),
        (Config, {"seed": "x"}, "seed must be of type int; got 'x'"),
    ],
)
def test_types_are_checked_whoever_builds(section: type, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        section(**values)
    assert message in str(caught.value)


@pytest.mark.parametrize("values", [{"train": None}, {"model": [1]}, [], None, "x"])
def test_from_dict_wants_mappings(values: Any) -> None:
    with pytest.raises(ValueError, match=r"must hold (options|sections), as `name: value`; got"):
        from_dict(values)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"loss": {"name": "ntce"}, "train": {"mixup": 0.2}}, "train.mixup needs a loss of logits and labels alone"),
        ({"loss": {"name": "bcl"}, "model": {"posthoc": "logit_adjusted"}}, "which would balance it twice"),
        ({"loss": {"name": "allnc"}, "model": {"posthoc": "logit_adjusted"}}, "which would balance it twice"),
        (
            {"loss": {"name": "ce"}, "model": {"posthoc": "logit_adjusted"}, "train": {"retrain_epochs": 2}},
            "train.retrain_epochs 2, which would balance it twice",
        ),
        ({"loss": {"name": "ce", "drw": 1.0}}, "loss.drw must be"),
        (
            {"loss": {"name": "ce"}, "model": {"name": "timm:resnet18", "pretrained": True, "tune": "head"}},
            "needs an encoder that trains",
        ),
    ],
)
def test_options_that_would_be_wrong_together_are_refused(sections: dict[str, dict], message: str) -> None:
    model = {"classifier": "normalised", **sections.get("model", {})}
    if "encoder" in message:
        model["classifier"] = "etf"
    with pytest.raises(ValueError) as error:
        from_dict({**sections, "model": model})
    assert message in str(error.value)


def test_post_hoc_adjustment_suits_what_nothing_has_balanced() -> None:
    assert from_dict({"loss": {"name": "ce"}, "model": {"posthoc": "logit_adjusted"}}).model.posthoc_tau == 1.0
    assert from_dict({"loss": {"name": "allnc", "tau": 0.0}, "model": {"posthoc": "logit_adjusted"}}).loss.tau == 0
