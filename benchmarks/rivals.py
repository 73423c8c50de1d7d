"""Losses of other packages, called so that they compute the same number where they can. All are optional.

pytorch-metric-learning  SupConLoss. Equal to hycon without means and with balance="none" when given its dot product
                         without normalisation: anchors without a positive have loss 0, which its default reducer,
                         the mean over the losses above 0, leaves out as we do.
inf-cl                   cal_flash_loss(q, k, labels, scale, head_dim), InfoNCE of one positive an anchor. Called with
                         q = k = z and the other view as positive. Its sum over the columns holds the anchor itself,
                         which ours leaves out: the same N² pairs, another number. It multiplies in TF32, whatever
                         the type of its inputs.
siglip-kernel            fused_siglip_loss(img, txt, log_temperature, bias): a sigmoid for each pair in place of a
                         softmax. Called on z and its rows in the order of their other views: the same N² pairs,
                         another loss.

The last two are checked against their own loss in float64.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

TEMPERATURE = 0.1  # of every case: the default of `allnc.hycon`
SIGLIP_BIAS = -10.0  # the start value of the SigLIP paper
MODULES = {
    "pytorch-metric-learning": "pytorch_metric_learning.losses",
    "inf-cl": "inf_cl",
    "siglip-kernel": "siglip_kernel",
}
INF_CL_TILE = 64  # rows of its tiles; it reads past the end of other row counts
INF_CL_COLUMNS = 256  # the most columns that it multiplies at a time


def version(package: str) -> str:
    """What the note of a row says: "version X", or that the package is not installed."""
    try:
        return f"version {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def unusable(package: str, *, n: int, d: int, device: torch.device) -> str:
    """The status of a rival that cannot run at this shape on this device; "" if it can."""
    if package != "pytorch-metric-learning" and device.type != "cuda":
        return "unsupported: needs a CUDA device"
    try:
        importlib.import_module(MODULES[package])
    except ModuleNotFoundError as error:
        if error.name == MODULES[package].split(".")[0]:
            return f"not installed: pip install {package}"
        return f"not usable: {error}"
    except Exception as error:  # a package that is there but cannot be loaded must not stop the others
        return f"not usable: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    if package == "inf-cl":
        if n % INF_CL_TILE:
            return f"unsupported: reads past its inputs unless N is a multiple of {INF_CL_TILE}"
        columns = min(d, INF_CL_COLUMNS)
        if columns < 16 or columns & (columns - 1) or d % columns:
            return "unsupported: D must be a power of 2 from 16 to 256 or a multiple of 256"
    return ""


def metric_learning(z: Tensor, labels: Tensor) -> Tensor:
    """SupConLoss at temperature 0.1, without means."""
    return _supcon_loss()(z, labels)


@functools.cache
def _supcon_loss() -> Callable[..., Tensor]:
    distances = importlib.import_module("pytorch_metric_learning.distances")
    losses = importlib.import_module("pytorch_metric_learning.losses")
    return losses.SupConLoss(
        temperature=TEMPERATURE, distance=distances.DotProductSimilarity(normalize_embeddings=False)
    )


def other_view(n: int, device: torch.device) -> Tensor:
    """Row of each row's other view, where row i and row i + N/2 are two views of an image.  [N]"""
    return torch.arange(n, device=device).roll(n // 2)


def inf_cl(z: Tensor, labels: Tensor) -> Tensor:
    """inf-cl's loss of every row against all rows, the other view its positive; mean over the rows."""
    flash = importlib.import_module("inf_cl").cal_flash_loss
    partner = other_view(len(z), z.device)
    return flash(z, z, partner, 1 / TEMPERATURE, min(z.shape[1], INF_CL_COLUMNS)).mean()


def inf_cl_reference(z: Tensor, labels: Tensor) -> Tensor:
    """What `inf_cl` computes: mean_i( log Σ_j exp S_ij - S_i,partner ), j = i included."""
    logits = z @ z.T / TEMPERATURE  # [N, N]
    return F.cross_entropy(logits, other_view(len(z), z.device))


def siglip(z: Tensor, labels: Tensor) -> Tensor:
    """siglip-kernel's loss of z against its rows in the order of their other views."""
    fused = importlib.import_module("siglip_kernel").fused_siglip_loss
    scale, bias = _siglip_scale(z, torch.float32)
    return fused(z, z[other_view(len(z), z.device)], scale, bias)


def siglip_reference(z: Tensor, labels: Tensor) -> Tensor:
    """What `siglip` computes: (1/N) Σ_ij softplus( -y_ij (S_ij + bias) ), y = 1 for the two views, else -1."""
    scale, bias = _siglip_scale(z, z.dtype)
    logits = z @ z[other_view(len(z), z.device)].T * scale.exp() + bias  # [N, N]
    sign = 2 * torch.eye(len(z), dtype=z.dtype, device=z.device) - 1
    return F.softplus(-sign * logits).sum() / len(z)


def _siglip_scale(z: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    options = {"dtype": dtype, "device": z.device}
    return torch.full((), -math.log(TEMPERATURE), **options), torch.full((), SIGLIP_BIAS, **options)
