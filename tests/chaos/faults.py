"""Faults that a process does to itself, at the n-th time that it reaches a place."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreampropeller import DistributedDispatcher, checkpoint
from dreampropeller.dispatch import wire
from systems.runs.recorder import FolderRecorder
from tests.chaos import problem

PLACES = {
    "load": (),
    "drift": (),
    "drift done": (),
    "gather": (DistributedDispatcher, "_gather"),
    "send": (wire, "pack"),
    "update": (),
    "agree": (DistributedDispatcher, "agree"),
    "confirm": (DistributedDispatcher, "confirm"),
    "record": (FolderRecorder, "record"),
    "checkpoint": (checkpoint, "_write"),
    "replace": (checkpoint, "_flush_folder"),
    "export": (),
}
"""Phases of a run in order, and the function that begins one; those without are named
by the problem itself."""


@dataclass(frozen=True)
class Fault:
    """What happens, where, and when.

    Args:
        what: Name of the action, a key of `ACTIONS`.
        place: A key of `PLACES`.
        at: Which visit of the place, from 1.
        marker: File that receives the time at which the fault happens.
    """

    what: str
    place: str
    at: int
    marker: str = ""

    def install(self) -> Callable[[], object]:
        """Let it happen in this process, until the returned function is called."""
        count = 0

        def reached(*details: Any) -> None:
            nonlocal count
            count += 1
            if count == self.at or (count > self.at and self.what in LASTING):
                if self.marker and not Path(self.marker).exists():
                    Path(self.marker).write_text(repr(time.monotonic()))
                ACTIONS[self.what](*details)

        where = PLACES[self.place]
        if not where:
            problem.FAULTS[self.place] = reached
            return functools.partial(problem.FAULTS.pop, self.place)
        owner, name = where
        healthy = getattr(owner, name)

        @functools.wraps(healthy)
        def faulty(*arguments: Any, **options: Any) -> Any:
            reached(*arguments)
            return healthy(*arguments, **options)

        setattr(owner, name, faulty)
        return functools.partial(setattr, owner, name, healthy)


def _signal(number: int) -> Callable[..., None]:
    def send(*details: Any) -> None:
        del details
        os.kill(os.getpid(), number)

    return send


def _raise(*details: Any) -> None:
    raise ZeroDivisionError("no such image")


def _spoil(value: float) -> Callable[..., None]:
    def write(step: int, drift: dict[str, Any]) -> None:
        del step
        drift["w"].view(-1)[3] = value

    return write


def _differ(step: int, y: dict[str, Any]) -> None:
    del step
    y["w"].view(-1)[5].mul_(1 + 2**-20)


def _sleep(*details: Any) -> None:
    del details
    time.sleep(0.25)


def _wait(*details: Any) -> None:
    """Wait until the trial lets the run continue."""
    del details
    while not Path(os.environ["CHAOS_DISK"], "release").exists():
        time.sleep(0.02)


def _interrupt_twice(*details: Any) -> None:
    """Ctrl-C, and again a moment later: at once counts as the same."""
    del details
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(2.2)
    os.kill(os.getpid(), signal.SIGINT)


def _fill(*details: Any) -> None:
    """Fill the disk that the run's results are on."""
    del details
    folder = Path(os.environ["CHAOS_DISK"])
    with open(folder / "filler", "wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)) == 4096:
                pass
            file.write(bytes(4096))
        except OSError:
            return


def _write_protect(*details: Any) -> None:
    """Make the run's folder, or that of its checkpoints, read-only."""
    del details
    (folder,) = Path(os.environ["CHAOS_DISK"]).glob("*/*@*")
    for options in (["--bind", folder, folder], ["-o", "remount,ro,bind", folder]):
        subprocess.run(["mount", *map(str, options)], check=True)


ACTIONS: dict[str, Callable[..., None]] = {
    "kill": _signal(signal.SIGKILL),
    "stop": _signal(signal.SIGSTOP),
    "interrupt": _signal(signal.SIGINT),
    "interrupt twice": _interrupt_twice,
    "terminate": _signal(signal.SIGTERM),
    "raise": _raise,
    "nan": _spoil(float("nan")),
    "infinity": _spoil(float("inf")),
    "differ": _differ,
    "sleep": _sleep,
    "wait": _wait,
    "fill": _fill,
    "write-protect": _write_protect,
}
LASTING = ("sleep", "raise", "nan", "infinity")
"""Faults that happen again at every later visit."""


def run(words: Sequence[str], faults: Sequence[Fault]) -> int:
    """`launch.py` in this process, with faults."""
    with contextlib.ExitStack() as undo:
        for fault in faults:
            undo.callback(fault.install())
        return problem.run(list(words))
