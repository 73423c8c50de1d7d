"""The trainer's parts: learning rate, parameter groups, precision, atomic files, checkpoints, records."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from allnc.config import Config, TrainConfig
from allnc.trainer import checkpoint
from allnc.trainer.folder import CHECKPOINT, STATE, WEIGHTS, write_whole
from allnc.trainer.optim import build_optimizer, learning_rate
from allnc.trainer.runlog import epoch_line, finite, read_lines
from allnc.trainer.runtime import (
    pick_device,
    pick_precision,
    random_state,
    restore_random_state,
    seed_everything,
)


def test_warm_up_and_cosine_by_hand() -> None:
    config = TrainConfig(epochs=10, lr=1.0, warmup_epochs=2)
    rates = [learning_rate(config, step, steps_per_epoch=2) for step in range(20)]
    assert rates[:5] == pytest.approx([1 / 5, 2 / 5, 3 / 5, 4 / 5, 1.0])
    assert rates[12] == pytest.approx(0.5)  # half of the 16 steps after the warm-up
    assert rates[19] == pytest.approx(0.5 * (1 + np.cos(np.pi * 15 / 16)))
    assert max(rates) == 1.0


def test_a_short_trial_still_reaches_its_peak() -> None:
    config = TrainConfig(epochs=2, lr=1.0, warmup_epochs=5)
    assert max(learning_rate(config, step, 10) for step in range(20)) == 1.0


def test_step_schedule_by_hand() -> None:
    config = TrainConfig(epochs=6, lr=1.0, warmup_epochs=0, schedule="step", milestones=(2, 4))
    rates = [learning_rate(config, epoch, steps_per_epoch=1) for epoch in range(6)]
    assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def test_weight_decay_spares_biases_and_normalisation() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 2))
    decayed, plain = build_optimizer(model, TrainConfig(weight_decay=0.1)).param_groups
    assert decayed["weight_decay"] == 0.1 and plain["weight_decay"] == 0
    assert [p.ndim for p in decayed["params"]] == [4, 2] and [p.ndim for p in plain["params"]] == [1] * 4


def test_precision() -> None:
    cpu = torch.device("cpu")
    assert pick_precision(TrainConfig(precision="bf16"), cpu) == torch.bfloat16
    assert pick_precision(TrainConfig(precision="fp32"), cpu) == torch.float32
    assert pick_precision(TrainConfig(), cpu) in (torch.bfloat16, torch.float32)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there() -> None:
    assert pick_device(TrainConfig()).type == "cpu"
    with pytest.raises(ValueError, match=r"train\.device must be cpu or auto here; got cuda"):
        pick_device(TrainConfig(device="cuda"))


def test_random_state_survives_a_file(tmp_path: Path) -> None:
    def draws() -> list[float]:
        return [random.random(), float(np.random.rand()), float(torch.rand(()))]

    seed_everything(5)
    torch.save(random_state(), tmp_path / "state.pt")
    first = draws()
    restore_random_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert draws() == first


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_whole(path, b"old")

    def full(_: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        write_whole(path, b"new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_checkpoint_round_trip(tmp_path: Path) -> None:
    model = {"w": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last), "n": torch.tensor(3)}
    config = Config(seed=9, train=TrainConfig(schedule="step", milestones=(3, 4)))
    checkpoint.save(tmp_path, config, epoch=4, model=model, training={"best": 1.5})
    again, epoch, weights = checkpoint.load_weights(tmp_path)
    assert again == config and epoch == 4
    manifest, again_weights, state = checkpoint.load(tmp_path)
    assert manifest.epoch == 4 and manifest.config == config and state == {"best": 1.5}
    for tensors in (weights, again_weights):
        assert all(torch.equal(tensors[name], value) for name, value in model.items())


def test_missing_and_damaged_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"with a checkpoint to resume; got .* without checkpoint\.json; --overwrite"):
        checkpoint.load(tmp_path)
    with pytest.raises(ValueError, match=r"must be a run folder with last\.safetensors"):
        checkpoint.load_weights(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(b"half of it")
    with pytest.raises(ValueError, match="must be a checkpoint; it cannot be read"):
        checkpoint.load_weights(tmp_path)
    (tmp_path / STATE).write_bytes(b"half of it")
    with pytest.raises(ValueError, match=r"an older version of allnc wrote state\.pt"):
        checkpoint.load(tmp_path)
    (tmp_path / CHECKPOINT).write_text("{}")
    for load in (checkpoint.load, checkpoint.load_weights):
        with pytest.raises(ValueError, match=r"checkpoint\.json must be the description of a checkpoint"):
            load(tmp_path)


def test_half_a_record_is_left_out_and_a_damaged_line_is_not(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_lines(path) == []
    path.write_text(json.dumps({"epoch": 1}) + '\n\n{"epoch": "x"}\n[1]\n{"epoch": 2}\n{"epoch": 3, "lo')
    lines = read_lines(path)
    assert [line.record for line in lines] == [{"epoch": 1}, None, None, None, {"epoch": 2}]
    assert [line.number for line in lines] == [1, 2, 3, 4, 5] and lines[2].text == b'{"epoch": "x"}'


def test_numbers_that_json_cannot_hold() -> None:
    assert [finite(v) for v in (1.5, float("inf"), float("nan"), None, 3)] == [1.5, None, None, None, 3]


def test_the_line_of_an_epoch() -> None:
    record = {
        "epoch": 3,
        "loss": 1.25,
        "loss_cls": 0.5,
        "loss_hycon": -1.0,
        "loss_p2p_means": 0.0,
        "loss_p2p_weights": None,
        "loss_p2p_duality": 0.25,
        "eta": 0.5,
    }
    record |= {"lr": 0.1, "accuracy": 71.234, "many": 90.0, "medium": 60.0, "few": None, "seconds": 1.26}
    assert epoch_line(record, 40) == (
        "  3/40 loss 1.250 (cls 0.500; hycon -1.000; p2p mw 0.250) η 0.50 lr 0.1000 "
        "acc 71.2 (many 90.0 medium 60.0 few -) 1.3 s"
    )
    assert "(cls 0.500; hycon -1.000) η" in epoch_line(record | {"loss_p2p_duality": 0.0}, 40)  # no P2P is computed
