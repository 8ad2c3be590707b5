"""The interface of every dispatcher, and the reference implementation."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from dreampropeller.timer import Timer
from dreampropeller.trajectory import Drift, Trajectory
from dreampropeller.tree import Aux, Nest, State, device_of


class WorkerError(RuntimeError):
    """A worker failed; the message names the step, the rank and the traceback."""


class Dispatcher(abc.ABC):
    """Evaluates drifts; a context manager opened and closed by `solve`.

    Every rank of a distributed run holds one and calls the same methods in the same
    order. In a single process the methods that synchronise ranks do nothing.

    Args:
        trajectory: Trajectory whose drifts are evaluated.

    Attributes:
        num_workers: Number of drifts that can be evaluated at the same time.
        timer: Seconds by phase, also those of the solver.
    """

    num_workers: int = 1

    def __init__(self, trajectory: Trajectory[Any]) -> None:
        self.trajectory = trajectory
        self.timer = Timer()
        self._drift: Drift | None = None

    def __enter__(self) -> Dispatcher:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._drift = None

    @abc.abstractmethod
    def evaluate(
        self, steps: Sequence[int], ys: Sequence[State]
    ) -> list[tuple[State, Aux]]:
        """Evaluate the drift of each step at its state, in order.

        An elastic dispatcher may return the drifts of the first steps only, at least
        one.

        Args:
            steps: The steps, shape ``(window,)``.
            ys: The states, shape ``(window,)``; `ys[0]` is the anchor, which is exact.
        """

    def agree(self, numbers: Sequence[int]) -> list[int]:
        """The numbers of rank 0, on every rank."""
        return list(numbers)

    def confirm(self, step: int, y: State) -> None:
        """Fail if another rank has accepted another state; called before recording."""
        del step, y

    def verify(self, step: int, y: State) -> None:
        """Fail if drifts are not what the trajectory checked; called before a solve.

        Raises:
            NotReproducible: They differ by more than a stated tolerance.
        """
        del step, y

    def share(self, y: State, carry: Nest) -> tuple[State, Nest]:
        """The state and carry of rank 0, on every rank, after a jump."""
        return y, carry

    def drift(self, y: State) -> Drift:
        """This worker's drift, built at first use on the device of the state."""
        if self._drift is None:
            device = device_of(y)
            self._drift = self.trajectory.make_drift(device)
        return self._drift


class InlineDispatcher(Dispatcher):
    """One drift after another, in this process: the reference for all others."""

    def evaluate(
        self, steps: Sequence[int], ys: Sequence[State]
    ) -> list[tuple[State, Aux]]:
        """Evaluate one after another; exceptions of the drift are not wrapped."""
        with self.timer.phase("drift"):
            return [self.drift(y)(step, y) for step, y in zip(steps, ys, strict=True)]
