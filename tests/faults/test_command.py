"""What a person can mend ends in one line and exit status 2, whatever the terminal and the size of the mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import save_file

from allnc import evaluate
from allnc.train import main
from tests.faults.runs import TINY, WORDS, one_line, start, start_afresh

SMALL = [*WORDS, "--train.epochs", "1"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model.width", "300000"], "not enough memory: lower train.batch_size"),
        (["--model.name", "timm:vit_tiny_patch16_224"], "model.name must be a model for 1 x 8 x 8 images"),
        (["--model.name", "timm:nosuch"], "model.name must be a model that timm knows; got 'nosuch'"),
        (["--train.threads", "100000"], "train.threads must be in [1, 1024]; got 100000"),
        (["--train.batch_size", "4294967295"], "train.batch_size must be <="),
        (["--train.batch_size", str(10**30)], "train.batch_size must be at most"),
    ],
)
def test_sizes_beyond_the_machine(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "--out", str(tmp_path / "run")]) == 2
    assert message in one_line(capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &a [x,x]\ntrain: {lr: *a}\n", "must write out what it repeats; got an alias"),
        ("train: " + "[" * 5000 + "]" * 5000, "it is not: maximum recursion depth exceeded"),
        ("train: {lr: \x00}", "it is not: unacceptable character"),
        ("\ufefftrain: {lr: -1}", "train.lr must be > 0; got -1"),
    ],
)
def test_files_that_are_no_configurations(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    assert main(["--config", str(path), "--print_config"]) == 2
    assert message in one_line(capsys.readouterr().err)


def test_another_encoding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes("data: {root: Bücher}".encode("latin-1"))
    assert main(["--config", str(path), "--print_config"]) == 2
    assert "must be YAML in UTF-8" in one_line(capsys.readouterr().err)


def test_a_home_that_nobody_has(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("~nobody-has-it/x", "", "a\0b"):
        assert main(["--out", name]) == 2
        assert "--out must be the name of a folder" in one_line(capsys.readouterr().err)


def test_a_terminal_without_greek(tmp_path: Path) -> None:
    process = start_afresh(*SMALL, "--out", str(tmp_path / "run"), PYTHONIOENCODING="ascii")
    shown, errors = process.communicate(timeout=120)
    assert process.returncode == 0 and not errors and "\\u03b7 " in shown


def test_a_reader_that_goes_away(tmp_path: Path) -> None:
    process = start(*WORDS, "--train.epochs", "400", "--out", str(tmp_path / "run"))
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(60) in (1, 2) and "Traceback" not in process.errors()


@pytest.mark.parametrize(
    ("notes", "message"),
    [
        (None, "must hold a configuration in its metadata; it does not"),
        ({"config": "{", "epoch": "1"}, "must hold a configuration in its metadata; it cannot be read"),
        ({"config": "[]", "epoch": "1"}, "a configuration must hold sections"),
        ({"config": "{}", "epoch": "x"}, "it cannot be read: invalid literal for int"),
        ({"config": json.dumps({"model": {"width": 99}}), "epoch": "1"}, "weights must fit the model of its config"),
        ({"config": json.dumps({"model": {"breadth": 1}}), "epoch": "1"}, "model.breadth is not an option"),
    ],
)
def test_weights_of_another_program(
    notes: dict[str, str] | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    save_file({"w": torch.zeros(2)}, tmp_path / "last.safetensors", notes)
    assert evaluate.main([str(tmp_path)]) == 2
    assert message in one_line(capsys.readouterr().err)


def test_evaluating_while_a_run_saves(tmp_path: Path) -> None:
    """A reader finds one checkpoint or the next, never a mixture and never an error."""
    import torch

    from allnc.trainer import checkpoint

    writer = start(str(tmp_path), program="tests.faults.writer")
    assert writer.stdout is not None
    writer.stdout.readline()
    seen = set()
    while writer.poll() is None:
        config, epoch, weights = checkpoint.load_weights(tmp_path)
        assert config == TINY and torch.equal(weights["w"], torch.full((1000,), float(epoch)))
        seen.add(epoch)
    assert writer.returncode == 0 and len(seen) > 5
