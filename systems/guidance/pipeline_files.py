"""The small files of a diffusers pipeline, checked before diffusers builds from them.

A number in them can cost any time and memory: a schedule of 10¹² timesteps is a list of
so many numbers.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import diffusers
import transformers
from safetensors import SafetensorError

PREDICTIONS = ("epsilon", "v_prediction", "sample")
"""What a model may predict: noise, velocity or image."""
LARGEST_FILE = 2**26
"""Bytes of a JSON file that is read."""
LARGEST_SIDE = 2048
"""Width of a U-Net's images."""
MOST_TIMESTEPS = 100_000
UNREADABLE = (
    *(OSError, RuntimeError, ValueError, LookupError, TypeError, AttributeError),
    SafetensorError,
)
"""What loading a damaged or absent pipeline raises, in torch and the libraries."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds a mapping.

    Raises:
        OSError: It cannot be opened.
        ValueError: It is something else, too large or nested too deeply.
    """
    if path.stat().st_size > LARGEST_FILE:
        raise ValueError(f"`{path.name}` has more than {LARGEST_FILE >> 20} MiB")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError(f"`{path.name}` is nested too deeply") from error
    if not isinstance(found, dict):
        raise ValueError(f"`{path.name}` holds no mapping")
    return found


def vocabulary(folder: Path) -> dict[str, Any]:
    """The words of an embedded prior's tokenizer.

    Raises:
        OSError: The file cannot be opened.
        ValueError: It holds no vocabulary.
    """
    model = read_json(folder / "tokenizer" / "tokenizer.json").get("model")
    words = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(words, dict):
        raise ValueError("`tokenizer.json` holds no vocabulary")
    return words


def check_schedule(config: Mapping[str, Any]) -> None:
    """Refuse a scheduler that costs any time to build, or that is read wrongly.

    Raises:
        ValueError: Names the entry of `scheduler_config.json`.
    """
    count = config.get("num_train_timesteps", 1000)  # as in diffusers
    if type(count) is not int or not 1 <= count <= MOST_TIMESTEPS:
        raise ValueError(
            f"`num_train_timesteps` of its scheduler is {count!r}, no whole number "
            f"from 1 to {MOST_TIMESTEPS}"
        )
    kind = config.get("prediction_type", "epsilon")
    if kind not in PREDICTIONS:
        raise ValueError(
            f"`prediction_type` of its scheduler is {kind!r}, none of "
            f"{', '.join(PREDICTIONS)}"
        )


def check_side(side: Any) -> None:
    """Refuse a U-Net without a usable size of images.

    Raises:
        ValueError: Names the entry of the U-Net's `config.json`.
    """
    if type(side) is not int or not 1 <= side <= LARGEST_SIDE:
        raise ValueError(
            f"`sample_size` of its U-Net is {side!r}, no whole number from 1 to "
            f"{LARGEST_SIDE}"
        )


def reason(error: Exception) -> str:
    """Why a pipeline could not be loaded: the first line, shortened."""
    first = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
    if isinstance(error, SafetensorError):
        return f"{first}. A file of weights is cut short or damaged: load it again."
    return first


@contextlib.contextmanager
def no_progress_bars() -> Iterator[None]:
    """Hide progress bars for local folders, which load at once."""
    libraries = (diffusers.utils.logging, transformers.utils.logging)
    for library in libraries:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in libraries:
            library.enable_progress_bar()
