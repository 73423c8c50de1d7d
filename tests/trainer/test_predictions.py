"""From logits to predictions.npz and classes.csv, and under another class prior."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss, top_k_accuracy_score

from allnc import evaluate
from allnc.config import Config, DataConfig, LossConfig, ModelConfig, TrainConfig
from allnc.data import ImageSet
from allnc.data.paths import PathList
from allnc.trainer import ending, loop
from allnc.trainer.classes import class_scores, class_table, write_classes
from allnc.trainer.predictions import Predictions, read_predictions, scores, write_predictions
from allnc.trainer.prior import assumed_prior, wanted_prior
from tests.trainer.test_training import TINY, changed, quiet

COUNTS = torch.tensor([200, 100, 50, 10, 5, 1, 1])
MANY, FEW = 60, 8


def drawn(number: int = 300) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 7, (number,), generator=generator)
    logits = torch.randn(number, 7, generator=generator)
    logits[torch.arange(number), labels] += 1
    return logits, labels


def test_what_is_kept_of_the_logits() -> None:
    """By softmax by hand; three batches give what one does."""
    logits = torch.tensor([[0.0, 1.0, 3.0, 2.0], [1.0, 1.0, 0.0, 0.0], [100.0, 0.0, 200.0, 0.0]]).log1p()
    kept = Predictions.of(logits, torch.tensor([2, 1, 1]))  # odds 1 : 2 : 4 : 3, 2 : 2 : 1 : 1, 101 : 1 : 201 : 1
    assert kept.predicted.tolist() == [2, 0, 2] and kept.second.tolist() == [3, 1, 0]
    assert kept.confidence.tolist() == pytest.approx([0.4, 1 / 3, 201 / 304])
    assert kept.second_confidence.tolist() == pytest.approx([0.3, 1 / 3, 101 / 304])
    assert kept.true_confidence.tolist() == pytest.approx([0.4, 1 / 3, 1 / 304])
    assert kept.nll.tolist() == pytest.approx([-math.log(0.4), math.log(3), math.log(304)])
    logits, labels = drawn()
    parts = [Predictions.of(a, b) for a, b in zip(logits.split(128), labels.split(128), strict=True)]
    assert all(
        torch.equal(a, b) for a, b in zip(Predictions.joined(parts), Predictions.of(logits, labels), strict=True)
    )
    far = Predictions.of(torch.tensor([[0.0, 500.0]]), torch.tensor([0]))
    assert far.true_confidence.item() == 0 and far.nll.item() == 500


def test_scores_against_scikit_learn() -> None:
    logits, labels = drawn()
    ours = scores(Predictions.of(logits, labels), COUNTS, many=MANY, few=FEW)
    probabilities = logits.double().softmax(1).numpy()
    assert ours["nll"] == pytest.approx(log_loss(labels, probabilities, labels=range(7)), rel=1e-6)
    assert ours["top5"] == pytest.approx(100 * top_k_accuracy_score(labels, probabilities, k=5, labels=range(7)))
    assert ours["ece"] != ours["ece_few"] and None not in ours.values()
    assert scores(Predictions.of(logits[:, :4], labels % 4), COUNTS[:4], many=MANY, few=FEW)["top5"] is None


def test_under_a_prior_classes_count_with_their_share() -> None:
    """Of class 0 3/4 are right, of class 1 1/2; class 2 counts nothing, even where its loss is infinite."""
    logits = torch.tensor([[2.0, 0.0], [2.0, 0.0], [2.0, 0.0], [0.0, 2.0], [0.0, 2.0], [2.0, 0.0], [2.0, 0.0]])
    logits = torch.cat([logits, torch.full((7, 1), -math.inf)], dim=1)
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2])
    kept = Predictions.of(logits, labels)
    ours = scores(kept, torch.tensor([9, 9, 9]), many=100, few=1, prior=torch.tensor([0.8, 0.2, 0.0]))
    assert ours["accuracy"] == pytest.approx(80 * 3 / 4 + 20 / 2)
    right, wrong = math.log1p(math.exp(-2)), math.log1p(math.exp(2))
    assert ours["nll"] == pytest.approx(0.8 * (3 * right + wrong) / 4 + 0.2 * (right + wrong) / 2)
    accuracy, confidence = 0.7, 1 / (1 + math.exp(-2))  # all have the same, and lie in one bin
    assert ours["ece"] == pytest.approx(100 * (confidence - accuracy), rel=1e-5)
    assert ours["balanced"] == pytest.approx(100 * (3 / 4 + 1 / 2 + 0) / 3)  # of all classes, as ever
    with pytest.raises(ValueError, match="class prior must give a class with measured images"):
        scores(
            kept._replace(labels=labels.clamp(max=1)),
            torch.tensor([9, 9, 9]),
            many=MANY,
            few=FEW,
            prior=torch.eye(3)[2],
        )


def test_a_file_of_predictions_comes_back(tmp_path: Path) -> None:
    logits, labels = drawn(4)
    root = tmp_path / "images"
    names = [f"{root}/a/1.png", f"{root}/ä/2.png", "/elsewhere/3.png", f"{root}/a/\udcff.png"]
    images = ImageSet(labels=labels, num_classes=7, mean=(0.5,), std=(0.5,), paths=PathList.of(names))
    kept = Predictions.of(logits, labels)
    file = tmp_path / "predictions.npz"
    write_predictions(file, kept, images, COUNTS, measured_on="validation", root=str(root))
    arrays = read_predictions(file)
    assert arrays["paths"].tolist() == ["a/1.png", "ä/2.png", "/elsewhere/3.png", "a/\udcff.png"]
    assert arrays["classes"].tolist() == list("0123456") and arrays["class_counts"].tolist() == COUNTS.tolist()
    assert str(arrays["measured_on"]) == "validation" and arrays["positions"].tolist() == [0, 1, 2, 3]
    for name, kind in (("labels", "int32"), ("second", "int32"), ("confidence", "float32"), ("positions", "int64")):
        assert arrays[name].dtype == kind
    assert arrays["predicted"].tolist() == kept.predicted.tolist()
    assert arrays["true_confidence"].tolist() == kept.true_confidence.tolist()

    whole = file.read_bytes()
    for damaged in (b"", b"PK", whole[: len(whole) // 2], whole.replace(b"labels", b"lapels")):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"predictions\.npz"):
            read_predictions(file)
    np.savez(file, **arrays | {"predicted": arrays["predicted"] + 7})  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="must name classes 0 to 6"):
        read_predictions(file)
    np.savez(file, **arrays | {"predicted": arrays["predicted"][:2]})  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="entry for each image"):
        read_predictions(file)
    with pytest.raises(ValueError, match=r"is missing: .*--predictions writes it"):
        read_predictions(tmp_path / "none.npz")


def test_classes_by_hand(tmp_path: Path) -> None:
    """A name may hold commas and what looks like markup; class c has no image, and is predicted once."""
    logits = torch.tensor([[3.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]).exp().log()
    kept = Predictions.of(logits, torch.tensor([0, 0, 1, 1]))
    found = class_scores(kept, torch.tensor([40, 2, 1]), ["[red]a,b", "b", "c"])
    assert [(s.accuracy, s.precision, s.f1) for s in found[:2]] == [(50.0, 100.0, pytest.approx(200 / 3)), (50, 50, 50)]
    assert found[2][1:] == (1, 0, None, 0.0, None, None, None, 0) and found[1].taken_for == "c" and found[1].times == 1
    assert found[0].confidence == pytest.approx(50 * float(kept.confidence[:2].sum()))
    write_classes(tmp_path / "classes.csv", found)
    rows = list(csv.DictReader((tmp_path / "classes.csv").read_text().splitlines()))
    assert [row["class"] for row in rows] == ["[red]a,b", "b", "c"]
    assert rows[0]["f1"] == "66.6667" and rows[2]["accuracy"] == ""
    table = class_table(found)
    assert [str(cell) for cell in table.columns[0].cells] == ["b", "[red]a,b"]  # c has nothing to show
    many = class_scores(kept, torch.tensor([40, 2, *[1] * 98]), [str(c) for c in range(100)])
    assert len(class_table(many).rows) == 2
    every = Predictions.of(torch.eye(30), torch.arange(30))
    shown = [str(c) for c in class_table(class_scores(every, torch.ones(30), [*map(str, range(30))])).columns[0].cells]
    assert shown[9:12] == ["9", "... 10 more", "20"] and len(shown) == 21


def config(loss: dict[str, Any] | None = None, **sections: dict[str, Any]) -> Config:
    return Config(
        loss=LossConfig(**{"name": "ce", **(loss or {})}),
        data=DataConfig(**sections.get("data", {})),
        model=ModelConfig(**sections.get("model", {})),
        train=TrainConfig(**sections.get("train", {})),
    )


# Classes of 30 and 10 images; WEIGHTED: times the inverse of their effective numbers.
PI, EVEN, REVERSED = torch.tensor([0.75, 0.25]), torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])

WEIGHTED = torch.tensor([3 / (1 - 0.9999**30), 1 / (1 - 0.9999**10)], dtype=torch.float64)


@pytest.mark.parametrize(
    ("case", "want"),
    [
        (config(), PI),
        (config({"name": "focal"}), PI),
        (config({"name": "supcon"}), PI),
        (config({"name": "logit_adjusted"}), EVEN),
        (config({"name": "logit_adjusted", "tau": 2.0}), REVERSED),
        (config({"name": "bcl"}), EVEN),
        (config({"name": "proco"}), EVEN),
        (config({"name": "allnc"}), EVEN),
        (config({"name": "allnc", "rebalance": "ce"}), PI),
        (config({"name": "allnc", "rebalance": "ce"}, data={"rebalance_sampler": "reversed"}), REVERSED),
        (config(data={"sampler": "class_balanced"}), EVEN),
        (config({"name": "class_balanced"}), WEIGHTED),
        (config({"drw": 0.8}), WEIGHTED),
        (config({"class_weights": "auto"}), EVEN),
        (config({"name": "focal", "class_weights": {"rare": 9}}), torch.tensor([1.0, 3.0])),
        (config({"name": "allnc"}, train={"retrain_epochs": 2}), EVEN),
        (config(train={"retrain_epochs": 2}), EVEN),
        (config(model={"posthoc": "logit_adjusted"}), EVEN),
        (config(model={"posthoc": "logit_adjusted", "posthoc_tau": 2.0}), REVERSED),
    ],
    ids=lambda case: None if isinstance(case, torch.Tensor) else f"{case.loss.name}",
)
def test_which_prior_a_loss_assumes(case: Config, want: torch.Tensor) -> None:
    got = assumed_prior(case, torch.tensor([30, 10]), classes=("often", "rare"))
    assert got.dtype == torch.float64 and got.tolist() == pytest.approx((want / want.sum()).tolist(), rel=1e-5)


def test_an_earlier_epoch_assumes_what_trained_it() -> None:
    counts = torch.tensor([30, 10])
    staged, deferred = config(train={"retrain_epochs": 2, "epochs": 10}), config({"drw": 0.8}, train={"epochs": 10})
    assert assumed_prior(staged, counts, epoch=8).tolist() == PI.tolist()
    assert assumed_prior(deferred, counts, epoch=8).tolist() == PI.tolist() != assumed_prior(deferred, counts).tolist()


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (config({"name": "mse"}), "got loss.name mse"),
        (config({"name": "nonl"}, model={"classifier": "normalised"}), "got loss.name nonl"),
        (config(model={"posthoc": "tau_normalised"}), "got model.posthoc tau_normalised"),
        (config({"class_weights": {"1": 0}}), "gives 1 the weight 0"),
        (config(train={"mixup": 0.5, "remix": True}), "got train.remix"),
    ],
)
def test_logits_without_a_prior_are_refused(case: Config, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        assumed_prior(case, torch.tensor([30, 10]))


def test_before_the_horizon_two_branches_have_no_common_prior() -> None:
    counts = torch.tensor([30, 10])
    case = config({"name": "allnc", "horizon": 0.3}, train={"epochs": 10})
    with pytest.raises(ValueError, match="after 2 epochs both still do"):
        assumed_prior(case, counts, epoch=2)
    assert assumed_prior(case, counts, epoch=3).tolist() == pytest.approx(EVEN.tolist())
    apart = config({"name": "allnc", "horizon": 0.3}, model={"heads": "separate"}, train={"epochs": 10})
    assert assumed_prior(apart, counts, epoch=2).tolist() == pytest.approx(EVEN.tolist())


def test_the_prior_of_a_file(tmp_path: Path) -> None:
    classes, counts, file = ["cat", "dog, small"], torch.tensor([30, 10]), tmp_path / "prior.csv"

    def read(text: str) -> list[float]:
        file.write_text(text, encoding="utf-8")
        return wanted_prior(str(file), counts, classes).tolist()

    assert wanted_prior("train", counts, classes).tolist() == [0.75, 0.25]
    assert wanted_prior("uniform", counts, classes).tolist() == [0.5, 0.5]
    assert read('\ufeffclass,weight\n"dog, small",3\n\ncat,1\n') == [0.25, 0.75]
    assert read('cat,0\n"dog, small",2') == [0.0, 1.0]
    for text, message in (
        ("cat,1\n", "must name every class; it lacks 1: dog, small"),
        ("cat,1\ncow,2\n", r"line 2 of .* must name a class of the run \(cat, dog, small\); got 'cow'"),
        ("cat,1\ncat,2\n", "line 2 of .* a second time"),
        ("cat,-1\n", "finite weight >= 0; got '-1'"),
        ("cat,nan\n", "finite weight >= 0; got 'nan'"),
        ("cat,many\n", "finite weight >= 0; got 'many'"),
        ("cat 1\n", "a class name and a weight with a comma"),
        ('cat,0\n"dog, small",0', "gives all of them 0"),
    ):
        with pytest.raises(ValueError, match=message):
            read(text)
    with pytest.raises(ValueError, match="uniform, train or a CSV file"):
        wanted_prior(str(tmp_path), counts, classes)
    with pytest.raises(ValueError, match="two of the run's have the same"):
        wanted_prior(str(file), counts, ["cat", "cat"])


def test_evaluate_measures_under_a_prior_and_writes_predictions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cross-entropy on the digits: adjusted to uniform, rare classes win; under its own prior no prediction moves."""
    monkeypatch.setattr(ending, "plot_angles", lambda *_, **__: None)
    monkeypatch.setattr(ending, "plot_curves", lambda *_: None)
    rare = {"imbalance_ratio": 30}
    config = changed(TINY, loss={"name": "ce"}, data=rare, train={"epochs": 25, "eval_every": 25})
    summary = loop.train(config, tmp_path, quiet())
    own = read_predictions(tmp_path / "predictions.npz")
    assert 100 * np.mean(own["labels"] == own["predicted"]) == pytest.approx(summary["accuracy"])
    assert "paths" not in own and str(own["measured_on"]) == "test" and len(own["labels"]) == 500
    assert len((tmp_path / "classes.csv").read_text().splitlines()) == 11

    (tmp_path / "predictions.npz").unlink()
    assert evaluate.main([str(tmp_path), "--predictions", "--classes"]) == 0
    told = capsys.readouterr().out
    assert "from the worst to the best" in told and "macro-F1" in told
    again = read_predictions(tmp_path / "predictions.npz")
    assert all(np.array_equal(own[name], again[name]) for name in own)

    run = loop.Run(config)
    run.load_model(loop.checkpoint.load_weights(tmp_path)[2], 25)
    priors = (wanted_prior(name, run.counts, list("0123456789")) for name in ("uniform", "train"))
    uniform, train = (run.measure_accuracy(prior) for prior in priors)
    plain = run.measure_accuracy()
    assert uniform["few"] > plain["few"] == train["few"] and uniform["nll"] < plain["nll"]  # type: ignore[operator]
    assert plain["accuracy"] == summary["accuracy"] != train["accuracy"]
    assert evaluate.main([str(tmp_path), "--prior", "uniform"]) == 0
    told = capsys.readouterr().out
    assert f"{uniform['accuracy']:.1f}" in told and "measured under the class prior uniform" in told
    for words, message in (
        (["--prior", "uniform", "--predictions"], "give it without --prior"),
        (["--prior", "uniform", "--collapse"], "--prior would be ignored with --collapse"),
        (["--classes", "--collapse"], "--classes would be ignored with --collapse"),
        (["--prior", "nowhere.csv"], "uniform, train or a CSV file"),
    ):
        assert evaluate.main([str(tmp_path), *words]) == 2
        assert message in capsys.readouterr().err
    assert json.loads((tmp_path / "summary.json").read_text())["macro_f1"] == pytest.approx(plain["macro_f1"])
