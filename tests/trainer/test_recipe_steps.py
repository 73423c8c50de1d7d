"""A training step of every recipe goes through the fused ops: on the CPU those in C++, and Triton's as interpreted."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from allnc import _extension
from allnc.config import Config, DataConfig
from allnc.data import Batch, ImageSet
from allnc.trainer.command import parse
from allnc.trainer.run import Run
from allnc.trainer.step import train_step
from tests.backends import needs_interpreter
from tests.launches import Dispatches, count_launches

# Those of lightly tuned models (_vit) have another loss.
STEMS = sorted(path.stem for path in (Path(__file__).parents[2] / "allnc" / "recipes").glob("*.yaml"))
RECIPES = [stem for stem in STEMS if not stem.endswith("_vit")]
NO_SIMPLEX = ("inat18", "kana_lt", "cyrillic_lt")  # more classes than features, and one more
CLASSES, IMAGES = 12, 8
needs_cpp = pytest.mark.skipif(not _extension.has_cpp(), reason="the C++ extension is not built")


def tiny_run(name: str, **loss: Any) -> tuple[Run, Batch]:
    """A run of the recipe's losses and heads on a small network, and a batch of random images in bfloat16 autocast."""
    config, _ = parse(["--config", name])
    # F = 8 features leave no room for a simplex of 12 classes, as iNaturalist's 2,048 do not for 8,142.
    width = 2 if name in NO_SIMPLEX else 4
    model = dataclasses.replace(
        config.model, name="resnet8", width=width, pretrained=False, projection_hidden=None, projection_dim=16
    )
    train = dataclasses.replace(config.train, batch_size=IMAGES, precision="bf16", device="cpu", threads=1)
    data = DataConfig(views=config.data.views, imbalance="none", augmentation="none")
    config = Config(data=data, model=model, train=train, loss=dataclasses.replace(config.loss, **loss))
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(CLASSES)
    pixels = torch.randint(0, 256, (CLASSES, 3, 8, 8), generator=generator, dtype=torch.uint8)
    images = ImageSet(labels=labels, num_classes=CLASSES, mean=(0.5,) * 3, std=(0.5,) * 3, images=pixels)
    rows = torch.randn(IMAGES * data.views, 3, 8, 8, generator=generator)
    seen = torch.randint(0, CLASSES, (IMAGES,), generator=generator).repeat(data.views)
    return Run(config, images=(images, images)), Batch(rows, seen, IMAGES, 0)


@pytest.mark.parametrize("name", ["digits_lt", "fashion_lt", "cifar10_lt", "cifar100_lt", "kana_lt", "cyrillic_lt"])
def test_which_recipes_have_a_simplex(name: str) -> None:
    """Of the network that the recipe trains, not of the small one here."""
    config, _ = parse(["--config", name])
    num_classes = {"cifar100_lt": 100, "kana_lt": 142, "cyrillic_lt": 66}.get(name, 10)
    _, weights, duality = config.loss.p2p(num_classes, 4 * config.model.width)
    assert weights == duality == float(name not in NO_SIMPLEX)


def step(run: Run, batch: Batch) -> Dispatches:
    run.model.train()
    with Dispatches() as ops:
        parts = train_step(run, batch, progress=0.1)
    assert all(torch.isfinite(value) for value in parts.values())
    return ops


@needs_cpp
@pytest.mark.parametrize("name", RECIPES)
def test_on_the_cpu_a_step_is_one_call_of_each_fused_op(name: str) -> None:
    run, batch = tiny_run(name)
    assert (run.loss.pairings == ["means"]) == (name in NO_SIMPLEX)
    ops = step(run, batch)
    counts = Counter(ops.named("allnc"))
    assert counts.pop("validated_labels") > 0
    assert counts == {
        "class_mean_ema": 2,  # of the features and of the projections
        "hycon_loss": 1,
        "p2p_values": 1,  # all pairings
        "hycon_loss_backward": 1,
        "class_mean_ema_backward": 2,
    }
    backends = {op.overloadpacket.__name__: arguments for op, arguments, _ in ops.of("allnc")}
    assert backends["hycon_loss"][-1] == "cpp" and backends["class_mean_ema"][-1] == "cpp"
    assert backends["hycon_loss"][0].dtype == torch.bfloat16, "autocast's type must reach the kernel"


@needs_interpreter
@pytest.mark.parametrize("name", RECIPES)
def test_triton_launches_all_of_it_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run, batch = tiny_run(name, backend="triton")
    launched = count_launches(monkeypatch)
    ops = step(run, batch)
    counts = Counter(ops.named("allnc"))
    assert (counts["hycon_loss_backward"], counts["p2p_blocks_backward"]) == (1, 1)
    backward = {"hycon_loss_bwd_kernel", "p2p_bwd_kernel", "unit_bwd_sums_kernel", "unit_bwd_rows_kernel"}
    if run.loss.pairings == ["means"]:  # no simplex: the classifier takes no part, and the contrast goes by itself
        assert (counts["hycon_loss"], counts["p2p_blocks"], counts["all_around"]) == (1, 1, 0)
        forward = {"hycon_prepare_kernel", "hycon_loss_fwd_kernel", "p2p_fwd_kernel", "p2p_finish_kernel"}
    else:
        assert counts["all_around"] == 1 and not {"hycon_loss", "p2p_blocks"} & set(counts)
        forward = {"hycon_prepare_kernel", "all_around_fwd_kernel"}
    assert not {"hycon_lse", "p2p_values"} & set(counts)
    assert Counter(launched) == dict.fromkeys({"unit_sums_kernel", "unit_rows_kernel", *forward, *backward}, 1)
    arguments = next(
        arguments for op, arguments, _ in ops.of("allnc") if "backward" not in str(op) and len(arguments) > 8
    )
    assert arguments[0].dtype == torch.bfloat16, "autocast's type must reach the kernel"


@pytest.mark.parametrize(("asked", "got"), [("auto", "highest"), ("high", "high"), ("medium", "medium")])
def test_the_precision_of_float32_products_is_set(asked: Any, got: str) -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium" if got != "medium" else "high")
        config, _ = parse(["--config", "digits_lt", "--train.matmul_precision", asked, "--train.device", "cpu"])
        Run(config)
        assert torch.get_float32_matmul_precision() == got
    finally:
        torch.set_float32_matmul_precision(before)
