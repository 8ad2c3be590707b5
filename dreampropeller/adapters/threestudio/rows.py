"""Origin of the rows of grown Gaussians, found by comparison.

A system that splits, clones and prunes does not report the map of rows. But a row that
stays keeps its values, and a new row inherits all but its position and size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dreampropeller.tree import State

OWN = ("_xyz", "_scaling")
"""Suffixes of the names of tensors that a new Gaussian does not inherit."""


def parents_of(before: State, after: State, names: Sequence[str]) -> Tensor:
    """The old row of each new row.

    Args:
        before: The state before the growth.
        after: The state after it.
        names: The tensors whose rows are Gaussians.

    Returns:
        Row indices, int64, shape ``(rows,)``: the old row that equals the new one bit
        by bit, else the row that it inherited from; −1 if there is none, or if there
        are several.
    """
    inherited = [name for name in names if not name.endswith(OWN)]
    found = _equal_rows(before, after, names)
    kin = _equal_rows(before, after, inherited) if inherited else found
    return torch.where(found >= 0, found, kin)


def _equal_rows(before: State, after: State, names: Sequence[str]) -> Tensor:
    table: dict[bytes, int] = {}
    for row, key in enumerate(_keys(before, names)):
        table[key] = -1 if key in table else row
    rows = [table.get(key, -1) for key in _keys(after, names)]
    return torch.tensor(rows, dtype=torch.int64, device=after[names[0]].device)


def _keys(state: State, names: Sequence[str]) -> list[bytes]:
    """The bytes of each row."""
    parts = [
        state[name].detach().cpu().contiguous().flatten(1).view(torch.uint8)
        if state[name].ndim > 1
        else state[name].detach().cpu().contiguous()[:, None].view(torch.uint8)
        for name in names
    ]
    return [row.tobytes() for row in torch.cat(parts, 1).numpy()]
