"""timm's encoders, with random, published or given weights; nothing is ever half loaded."""

from __future__ import annotations

import os
import socket
import urllib.request
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import nn

from allnc.config import ModelConfig

_PATIENCE = 5.0  # seconds for a connection to the server of the weights


def timm_encoder(config: ModelConfig, in_channels: int, image_size: tuple[int, ...] = ()) -> tuple[nn.Module, int]:
    """Return a timm model without its classifier, and the width of its features.

    Args:
        config: name, pretrained and weights.
        in_channels: channels of the images; timm fits the first layer of pretrained weights to them.
        image_size: height and width of the images, for which a model of another fixed size is built where it does not
            take them as it is; timm then resamples the position embeddings of its weights. Where the patches do not
            part the size evenly, the convolution that cuts them leaves out the rest at the right and below without a
            word: with patches of 16 pixels the last 4 of 100. (): the model's own.

    Raises:
        ValueError: timm does not know the model, its weights cannot be got or read, or do not fit it.
    """

    name = _known(config)
    if config.pretrained and config.weights is not None:
        encoder = _from_file(name, os.path.expanduser(config.weights), in_channels, image_size)
    else:
        if config.pretrained:
            _check_reachable(name)
        options = {"pretrained": config.pretrained, "num_classes": 0, "in_chans": in_channels}
        try:
            encoder = _create(name, image_size, options)
        except Exception as error:  # timm's downloads raise what its network libraries raise
            if not config.pretrained:
                raise
            raise _no_weights(name, error) from error
    # Some architectures keep a wide layer before the classifier even without one.
    width: Any = getattr(encoder, "head_hidden_size", None) or encoder.num_features
    return encoder, int(width)


def _create(name: str, image_size: tuple[int, ...], options: dict[str, Any]) -> nn.Module:
    """Build a timm model that takes images of this size, if it can be built for them."""
    import timm

    encoder = timm.create_model(name, **options)
    published = timm.get_pretrained_cfg(name, allow_unregistered=True)
    own = published is None or not published.fixed_input_size or image_size in ((), tuple(published.input_size[1:]))
    if own or _takes(encoder, options["in_chans"], image_size):
        return encoder
    try:
        return timm.create_model(name, img_size=image_size, **options)
    except (AssertionError, RuntimeError, TypeError, ValueError):  # what does not fit a window or a stride
        return encoder


@torch.no_grad()
def _takes(encoder: nn.Module, channels: int, image_size: tuple[int, ...]) -> bool:
    """Whether a model takes images of this size; models refuse them in many ways."""
    training = encoder.training
    try:
        encoder.eval()(torch.zeros(1, channels, *image_size))
    except (AssertionError, RuntimeError, ValueError):
        return False
    finally:
        encoder.train(training)
    return True


def _check_reachable(name: str) -> None:
    """Raise ValueError at once where weights are neither here nor to be had: the libraries try for a minute."""
    import timm
    from huggingface_hub import constants, try_to_load_from_cache

    published = timm.get_pretrained_cfg(name, allow_unregistered=True)
    if published is None or not published.hf_hub_id or constants.HF_HUB_OFFLINE or urllib.request.getproxies():
        return
    files = (published.hf_hub_filename, "model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors")
    if any(isinstance(try_to_load_from_cache(published.hf_hub_id, file), str) for file in files if file):
        return
    server = urlsplit(constants.ENDPOINT)
    try:
        socket.create_connection((server.hostname, server.port or 443), timeout=_PATIENCE).close()
    except OSError as error:
        raise _no_weights(name, f"no connection to {server.hostname} ({error})") from error


def _no_weights(name: str, reason: object) -> ValueError:
    return ValueError(
        f"model.pretrained could not get weights for {name}: {_line(reason)}; name a file of them by model.weights, or "
        "set model.pretrained false to start anew"
    )


def pixel_statistics(config: ModelConfig) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Return mean and deviation of the pixels that a pretrained model's weights were trained with, by channel.

    None where there is nothing to return: a model of random weights, or one that timm has no weights of.

    Raises:
        ValueError: timm does not know the model.
    """
    if not config.pretrained:
        return None
    import timm

    pretrained = timm.get_pretrained_cfg(_known(config), allow_unregistered=True)
    return None if pretrained is None else (tuple(pretrained.mean), tuple(pretrained.std))


def _known(config: ModelConfig) -> str:
    """Return timm's name of the model."""
    import timm

    name = config.name.removeprefix("timm:")
    if not timm.is_model(name):
        near = timm.list_models(f"*{name}*")[:3] or timm.list_models(f"{name[:6]}*")[:3]
        hint = f"; near it: {', '.join(near)}" if near else ""
        raise ValueError(f"model.name must be a model that timm knows; got {name!r}{hint}")
    try:
        timm.get_pretrained_cfg(name, allow_unregistered=True)
    except RuntimeError:  # what stands behind the dot names weights, and is not among those of the model
        model, tag = name.split(".", 1)
        tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{model}.*")]
        hint = f"it has {', '.join(tags[:5])}{' ...' if len(tags) > 5 else ''}" if tags else "it has none"
        raise ValueError(f"model.name must name weights that timm knows of {model}; got {tag!r}: {hint}") from None
    return name


def _from_file(name: str, path: str, in_channels: int, image_size: tuple[int, ...]) -> nn.Module:
    """Build a timm model with the weights of a file, each of which must have its place, and the other way round.

    timm is lenient about names as soon as the number of classes is not that of the weights. So the model is built with
    the file's own classifier, or none, as the file has it, and loses it afterwards.
    """
    import timm

    if not os.path.isfile(path):
        fault = "is a folder" if os.path.isdir(path) else "is missing"
        raise ValueError(f"model.weights must be a file with weights of {name} (.safetensors, .pth); {path} {fault}")
    published = timm.get_pretrained_cfg(name, allow_unregistered=True)
    try:
        classes = _classes_of(timm.models.load_state_dict(path), published.classifier if published else None)
    except Exception as error:  # a broken file raises whatever its bytes happen to mean
        raise ValueError(
            f"model.weights must be a file with weights of {name}; {path} cannot be read: {_line(error)}"
        ) from error
    # The number of classes of a foreign format (the original one of CLIP) stands nowhere: it is that of timm's own.
    options = [classes] if classes or published is None else [0, published.num_classes]
    problem: Exception | None = None
    for number in options:
        overlay = {"file": path, "num_classes": number, "custom_load": False}
        given = {"pretrained": True, "num_classes": number, "in_chans": in_channels, "pretrained_cfg_overlay": overlay}
        try:
            encoder = _create(name, image_size, given)
        except Exception as error:  # torch's names and shapes, or what a reader of foreign formats stumbles on
            problem = problem or error
            continue
        if number:
            encoder.reset_classifier(0)  # pyright: ignore[reportCallIssue]
        return encoder
    assert problem is not None
    raise ValueError(f"model.weights must fit {name}; {path} does not: {_line(problem)}") from problem


def _classes_of(state: dict[str, Any], classifier: Any) -> int:
    """Return the rows of the classifier in a state, 0 where it has none; `classifier` is timm's name of it."""
    names = (classifier,) if isinstance(classifier, str) else tuple(classifier or ())
    rows = [state[f"{name}.weight"].shape[0] for name in names if f"{name}.weight" in state]
    return rows[0] if rows else 0


def _line(error: object) -> str:
    """Return what went wrong on one short line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:300] + " ..."
