"""The state after the last iteration, for saving it when the next one fails."""

from __future__ import annotations

from dataclasses import Field
from typing import Any

from torch import Tensor

import dreampropeller as dp
from dreampropeller.tree import encode


class LastState:
    """Keeps a solver state without a copy, and knows whether it is still the same.

    The next iteration consumes the carry of a state. `PicardSolver` copies it first,
    `Sequential` hands it to `update`, which may write into it. Whether anything was
    written shows in the version counters of the tensors, which every operation in place
    increments (except through `Tensor.data`), and in the values between them.
    """

    def __init__(self) -> None:
        self._state: dp.SolverState[Any] | None = None
        self._seen: Any = None

    def keep(self, state: dp.SolverState[Any]) -> None:
        """Keep a state; the one before is forgotten."""
        self._state, self._seen = state, _look(state)

    def intact(self) -> dp.SolverState[Any] | None:
        """The state, or None if there is none or something has written into it."""
        if self._state is None:
            return None
        (form, leaves, versions), now = self._seen, _look(self._state)
        same = form == now[0] and versions == now[2] and len(leaves) == len(now[1])
        same = same and all(a is b for a, b in zip(leaves, now[1], strict=True))
        return self._state if same else None


def _look(state: dp.SolverState[Any]) -> tuple[Any, list[Tensor], list[int]]:
    """Values and nesting of a state, its tensors, and how often each was written."""
    form, leaves = encode(state, _changes)
    counts = [0 if leaf.is_inference() else leaf._version for leaf in leaves]
    return form, leaves, counts


def _changes(field: Field[Any]) -> bool:
    return field.name != "stats"  # long, and replaced rather than changed
