"""Seconds by phase, of completed work instead of launched kernels."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch


class Timer:
    """Adds up the wall-clock seconds of named phases.

    A phase synchronises with the GPU on entry and on exit, so that a kernel is counted
    in the phase that launched it. Phases may nest; the seconds of the inner phase are
    subtracted from the outer.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._inner = [0.0]

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time the block under `name`."""
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
