"""Requests to stop: Ctrl-C, SIGTERM, or a file; and to wait: another file."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from tqdm import tqdm

STOP = "stop"
"""Name of the file in a run folder that requests a stop."""
PAUSE = "pause"
"""Name of the file beside it that makes a run wait until it is removed."""
LOOK = 0.2
"""Seconds between two looks for the latter."""
SAME_SIGNAL = 2.0
"""Seconds within which signals count as one: a launcher repeats the terminal's."""


def forget(folder: Path) -> None:
    """Remove the requests to an earlier run in a folder."""
    for name in (STOP, PAUSE):
        (folder / name).unlink(missing_ok=True)


class Stop:
    """A request to stop, granted after the current iteration.

    Args:
        files: Files whose existence requests a stop; a file may hold the name of a
            signal, and is removed. None: listen to nothing (ranks other than 0; rank 0
            decides for all).
        patience: Seconds that a pause lasts at most: other ranks wait meanwhile.

    Attributes:
        signal: The signal that requested the stop, if any. A file counts as Ctrl-C,
            unless it names SIGTERM.
    """

    def __init__(
        self, files: Sequence[Path] | None, patience: float = math.inf
    ) -> None:
        self.signal: signal.Signals | None = None
        self._files = files
        self._patience = patience
        self._at = 0.0

    @contextmanager
    def listening(self) -> Iterator[Stop]:
        """Handle the signals inside the block.

        A file that is there already counts: it was written while ranks started.

        Raises:
            KeyboardInterrupt: A second signal arrived: stop at once.
        """
        previous = {
            number: signal.signal(number, self._hear)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def asked(self) -> bool:
        """Whether to stop now."""
        for file in self._files or ():
            if file.exists():
                named = file.read_text().strip() == "SIGTERM"
                self.signal = signal.SIGTERM if named else signal.SIGINT
                file.unlink(missing_ok=True)
        return self.signal is not None

    def wait(self) -> None:
        """Wait while a pause is requested, and no stop."""
        files = [file.with_name(PAUSE) for file in self._files or ()]
        begin = time.monotonic()
        while any(file.exists() for file in files) and not self.asked():
            if time.monotonic() - begin > self._patience:
                tqdm.write("Paused for as long as other processes wait: going on.")
                for file in files:
                    file.unlink(missing_ok=True)
            time.sleep(LOOK)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self._files is None:
            return
        now = time.monotonic()
        if self.signal is None:
            self._at = now
            self.signal = signal.Signals(number)
            tqdm.write("Stopping after this iteration; once more stops at once.")
        elif now - self._at > SAME_SIGNAL:
            raise KeyboardInterrupt
