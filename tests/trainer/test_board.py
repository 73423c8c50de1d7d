"""TensorBoard's files of a finished run: the pictures, the options and the final measures are in them, once."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from allnc.config import Config, DataConfig, LossConfig, ModelConfig, TrainConfig
from allnc.trainer import loop

TINY = Config(
    data=DataConfig(max_per_class=6, imbalance_ratio=3, augmentation="none", views=1, many=10, few=5),
    model=ModelConfig(name="resnet8", width=2),
    loss=LossConfig(name="ce"),
    train=TrainConfig(
        epochs=2, batch_size=16, precision="fp32", device="cpu", threads=1, collapse_every=1, collapse_layers=True
    ),
)


def test_pictures_options_and_final_measures(tmp_path: Path) -> None:
    loop.train(TINY, tmp_path / "run", Console(file=io.StringIO()))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    events = EventAccumulator(str(tmp_path / "run"), {"images": 0, "scalars": 0})
    events.Reload()
    assert sorted(events.Tags()["images"]) == ["angles", "confusion", "curves"]
    (picture,) = events.Images("confusion")
    assert picture.step == 2 and picture.width > 300 and picture.encoded_image_string[:4] == b"\x89PNG"
    assert [s.step for s in events.Scalars("loss")] == [1, 2]  # those of the epochs are as they were
    assert [s.step for s in events.Scalars("layers/features/nc1")] == [1, 2]
    (final,) = events.Scalars("final/accuracy")
    assert final.step == 2 and abs(final.value - summary["accuracy"]) < 1e-4
    assert not any(tag in events.Tags()["scalars"] for tag in ("final/seed", "final/epochs"))

    read = plugin_data_pb2.HParamsPluginData.FromString  # type: ignore[attr-defined]
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    options = read(content).session_start_info.hparams
    assert options["loss.name"].string_value == "ce" and options["train.epochs"].number_value == 2
    assert options["data.mean"].string_value == "None" and "out" not in options
    experiment = events.SummaryMetadata("_hparams_/experiment").plugin_data.content
    measures = [info.name.tag for info in read(experiment).experiment.metric_infos]
    assert "final/accuracy" in measures and set(measures) <= set(events.Tags()["scalars"])
    assert not [path for path in (tmp_path / "run").iterdir() if path.is_dir() and path.name != "plots"]

    assert len(list((tmp_path / "run").glob("events.*"))) == 1
    longer = replace(TINY, train=replace(TINY.train, epochs=3))
    loop.train(longer, tmp_path / "run", Console(file=io.StringIO()), mode="resume")
    assert len(list((tmp_path / "run").glob("events.*"))) == 2  # each process writes one
    events.Reload()
    assert [s.step for s in events.Scalars("loss")] == [1, 2, 3]
    assert [s.step for s in events.Scalars("final/accuracy")] == [2, 3]
