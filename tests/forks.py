"""Processes that have imported what they need when they begin: forks of one that has done nothing else.

Importing takes a program of ours some seconds, its work in a test often less than one. Programs that are started from
nothing have tests, too: a launcher's (tests/trainer/test_ranks.py), those of `allnc` (tests/test_entry.py), and Ctrl-C
during imports (tests/faults/test_folder.py).
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import resource
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection

FORKS = multiprocessing.get_context("forkserver")
# What is missing where only kernels and ops are tested is passed over.
FORKS.set_forkserver_preload(
    ["torch._dynamo", "allnc.ops", "allnc.trainer.loop", "torch.utils.tensorboard", "sklearn.datasets", "timm"]
)


@atexit.register
def _end() -> None:
    """Kill what a failed test has left, before multiprocessing waits for it."""
    for child in multiprocessing.active_children():
        child.kill()


class Fork:
    """`python -m PROGRAM WORDS...`, or a call of a function; what of subprocess.Popen the tests use.

    Args:
        program: name of its module, or the function.
        words: its arguments.
        environment: its environment; that of this process by default.
        largest_file: it can write no file of more than so many bytes.
    """

    def __init__(
        self,
        program: str | Callable[..., object],
        *words: str,
        environment: Mapping[str, str] | None = None,
        largest_file: int | None = None,
    ) -> None:
        reader, writer = FORKS.Pipe(duplex=False)
        self._errors = tempfile.NamedTemporaryFile("r")  # noqa: SIM115  # closed with this object
        given = dict(os.environ if environment is None else environment)
        arguments = (program, words, given, os.getcwd(), largest_file, writer, self._errors.name)
        self._process = FORKS.Process(target=_become, args=arguments)
        self._process.start()
        writer.close()
        self.stdout = os.fdopen(os.dup(reader.fileno()))
        reader.close()
        self.pid = self._process.pid or 0

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            self.kill()
            raise subprocess.TimeoutExpired(self._process.name, timeout or 0)
        return self.returncode

    def errors(self) -> str:
        """What it has written to standard error so far."""
        return self._errors.read()

    def communicate(self, timeout: float) -> tuple[str, str]:
        """Wait for its end; return the rest of its standard output, and its standard error."""
        late = threading.Timer(timeout, self.kill)
        late.start()
        shown = self.stdout.read()
        late.cancel()
        self.wait(timeout)
        return shown, self.errors()

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def called(function: Callable[[], object], **environment: str) -> str:
    """What the function prints in a fork that has these variables before the first call of an op."""
    fork = Fork(function, environment=os.environ | environment)
    shown, errors = fork.communicate(timeout=120)
    assert fork.returncode == 0, errors
    return shown


def _become(
    program: str | Callable[..., object],
    words: tuple[str, ...],
    environment: dict[str, str],
    folder: str,
    largest_file: int | None,
    output: Connection,
    errors: str,
) -> None:
    """Be the program, in the fork."""
    multiprocessing.set_start_method(None, force=True)  # its own processes start as they always do
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    os.dup2(output.fileno(), 1)
    output.close()
    os.dup2(os.open(errors, os.O_WRONLY | os.O_APPEND), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    if not isinstance(program, str):
        program(*words)
        return
    sys.argv[1:] = words
    runpy.run_module(program, run_name="__main__", alter_sys=True)
