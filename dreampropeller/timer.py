"""Seconds by phase, counted when the work is done and not when it is launched."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch


class Timer:
    """Adds up the wall-clock seconds of named phases.

    A phase waits for the GPU on entry and on exit, so that a kernel is counted where it
    ran. Phases may nest; the inner one's seconds are taken from the outer one's.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._inner = [0.0]

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the block under `name`."""
        _synchronize()
        start = time.perf_counter()
        self._inner.append(0.0)
        try:
            yield
        finally:
            _synchronize()
            elapsed = time.perf_counter() - start
            own = elapsed - self._inner.pop()
            self._inner[-1] += elapsed
            self._seconds[name] = self._seconds.get(name, 0.0) + own

    def lap(self) -> dict[str, float]:
        """The seconds since the last lap, by phase."""
        seconds, self._seconds = self._seconds, {}
        return seconds


def _synchronize() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
