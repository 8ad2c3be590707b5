"""Optional packages: asked for at run time, refused in one line."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from packaging.version import Version


def dtype_argument(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """How `from_pretrained` of the installed diffusers is told a precision."""
    import diffusers

    renamed = Version(diffusers.__version__) >= Version("0.42")
    return {"dtype" if renamed else "torch_dtype": dtype}


@functools.cache
def probe(name: str, *, needs_cuda: bool = False) -> tuple[Any, str]:
    """Import a package that may not be there.

    Args:
        name: Of the module.
        needs_cuda: It is of use on a GPU only.

    Returns:
        The module and an empty text, or None and the reason why it is not used.
    """
    if needs_cuda and not torch.cuda.is_available():
        return None, f"`{name}` is not used: it needs a CUDA device."
    try:
        return importlib.import_module(name), ""
    except ImportError:
        return None, f"`{name}` is not used: it is not installed."
    except (OSError, RuntimeError) as error:  # built for another torch or driver
        first = (str(error).splitlines() or [type(error).__name__])[0]
        return None, f"`{name}` is not used: {first}"
