"""Sweep files: which runs they ask for, and which mistakes are answered before the first one starts."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

from allnc.config import Config, DataConfig, LossConfig, TrainConfig
from allnc.sweep.plan import read_options, read_sweep, same_options

SMALL = {
    "baseline": "ce",
    "seeds": [0, 1],
    "options": {"train.threads": 1},
    "data": {"digits": {"config": "digits_lt", "ratios": [10, 20]}, "even": {"config": "digits_lt", "data.many": 70}},
    "methods": {
        "ce": {"loss.name": "ce"},
        "allnc": {"seeds": [3], "data": ["even"], "loss.alpha": 0.5, "config": ["batch/1024"], "train.batch_size": 256},
    },
}


def written(tmp_path: Path, values: object) -> Path:
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def test_every_run_has_its_options(tmp_path: Path) -> None:
    sweep = read_sweep(written(tmp_path, SMALL))
    assert sweep.data == ("digits_10", "digits_20", "even")
    names = [job.name for job in sweep.jobs]
    assert names == [
        *("digits_10 ce seed 0", "digits_20 ce seed 0", "even ce seed 0"),
        *("digits_10 ce seed 1", "digits_20 ce seed 1", "even ce seed 1", "even allnc seed 3"),
    ]
    first, last = sweep.jobs[0], sweep.jobs[-1]
    assert (first.config.data.imbalance_ratio, first.config.loss.name, first.config.train.threads) == (10, "ce", 1)
    assert (last.config.seed, last.config.loss.alpha, last.config.data.many) == (3, 0.5, 70)
    assert last.config.train.lr_scaling == "linear"  # of the method's recipe, which lies over that of the data set
    assert last.config.train.batch_size == 256


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"baseline": "none"}, "baseline must be one of the methods; got 'none'"),
        ({"seed": [0]}, "must have baseline, data, methods, options, seeds; got 'seed'"),
        ({"seeds": [0, 0]}, "must name each seed once"),
        ({"seeds": "all"}, "must be a list of numbers >= 0; got 'all'"),
        ({"options": {"threads": 1}}, "must hold dotted options, such as loss.name; got 'threads'"),
        ({"methods": {"ce": {"loss.name": "cee"}}}, "ce on digits_10: loss.name must be one of"),
        ({"methods": {"ce": {"loss.name": "ce", "loss.alpha": 1}}}, "ce on digits_10: --loss.alpha would be ignored"),
        ({"methods": {"ce": {"loss.nam": "ce"}}}, "did you mean --loss.name?"),
        ({"methods": {"ce": {"data": ["mnist"]}}}, "must name data sets (digits_10, digits_20, even); got 'mnist'"),
        ({"methods": {"../ce": {}}, "baseline": "../ce"}, "must be of letters, digits and _.+-; got '../ce'"),
        ({"data": {"digits": {}}}, "data.digits must have config"),
        ({"data": {"digits": {"config": "digits_lt", "ratios": ["ten"]}}}, "must be a list of numbers; got ['ten']"),
        ({"methods": None}, "must hold `name: value`; got None"),
    ],
)
def test_mistakes_are_named(change: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        read_sweep(written(tmp_path, SMALL | change))
    assert message in str(error.value)


def test_what_is_missing_or_no_yaml_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="seeds is missing"):
        read_sweep(written(tmp_path, {name: value for name, value in SMALL.items() if name != "seeds"}))
    (tmp_path / "sweep.yaml").write_text("a: [")
    with pytest.raises(ValueError, match="must be a sweep file in YAML"):
        read_sweep(tmp_path / "sweep.yaml")


def test_a_run_is_known_by_the_options_that_it_reads() -> None:
    ce = Config(loss=LossConfig(name="ce"))
    recorded = read_options(ce)
    assert "loss.alpha" not in recorded and "seed" not in recorded and "out" not in recorded
    assert same_options(recorded, dataclasses.replace(ce, loss=LossConfig(name="ce", alpha=0.7)))
    assert same_options(recorded, dataclasses.replace(ce, train=TrainConfig(threads=2), out="elsewhere", seed=5))
    assert not same_options(recorded, dataclasses.replace(ce, data=DataConfig(views=1)))
    assert not same_options(recorded, Config())
    none = Config(loss=LossConfig(p2p_means=0, p2p_weights=0, p2p_duality=0))
    assert same_options({**read_options(none), "loss.p2p_target": "softmax"}, none)  # which older versions recorded


def test_an_option_that_did_not_exist_counts_as_its_default() -> None:
    config = Config(loss=LossConfig(name="ce"))
    recorded = {name: value for name, value in read_options(config).items() if name != "data.validation"}
    assert same_options(recorded, config)
    assert not same_options(recorded, dataclasses.replace(config, data=DataConfig(validation=0.2)))
    assert not same_options({**recorded, "loss.gone": 1}, config)


def test_own_images_need_a_split_that_all_runs_share(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    own = {"config": "own_images", "data.name": "own", "data.root": str(tmp_path / "photos")}
    path = written(
        tmp_path, {"baseline": "ce", "seeds": [0], "data": {"photos": own}, "methods": {"ce": {"loss.name": "ce"}}}
    )
    with pytest.raises(ValueError, match=r"give the config\.yaml of that run as config"):
        read_sweep(path)
