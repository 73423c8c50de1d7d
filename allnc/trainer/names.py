"""The nearest known name to one that is not: "did you mean"."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# What other trainers call it.
_ELSEWHERE = {
    "amp": "train.precision",
    "arch": "model.name",
    "backbone": "model.name",
    "bs": "train.batch_size",
    "data_dir": "data.root",
    "data_path": "data.root",
    "dataset": "data.name",
    "gpu": "train.device",
    "gpus": "train.device",
    "img_size": "data.image_size",
    "imgsz": "data.image_size",
    "learning_rate": "train.lr",
    "num_workers": "data.workers",
    "opt": "train.optimizer",
    "output": "out",
    "val_split": "data.validation",
    "wd": "train.weight_decay",
}
_MOST = 3  # names that are offered


def nearest(name: str, known: Iterable[str], prefix: str = "") -> str:
    """Return "; did you mean X?" with the likeliest of the known names, or nothing where none is likely.

    A known name is likely when its last part, as the `lr` of `train.lr`, is the last part of the name, whatever the
    case and the dashes; then when other trainers call it so; then when it is spelt alike; then when its last part is,
    or begins so.

    Args:
        name: what was written.
        known: names with or without dots, in the order in which they are offered.
        prefix: what stands before a name where it is written, such as --.
    """
    known = list(dict.fromkeys(known))
    wanted = name.lower().replace("-", "_")
    last = wanted.rpartition(".")[2]
    ends = {option: option.rpartition(".")[2] for option in known}
    near = [option for option, end in ends.items() if end == last]
    if not near and _ELSEWHERE.get(last) in known:
        near = [_ELSEWHERE[last]]
    if not near:
        near = difflib.get_close_matches(wanted, known, n=1, cutoff=0.75)
    if not near:
        alike = difflib.get_close_matches(last, ends.values(), n=1, cutoff=0.7)
        near = [option for option, end in ends.items() if alike and end == alike[0]]
    if not near and len(last) >= 3:
        near = [option for option, end in ends.items() if end.startswith(last)]
    if not near or len(near) > _MOST:
        near = difflib.get_close_matches(wanted, known, n=1)
    *others, final = [f"{prefix}{option}" for option in near] or [""]
    return f"; did you mean {', '.join(others)}{' or ' if others else ''}{final}?" if final else ""
