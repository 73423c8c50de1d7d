"""What every op shares: accumulation types, argument checks and the choice of a backend.

Checks that need only shapes, types and devices run in Python and cost nothing under `torch.compile`. The one
check that needs values, label range, is itself an op (`validated_labels`), so that it breaks no graph.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
from collections.abc import Iterator
from typing import Literal, get_args

import torch
from torch import Tensor

from allnc import _extension
from allnc._checks import check_choice

Backend = Literal["auto", "eager", "cpp", "triton", "cuda"]
FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LEAST_ENTRY = 2.0**-100  # 8e-31: rows without an entry as large have no direction


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type sums are kept in: float64 for float64 input, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def normal_scale(largest: Tensor) -> Tensor:
    """The power of two that brings numbers whose largest is `largest` near 1, where their squares neither overflow nor
    vanish; it rounds nothing. Numbers below LEAST_ENTRY stay below 1.
    """
    smallest = math.log2(torch.finfo(largest.dtype).tiny)  # exponent of the smallest power of two
    return torch.exp2(-largest.log2().floor().clamp(-100, -smallest))


def unit_rows(x: Tensor) -> Tensor:
    """Rows of x at unit length, differentiable; rows whose entries are all below LEAST_ENTRY are 0, without gradient.

    Args:
        x: [N, F] float32 or float64, of any size up to the largest number of its type.
    """
    largest = x.detach().abs().amax(1, keepdim=True)  # [N, 1]
    x = x * normal_scale(largest)
    short = largest < LEAST_ENTRY  # not where there is a NaN
    return x * torch.linalg.vector_norm(x, dim=1, keepdim=True).where(~short, 1).reciprocal().where(~short, 0)


def debug_checks() -> bool:
    """Whether value checks that cost a pass or a synchronisation are on (environment variable ALLNC_DEBUG=1)."""
    return os.environ.get("ALLNC_DEBUG", "0") == "1" and not torch.compiler.is_compiling()


def has_triton() -> bool:
    """Whether Triton can be imported (it is not imported here)."""
    return importlib.util.find_spec("triton") is not None


# torch.compile must take the answer as a constant: torch 2.11 does not trace find_spec. This is what
# torch.compiler.assume_constant_result does; calling it here would import torch._dynamo, two seconds.
has_triton._dynamo_marked_constant = True  # type: ignore[attr-defined]


def triton_interprets() -> bool:
    """Whether Triton runs kernels in its interpreter, which also takes CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def check_floating(name: str, tensor: Tensor) -> None:
    """Raise unless `tensor` is a tensor of a supported floating type."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {type(tensor).__name__}")
    if tensor.dtype not in FLOATING:
        raise ValueError(f"{name} must be float16, bfloat16, float32 or float64; got {tensor.dtype}")


def check_shape(name: str, tensor: Tensor, expected: tuple[int | str, ...]) -> None:
    """Raise ValueError unless `tensor` has the expected shape; a string stands for any size, e.g. ("N", 64)."""
    fits = tensor.dim() == len(expected) and all(
        isinstance(want, str) or got == want for got, want in zip(tensor.shape, expected, strict=True)
    )
    if not fits:
        want = "[" + ", ".join(str(e) for e in expected) + "]"
        raise ValueError(f"{name} must have shape {want}; got {list(tensor.shape)}")


def check_same_device(**tensors: Tensor | None) -> None:
    """Raise ValueError unless all given tensors are on one device."""
    devices = {name: t.device for name, t in tensors.items() if t is not None}
    if len(set(devices.values())) > 1:
        listing = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"all tensors must be on one device; got {listing}. Move them with .to(device)")


def check_labels(labels: Tensor, num_rows: int) -> None:
    """Raise unless labels are int64 of shape [num_rows]; the range is checked by `validated_labels`."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a torch.Tensor; got {type(labels).__name__}")
    if labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64; got {labels.dtype}. Convert with labels.long()")
    check_shape("labels", labels, (num_rows,))


def check_no_tangent(op: str, *tensors: Tensor | None) -> None:
    """Raise NotImplementedError where forward-mode differentiation asks for what the op's kernels do not compute."""
    if torch.compiler.is_compiling():
        return
    for tensor in tensors:
        if tensor is not None and torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(
                f"{op} has no forward-mode derivative (torch.func.jvp, jacfwd); use reverse mode (backward, "
                "torch.func.vjp) or the op's reference function, which is plain torch"
            )


def check_seen(seen: Tensor, num_classes: int) -> None:
    """Raise unless seen is a bool tensor of shape [num_classes]."""
    if not isinstance(seen, Tensor) or seen.dtype != torch.bool:
        got = seen.dtype if isinstance(seen, Tensor) else type(seen).__name__
        raise ValueError(f"seen must be a bool tensor; got {got}")
    check_shape("seen", seen, (num_classes,))


def resolve_backend(
    requested: Backend,
    *,
    op: str,
    device: torch.device,
    dtype: torch.dtype,
    supported: tuple[str, ...],
) -> str:
    """The backend an op will use: the fastest that can run for "auto", the requested one otherwise.

    Args:
        requested: what the caller asked for.
        op: name of the op, for messages.
        device, dtype: of the op's main input.
        supported: backends the op has besides "eager", e.g. ("cpp", "triton").

    Raises:
        ValueError: unknown backend, or one this op, device or dtype has no code for.
        RuntimeError: the backend exists but is not available in this installation.
    """
    check_choice("backend", requested, get_args(Backend))
    if requested == "auto":
        return _fastest(device, dtype, supported)
    if requested == "eager":
        return requested
    if requested not in supported:
        has = ", ".join(repr(b) for b in ("auto", "eager", *supported))
        raise ValueError(f"{op} has no backend {requested!r}; it has {has}")
    if requested == "cpp":
        _require(device.type == "cpu", f"{op}: backend 'cpp' runs on CPU tensors; got {device}")
        _require_extension(_extension.has_cpp(), op, "cpp")
    elif requested == "cuda":
        _require(device.type == "cuda", f"{op}: backend 'cuda' runs on CUDA tensors; got {device}")
        _require_extension(_extension.has_cuda(), op, "cuda")
    else:
        _require(dtype != torch.float64, f"{op}: backend 'triton' does not take float64; use 'eager' or 'cpp'")
        on_device = device.type == "cuda" or triton_interprets()
        _require(
            on_device,
            f"{op}: backend 'triton' runs on CUDA tensors; got {device}. "
            "Use backend='cpp' or 'eager' on CPU (TRITON_INTERPRET=1 interprets kernels, for tests)",
        )
        if not has_triton():
            raise RuntimeError(f"{op}: backend 'triton' needs the triton package; pip install triton (Linux)")
    return requested


def _fastest(device: torch.device, dtype: torch.dtype, supported: tuple[str, ...]) -> str:
    if device.type == "cpu" and "cpp" in supported and _extension.has_cpp():
        return "cpp"
    if device.type == "cuda" and "cuda" in supported and _extension.has_cuda():
        return "cuda"
    if device.type == "cuda" and "triton" in supported and dtype != torch.float64 and has_triton():
        return "triton"
    return "eager"


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _require_extension(present: bool, op: str, backend: str) -> None:
    if not present:
        why = _extension.extension_error() or f"the extension was built without {backend} code"
        raise RuntimeError(
            f"{op}: backend {backend!r} is not available: {why}. "
            "Rebuild with `pip install -e .` and see `python -m allnc.info`"
        )


@torch.library.custom_op("allnc::validated_labels", mutates_args=())
def _validated_labels(labels: Tensor, num_classes: int, ignore_index: int, num_views: int) -> Tensor:
    valid = ((labels >= 0) & (labels < num_classes)) | (labels == ignore_index)
    message = f"labels must be in [0, {num_classes}) or ignore_index ({ignore_index})"
    if labels.device.type == "cuda":
        torch._assert_async(valid.all(), message)  # pyright: ignore[reportPrivateImportUsage]
    elif not bool(valid.all()):
        wrong = labels[~valid]
        raise ValueError(f"{message}; got {int(wrong[0])} ({wrong.numel()} of {labels.numel()} out of range)")
    if num_views > 1 and len(labels):
        by_view = labels.unflatten(0, (num_views, -1))
        alike = (by_view == by_view[0]).all()
        message = (
            f"the {num_views} views of an image must have one label; got rows that differ. Rows are view-major: "
            "stack all images of view 0, then all images of view 1, and so on"
        )
        if labels.device.type == "cuda":
            torch._assert_async(alike, message)  # pyright: ignore[reportPrivateImportUsage]
        elif not bool(alike):
            raise ValueError(message)
    return labels.clone(memory_format=torch.contiguous_format)


@_validated_labels.register_fake
def _(labels: Tensor, num_classes: int, ignore_index: int, num_views: int) -> Tensor:
    return torch.empty_like(labels, memory_format=torch.contiguous_format)


def validated_labels(labels: Tensor, num_classes: int, ignore_index: int, num_views: int = 1) -> Tensor:
    """A contiguous copy of labels after checking that each is in [0, num_classes) or equals ignore_index.

    On the CPU a wrong label raises ValueError. On CUDA the check is asynchronous (no synchronisation): a wrong
    label stops the program with a device-side assertion that carries the same message.

    Args:
        labels: [N] int64.
        num_classes: C.
        ignore_index: label of rows that take no part.
        num_views: V, a divisor of N; rows are view-major, and the views of an image must have one label.

    Returns:
        [N] int64.
    """
    return _validated_labels(labels, num_classes, ignore_index, num_views)


@contextlib.contextmanager
def label_errors(labels: Tensor, num_classes: int, ignore_index: int) -> Iterator[None]:
    """The ValueError of `validated_labels` where C++ code that checks labels by itself refuses them.

    Labels are looked at twice only once something is wrong.
    """
    try:
        yield
    except RuntimeError:
        validated_labels(labels, num_classes, ignore_index)
        raise
