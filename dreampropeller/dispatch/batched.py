"""The window as a batch dimension: one device, one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dreampropeller.dispatch.base import Dispatcher
from dreampropeller.tree import Aux, State


class BatchedDispatcher(Dispatcher):
    """Evaluates a window's drifts in one call, if the drift supports it.

    The drift's ``batch(steps, ys)`` returns the results of one call per step, in order.
    Results are close to those of `InlineDispatcher` and not bitwise
    equal: libraries choose other kernels for other batch sizes. Whether it saves time
    depends on how busy one step keeps the device; `calibrate` measures it.

    Raises:
        ValueError: The drift has no `batch`; raised at the first evaluation.
    """

    def evaluate(
        self, steps: Sequence[int], ys: Sequence[State]
    ) -> list[tuple[State, Aux]]:
        """Evaluate in one call; exceptions of the drift are not wrapped."""
        drift = self.drift(ys[0])
        batch: Any = getattr(drift, "batch", None)
        if batch is None:
            raise ValueError(
                f"`{type(self.trajectory).__name__}` cannot be evaluated as a batch: "
                "its drift has no `batch(steps, ys)`, because its steps are not one "
                "call of one model. Use `InlineDispatcher` (one after the other) or "
                "`DistributedDispatcher` (one process per device), or give the drift "
                "that method."
            )
        with self.timer.phase("drift"):
            found: list[tuple[State, Aux]] = batch(list(steps), list(ys))
        if len(found) != len(steps):
            raise ValueError(
                f"`{type(drift).__name__}.batch` returned {len(found)} drifts for "
                f"{len(steps)} steps: return one for each, in order."
            )
        return found
