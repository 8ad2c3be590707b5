"""What an installation has: optional packages, and the command that started us."""

from __future__ import annotations

import functools
import importlib
import os
from importlib import metadata
from typing import Any

import torch

_SYSTEMS = (
    *("PIL", "accelerate", "diffusers", "embreex", "fast_simplification", "imageio"),
    *("imageio_ffmpeg", "matplotlib", "nerfacc", "packaging", "peft", "pygltflib"),
    *("scipy", "skimage", "tensorboard", "tokenizers", "transformers", "trimesh"),
    *("xatlas", "yaml"),
)
_EXTRAS = {
    **dict.fromkeys(_SYSTEMS, "systems"),
    "gradio": "app",
    "gsplat": "splats",
    "joblib": "mixtures",
    "lightning": "lightning",
    "pytorch_lightning": "lightning",
    "ray": "ray",
    "rembg": "images",
    "sklearn": "mixtures",
    "threadpoolctl": "mixtures",
    "viser": "viewer",
}
"""The extra of `pyproject.toml` that brings a module."""


def dtype_argument(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The precision argument of `from_pretrained` in the installed diffusers."""
    import diffusers
    from packaging.version import Version

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
    except (Exception, SystemExit) as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is not None and f"{name}.".startswith(f"{missing}."):
            return None, f"`{name}` is not used: it is not installed."
        # Built for another torch or driver, or half installed: whatever it raises.
        first = (str(error).splitlines() or [type(error).__name__])[0]
        return None, f"`{name}` is not used: found, but cannot be imported: {first}"


def version(distribution: str) -> str:
    """The version of an installed distribution, or that it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def to_install(error: ImportError) -> str:
    """What to do about an import that failed, as a sentence."""
    name = (error.name or "").partition(".")[0]
    if isinstance(error, ModuleNotFoundError) and name:
        return not_installed(name)
    reason = " ".join(str(error).split())
    if not name:  # says itself what to do
        return reason
    return (
        f"`{name}` is installed, but cannot be imported: {reason}. Install it again, "
        f"with what belongs to it: {_command(name)}."
    )


def not_installed(module: str) -> str:
    """A sentence about a module that is missing."""
    if module not in _EXTRAS:  # whose package may have another name
        return f"`{module}` is not installed."
    return f"`{module}` is not installed: write {_command(module)}."


def _command(module: str) -> str:
    extra = _EXTRAS.get(module)
    return f'`pip install -e ".[{extra}]"`' if extra else f"`pip install {module}`"
