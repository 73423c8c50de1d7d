"""Class priors: which one the logits of a run assume, and which one somebody wants.

softmax(logits) is the probability of each class when classes are as frequent as the *assumed* prior says. With π the
class frequencies of the training set and q those of the batches (data.sampler; π for uniform),

    loss                                          assumed prior, up to its sum
    ce, focal, supcon                             q
    ldam                                          q (its margins move the border, as a prior would not)
    class_balanced; ce, focal, ldam after drw     q w, w the class weights of the loss
    ce, focal, ldam with loss.class_weights       q w
    logit_adjusted, bcl, proco                    q / π^τ: uniform with τ = 1
    allnc                                         that of its loss.rebalance, which alone remains at the end, with q of
                                                  data.rebalance_sampler
    a second stage (train.retrain_epochs)         uniform: cross-entropy on class-balanced batches
    model.posthoc logit_adjusted                  that of the loss, / π^posthoc_tau

An epoch of allnc before loss.horizon, in which both branches train the shared head, train.remix and model.posthoc
tau_normalised have priors that no formula gives; mse, etf_dr, ntce and nonl train no logits that softmax makes
probabilities of: they are refused.

Sources: Menon et al., Long-tail learning via logit adjustment, ICLR 2021; Saerens et al., Neural Computation 2002; for
class weights as a prior, Elkan, The Foundations of Cost-Sensitive Learning, IJCAI 2001.

Legend: C classes.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from allnc.config import REWEIGHTED, Config
from allnc.data import class_probabilities
from allnc.losses.base import class_weights, effective_number_weights

_NO_POSTERIOR = ("mse", "etf_dr", "ntce", "nonl")


def assumed_prior(
    config: Config, class_counts: Tensor, *, epoch: int | None = None, classes: Sequence[str] = ()
) -> Tensor:
    """Return the class prior for which a run's logits are right.

    Args:
        config: of the run.
        class_counts: [C] training images of each class, >= 1.
        epoch: epochs done; None: all of them.
        classes: names of the C classes, which loss.class_weights has; none where they are "0", "1" ...

    Returns:
        [C] float64 > 0, of sum 1.

    Raises:
        ValueError: the loss has no logits that softmax makes probabilities of, or a class that weighs nothing.
    """
    loss, data, model = config.loss, config.data, config.model
    if loss.name in _NO_POSTERIOR:
        raise ValueError(
            "--prior needs a run whose logits softmax makes probabilities of; got loss.name "
            f"{loss.name}, whose logits are none: remove it"
        )
    if model.posthoc == "tau_normalised":
        raise ValueError(
            "--prior needs a run whose logits assume a known class prior; got model.posthoc tau_normalised, which "
            "changes it by no formula: remove --prior"
        )
    done = config.train.epochs if epoch is None else epoch
    if config.train.remix and config.train.mixup > 0:
        raise ValueError(
            "--prior needs a run whose logits assume a known class prior; got train.remix, which gives mixed images to "
            "rare classes by no fixed share: remove --prior"
        )
    if loss.name == "allnc" and model.heads == "shared" and done < loss.horizon * config.train.feature_epochs:
        raise ValueError(
            f"--prior needs a classifier that one branch trains; after {done} epochs both still do (loss.horizon "
            f"{loss.horizon:g} of {config.train.feature_epochs}): remove --prior"
        )
    if done > config.train.feature_epochs:
        return class_probabilities(class_counts, "class_balanced")
    frequency = class_probabilities(class_counts, "uniform")
    name, sampler = loss.name, data.sampler
    if loss.name == "allnc":
        name = loss.rebalance
        sampler = data.sampler if data.rebalance_sampler == "uniform" else data.rebalance_sampler
    prior = class_probabilities(class_counts, sampler)
    reweighted = loss.name in REWEIGHTED and loss.drw is not None and done / config.train.feature_epochs > loss.drw
    if name == "class_balanced" or reweighted:
        prior = prior * effective_number_weights(class_counts).cpu().double()
    if loss.name in REWEIGHTED and loss.class_weights is not None:
        names = classes or tuple(map(str, range(len(class_counts))))
        weights = class_weights(loss.class_weights, class_counts, names).cpu().double()
        if float(weights.min()) == 0:
            raise ValueError(
                f"--prior needs a loss that sees every class; loss.class_weights gives {names[int(weights.argmin())]} "
                "the weight 0: remove --prior"
            )
        prior = prior * weights
    if name in ("logit_adjusted", "bcl", "proco"):
        prior = prior / frequency**loss.tau
    if model.posthoc == "logit_adjusted":
        prior = prior / frequency**model.posthoc_tau
    return prior / prior.sum()


def wanted_prior(text: str, class_counts: Tensor, classes: Sequence[str]) -> Tensor:
    """Return the class prior that `--prior` names.

    Args:
        text: uniform; train, the frequencies of the training images; or a CSV file of class name and weight in each
            line, with or without a heading.
        class_counts: [C] training images of each class.
        classes: names of the C classes.

    Returns:
        [C] float64 >= 0, of sum 1.

    Raises:
        ValueError: no such file, or one that does not name every class once with a weight >= 0.
    """
    if text in ("uniform", "train"):
        return class_probabilities(class_counts, "class_balanced" if text == "uniform" else "uniform")
    weights = _weights(Path(text).expanduser(), classes)
    prior = torch.tensor([weights[name] for name in classes], dtype=torch.float64)
    if float(prior.sum()) <= 0:
        raise ValueError(f"--prior must give a class more than 0; {text} gives all of them 0")
    return prior / prior.sum()


def _weights(path: Path, classes: Sequence[str]) -> dict[str, float]:
    known, weights = set(classes), {}
    if len(known) < len(classes):
        raise ValueError("--prior FILE needs classes of different names; two of the run's have the same")
    try:
        rows = list(csv.reader(path.read_text(encoding="utf-8-sig").splitlines()))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ValueError(
            f"--prior must be uniform, train or a CSV file of class name and weight; got {path}: {reason}"
        ) from None
    for number, row in enumerate(rows, 1):
        if not row:
            continue
        where = f"--prior: line {number} of {path}"
        if len(row) != 2:
            raise ValueError(f"{where} must be a class name and a weight with a comma between; got {','.join(row)!r}")
        name, weight = row[0].strip(), _number(row[1])
        if number == 1 and weight is None and name not in known:  # a heading
            continue
        if name not in known:
            raise ValueError(f"{where} must name a class of the run ({_some(classes)}); got {name!r}")
        if name in weights:
            raise ValueError(f"{where} names {name!r} a second time; each class has one weight")
        if weight is None or not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"{where} must give a finite weight >= 0; got {row[1]!r}")
        weights[name] = weight
    absent = [name for name in classes if name not in weights]
    if absent:
        raise ValueError(f"--prior: {path} must name every class; it lacks {len(absent)}: {_some(absent)}")
    return weights


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")
