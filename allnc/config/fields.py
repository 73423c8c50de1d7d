"""Types and ranges that every section of a configuration checks its fields for."""

from __future__ import annotations

import math
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

_KINDS: dict[Any, str] = {
    type(None): "null",
    tuple[int, ...]: "list of int",
    tuple[float, ...]: "list of float",
    dict[str, float]: "{name: number}",
}
_LARGEST_INT, _LARGEST_FLOAT = 2**32 - 1, 3e38  # of what seeds, sizes and float32 can hold


def check_fields(section: str, config: Any) -> None:
    """Check the type of every field, whoever builds the configuration; the command line's parser is one of several."""
    for name, hint in get_type_hints(type(config)).items():
        value, kinds = getattr(config, name), get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        if get_origin(hint) is Literal:
            if value not in get_args(hint):
                raise ValueError(f"{section}.{name} must be one of {', '.join(get_args(hint))}; got {value!r}")
        elif not any(fits(value, kind) for kind in kinds):
            wanted = " or ".join(_named(kind) for kind in kinds)
            raise ValueError(f"{section}.{name} must be of type {wanted}; got {value!r}")
        elif isinstance(value, float) and math.isfinite(value) and abs(value) > _LARGEST_FLOAT:
            raise ValueError(f"{section}.{name} must be a number that float32 holds; got {value}")
        elif isinstance(value, int) and abs(value) > _LARGEST_INT:
            raise ValueError(f"{section}.{name} must be at most {_LARGEST_INT}; got {value}")


def _named(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return ", ".join(get_args(kind))
    return _KINDS.get(kind) or getattr(kind, "__name__", "")


def fits(value: object, kind: Any) -> bool:
    """Whether a value is of this type: a bool is no number, an int is a float."""
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(fits(item, get_args(kind)[0]) for item in value)
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is dict:
        names, values = get_args(kind)
        return isinstance(value, dict) and all(fits(k, names) and fits(v, values) for k, v in value.items())
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    return isinstance(value, kind)
