"""`python -m allnc.plot.simplex`: the still, the film, and the images that it trains on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from allnc.config import DataConfig
from allnc.data import load
from allnc.plot.simplex import METHODS, _images, main


@pytest.mark.slow
@pytest.mark.parametrize("dim", [2, 3])
def test_it_draws_all_methods_over_the_training(dim: int, tmp_path: Path) -> None:
    words = ["--epochs", "2", "--images", "20", "3", "2", "--features", str(dim), "--out", str(tmp_path / "out")]
    assert main(words) == 0
    with Image.open(tmp_path / "out" / "simplex.gif") as film:
        assert getattr(film, "n_frames", 1) == 3  # before the training, and after each epoch
    with Image.open(tmp_path / "out" / "simplex.png") as still:
        assert still.width > 300 * len(METHODS)


def test_the_images_are_of_the_digits_asked_for() -> None:
    train, test = _images([7, 0, 4], [30, 20, 10])
    assert train.class_counts.tolist() == [30, 20, 10] and test.class_counts.tolist() == [50, 50, 50]
    assert train.classes == ("digit 7", "digit 0", "digit 4")
    _, every = load(DataConfig(name="digits", imbalance="none"))
    assert test.images is not None and every.images is not None
    for label, digit in enumerate((7, 0, 4)):
        assert torch.equal(test.images[test.labels == label], every.images[every.labels == digit])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--digits", "1", "1", "2"], "--digits must be different; got 1 1 2"),
        (["--images", "100", "500", "5"], "for the digit 5; got 500"),
        (["--images", "100", "0", "5"], "for the digit 5; got 0"),
        (["--epochs", "0"], "epochs"),
        (["--seed", "-1"], "seed"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
