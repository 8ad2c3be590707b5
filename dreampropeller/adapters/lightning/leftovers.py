"""What evaluations leave in a LightningModule, and whether a later one reads it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from dreampropeller.adapters.lightning.host import Host
from dreampropeller.leftovers import Due, require_unread
from dreampropeller.trajectory import Drift
from dreampropeller.tree import Aux, State, copy_nest


class Leftovers:
    """Evaluates drifts, now and then also with the attributes as they were left.

    Args:
        host: The module's host, which puts its attributes back before an evaluation.
        as_left: Evaluates a step without putting them back.
        last: The last step.
        noise: See `dreampropeller.verification.Probe`.
    """

    def __init__(
        self,
        host: Host,
        as_left: Callable[[int, State], State],
        last: int,
        noise: Mapping[str, Any],
    ) -> None:
        self._host, self._as_left, self._noise = host, as_left, noise
        self._due, self._before = Due(last), -1

    def evaluate(self, drift: Drift, step: int, y: State) -> tuple[State, Aux]:
        """Evaluate a drift.

        Raises:
            NotReproducible: It depends on what an earlier evaluation has left.
        """
        touched = self._host.attributes.touched() if self._host.counts else []
        changed = self._host.attributes.changed(touched)
        later, self._before = step > self._before, step
        if not (changed and later and self._due(step, changed)):
            return drift(step, y)
        try:
            left = copy_nest(self._as_left(step, y))
        except torch.OutOfMemoryError:
            raise
        except Exception:  # which is a difference, too
            left = {}
        found, aux = drift(step, y)
        require_unread(step, found, lambda: left, changed, self._noise)
        return found, aux
