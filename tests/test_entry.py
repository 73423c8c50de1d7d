"""The command `allnc`: its commands, its help on a screen, and mistakes answered before torch is imported."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from allnc.__main__ import COMMANDS, main
from allnc.trainer.command import ACTIONS, TRAIN
from allnc.trainer.extract_command import PROGRAM
from allnc.trainer.names import nearest
from allnc.trainer.options import option_names
from tests.test_project import PROJECT

SCREEN = 42  # lines
ROOT = Path(__file__).parent.parent


@pytest.fixture
def by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/allnc"])


def _run(*words: str) -> subprocess.CompletedProcess[str]:
    """Run allnc without torch, so that it fails where it would import it."""
    program = (
        f"import sys; sys.modules['torch'] = None; sys.argv = ['allnc']; import allnc.__main__ as m; m.main({words})"
    )
    exits = program.replace("m.main", "sys.exit(m.main") + ")"
    return subprocess.run([sys.executable, "-c", exits], cwd=ROOT, capture_output=True, text=True)


def test_help_is_a_screen_and_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 24 and all(len(line) <= 100 for line in lines)
    for name, (module, does) in COMMANDS.items():
        assert sum(line.split()[:1] == [name] and does in line for line in lines) == 1
        assert callable(import_module(module).main)
    assert PROJECT["project"]["scripts"] == {"allnc": "allnc.__main__:main"}
    assert main([]) == 2 and "usage: allnc COMMAND" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_is_a_screen_without_torch(command: str) -> None:
    done = _run(command, "--help")
    assert done.returncode == 0, done.stderr
    assert f"usage: allnc {command}" in done.stdout and "python -m" not in done.stdout
    assert done.stdout.count("\n") <= SCREEN
    assert all(len(line) <= 120 for line in done.stdout.splitlines())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("trian",), "allnc: error: trian is not a command; did you mean train?; allnc --help lists them"),
        (("docs", "train"), "docs is not a command, but a folder: allnc train docs trains on it; allnc --help"),
        (("--config", "x"), "allnc: error: a command comes first, such as allnc train --config; got --config; allnc"),
        (("train", "--lr", "1"), "allnc train: error: --lr is not an option; did you mean --train.lr?"),
        (("evaluate", "x", "--colapse"), "allnc evaluate: error: --colapse is not an option; did you mean --collapse?"),
        (("evaluate",), "allnc evaluate: error: the following arguments are required: RUN_DIR"),
        (
            ("theory", "minority", "--cell", "x"),
            "allnc theory minority: error: argument --cells: invalid int value: 'x'",
        ),
        (("theory", "minority", "--count_", "x"), "is not an option; did you mean --counts?"),
        (("features", "--passe", "3"), "allnc features: error: --passe is not an option; did you mean --passes?"),
        (("plot", "x", "--kind", "y"), "allnc plot: error: argument --kind: invalid choice: 'y'"),
        (("info", "x"), "allnc info: error: unrecognized arguments: x"),
        (("predict", "gone", "docs/images"), "last.safetensors; got gone, which is missing"),
        (("evaluate", "setup.py"), "must be a run folder with last.safetensors; got setup.py, which is no folder"),
        (("export", "gone", "--format", "onnx"), "RUN_DIR must be a run folder with last.safetensors; got gone"),
        (("export", "docs", "--format", "onnx"), "got docs, which has no last.safetensors"),
    ],
)
def test_mistakes_are_one_line_without_torch(words: tuple[str, ...], message: str) -> None:
    done = _run(*words)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and not done.stdout
    assert message in done.stderr


def test_a_program_says_the_name_that_was_typed(
    by_name: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["train", "--config", "nothing"]) == 2
    assert capsys.readouterr().err.startswith("allnc train: error: --config must be")
    monkeypatch.setattr(sys, "argv", ["/x/allnc/train.py"])
    assert main(["train", "--config", "nothing"]) == 2
    assert capsys.readouterr().err.startswith("allnc.train: error: --config must be")
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    assert capsys.readouterr().out.startswith("usage: python -m allnc.evaluate")


def test_the_short_help_shows_options_that_exist_with_their_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    for program in (TRAIN, PROGRAM):
        shown = {name for names in program.shown.values() for name in names}
        assert shown <= {*option_names(), *program.flags, *program.options, *ACTIONS, "config"}
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--config", "cifar100_lt", "--help"])
    said = capsys.readouterr().out
    assert stopped.value.code == 0
    assert "[cifar100_lt]" in said and "passes over the training images [200]" in said and "--loss.balance" not in said


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    from allnc import __version__

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"allnc {__version__}\n"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("lr", "train.lr"),
        ("Train.Epochs", "train.epochs"),
        ("batch-size", "train.batch_size"),
        ("arch", "model.name"),
        ("gpus", "train.device"),
        ("temp", "loss.temperature"),
        ("tempratur", "loss.temperature"),
        ("model.nam", "model.name"),
        ("name", "data.name, model.name or loss.name"),
        ("qqqq", ""),
    ],
)
def test_nearest_names(name: str, said: str) -> None:
    assert nearest(name, option_names()) == (f"; did you mean {said}?" if said else "")
