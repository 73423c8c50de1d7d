"""How allnc's programs end: with an exit status and, for whatever a person can mend, one line instead of a traceback.

Only the standard library is imported, so that Ctrl-C is answered from the first moment on.
"""

from __future__ import annotations

import argparse
import difflib
import io
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

DONE, MISTAKE, INTERRUPTED = 0, 2, 130
_SPEAKING = 10  # seconds: a launcher ends all its processes when the first one ends, which must be the one that speaks


class SaidElsewhereError(ValueError):
    """A mistake that another process of the same launcher says; this one has nothing to add."""


def typed(module: str) -> str:
    """Return what a person types to start a program: `allnc train` or `python -m allnc.train`, as this time.

    Args:
        module: name of the program, such as allnc.train.
    """
    return _spoken(module) if _by_entry_point() else f"python -m {module}"


def _spoken(module: str) -> str:
    """Return the name before a message: `allnc train` or `allnc.train`."""
    return module.replace(".", " ") if _by_entry_point() else module


def _by_entry_point() -> bool:
    started = Path(sys.argv[0])
    return started.name == "allnc" or (started.name == "__main__.py" and started.parent.name == "allnc")


class Parser(argparse.ArgumentParser):
    """A parser whose mistakes take one line, with the nearest option.

    Args:
        module: name of the program, such as allnc.evaluate; None for a subcommand, whose `prog` argparse knows.
        description: what it does.
        options: as of argparse.
    """

    def __init__(self, module: str | None = None, description: str | None = None, **options: Any) -> None:
        if description:
            description = re.sub(r"python -m (allnc[.\w]*)", lambda found: typed(found[1]), description)
        own = {} if module is None else {"prog": typed(module)}
        super().__init__(description=description, **{"formatter_class": _wide, **own, **options})
        self.module = module or self.prog

    def error(self, message: str) -> NoReturn:
        """Say the mistake on one line and end with status 2."""
        words = message.removeprefix("unrecognized arguments: ").split()
        if message.startswith("unrecognized arguments: -"):
            commands = [action.choices for action in self._actions if isinstance(action, argparse._SubParsersAction)]
            parsers = [self, *(parser for named in commands for parser in named.values())]
            known = [option for parser in parsers for option in parser._option_string_actions]
            near = difflib.get_close_matches(words[0].split("=")[0], known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            message = f"{words[0]} is not an option{hint}; --help lists them"
        sys.exit(_mistake(self.module, message))


def _wide(prog: str) -> argparse.HelpFormatter:
    return argparse.HelpFormatter(prog, max_help_position=30, width=112)


def answer(program: str, body: Callable[[], None]) -> int:
    """Run a program and return its exit status.

    ValueError, OSError and too little memory are what a person can mend (an option, a file, a full disk): one line on
    standard error and 2. Ctrl-C gives the line that whoever was interrupted put into the exception, and 130. All other
    exceptions are faults of allnc and keep their traceback.

    Args:
        program: name that the line begins with.
        body: the program; it imports what it needs itself.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal without η shows its number; the training goes on
            stream.reconfigure(errors="backslashreplace")
    threading.excepthook = _in_thread
    try:
        try:
            body()
            sys.stdout.flush()
        finally:
            _let_end()
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has gone: nobody is left to tell
        sys.stdout = None
        return MISTAKE
    except OSError as error:
        return _mistake(program, _reason(error))
    except SaidElsewhereError:
        time.sleep(_SPEAKING)
        return MISTAKE
    except ValueError as error:
        return _mistake(program, str(error))
    except (MemoryError, RuntimeError) as error:
        if not _is_memory(error):
            raise
        smaller = "lower train.batch_size, data.views, data.image_size or the model's size"
        return _mistake(program, f"not enough memory: {smaller} ({str(error) or type(error).__name__})")
    except KeyboardInterrupt as stop:
        _let_end()
        print(f"{_spoken(program)}: {stop if stop.args else 'stopped'}", file=sys.stderr)
        return INTERRUPTED
    return DONE


def _let_end() -> None:
    """Ignore Ctrl-C from here on, where the process ends with the program.

    Python takes a fifth of a second to end with torch, whose clean-up would answer a second Ctrl-C by its traceback.
    """
    started = Path(sys.argv[0])
    if started.name == "allnc" or Path(__file__).parent in started.absolute().parents:  # else somebody's own program
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _in_thread(fault: threading.ExceptHookArgs) -> None:
    """Let a thread that cannot write end silently: TensorBoard raises its error again at the next event."""
    if not isinstance(fault.exc_value, OSError):
        threading.__excepthook__(fault)


def _reason(error: OSError) -> str:
    if error.strerror is None:
        return str(error)
    given = (name for name in (error.filename, error.filename2) if name is not None)
    names = [os.fsdecode(name) if isinstance(name, bytes) else str(name) for name in given]
    return f"{' -> '.join(names)}: {error.strerror}" if names else error.strerror


def _is_memory(error: Exception) -> bool:
    """Whether memory ran out; torch says so by RuntimeError on a CPU and by a class of its own on a GPU."""
    torch_says = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
    return isinstance(error, MemoryError) or torch_says


def _mistake(program: str, message: str) -> int:
    print(f"{_spoken(program)}: error: {' '.join(message.split())}", file=sys.stderr)
    return MISTAKE
