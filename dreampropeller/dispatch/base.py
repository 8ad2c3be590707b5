"""The interface of every dispatcher, and the reference implementation."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch

from dreampropeller.dispatch.guesses import Guesses
from dreampropeller.precision import Precision
from dreampropeller.timer import Timer
from dreampropeller.trajectory import Drift, Trajectory
from dreampropeller.tree import Aux, Nest, State, all_finite, device_of
from dreampropeller.verification import TOLERANCE, NotReproducible, deviation


class WorkerError(RuntimeError):
    """A worker failed; the message names the step, the rank and the traceback."""


class Dispatcher(abc.ABC):
    """Evaluates drifts; a context manager opened and closed by `solve`.

    Every rank of a distributed run holds one and calls the same methods in the same
    order. In a single process the methods that synchronise ranks do nothing.

    Args:
        trajectory: Trajectory whose drifts are evaluated.
        views: Number of shards of a step's views (`Trajectory.make_shard`); 1: steps
            are not split.

    Attributes:
        num_workers: Number of drifts that can be evaluated at the same time.
        timer: Seconds by phase, also those of the solver.
    """

    num_workers: int = 1

    def __init__(self, trajectory: Trajectory[Any], *, views: int = 1) -> None:
        if views < 1:
            raise ValueError(f"`views` is {views}: write at least 1.")
        self.trajectory = trajectory
        self.views = views
        self.timer = Timer()
        self._drift: Drift | None = None
        self._guesses = Guesses()
        self._shards: dict[int, Drift] = {}

    def __enter__(self) -> Dispatcher:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._drift = None
        self._shards.clear()

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

        Here: if the shards of a step do not make up the step, up to `TOLERANCE`. A step
        that is too large for one device is not compared.

        Raises:
            NotReproducible: They differ by more than a stated tolerance.
        """
        if self.views == 1:
            return
        ((found, _),) = self.evaluate([step], [y])
        try:
            wanted, _ = self.drift(y)(step, y)
        except torch.OutOfMemoryError:
            return
        self._drift = None  # not needed any more
        overflow = any(map(Precision.overflowed, (found, wanted)))
        off = deviation(found, wanted)
        if all(all_finite([found, wanted])) and not (overflow or off <= TOLERANCE):
            raise NotReproducible(
                f"The drift of step {step} in {self.views} shards deviates from that "
                f"of the whole step by {off:.2g} of its norm, above {TOLERANCE:g}: "
                "`join_shards` must make the whole of what `make_shard` returns, with "
                "random numbers drawn for all views and then sliced, and means "
                "weighted by the share of the views. The solve would silently go "
                "astray, so it is refused; `check=False` leaves this check out."
            )

    def share(self, y: State, carry: Nest) -> tuple[State, Nest]:
        """The state and carry of rank 0, on every rank, after a jump."""
        return y, carry

    def drift(self, y: State) -> Drift:
        """This worker's drift, built at first use on the device of the state."""
        if self._drift is None:
            device = device_of(y)
            self._drift = self.trajectory.make_drift(device)
        return self._drift

    def shard(self, y: State, index: int) -> Drift:
        """One of the shards of a step, built at first use; all of it if not split."""
        if self.views == 1:
            return self.drift(y)
        if index not in self._shards:
            device = device_of(y)
            made = self.trajectory.make_shard(device, index, self.views)
            self._shards[index] = made
        return self._shards[index]


class InlineDispatcher(Dispatcher):
    """One drift after another, in this process: the reference for all others.

    With `views` the shards of each step are evaluated one after another, too, and
    added up: less memory at once, and what a mesh with as many columns computes.
    """

    def evaluate(
        self, steps: Sequence[int], ys: Sequence[State]
    ) -> list[tuple[State, Aux]]:
        """Evaluate one after another; exceptions of the drift are not wrapped."""
        with self.timer.phase("drift"):
            return [
                self._guesses.evaluate(self._one, slot, step, y)
                for slot, (step, y) in enumerate(zip(steps, ys, strict=True))
            ]

    def _one(self, step: int, y: State) -> tuple[State, Aux]:
        if self.views == 1:
            return self.drift(y)(step, y)
        parts = [self.shard(y, index)(step, y) for index in range(self.views)]
        return self.trajectory.join_shards(parts)
