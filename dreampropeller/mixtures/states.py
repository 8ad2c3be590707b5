"""A chain's state on disk, and the mark of what determines the chain.

A mark names everything that a resumed chain must share: data, groups, seed, method,
priors, concentrations, number of proposals and of initial components. How long a chain
runs (`n_sweeps`, `patience`) is not part of it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from dreampropeller.mixtures.inputs import NIW, Dirichlet, as_floats

Mark: TypeAlias = dict[str, str]
"""What determines a chain, by the name of the parameter; data and priors as digests."""


def digest(*parts: Any) -> str:
    """A digest of arrays, sparse matrices and what prints in full."""
    found = hashlib.blake2b(digest_size=8)
    for part in parts:
        if sparse.issparse(part):
            found.update(
                digest(part.shape, part.data, part.indices, part.indptr).encode()
            )
        elif isinstance(part, (np.ndarray, Tensor)):
            array = np.ascontiguousarray(np.asarray(part))
            found.update(f"{array.shape}{array.dtype}".encode())
            found.update(array.reshape(-1).data)  # not a copy
        else:
            found.update(f"{part!r};".encode())
    return found.hexdigest()


def prior_mark(prior: NIW | Dirichlet) -> str:
    """The family's name and a digest of its prior's arguments, as given.

    What is taken from the data instead is rounded differently by different CPUs.
    """
    name = prior.covariance if isinstance(prior, NIW) else "multinomial"
    parts: list[Any] = []
    for argument, value in vars(prior).items():
        plain = value is None or isinstance(value, str)
        parts += [argument, value if plain else as_floats(value, argument)]
    return f"{name}/{digest(*parts)}"


def differing(mark: Mark, other: Mark) -> list[str]:
    """The names at which two marks differ, in order."""
    names = sorted({*mark, *other})
    return [name for name in names if mark.get(name) != other.get(name)]


def check_folder(path: Path) -> None:
    """Refuse a file that could not be written, before any work is done."""
    if path.is_dir():
        raise ValueError(f"`{path}` is a folder: write the name of a file.")
    if not path.absolute().parent.is_dir():
        raise ValueError(
            f"The folder of `{path}` does not exist: make it, or write another path."
        )


def write(state: dict[str, Any], path: Path) -> None:
    """Save a state; the file appears complete or not at all."""
    check_folder(path)
    beside = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        torch.save(state, beside)
        os.replace(beside, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            beside.unlink()


def read(path: Path, mark: Mark, last: Mark | None = None) -> dict[str, Any] | None:
    """Load a state of the same chain; None if there is no such file yet.

    A file of the chain as it was before its settings changed, whose mark is `last`,
    counts as none.
    """
    check_folder(path)
    if not path.exists():
        return None
    refused = f"`{path}` is not a state of a mixture: write another `checkpoint`."
    try:
        state = torch.load(path, weights_only=True)
    except Exception as error:
        raise ValueError(refused) from error
    if not isinstance(state, dict) or "labels" not in state:
        raise ValueError(refused)
    if not isinstance(state.get("mark"), dict):
        raise ValueError(
            f"`{path}` does not say which data and settings it belongs to, as files of "
            "older versions: write another `checkpoint`, or delete the file."
        )
    if state["mark"] != mark and state["mark"] == last:
        return None
    if names := differing(state["mark"], mark):
        raise ValueError(
            f"`{path}` belongs to a chain with other {', '.join(names)}: write another "
            "`checkpoint`, or delete the file."
        )
    return state
