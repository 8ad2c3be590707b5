"""Names in a run's folder, and atomic writing: a temporary name, then a move."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

CONFIG = "config.yaml"
"""The resolved config in a run's folder."""
CHECKPOINTS = "ckpts"
"""The folder of checkpoints in a run's folder."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def written(path: Path) -> Iterator[Path]:
    """A temporary path to write to, moved to `path` when the block ends without error.

    A reader never sees a partial file, and a failure leaves the old file unchanged.

    Args:
        path: Final path; its folder is made if missing. The path that is yielded has
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
    """Name the file when writing fails.

    Raises:
        OSError: The file cannot be written; the message names it, and says what to do
            if the disk is full.
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
    """Whether a disk is full; external programs do not always report it."""
    with contextlib.suppress(OSError):
        return shutil.disk_usage(folder).free < 2**16
    return False
