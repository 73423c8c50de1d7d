"""Arrays by name in a .npz or .safetensors file, whatever damaged bytes do; what each must be is in arrays.py."""

from __future__ import annotations

import json
import warnings
import zipfile
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import safe_open

LABELLED = ("images", "labels")  # what is trained on; or all there is, of a file that is measured on only
TESTED = ("test_images", "test_labels")  # both or none
OPTIONAL = ("classes", "groups", "source")
Array = npt.NDArray[Any]


def read_file(path: str, *, trained_on: bool = True) -> dict[str, Array]:
    """Return the arrays of a file by name, all but `source`.

    Args:
        path: a .npz or .safetensors file.
        trained_on: whether test images must have their labels, and labels their images.

    Raises:
        ValueError: the file is damaged or of another kind, lacks an array or has one that is not known. The message is
            what stands behind the path.
    """
    return (_read_safetensors if path.lower().endswith(".safetensors") else _read_npz)(path, trained_on)


def has_test_images(path: str) -> bool:
    """Whether a file has test images, by its list of names; False where it cannot be read, which reading it says."""
    try:
        if path.lower().endswith(".safetensors"):
            with safe_open(path, "np") as file:
                return TESTED[0] in file.keys()  # noqa: SIM118 (no mapping)
        with zipfile.ZipFile(path) as archive:
            return f"{TESTED[0]}.npy" in archive.namelist()
    except Exception:  # what damaged bytes drive a reader to
        return False


def _read_npz(path: str, trained_on: bool) -> dict[str, Array]:
    try:
        archive = zipfile.ZipFile(path)
    except Exception as error:  # what damaged bytes drive a reader to, here and below
        raise ValueError(f"must be a whole .npz file, as numpy.savez writes it; got: {_reason(error)}") from error
    with archive:
        names = [name.removesuffix(".npy") for name in archive.namelist()]
        _check_names(names, trained_on)
        return {name: _read_npy(archive, name) for name in sorted(set(names) - {"source"})}


def _read_npy(archive: zipfile.ZipFile, name: str) -> Array:
    try:
        with warnings.catch_warnings(), archive.open(f"{name}.npy") as file:
            warnings.simplefilter("ignore")  # numpy's on headers that other versions wrote
            array = np.lib.format.read_array(file, allow_pickle=False)
            if file.read(1):  # and reading to the end makes zipfile compare the checksum
                raise ValueError("it has more bytes than its shape tells")
            return array
    except Exception as error:
        if "Object arrays" in str(error):
            raise ValueError(
                f"must hold plain arrays; {name} is one of Python objects, which is not unpickled: save numbers, or "
                "for classes strings (numpy.array(names, dtype=str))"
            ) from error
        raise ValueError(f"must be a whole .npz file; {name} cannot be read: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    line = " ".join(str(error).split()) or type(error).__name__
    return line if line.isprintable() else ascii(line)


def _read_safetensors(path: str, trained_on: bool) -> dict[str, Array]:
    try:
        with safe_open(path, "pt") as file:  # numpy would not know bfloat16
            tensors = {name: file.get_tensor(name) for name in set(file.keys()) - {"source"}}
            classes = (file.metadata() or {}).get("classes")
    except Exception as error:
        raise ValueError(f"must be a whole .safetensors file; got: {_reason(error)}") from error
    _check_names([*tensors], trained_on)
    arrays: dict[str, Array] = {}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() or tensor.is_complex():
            raise ValueError(f"must have {name} of integers; got {list(tensor.shape)} of type {tensor.dtype}")
        arrays[name] = tensor.clone().numpy()  # not the file's own bytes, which others may change
    if classes is not None:
        arrays["classes"] = _listed(classes)
    return arrays


def _listed(text: str) -> Array:
    try:
        names = json.loads(text)
    except (ValueError, RecursionError):
        names = None
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ValueError(f"must name its classes in a JSON list of strings; got {text[:40]!r}")
    return np.array(names, dtype=str)


def _check_names(names: list[str], trained_on: bool) -> None:
    needed = (*LABELLED, *TESTED) if trained_on and any(name in names for name in TESTED) else LABELLED
    missing = [name for name in needed if name not in names]
    if missing:
        got = ", ".join(map(ascii, names[:8])) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        raise ValueError(f"must hold {', '.join(needed)}; {', '.join(missing)} missing; got {got or 'nothing'}")
    unknown = sorted(set(names) - {*LABELLED, *TESTED, *OPTIONAL})
    if unknown:
        raise ValueError(
            f"must hold no more than {', '.join((*LABELLED, *TESTED, *OPTIONAL))}; got "
            f"{', '.join(map(ascii, unknown))}, too"
        )
