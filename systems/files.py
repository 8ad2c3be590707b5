"""Files that are whole or not there: written beside their place, then moved into it."""

from __future__ import annotations

import contextlib
import errno
import os
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
        OSError: It cannot be written; names the file, and what to do when the disk is
            full.
    """
    part = path.with_name(f"part-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        os.replace(part, path)
    except OSError as error:
        advice = (
            "Free some space there, or write to another folder: `exp_root_dir=…`."
            if error.errno in _FULL
            else "Write to another folder: `exp_root_dir=…`."
        )
        reason = error.strerror or str(error) or type(error).__name__
        raise OSError(f"`{path}` cannot be written: {reason}. {advice}") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
