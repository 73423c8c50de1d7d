"""Light tuning of an encoder: what trains, what is added to it, and what stays as it was.

Everything is found by structure, not by the name of an architecture, as timm's transformers have it: normalisation
layers by their class, attention as the linear layers of a module called `attn`, a block's MLP as a module called `mlp`
beside one called `norm2`, of linear layers `fc1` and `fc2` that lead back to the width they came from.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from allnc.config import ModelConfig


class ParallelAdapter(nn.Module):
    """An MLP with a bottleneck beside it, which adds nothing until it is trained.

    Args:
        mlp: the MLP of a block, which maps the last of its input's dimensions to itself.
        width: that dimension.
        rank: columns of the bottleneck.

    Source: Chen et al., AdaptFormer (NeurIPS 2022), with the normalisation of its own and the learnable scale, from 1,
    of LIFT (Shi et al., ICML 2024), whose learning rates the recipes take. LIFT's adapter reads what the block's
    normalisation reads; this one reads what the MLP reads, and so fits blocks of any order.
    """

    def __init__(self, mlp: nn.Module, width: int, rank: int) -> None:
        super().__init__()
        self.mlp = mlp
        self.norm = nn.LayerNorm(width)
        self.down = nn.Linear(width, rank)
        self.up = nn.Linear(rank, width)
        self.scale = nn.Parameter(torch.ones(()))
        nn.init.kaiming_normal_(self.down.weight, a=math.sqrt(5))
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, x: Tensor, *others: Any) -> Tensor:
        added = self.up(torch.relu(self.down(self.norm(x))))  # [..., width]
        return self.mlp(x, *others) + self.scale * added


def rank_of(config: ModelConfig, num_classes: int, blocks: int) -> int:
    """Return the columns of a bottleneck: as given, or LIFT's rule 2^floor(log2(C / 2L)), at least 1."""
    if config.tune_rank is not None:
        return config.tune_rank
    return 2 ** max(0, math.floor(math.log2(num_classes / (2 * blocks))))


def tune(encoder: nn.Module, config: ModelConfig, num_classes: int) -> None:
    """Freeze what `model.tune` does not train, and add what it adds; the encoder's function stays what it is.

    Args:
        encoder: a timm model with its weights; changed in place.
        config: tune and tune_rank.
        num_classes: number of classes C, of which the rank depends.

    Raises:
        ValueError: the model has no part of the kind, or peft is not installed.
    """
    if config.tune == "full":
        return
    for parameter in encoder.parameters():
        parameter.requires_grad_(False)
    _TUNERS[config.tune](encoder, config, num_classes)


def _tune_norm(encoder: nn.Module, config: ModelConfig, num_classes: int) -> None:
    found = [module for module in encoder.modules() if _is_norm(module)]
    if not found:
        raise ValueError(_lacks(config, "normalisation layer with a scale", "head or full"))
    for module in found:
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(True)


def _add_adapters(encoder: nn.Module, config: ModelConfig, num_classes: int) -> None:
    # A block normalises before its MLP or after it; an `mlp` elsewhere makes biases of relative positions, or pools.
    blocks: list[Any] = [m for m in encoder.modules() if hasattr(m, "norm2") and _width(getattr(m, "mlp", None))]
    if not blocks:
        part = "block with an MLP of linear layers (timm's ViT, DeiT, CLIP, BEiT, EVA and Swin models have them)"
        raise ValueError(_lacks(config, part, "norm, head or full"))
    rank = rank_of(config, num_classes, len(blocks))
    for block in blocks:
        block.mlp = ParallelAdapter(block.mlp, _width(block.mlp), rank)


def _add_lora(encoder: nn.Module, config: ModelConfig, num_classes: int) -> None:
    layers = [
        name
        for name, module in encoder.named_modules()
        if isinstance(module, nn.Linear) and name.split(".")[-2:-1] == ["attn"]
    ]
    if not layers:
        part = "block with attention of linear layers (timm's ViT, DeiT, CLIP and Swin models have them)"
        raise ValueError(_lacks(config, part, "norm, head or full"))
    lora_config, inject = _peft()
    blocks = len({name.rsplit(".", 1)[0] for name in layers})
    rank = rank_of(config, num_classes, blocks)
    # alpha / rank scales the update: 1, so that one learning rate serves every rank and the heads.
    inject(lora_config(r=rank, lora_alpha=rank, target_modules=layers), encoder)


_TUNERS: dict[str, Callable[[nn.Module, ModelConfig, int], None]] = {
    "head": lambda *_: None,
    "norm": _tune_norm,
    "lora": _add_lora,
    "adapter": _add_adapters,
}


def _lacks(config: ModelConfig, part: str, others: str) -> str:
    return f"model.tune {config.tune} needs a {part}; {config.name} has none: choose model.tune {others}"


def _peft() -> tuple[Any, Any]:
    """Return peft's LoraConfig and inject_adapter_in_model."""
    # transformers, which peft imports, looks for a package called kernels. Run in a checkout of allnc it would find the
    # folder of that name, which refuses to be imported.
    absent = sys.modules.setdefault("kernels", None) is None  # pyright: ignore[reportArgumentType]
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ValueError(
            f"model.tune lora needs Hugging Face's peft: pip install 'allnc[peft]'; importing it failed: {error}"
        ) from error
    finally:
        if absent:
            sys.modules.pop("kernels", None)
    return LoraConfig, inject_adapter_in_model


def _width(mlp: Any) -> int:
    """Return the width that two linear layers map to itself, 0 where a block's `mlp` is something else."""
    first, last = getattr(mlp, "fc1", None), getattr(mlp, "fc2", None)
    if not (isinstance(first, nn.Linear) and isinstance(last, nn.Linear)):
        return 0
    return first.in_features if first.in_features == last.out_features else 0


def _is_norm(module: nn.Module) -> bool:
    """Tell whether a module scales by channel what it has normalised; timm has many classes of the kind."""
    return "Norm" in type(module).__name__ and isinstance(getattr(module, "weight", None), nn.Parameter)


def _is_added(name: str, module: nn.Module) -> bool:
    return isinstance(module, ParallelAdapter) or name.endswith("lora_A.default")


@contextmanager
def added_parts_run(encoder: nn.Module) -> Iterator[None]:
    """Raise ValueError unless every part that `tune` added runs in the forward pass within.

    Some models read the weight of a linear layer instead of calling it: what was added beside it would never train.
    """
    idle = {name: module for name, module in encoder.named_modules() if _is_added(name, module)}
    hooks = []
    for name, module in idle.items():

        def ran(*_: Any, name: str = name) -> None:
            idle.pop(name, None)

        hooks.append(module.register_forward_pre_hook(ran))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    if idle:
        raise ValueError(
            f"model.tune adapter, norm, head or full must be chosen for this model: it reads the weights of layers "
            f"without calling them, so that {len(idle)} of {len(hooks)} added parts would never train ({min(idle)} ...)"
        )


def rest(encoder: nn.Module, mode: str) -> None:
    """Put what is frozen into evaluation mode: its running statistics and noise are part of what stays.

    Called after `train()`. Only BatchNorm has statistics; some of timm's models (Swin) have stochastic depth unasked.
    """
    if mode == "head":
        encoder.eval()
    elif mode != "full":
        for module in encoder.modules():
            noisy = isinstance(module, nn.modules.dropout._DropoutNd) or type(module).__name__ == "DropPath"
            if noisy or (isinstance(module, nn.modules.batchnorm._NormBase) and not _trains(module)):
                module.eval()


def frozen_names(encoder: nn.Module, mode: str) -> list[str]:
    """Return the entries of the encoder's state that training never changes, in order of their names.

    A module without a parameter that trains keeps its buffers, too (see `rest`).
    """
    if mode == "full":
        return []
    moves = {name: parameter.requires_grad for name, parameter in encoder.named_parameters(remove_duplicate=False)}
    for prefix, module in encoder.named_modules():
        for name, _ in module.named_buffers(prefix, recurse=False):
            moves[name] = _trains(module)
    return sorted(name for name in encoder.state_dict() if not moves[name])


def sum_of_tensors(tensors: dict[str, Tensor]) -> str:
    """Return the SHA-256 of names, types, shapes and values, whatever device they are on and whatever their order."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters(recurse=False))
