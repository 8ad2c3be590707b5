"""The window as a batch dimension: one device, one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dreampropeller.dispatch.base import Dispatcher
from dreampropeller.dispatch.guesses import OF_VALUES, is_of_values
from dreampropeller.trajectory import Trajectory
from dreampropeller.tree import Aux, State, all_finite
from dreampropeller.verification import TOLERANCE, NotReproducible, deviation

__all__ = ["TOLERANCE", "BatchedDispatcher", "deviation"]


class BatchedDispatcher(Dispatcher):
    """Evaluates a window's drifts in one call, if the drift supports it.

    The drift's ``batch(steps, ys)`` returns the results of one call per step, in order.
    Results are close to those of `InlineDispatcher` and not bitwise
    equal: libraries choose other kernels for other batch sizes. Whether it saves time
    depends on how busy one step keeps the device; `calibrate` measures it.

    Raises:
        ValueError: The drift has no `batch`; raised at the first evaluation.
    """

    def __init__(self, trajectory: Trajectory[Any]) -> None:
        super().__init__(trajectory)  # all views of all steps, in one call

    def evaluate(
        self, steps: Sequence[int], ys: Sequence[State]
    ) -> list[tuple[State, Aux]]:
        """Evaluate in one call; exceptions of the drift are not wrapped.

        Where a call fails, each step is evaluated in a call of its own, so that a guess
        that makes it fail only cuts the window.
        """
        drift = self.drift(ys[0])
        with self.timer.phase("drift"):
            try:
                return self._batch(drift, steps, ys)
            except OF_VALUES as error:
                if len(steps) == 1 or not is_of_values(error):
                    raise

            def alone(step: int, y: State) -> tuple[State, Aux]:
                return self._batch(drift, [step], [y])[0]

            return [
                self._guesses.evaluate(alone, slot, step, y)
                for slot, (step, y) in enumerate(zip(steps, ys, strict=True))
            ]

    def verify(self, step: int, y: State) -> None:
        """Compare a batch of two steps with each by itself, up to `TOLERANCE`."""
        drift, steps = self.drift(y), [step, min(step + 1, self._last(step))]
        batched = [found for found, _ in self._batch(drift, steps, [y, y])]
        plain = [drift(one, y)[0] for one in steps]
        if not all(all_finite([*batched, *plain])):
            return  # the run will meet it
        for one, found, wanted in zip(steps, batched, plain, strict=True):
            off = deviation(found, wanted)
            if not off <= TOLERANCE:
                raise NotReproducible(
                    f"The drift of step {one} in a batch deviates from that of the "
                    f"step by itself by {off:.2g} of its norm, above {TOLERANCE:g}: "
                    "`batch` must return what each step returns by itself, in order, "
                    "with random numbers keyed by each step. The solve would silently "
                    "go astray, so it is refused; `check=False` leaves this check out."
                )

    def _last(self, step: int) -> int:
        """The last step with the structure of the state of a step."""
        trajectory = self.trajectory
        return max(step, min(trajectory.next_jump(step), trajectory.num_steps) - 1)

    def _batch(
        self, drift: Any, steps: Sequence[int], ys: Sequence[State]
    ) -> list[tuple[State, Aux]]:
        batch: Any = getattr(drift, "batch", None)
        if batch is None:
            raise ValueError(
                f"`{type(self.trajectory).__name__}` cannot be evaluated as a batch: "
                "its drift has no `batch(steps, ys)`, because its steps are not one "
                "call of one model. Use `InlineDispatcher` (one after the other) or "
                "`DistributedDispatcher` (one process per device), or give the drift "
                "that method."
            )
        found: list[tuple[State, Aux]] = batch(list(steps), list(ys))
        if len(found) != len(steps):
            raise ValueError(
                f"`{type(drift).__name__}.batch` returned {len(found)} drifts for "
                f"{len(steps)} steps: return one for each, in order."
            )
        return found
