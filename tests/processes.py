"""Real processes for tests of faults, forked from one that has imported everything."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.processes", "dreampropeller", "tests.helpers"])


class Child:
    """A process that runs a function; its output goes to a file.

    Args:
        function: Importable; its return value is the exit code.
        *arguments: Picklable arguments.
        output: File of its standard output and error.
        environ: Environment variables to set.
    """

    def __init__(
        self,
        function: Callable[..., int | None],
        *arguments: Any,
        output: Path,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self.output = output
        job = (function, arguments, str(output), dict(environ or {}))
        self._process = _CONTEXT.Process(target=_run, args=job)
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def code(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self._process.exitcode

    def send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self, seconds: float) -> int:
        """Wait for the end; a process that outlives the time is a failure."""
        self._process.join(seconds)
        assert self.code is not None, f"still running after {seconds} s: {self.said()}"
        return self.code

    def said(self) -> str:
        return self.output.read_text() if self.output.exists() else ""

    def wait_for(self, words: str, seconds: float) -> str:
        """Wait until the process has said something."""
        end = time.monotonic() + seconds
        while words not in self.said():
            assert self.code is None or words in self.said(), self.said()
            assert time.monotonic() < end, f"never said {words!r}: {self.said()}"
            time.sleep(0.02)
        return self.said()

    def end(self) -> None:
        """Kill it, whatever its state."""
        if self.code is None:
            self.send(signal.SIGKILL)
            self._process.join(10)
        self._process.close()


def _run(
    function: Callable[..., int | None],
    arguments: tuple[Any, ...],
    output: str,
    environ: dict[str, str],
) -> None:
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    os.environ.update(environ)
    # Semaphores without a name: this process ends without clearing up.
    multiprocessing.set_start_method("fork", force=True)
    import torch

    torch.set_num_threads(1)
    code = code_of(function, arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def code_of(function: Callable[..., int | None], arguments: tuple[Any, ...]) -> int:
    """The exit code of a process whose main program is this function."""
    try:
        return function(*arguments) or 0
    except SystemExit as error:
        return int(error.code or 0)
    except KeyboardInterrupt:
        return 130
    except BaseException:
        traceback.print_exc()
        return 1


def rank_environ(rank: int, count: int, port: int) -> dict[str, str]:
    """What `torchrun` would set, for ranks of this machine."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
    }


@contextlib.contextmanager
def group_of(
    count: int, port: int, folder: Path, function: Callable[..., Any], *arguments: Any
) -> Iterator[list[Child]]:
    """Ranks that run a function, and are ended in any case."""
    ranks = [
        Child(
            function,
            *arguments,
            output=folder / f"{number}.txt",
            environ=rank_environ(number, count, port),
        )
        for number in range(count)
    ]
    try:
        yield ranks
    finally:
        for rank in ranks:
            rank.end()
