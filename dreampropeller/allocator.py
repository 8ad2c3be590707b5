"""Reuse of the memory of large tensors during a solve on the CPU.

A solve constantly allocates and frees states of the same sizes. glibc maps a block of
more than 32 MiB anew at each allocation and unmaps it when it is freed, so that a copy
pays for fresh pages each time: three to five times the copy itself (12.6 M parameters,
measured). Inside `reused`, freed blocks stay with the process; at the end they go back
to the system. Results do not depend on it. Nothing happens without glibc, or while no
tensor is that large.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator

from torch import Tensor

from dreampropeller.tree import Nest, tensors

LARGE = 1 << 25
"""Size in bytes from which glibc maps every block separately, by any setting."""
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # of <malloc.h>
_AFTER = {_TRIM_THRESHOLD: 2 * LARGE, _MMAP_THRESHOLD: LARGE, _MMAP_MAX: 1 << 16}
"""The limits of glibc's own rule; setting one turns that rule off permanently."""
_open = 0


@contextlib.contextmanager
def reused(nest: Nest) -> Iterator[None]:
    """Keep freed memory inside the block if a tensor of the nest is large."""
    global _open
    libc = _glibc() if any(_is_large(tensor) for tensor in tensors(nest)) else None
    if libc is None:
        yield
        return
    _open += 1
    libc.mallopt(_MMAP_MAX, 0)
    libc.mallopt(_TRIM_THRESHOLD, (1 << 31) - 1)
    try:
        yield
    finally:
        _open -= 1
        if not _open:  # solves may be nested
            for option, value in _AFTER.items():
                libc.mallopt(option, value)
            libc.malloc_trim(0)


def _is_large(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.nbytes >= LARGE


def _glibc() -> ctypes.CDLL | None:
    own = any(name.startswith("MALLOC_") for name in os.environ)
    if own or not sys.platform.startswith("linux"):
        return None  # the user's own malloc options take precedence
    libc = ctypes.CDLL(None)
    known = hasattr(libc, "gnu_get_libc_version") and hasattr(libc, "malloc_trim")
    return libc if known else None
