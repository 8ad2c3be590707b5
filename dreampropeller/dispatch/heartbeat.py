"""Signs of life of all ranks, beside the collectives.

A rank that is stopped, or whose machine has lost its network, keeps its connections:
the others would wait in a collective until its time-out. So a thread of each rank
counts up a key of the process group's store every `silence` / 10 seconds. Rank 0 reads
the keys of all ranks, the others that of rank 0 and its verdict, so that the store
answers 3 n requests per interval. A second thread, which never waits for the store,
notices a count that stands still for `silence` seconds, and a store that does not
answer for as long.

Within about 1.3 `silence` the main thread of every rank learns who is lost, whether it
waits in a collective or evaluates a drift.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

_PARTS = 10
"""Beats per silence."""
_LEFT = 2**40
"""Added to a rank's count when it leaves; it is not silent, then."""
EXIT_LOST = 86
"""Exit code of a rank that could not be interrupted in its drift."""


class Interrupted(BaseException):
    """Raised in the main thread, inside a drift, when another rank is lost."""


class Heartbeat:
    """Beats for this rank, and listens to the others, until it is stopped.

    Args:
        store: A connection to the store that nothing else uses.
        rank: This rank.
        size: Number of ranks.
        silence: Seconds without a beat after which a rank counts as lost. Code that
            holds the interpreter's lock for longer is taken for a lost rank.
    """

    def __init__(self, store: Any, rank: int, size: int, silence: float) -> None:
        self._store: Any = store
        self._rank, self._size = rank, size
        self._silence, self._interval = silence, silence / _PARTS
        self._counts = [0] * size
        self._heard = [time.monotonic()] * size
        self._answered = time.monotonic()
        self._all = rank == 0
        self._suspect: int | None = None
        self._verdict: int | None = None
        self._error = ""
        self._done = threading.Event()
        self._noticed = threading.Event()
        self._lock = threading.Lock()
        self._target: int | None = None
        self._threads = [
            threading.Thread(target=run, daemon=True)
            for run in (self._beat, self._watch)
        ]

    def start(self) -> None:
        """Start the threads."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Say that this rank leaves, and stop the threads."""
        self._done.set()
        for thread in self._threads:
            thread.join(self._interval)  # one may wait for a store that is gone
        self._store = None  # closes the connection

    @property
    def interval(self) -> float:
        """Seconds between two beats."""
        return self._interval

    @property
    def lost(self) -> str:
        """A clause that names what is lost; empty as long as nothing is."""
        if self._verdict == self._rank:
            return (
                "the others have had no sign of life of this one for "
                f"{self._silence:g} s (raise `heartbeat` if a call of a drift holds "
                "Python's interpreter lock for longer)"
            )
        if self._verdict is not None:
            return (
                f"rank {self._verdict} has given no sign of life for "
                f"{self._silence:g} s"
            )
        if self._error:
            return (
                "the store of the process group has ended, which the launcher or rank "
                f"0 holds ({self._error})"
            )
        if self._noticed.is_set():
            return (
                "the store of the process group, which the launcher or rank 0 holds, "
                f"has not answered for {self._silence:g} s"
            )
        return ""

    def diagnose(self) -> str:
        """Who is lost, after a connection broke: a clause, or empty if all still beat.

        Waits for four beats.
        """
        self._all = True
        begin = time.monotonic()
        self._done.wait(4 * self._interval)
        if self.lost:
            return self.lost
        silent = [
            rank
            for rank in range(self._size)
            if self._counts[rank] < _LEFT
            and self._heard[rank] < begin + 2 * self._interval
            and rank != self._rank
        ]
        names = " and ".join(f"rank {rank}" for rank in silent)
        return f"{names} stopped giving signs of life" if silent else ""

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """A block of the calling thread that is interrupted when something is lost.

        Raises:
            Interrupted: Something is lost; `lost` says what.
        """
        with self._lock:
            self._target = threading.get_ident()
        try:
            yield
        finally:
            with self._lock:
                self._target = None
        if self._noticed.is_set():
            raise Interrupted

    def _beat(self) -> None:
        """Count up, and read the counts of others."""
        try:
            while True:
                self._store.add(str(self._rank), 1)
                for rank in range(self._size) if self._all else (0,):
                    count = self._store.add(str(rank), 0)
                    if count != self._counts[rank]:
                        self._counts[rank] = count
                        self._heard[rank] = time.monotonic()
                if self._suspect is not None:
                    self._store.set("lost", str(self._suspect))
                if self._store.check(["lost"]):
                    self._verdict = int(self._store.get("lost"))
                self._answered = time.monotonic()
                if self._done.wait(self._interval):
                    break
            self._store.add(str(self._rank), _LEFT)
        except Exception as error:  # whatever a store raises when it is gone
            if not self._done.is_set():
                self._error = str(error).splitlines()[0][:120]

    def _watch(self) -> None:
        """Notice silence; never waits for anything but the clock."""
        before = time.monotonic()
        while not self._done.wait(self._interval):
            now = time.monotonic()
            if now - before > self._silence / 2:
                # This process itself was stopped: nobody else can be blamed for it.
                self._heard = [now] * self._size
                self._answered = now
            before = now
            if self._suspect is None:
                self._suspect = self._find_silent(now)
            gone = self._verdict is not None or self._error
            if gone or now - self._answered > self._silence:
                self._noticed.set()
                self._interrupt()
                return

    def _find_silent(self, now: float) -> int | None:
        watched = range(self._size) if self._rank == 0 else range(1)
        for rank in watched:
            beats = 0 < self._counts[rank] < _LEFT
            if beats and now - self._heard[rank] > self._silence and rank != self._rank:
                # No answer to anybody is the store's silence, not the rank's.
                return rank if now - self._answered < self._silence / 2 else None
        return None

    def _interrupt(self) -> None:
        """Interrupt a drift; end the process if the drift does not return."""
        end = time.monotonic() + self._silence
        raised = False
        while not self._done.wait(self._interval):
            with self._lock:
                if self._target is None:
                    return
                if not raised:
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(
                        ctypes.c_ulong(self._target), ctypes.py_object(Interrupted)
                    )
                    raised = True
            if time.monotonic() > end:
                print(
                    f"error: rank {self._rank} ends in the middle of a drift, which "
                    f"cannot be interrupted: {self.lost}. The last checkpoint is "
                    "intact.",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(EXIT_LOST)
