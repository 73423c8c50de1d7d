"""JSON files that name the SHA-256 of themselves: what describes a checkpoint or stored features is whole, or refused.

Only the standard library is imported: the command line reads such files before it imports torch.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any


def sum_of(data: bytes) -> str:
    """Return the SHA-256 of bytes."""
    return hashlib.sha256(data).hexdigest()


def sum_of_values(values: dict[str, Any]) -> str:
    """Return the SHA-256 of values that JSON can hold, whatever their order."""
    return sum_of(json.dumps(values, sort_keys=True).encode())


def sealed(values: dict[str, Any]) -> dict[str, Any]:
    """Return values with the SHA-256 of all the rest of them."""
    rest = {name: value for name, value in values.items() if name != "sha256"}
    return rest | {"sha256": sum_of_values(rest)}


def unsealed(data: bytes, wanted: int) -> dict[str, Any]:
    """Return the values of a file without their SHA-256.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: no JSON of such values, of another format than wanted, or
            changed since it was written.
    """
    values = json.loads(data)
    if values["format"] != wanted:
        raise ValueError(f"its format is {values['format']!r}, and this version of allnc reads {wanted}")
    if values.pop("sha256") != sum_of_values(values):
        raise ValueError("its SHA-256 differs from the one it names")
    return values
