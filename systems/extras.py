"""What an installation has: optional packages, and the command that started us."""

from __future__ import annotations

import functools
import importlib
import os
from typing import Any

import torch
from packaging.version import Version


def dtype_argument(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The precision argument of `from_pretrained` in the installed diffusers."""
    import diffusers

    renamed = Version(diffusers.__version__) >= Version("0.42")
    return {"dtype" if renamed else "torch_dtype": dtype}


def command(task: str) -> str:
    """How a task is started: by `launch.py`, or by the installed command."""
    installed = os.environ.get("DREAMPROPELLER_COMMAND")
    return f"{installed} {task}" if installed else f"python launch.py --{task}"


@functools.cache
def probe(name: str, *, needs_cuda: bool = False) -> tuple[Any, str]:
    """Import an optional package.

    Args:
        name: Name of the module.
        needs_cuda: Whether the package is useful only on a GPU.

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
