"""Files that are whole or not there: written beside their place, then moved into it."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def written(path: Path) -> Iterator[Path]:
    """Where to write a file; it appears at `path` once the block has ended well.

    A reader never sees half of it, and a failure leaves what was there before.

    Args:
        path: Its place; the folder is made if need be. The path that is yielded has
            the same ending.

    Raises:
        OSError: As `named`.
    """
    part = path.with_name(f"part-{path.name}")
    try:
        with named(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield part
            os.replace(part, path)
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
    """Say which file it was when writing fails.

    Raises:
        OSError: It cannot be written; names the file, and what to do when the disk is
            full.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error).split("\n")[0] or type(error).__name__
        advice = "Write to another folder: `exp_root_dir=…`."
        if error.errno in _FULL or _is_full(path.parent):
            advice = f"Free some space there. {advice}"
        message = f"`{path}` cannot be written: {reason.rstrip('.')}. {advice}"
        raise OSError(message) from error


def _is_full(folder: Path) -> bool:
    """Whether a disk is full; programs that write for us do not always say so."""
    with contextlib.suppress(OSError):
        return shutil.disk_usage(folder).free < 2**16
    return False
