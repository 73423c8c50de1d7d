"""What the README shows works when pasted."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from allnc.trainer.command import parse

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
TRAIN_COMMANDS = re.findall(r"python -m allnc\.train (--[^#`\n]*)", README)


def test_the_python_example_runs() -> None:
    examples = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert examples
    for example in examples:
        names: dict[str, object] = {}
        exec(example, names)
        assert names["z"].grad.isfinite().all()  # type: ignore[attr-defined]


@pytest.mark.parametrize("command", TRAIN_COMMANDS)
def test_the_training_commands_are_understood(command: str) -> None:
    words = [word for word in shlex.split(command) if word != "--print_config"]
    parse(words)


def test_file_map_names_what_is_there() -> None:
    block = re.search(r"## File map\n\n```\n(.*?)```", README, flags=re.DOTALL)
    assert block is not None
    for line in block.group(1).splitlines():
        assert (ROOT / line.split()[0]).is_dir(), line
