"""Trained runs as files that other programs load without allnc; each is compared with the run before it stands.

    safetensors    weights of the encoder and of one linear layer; what they mean stands in a .json beside them
    torch          torch.export's program (.pt2): torch.export.load(FILE).module()
    onnx           ONNX, for onnxruntime and others

All have any number of images in a batch, and the classes, the mean and deviation of the pixels and more as JSON: in the
metadata of the file under `allnc`, and in the .json.

Legend: N images, c channels, H, W height and width, F features, C classes.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor
from torch.nn import functional as F

from allnc._version import __version__
from allnc.config import Config
from allnc.inference.network import PlainNetwork
from allnc.inference.predictor import Predictor
from allnc.trainer.folder import sync, temporary_of, write_temporary
from allnc.trainer.options import to_dict

OPSET = 18
CLOSE = 1e-4  # largest difference of a logit from the run's, as a share of the largest logit
CHECKED = (1, 5)  # images in the batches that are compared
KEY, INPUT, OUTPUT = "allnc", "images", "logits"

Run = Callable[[Tensor], Tensor]


class Exported(NamedTuple):
    """What was written: the files, and the largest difference of a logit, also as a share of the largest logit."""

    files: tuple[Path, ...]
    difference: float
    relative: float


def export(predictor: Predictor, kind: str, path: Path, *, raw: bool = False) -> Exported:
    """Write a run's network for other programs.

    Args:
        predictor: the run, on the CPU.
        kind: safetensors, torch or onnx.
        path: the file, which is replaced; for safetensors a .json of the same name is, too.
        raw: let the network take uint8 images [N, c, H, W] and normalise them itself; not with safetensors.

    Raises:
        ValueError: the network cannot be exported, what was written differs from the run, or a package is missing.
    """
    card = predictor.card
    if raw and len(card.shape) != 3:
        raise ValueError("--raw needs a run on images; got one on stored features, which are not normalised")
    network = PlainNetwork(predictor.model, (card.mean, card.std) if raw else None)
    description = describe(predictor, network)
    example = _examples(predictor, raw, 2)
    encode, read = {
        "safetensors": (_safetensors, _read_safetensors),
        "torch": (_torch, _read_torch),
        "onnx": (_onnx, _read_onnx),
    }[kind]
    with _quiet():
        files = {path: encode(network, example, description)}
    if kind == "safetensors":
        files[path.with_suffix(".json")] = (json.dumps(description, indent=2) + "\n").encode()
    try:
        for file, data in files.items():
            write_temporary(file, data)
        difference, relative = _compare(predictor, read(temporary_of(path), network), raw)
        for file in files:  # the weights first
            temporary_of(file).replace(file)
    finally:
        for file in files:
            temporary_of(file).unlink(missing_ok=True)
    sync(path.parent)
    return Exported(tuple(files), difference, relative)


def describe(predictor: Predictor, network: PlainNetwork) -> dict[str, Any]:
    """Return what a program must know of the network, as JSON has it."""
    card, data = predictor.card, predictor.config.data
    shape = list(card.shape)
    if network.size is not None:
        shape[1:] = [data.image_size * 8 // 7] * 2
    described: dict[str, Any] = {
        "input": INPUT,
        "output": OUTPUT,
        "shape": ["N", *shape],
        "classes": list(predictor.classes),
        "class_counts": list(card.class_counts),
    }
    if len(shape) == 3:
        described |= {
            "input_type": "uint8, 0 to 255" if network.raw else "float32, (pixels / 255 - mean) / std by channel",
            "mean": list(card.mean),
            "std": list(card.std),
            "transform": _steps(predictor),
        }
    else:
        described["input_type"] = "float32, features as python -m allnc.features stores them"
    name = predictor.config.model.name
    described |= {
        "model": name,
        "timm": name.removeprefix("timm:") if name.startswith("timm:") else None,
        "tune": predictor.config.model.tune,
        "features_at_unit_length": network.normalises,
        "crops": 1 if network.size is None else 5,
        "epoch": predictor.epoch,
        "allnc": __version__,
        "config": _without_places(predictor.config),
    }
    return described


def _without_places(config: Config) -> dict[str, Any]:
    """Return a run's configuration without where its files lie, which is nobody else's business."""
    values = to_dict(config)
    values["out"] = None
    for name in ("root", "train_list", "test_list", "index"):
        values["data"][name] = None
    values["model"]["weights"] = None
    return values


def _steps(predictor: Predictor) -> list[str]:
    """Say what becomes of an image before it is normalised."""
    channels, height, width = predictor.card.shape
    colour = "grey (8 bits)" if channels == 1 else "RGB (8 bits)"
    first = [f"upright by EXIF, what is transparent over white, {colour}"]
    if predictor.transform.of_arrays:
        return [*first, f"the middle of the aspect {width}:{height}, bilinear to {height} x {width} pixels"]
    if predictor.config.data.fit == "whole":
        side = f"{height} x {width} pixels"
        return [*first, f"bilinear with antialiasing until all of it fits into {side}, the border repeated beside it"]
    square, side = height * 8 // 7, height if predictor.config.data.test_crops == 1 else height * 8 // 7
    return [*first, f"shorter side to {square} pixels, bilinear with antialiasing", f"centre crop of {side} x {side}"]


def _examples(predictor: Predictor, raw: bool, number: int) -> Tensor:
    """Return smooth random images, [number, c, H, W], as the network takes them (or features [number, F])."""
    random = np.random.RandomState(number)
    if len(predictor.card.shape) == 1:
        return torch.from_numpy(random.randn(number, *predictor.card.shape).astype(np.float32))
    channels = predictor.card.channels
    coarse = torch.from_numpy(random.rand(number, channels, 4, 4).astype(np.float32) * 255)
    height, width = predictor.transform.size
    pixels = F.interpolate(coarse, (height, width), mode="bilinear").round().to(torch.uint8)
    return pixels if raw else predictor.transform.normalised(pixels)


@torch.inference_mode()
def _compare(predictor: Predictor, exported: Run, raw: bool) -> tuple[float, float]:
    """Return the largest difference of a logit between what was written and the run, in batches of several sizes."""
    difference = largest = 0.0
    for number in CHECKED:
        images = _examples(predictor, raw, number)
        wanted = predictor.model(predictor.transform.normalised(images) if raw else images)
        got = exported(images)
        if got.shape != wanted.shape or not bool(torch.isfinite(got).all()):
            raise ValueError(f"what was exported must give finite logits {list(wanted.shape)}; got {list(got.shape)}")
        difference = max(difference, float((got - wanted).abs().max()))
        largest = max(largest, float(wanted.abs().max()))
    relative = difference / largest if largest else difference
    if relative > CLOSE:
        raise ValueError(
            f"what was exported must give the run's logits; they differ by {difference:.3g}, {relative:.1e} of the "
            f"largest, which is more than {CLOSE:.0e}: nothing was written; try another --format"
        )
    return difference, relative


def _safetensors(network: PlainNetwork, example: Tensor, description: dict[str, Any]) -> bytes:
    return save(_named(network), {KEY: json.dumps(description)})


def _named(network: PlainNetwork) -> dict[str, Tensor]:
    """Return the weights under the names of the .json: encoder.*, classifier.weight, classifier.bias."""
    state = {name: value.contiguous().clone() for name, value in network.state_dict().items()}
    return {name if name.startswith("encoder.") else f"classifier.{name}": value for name, value in state.items()}


def _read_safetensors(path: Path, network: PlainNetwork) -> Run:
    state = load_file(path)
    network.load_state_dict({name.removeprefix("classifier."): value for name, value in state.items()})
    return network


def _torch(network: PlainNetwork, example: Tensor, description: dict[str, Any]) -> bytes:
    try:
        program = torch.export.export(
            network, (example,), dynamic_shapes=({0: torch.export.Dim("N", min=1)},), strict=False
        )
    except Exception as error:  # what a network's Python code drives the tracer to
        raise ValueError(_unsuited("torch", error)) from error
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={KEY: json.dumps(description)})
    return buffer.getvalue()


def _read_torch(path: Path, network: PlainNetwork) -> Run:
    return torch.export.load(io.BytesIO(path.read_bytes())).module()


def _onnx(network: PlainNetwork, example: Tensor, description: dict[str, Any]) -> bytes:
    onnx = _package("onnx")
    _package("onnxscript")
    try:
        program = torch.onnx.export(
            network,
            (example,),
            dynamo=True,
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=({0: torch.export.Dim("N", min=1)},),
            verbose=False,
        )
        assert program is not None
        model = program.model_proto
    except Exception as error:  # what a network's Python code drives the exporter to
        raise ValueError(_unsuited("onnx", error)) from error
    onnx.helper.set_model_props(model, {KEY: json.dumps(description)})
    return model.SerializeToString()


def _read_onnx(path: Path, network: PlainNetwork) -> Run:
    session = _package("onnxruntime").InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])


def _package(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"--format onnx needs the package {name}: pip install 'allnc[export]'; {error}") from error


def _unsuited(kind: str, error: Exception) -> str:
    other = "onnx or safetensors" if kind == "torch" else "torch or safetensors"
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    return f"--format {kind} cannot express this network: {reason}; try --format {other}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what exporters print and warn about their own ways from a reader who can do nothing about it."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
