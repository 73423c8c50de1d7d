"""What a call really does: the kernels that it launches and the torch ops that it dispatches."""

from __future__ import annotations

from collections.abc import Iterable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode


class _Counted:
    """A @triton.jit kernel whose launches write its name into a list."""

    def __init__(self, kernel: Any, name: str, launched: list[str]) -> None:
        self.kernel, self.name, self.launched = kernel, name, launched

    def __getitem__(self, grid: Any) -> Any:
        self.launched.append(self.name)
        return self.kernel[grid]


def count_launches(monkeypatch: pytest.MonkeyPatch, *modules: ModuleType) -> list[str]:
    """The list into which, from now on, each launch of these modules' kernels writes the kernel's name.

    Args:
        monkeypatch: undoes it after the test.
        modules: those that hold the launchers; every name in them that ends in `_kernel` is counted. Default: all
            modules of allnc.kernels that are loaded once allnc.kernels.all_around is, which imports what it launches.
    """
    launched: list[str] = []
    for module in modules or _kernel_modules():
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, _Counted(getattr(module, name), name, launched))
    return launched


def _kernel_modules() -> Iterable[ModuleType]:
    import importlib
    import pkgutil

    import allnc.kernels

    names = [module.name for module in pkgutil.walk_packages(allnc.kernels.__path__, "allnc.kernels.")]
    return [importlib.import_module(name) for name in names]


class Dispatches(TorchDispatchMode):
    """Inside `with Dispatches() as ops`: the torch ops that run, those of backward passes included.

    Attributes:
        calls: (op, args, kwargs) in order, arguments as the op was given them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))

    def of(self, namespace: str) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
        """The calls of the ops of one namespace, e.g. "allnc"."""
        return [call for call in self.calls if call[0].namespace == namespace]

    @property
    def names(self) -> list[str]:
        """Names without the overload, e.g. "aten.empty" and "allnc.hycon_lse"."""
        return [str(op.overloadpacket) for op, _, _ in self.calls]

    def named(self, namespace: str) -> list[str]:
        """Names of the ops of one namespace, without it."""
        return [op.overloadpacket.__name__ for op, _, _ in self.of(namespace)]


def opcheck_all(ops: Dispatches) -> list[str]:
    """torch.library.opcheck of every op of ours that was dispatched, with the arguments that it was given.

    Ask for deterministic algorithms first: opcheck compares the results of several runs.

    Returns:
        The names of the ops.
    """
    for op, arguments, keywords in ops.of("allnc"):
        # Gradients are around the ops, not theirs.
        arguments = tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in arguments)
        torch.library.opcheck(op, arguments, keywords)
    return ops.named("allnc")
