"""Notes to the user while a config is read."""

from __future__ import annotations

import functools
import os
import sys


@functools.cache
def note(line: str) -> None:
    """Print a line on standard error, once however often it is built, on one rank."""
    if os.environ.get("RANK", "0") == "0":
        print(f"note: {line}", file=sys.stderr)
