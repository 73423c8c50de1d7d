"""How allnc's programs end: with an exit status and, for whatever a person can mend, one line instead of a traceback.

Only the standard library is imported, so that Ctrl-C is answered from the first moment on.
"""

from __future__ import annotations

import io
import os
import sys
import threading
import time
from collections.abc import Callable

DONE, MISTAKE, INTERRUPTED = 0, 2, 130
_SPEAKING = 10  # seconds: a launcher ends all its processes when the first one ends, which must be the one that speaks


class SaidElsewhereError(ValueError):
    """A mistake that another process of the same launcher says; this one has nothing to add."""


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
        body()
        sys.stdout.flush()
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
        print(f"{program}: {stop if stop.args else 'stopped'}", file=sys.stderr)
        return INTERRUPTED
    return DONE


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
    print(f"{program}: error: {' '.join(message.split())}", file=sys.stderr)
    return MISTAKE
