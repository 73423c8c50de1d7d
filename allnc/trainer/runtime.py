"""Device, number format, seeds, and what a run notes about its surroundings."""

from __future__ import annotations

import platform
import random
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import torch

from allnc._version import __version__
from allnc.config import TrainConfig
from allnc.ops._common import Backend, resolve_backend


def pick_device(config: TrainConfig) -> torch.device:
    """Return the device of a run.

    Raises:
        ValueError: a GPU was asked for and none can be used.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("train.device must be cpu or auto here; got cuda, and torch sees no usable GPU")
    use_gpu = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
    return torch.device("cuda" if use_gpu else "cpu")


def check_backend(backend: Backend, device: torch.device) -> None:
    """Raise ValueError when the ops' backend cannot run here, before there is a batch to run it on."""
    try:
        resolve_backend(
            backend, op="loss.backend", device=device, dtype=torch.float32, supported=("cpp", "triton", "cuda")
        )
    except RuntimeError as error:  # built without it, or without Triton
        raise ValueError(str(error)) from error


def pick_precision(config: TrainConfig, device: torch.device) -> torch.dtype:
    """Return the autocast type; float32 means no autocast.

    `auto` takes bf16 where the hardware has matrix units for it. Without them it is slower than fp32, emulated or not:
    with AVX512-BF16 alone, forward and backward of a ResNet-8 take 1.2 times as long, and products of matrices 1.6
    times (n = 3 and 2, Intel Xeon). A GPU without it takes fp16 with a scaled loss, a CPU fp32.
    """
    named = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if config.precision != "auto":
        return named[config.precision]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    # A private name: when another torch lacks it, fp32 is the safe answer.
    return torch.bfloat16 if getattr(torch.cpu, "_is_amx_tile_supported", bool)() else torch.float32


def pick_matmul_precision(config: TrainConfig, device: torch.device) -> str:
    """Return how float32 matrices are multiplied: as configured; `auto` is high (TF32) on a GPU, highest on a CPU.

    It decides for P2P, the collapse metrics on the device and every layer outside autocast. 16-bit types are not
    affected.
    """
    if config.matmul_precision != "auto":
        return config.matmul_precision
    return "high" if device.type == "cuda" else "highest"


def prepare(config: TrainConfig, device: torch.device) -> None:
    """Let torch multiply, and use cores, as a run on this device wants it; for the whole process."""
    torch.set_float32_matmul_precision(pick_matmul_precision(config, device))
    if device.type == "cpu":
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        torch.set_flush_denormal(True)  # denormals of a nearly perfect fit slow CPU kernels tenfold


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch (weights, dropout); loaders have their own."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def random_state() -> dict[str, Any]:
    """Return the state of the global generators in types that torch.load(weights_only=True) accepts."""
    kind, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Set the global generators to a state from `random_state`."""
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    kind, numpy_keys, *rest = state["numpy"]
    np.random.set_state((kind, numpy_keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def dropout_state(device: torch.device) -> list[torch.Tensor]:
    """Return the state of the generators from which a forward draws on a device."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def restore_dropout_state(states: list[torch.Tensor], device: torch.device) -> None:
    """Set them to a state from `dropout_state`."""
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


def versions() -> dict[str, str]:
    """Return the versions that decide a run's numbers."""
    return {
        "allnc": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def git_commit() -> str | None:
    """Return the commit of the source tree, with `-dirty` when it has changes; None outside a checkout."""
    source = Path(__file__).resolve().parents[2]
    if not (source / ".git").exists():
        return None
    try:
        described = subprocess.run(
            ["git", "-C", str(source), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip()
