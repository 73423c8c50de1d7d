"""Random cases for configurations, command lines and the files of a run folder."""

from __future__ import annotations

import contextlib
import functools
import io
import shutil
import tempfile
from pathlib import Path
from random import Random
from typing import Any

import torch
import yaml
from mutate import mutated
from rich.console import Console

from allnc.config import Config, DataConfig, ModelConfig, TrainConfig
from allnc.trainer import checkpoint, loop, state
from allnc.trainer.command import RECIPES
from allnc.trainer.divergence import check_weights
from allnc.trainer.folder import CHECKPOINT, CONFIG, METRICS, STATE, WEIGHTS, RunFolder
from allnc.trainer.options import dotted, from_dict, to_dict
from allnc.trainer.planning import plan
from allnc.trainer.runlog import RunLog

TINY = Config(
    data=DataConfig(max_per_class=20, imbalance_ratio=4, many=15, few=8),
    model=ModelConfig(name="resnet8", width=2, projection_dim=8),
    train=TrainConfig(epochs=2, batch_size=32, precision="fp32", device="cpu", threads=1, collapse_every=0),
)
ODD: tuple[Any, ...] = (
    *(None, True, False, [], [1], {}, {"a": 1}, "", " ", "x", "null", "~", "\0", "\ud800", "é\n", "1e5", "0x10", "1_0"),
    *(0, 1, -1, 2, 7, 2**31, 2**32, 2**63, 10**30, 0.0, -0.0, 0.5, 1e-45, 1e-300, 1e20, 1e38, 1e300),
    *(float("inf"), float("nan"), "inf", "nan", "-1", "1.5", "auto", "none", "timm:", "timm:nothing", "resnet8"),
)


def configs(random: Random, folder: Path) -> None:
    """Command lines and YAML with odd values: refused on one line, or a run that takes a step or says why not."""
    recipe = random.choice(sorted(RECIPES.glob("*.yaml")))
    values = yaml.safe_load(recipe.read_text())
    words: list[str] = []
    options = sorted(dotted(Config()))
    for _ in range(random.randrange(4)):
        name, value = random.choice(options), random.choice(ODD)
        if random.random() < 0.5:
            words += [f"--{name}", str(value)] if random.random() < 0.5 else [f"--{name}={value}"]
        else:
            section, _, key = name.partition(".")
            if key and isinstance(values.get(section), dict) and random.random() < 0.8:
                values[section][key] = value
            else:
                values[section] = value
    text = yaml.safe_dump(values, sort_keys=False).encode(errors="surrogatepass")
    path = folder / "recipe.yaml"
    path.write_bytes(mutated(random, text) if random.random() < 0.4 else text)
    words = ["--config", str(path), *words]
    if random.random() < 0.2:
        words.insert(
            random.randrange(len(words)), random.choice(("--resume", "--overwrite", "--x", "", "--", "-o", "é"))
        )
    out = folder / "run"
    shutil.rmtree(out, ignore_errors=True)
    try:
        config = plan([*words, "--out", str(out)]).config
    except (ValueError, OSError) as error:
        return readable(error)
    except SystemExit:  # --help
        return
    assert from_dict(to_dict(config)) == config
    assert from_dict(yaml.safe_load(yaml.safe_dump(to_dict(config)))) == config
    if config.data.name == "digits" and _is_small(config):
        try:
            run = loop.Run(config)
            batch = next(iter(run.loader.epoch(0)))
            total = loop.train_step(run, batch, progress=0.0)["loss"]
            if bool(total.isfinite()):
                check_weights(run)
        except ValueError as error:
            readable(error)


def _is_small(config: Config) -> bool:
    model, data, train = config.model, config.data, config.train
    sizes = (model.width, model.projection_dim, model.projection_hidden or 1)
    large_model = max(sizes) > 256 or (model.name.startswith("resnet") and int(model.name[6:]) > 50)
    return not large_model and data.views <= 8 and train.batch_size * data.views < 2000 and (train.threads or 1) <= 4


def readable(error: Exception) -> None:
    """Check that an error is one of those that end a command with one line."""
    if not isinstance(error, (ValueError, OSError)) or isinstance(error, UnicodeError) or len(str(error)) > 2000:
        raise AssertionError(f"not a readable error: {type(error).__name__}: {str(error)!r}") from error


def checkpoints(random: Random, folder: Path) -> None:
    """Run folders with damaged files: refused and left alone, or resumed with exactly the weights that were saved."""
    run = folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    for name, data in _good_run().items():
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_bytes(data)
    for name in random.choices((CONFIG, CHECKPOINT, WEIGHTS, STATE, METRICS), k=random.choice((1, 1, 2))):
        damage(random, run / name)
    before = contents(run)
    try:
        config, epoch, weights = checkpoint.load_weights(run)
        if (run / CHECKPOINT).exists():  # else nothing says what the weights should be
            assert config == TINY and epoch == 1 and _same(weights)
    except (ValueError, OSError) as error:
        readable(error)
    try:
        plan(["--out", str(run), "--overwrite"])
    except (ValueError, OSError) as error:
        readable(error)
    try:
        config, path, mode, *_ = plan(["--resume", "--out", str(run)])
        with RunFolder(path, mode):
            resumed = loop.Run(config, _images())
            state.restore(resumed, path)
            with RunLog(path, Console(file=io.StringIO()), epochs=2, done=resumed.epoch):
                pass
    except (ValueError, OSError) as error:
        readable(error)
        assert contents(run) == before, "a refusal has changed the folder"
        return
    assert _same(resumed.model.state_dict()) and resumed.epoch == 1
    assert to_dict(config) | {"out": None} == to_dict(TINY) or resumed.changes


def damage(random: Random, path: Path) -> None:
    """Damage a file, or put something else in its place."""
    kind = random.randrange(8)
    data = path.read_bytes() if path.is_file() else b""
    if path.is_dir():
        return
    if kind == 0:
        path.unlink(missing_ok=True)
    elif kind == 1:
        path.unlink(missing_ok=True)
        path.mkdir()
    elif kind == 2:
        path.write_bytes(data[: random.randrange(len(data) + 1)])
    elif kind == 3 and data:
        flipped = bytearray(data)
        flipped[random.randrange(len(data))] ^= 1 << random.randrange(8)
        path.write_bytes(flipped)
    elif kind == 4 and path.name == CONFIG and isinstance(values := _values(data), dict):
        section, _, key = random.choice(sorted(dotted(Config()))).partition(".")
        if key and isinstance(values.get(section), dict):
            values[section][key] = random.choice(ODD)
        path.write_bytes(yaml.safe_dump(values).encode(errors="surrogatepass"))
    else:
        path.write_bytes(mutated(random, data))


def _values(data: bytes) -> Any:
    try:
        return yaml.safe_load(data)
    except yaml.YAMLError:  # it was damaged before
        return None


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _same(weights: dict[str, torch.Tensor]) -> bool:
    wanted = _good_weights()
    return wanted.keys() == weights.keys() and all(torch.equal(value, weights[name]) for name, value in wanted.items())


@functools.cache
def _images() -> Any:
    from allnc.data import load

    return load(TINY.data)


@functools.cache
def _good_run() -> dict[str, bytes]:
    torch.set_num_threads(1)
    train_epoch = loop.train_epoch

    def stopped(run: loop.Run, log: RunLog) -> dict[str, float]:
        if run.epoch == 1:
            raise KeyboardInterrupt
        return train_epoch(run, log)

    with tempfile.TemporaryDirectory() as place:
        loop.train_epoch = stopped
        with contextlib.suppress(KeyboardInterrupt):
            loop.train(TINY, Path(place), Console(file=io.StringIO()))
        loop.train_epoch = train_epoch
        return {name: data for name, data in contents(Path(place)).items() if "tfevents" not in name}


@functools.cache
def _good_weights() -> dict[str, torch.Tensor]:
    from safetensors.torch import load

    return load(_good_run()[WEIGHTS])
