"""Ops that cost nothing where nobody looks at them, and their gradients.

An op of torch.library is one step in a graph, for torch.compile, fake tensors and dispatch modes; but each call passes
through some ten more Python functions, 15 us of them. With no one to see the op, its function is called as it is.
Measured on a CPU, together with `differentiable`: `hycon` of a tiny batch, forward and backward, takes 146 us and not
226.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

_PLAIN = (Tensor, Parameter)


class Op:
    """`function` as the op torch.ops.allnc.<name>, to be called where autograd records nothing: see `differentiable`.

    Args:
        function: from positional arguments to a tensor or a tuple of tensors, none of them an argument; changes none.
        name: of the op.
    """

    def __init__(self, function: Callable[..., Any], name: str) -> None:
        self.function = function
        defined = torch.library.custom_op(f"allnc::{name}", function, mutates_args=())
        self.register_fake = defined.register_fake
        self.registered = getattr(torch.ops.allnc, name).default

    def __call__(self, *inputs: Any) -> Any:
        return self.registered(*inputs) if _is_watched(inputs) else self.function(*inputs)


def op(name: str) -> Callable[[Callable[..., Any]], Op]:
    """Make an `Op` of the function below."""
    return lambda function: Op(function, name)


def _is_watched(inputs: tuple[Any, ...]) -> bool:
    """Whether something traces, transforms, counts or records the ops that are called."""
    if torch.compiler.is_compiling():
        return True
    if torch.is_grad_enabled() or is_in_torch_dispatch_mode() or torch._C._are_functorch_transforms_active():
        return True
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    return any(type(x) not in _PLAIN or is_functorch_wrapped_tensor(x) for x in tensors)


def differentiable(
    function: Callable[..., Any], *, name: str, save: Callable[..., None], backward: Callable[..., Any]
) -> Callable[..., Any]:
    """`function` with a gradient, and an error for a second derivative; to be called in its place.

    torch.library.register_autograd would do, for 50 us a call more, but torch.func cannot differentiate what it makes.

    Args:
        function: from positional arguments to a tensor or a tuple of tensors, such as an `Op`.
        name: what a caller knows it as.
        save: save(ctx, inputs, output) keeps what the backward needs, and what the gradients depend on: a second
            derivative is refused by way of the tensors that `ctx.save_for_backward` got.
        backward: backward(ctx, *gradients of the outputs) is the gradient of each input, None for those without.
    """

    def backward_once(ctx: Any, *grads: Any) -> Any:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return backward(ctx, *grads)
        with torch.no_grad():
            found = backward(ctx, *grads)
        present = [g for g in found if g is not None]
        origins = [t for t in (*ctx.saved_tensors, *grads) if t is not None]
        final = iter(_form(_Final, _FinalTransformed).apply(name, len(present), *present, *origins))
        return tuple(None if g is None else next(final) for g in found)

    class Step(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):  # pyright: ignore[reportIncompatibleMethodOverride]
            output = function(*inputs)
            save(ctx, inputs, output)
            return output

    class Transformed(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*inputs):  # pyright: ignore[reportIncompatibleMethodOverride]
            return function(*inputs)

        @staticmethod
        def setup_context(ctx, inputs, output):
            save(ctx, inputs, output)

    Step.backward = Transformed.backward = staticmethod(backward_once)
    return lambda *inputs: _form(Step, Transformed).apply(*inputs)


def _form(plain: Any, transformed: Any) -> Any:
    """The form of a torch.autograd.Function that is called for: torch.func takes one that costs 20 us more."""
    active = not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
    return transformed if active else plain


class _FinalTransformed(torch.autograd.Function):
    """Gradients as they are, which depend on `origins` in a way that is not known."""

    generate_vmap_rule = True

    @staticmethod
    def forward(name: str, count: int, *gradients_and_origins):  # pyright: ignore[reportIncompatibleMethodOverride]
        return tuple(g.clone() for g in gradients_and_origins[:count])

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.name = inputs[0]

    @staticmethod
    def backward(ctx, *grads):
        raise NotImplementedError(
            f"{ctx.name} has no second derivative; {ctx.name}_reference in allnc.ops, which is plain torch, has"
        )


class _Final(_FinalTransformed):
    @staticmethod
    def forward(ctx, *inputs):  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.name = inputs[0]
        return _FinalTransformed.forward(*inputs)

    setup_context = torch.autograd.Function.setup_context
