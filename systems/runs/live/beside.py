"""The page in a process of its own, beside a run in progress (`viewer=true`)."""

from __future__ import annotations

import importlib.util
import multiprocessing
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from systems.runs import live
from systems.runs.live.address import Address
from systems.settings.reader import ConfigError


@contextmanager
def page(folder: Path, port: int) -> Iterator[None]:
    """Serve the page of a run inside the block; a run is never lost to its page.

    What keeps the page from being served is said in a sentence on standard error.

    Args:
        folder: Folder of the run.
        port: TCP port, on this machine alone.
    """
    try:
        Address(port=port).check()
        if importlib.util.find_spec("viser") is None:
            raise ConfigError('it needs viser: `pip install -e ".[viewer]"`.')
    except ConfigError as error:
        print(f"note: No live viewer. {error}", file=sys.stderr)
        yield
        return
    process = multiprocessing.get_context("spawn").Process(
        target=_serve, args=(str(folder), port), daemon=True
    )
    process.start()
    try:
        yield
    finally:
        process.terminate()
        process.join()


def _serve(folder: str, port: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's is for the run
    try:
        live.run([folder, f"port={port}"])
    except ConfigError as error:
        print(f"note: No live viewer. {error}", file=sys.stderr)
