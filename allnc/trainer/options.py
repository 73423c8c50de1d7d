"""Configurations as dictionaries, as dotted options, and which options a configuration never reads."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from allnc.config import BATCH_AUGMENTATIONS, CONTRASTIVE, FEATURE_MODELS, SECTIONS, SMALL_SETS, Config, LossConfig

# Where files lie and how a machine works on them: two runs that differ in these alone are the same run.
OF_A_MACHINE = (
    "out",
    "data.root",
    "data.train_list",
    "data.test_list",
    "data.index",
    "data.workers",
    "train.threads",
    "model.weights",
)
# The options of the loss that each baseline reads, beside its name.
_READ_BY: dict[str, tuple[str, ...]] = {
    "ce": ("label_smoothing", "drw", "class_weights"),
    "logit_adjusted": ("tau", "label_smoothing"),
    "focal": ("focal_gamma", "drw", "class_weights"),
    "ldam": ("drw", "class_weights"),
    "mse": ("drw", "class_weights"),
    "supcon": ("hycon_weight", "classification_weight", "temperature", "backend"),
    "bcl": ("hycon_weight", "classification_weight", "temperature", "tau"),
    "proco": ("hycon_weight", "classification_weight", "temperature", "tau", "ema_momentum", "backend"),
}


def ignored_options(config: Config) -> dict[str, str]:
    """Name the options that this configuration never reads, each with the reason.

    A recipe may hold them (the same recipe serves several losses); setting one by hand is a mistake that the
    command line refuses.
    """
    data, model, loss, train = config.data, config.model, config.loss, config.train
    ignored: dict[str, str] = {}

    def drop(section: str, names: str, reason: str) -> None:
        for name in names.split():
            ignored.setdefault(f"{section}.{name}", reason)

    if loss.name != "allnc":
        reads = _READ_BY.get(loss.name, ())
        parts = " ".join(f.name for f in dataclasses.fields(LossConfig) if f.name not in ("name", *reads))
        drop("loss", parts, f"loss.name is {loss.name}")
        drop("data", "rebalance_sampler", f"loss.name {loss.name} has no re-balancing branch")
        drop("model", "heads", f"loss.name {loss.name} has one branch and one classifier")
    if loss.name in CONTRASTIVE:
        if loss.hycon_weight == 0:
            drop("loss", "temperature ema_momentum backend", "loss.hycon_weight is 0")
            drop("model", "projection_hidden projection_dim", "loss.hycon_weight is 0")
    elif loss.hycon != "softmax" or loss.name != "allnc":
        drop("loss", "temperature mean_weight balance", f"loss.hycon is {loss.hycon}")
        drop(
            "model",
            "projection_hidden projection_dim",
            f"the loss has no softmax HyCon ({loss.name}, {loss.hycon})",
        )
    if loss.name == "allnc":
        drop("loss", "classification_weight", "loss.name is allnc, which weighs its contrast by alpha")
        drop("loss", "drw class_weights", "loss.name is allnc, which re-balances by itself")
        if loss.rebalance != "focal":
            drop("loss", "focal_gamma", "no branch has the focal loss")
        if loss.rebalance != "logit_adjusted":
            drop("loss", "tau", f"loss.rebalance is {loss.rebalance}")
        if loss.rebalance not in ("ce", "logit_adjusted"):
            drop("loss", "label_smoothing", f"loss.rebalance is {loss.rebalance}")
        if model.classifier == "etf":
            drop("loss", "p2p_weights", "model.classifier is etf, whose vectors do not train")
    if loss.hycon == "none" and loss.name == "allnc":
        drop("loss", "hycon_weight", "loss.hycon is none")
    p2p = (loss.alpha * loss.p2p_means, loss.p2p_weights, loss.p2p_duality if loss.alpha > 0 else 0)
    if loss.name == "allnc" and all(weight == 0 for weight in p2p[1:]):  # None: 1 where there is a simplex
        drop("loss", "p2p_centre", "loss.p2p_weights and loss.p2p_duality are 0")
        if p2p[0] == 0:
            drop("loss", "p2p_target p2p_temperature", "every weight of P2P is 0")
    if loss.p2p_target == "etf":
        drop("loss", "p2p_temperature", "loss.p2p_target is etf")
    if loss.horizon == 0 and loss.name == "allnc":
        drop("loss", "gamma", "loss.horizon is 0: the re-balancing branch alone from the start")
    if model.name.startswith("timm:"):
        drop("model", "width feature_dim shortcut", f"model.name is {model.name}")
    if model.name in FEATURE_MODELS:
        drop("model", "width feature_dim shortcut", f"model.name {model.name} has the width of the features")
    if model.name == "linear":
        drop("train", "micro_batch", "model.name linear has no encoder that a batch could pass in parts")
    if model.name != "mlp":
        drop("model", "mlp_hidden", f"model.name is {model.name}")
    if not model.pretrained:
        drop("model", "weights", "model.pretrained is false")
    if model.tune not in ("lora", "adapter"):
        drop("model", "tune_rank", f"model.tune is {model.tune}")
    if not model.pretrained or model.tune == "full":
        drop("train", "save", "no pretrained weights stay frozen (model.pretrained, model.tune): all are saved")
    if model.classifier == "linear":
        drop("model", "classifier_scale", "model.classifier is linear")
    if model.posthoc == "none":
        drop("model", "posthoc_tau", "model.posthoc is none")
    if data.profile == "none":
        default = f", as is the default with data.name {data.name}" if data.imbalance == "auto" else ""
        drop("data", "imbalance_ratio max_per_class", f"data.imbalance is none{default}")
        if data.validation == 0:
            drop("data", "subset_seed", f"data.imbalance is none{default}, and no image is held out")
    if data.name == "digits":
        drop("data", "root", "the digits come with scikit-learn")
        ignored.pop("data.subset_seed", None)  # it also splits training from test images
    if data.name in SMALL_SETS:
        drop("data", "image_size fit", f"{data.name} has its own size")
    if (data.name in SMALL_SETS or data.in_memory) and data.augmentation in BATCH_AUGMENTATIONS:
        drop("data", "workers", "small images are augmented in whole batches")
    if data.name == "features" or data.augmentation in ("none", "shift_rotate"):
        drop("data", "flip", f"data.augmentation {data.augmentation} mirrors nothing")
    if data.augmentation not in ("resized_crop", "crop_flip", "randaugment"):
        drop("data", "crop_scale", f"data.augmentation is {data.augmentation}")
    if data.name not in ("own", "arrays"):
        drop("data", "test_share", f"data.name is {data.name}")
    if data.name != "own":
        drop("data", "max_bad", f"data.name is {data.name}")
    elif data.index:
        drop("data", "test_share max_bad train_list test_list", "data.index says what every image is for")
    if data.name in ("own", "arrays") and not data.index:
        ignored.pop("data.subset_seed", None)  # it also splits training from test images, where there are none
    if data.name == "features":
        drop("data", "image_size fit workers mean std", "features are read as they were stored")
        drop("train", "channels_last", "features are rows of numbers, not images")
    if train.mixup == 0:
        drop("train", "remix", "train.mixup is 0")
    if train.schedule == "cosine":
        drop("train", "milestones", "train.schedule is cosine")
    return ignored


def to_dict(config: Config) -> dict[str, Any]:
    """Return the configuration as plain dictionaries, lists, strings and numbers (for YAML and JSON)."""
    values = dataclasses.asdict(config)
    for section in SECTIONS:  # YAML and JSON have lists
        values[section] |= {name: list(v) for name, v in values[section].items() if isinstance(v, tuple)}
    return values


def from_dict(values: Mapping[str, Any]) -> Config:
    """Build a configuration from what `to_dict` returned.

    Raises:
        ValueError: not a mapping, an unknown key (with the nearest known one), a wrong type or a value out of range.
    """
    arguments = _known("", Config, values)
    for name, section in SECTIONS.items():
        if name in arguments:
            arguments[name] = section(**_known(f"{name}.", section, arguments[name]))
    return Config(**arguments)


def dotted(config: Config) -> dict[str, Any]:
    """Return every option in dotted form, such as `train.epochs`, with its value."""
    values = to_dict(config)
    flat = {"seed": values["seed"], "out": values["out"]}
    return flat | {f"{name}.{key}": value for name in SECTIONS for key, value in values[name].items()}


def option_names() -> list[str]:
    """Return every option of a configuration in dotted form, such as `train.epochs`."""
    names = ["seed", "out"]
    for name, section in SECTIONS.items():
        names += [f"{name}.{f.name}" for f in dataclasses.fields(section)]
    return names


def _known(prefix: str, cls: type, values: Any) -> dict[str, Any]:
    """Return the values of a section, whose keys must be options."""
    if not isinstance(values, Mapping):
        what = f"{prefix.rstrip('.')} must hold options" if prefix else "a configuration must hold sections"
        raise ValueError(f"{what}, as `name: value`; got {values!r}")
    names = [f.name for f in dataclasses.fields(cls)]
    for key in values:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1)
            hint = f"; did you mean {prefix}{near[0]}?" if near else ""
            raise ValueError(f"{prefix}{key} is not an option{hint}")
    return dict(values)
