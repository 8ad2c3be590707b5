"""State, result and cost of a solve."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from dreampropeller.component import FULL, LEAN
from dreampropeller.identity import Fingerprint
from dreampropeller.tree import Aux, State
from dreampropeller.verification import Checked

C = TypeVar("C")


class Result(enum.Enum):
    """Why a solve ended; the value is the sentence shown to the user."""

    SUCCESS = "Every step of the trajectory was solved."
    MAX_ITERATIONS = (
        "The solve reached `max_iterations` before the end of the trajectory; raise "
        "it, or continue with `solve(..., state=solution.state)`."
    )
    NON_FINITE = (
        "The drift at an accepted state holds NaN or infinity, so no later step can be "
        "solved."
    )
    STOPPED = "Stopped on request (by `on_iteration`) before the end of the trajectory."


@dataclass
class Stats:
    """The cost of a solve, resumed parts included.

    Attributes:
        num_evaluations: Number of drifts evaluated (NFE).
        strides: Steps accepted in each iteration.
        growth: Growth of an error per step in each iteration (`error_growth.py`); None
            where it was not measured.
    """

    num_evaluations: int = 0
    strides: list[int] = field(default_factory=list)
    growth: list[float | None] = field(default_factory=list)

    @property
    def num_iterations(self) -> int:
        """Number of iterations: the sequential depth of the solve."""
        return len(self.strides)

    def after(self, evaluations: int, stride: int, rate: float | None = None) -> Stats:
        """The cost after one more iteration."""
        # Of a run that was begun before growth was recorded, nothing is known.
        unknown: list[float | None] = [None] * (len(self.strides) - len(self.growth))
        return Stats(
            self.num_evaluations + evaluations,
            [*self.strides, stride],
            [*self.growth, *unknown, rate],
        )


@dataclass
class SolverState(Generic[C]):
    """Everything that a solve needs to resume; see `dreampropeller.checkpoint`.

    A checkpoint holds every field, a lean checkpoint those marked `LEAN`.

    Attributes:
        step: The anchor's step.
        y: The anchor: exact up to the errors accepted so far.
        carry: The carry at the anchor.
        guesses: Guesses of the states at `step + 1`, `step + 2`, …
        threshold: The threshold's memory.
        window: The window's memory.
        predictor: The predictor's memory.
        acceleration: The acceleration's memory.
        growth: The memory of what was measured of errors.
        stats: The cost so far.
        run: The name of the run; empty if there is none.
        problem: The trajectory's fingerprint; empty if unknown.
    """

    step: int = field(metadata=LEAN)
    y: State = field(metadata=LEAN)
    carry: C = field(metadata=LEAN)
    guesses: list[State] = field(default_factory=list, metadata=FULL)
    threshold: Any = field(default=None, metadata=LEAN)
    window: Any = field(default=None, metadata=LEAN)
    predictor: Any = field(default=None, metadata=LEAN)
    acceleration: Any = field(default=None, metadata=LEAN)
    growth: Any = field(default=None, metadata=LEAN)
    stats: Stats = field(default_factory=Stats, metadata=LEAN)
    run: str = field(default="", metadata=LEAN)
    problem: Fingerprint = field(default_factory=dict, metadata=LEAN)


@dataclass(frozen=True)
class Iteration:
    """Report of one iteration, for `on_iteration`.

    Attributes:
        begin: The anchor's step before the iteration.
        window: Number of slots evaluated.
        stride: Number of steps accepted.
        errors: Error of each rolled-out slot as the threshold measures it, shape
            ``(slots,)``; with `DriftThreshold` the estimated relative drift errors.
        threshold: The largest error that passed; None for the sequential solver.
        aux: Scalars that the drifts logged at the accepted steps, in order.
        seconds: Seconds by phase.
        diagnostics: Estimates of the components, by name.
    """

    begin: int
    window: int
    stride: int
    errors: tuple[float, ...]
    threshold: float | None
    aux: tuple[Aux, ...]
    seconds: dict[str, float]
    diagnostics: dict[str, float] = field(default_factory=dict)

    @property
    def end(self) -> int:
        """The anchor's step after the iteration."""
        return self.begin + self.stride


@dataclass(frozen=True)
class Solution(Generic[C]):
    """The end of a solve.

    Attributes:
        value: The last accepted state.
        carry: The carry at that state.
        result: Why the solve ended.
        stats: The cost of the solve.
        state: The whole solver state, to resume from or to save.
        checked: What was verified before the run; None if nothing was.
        note: A sentence about a solve that gained nothing, that ended at a drift that
            is not finite, or whose error nothing checked; empty otherwise.
    """

    value: State
    carry: C
    result: Result
    stats: Stats
    state: SolverState[C]
    checked: Checked | None = None
    note: str = ""


class NotConverged(RuntimeError):
    """The solve ended before the last step; `solution` holds the state reached."""

    def __init__(self, message: str, solution: Solution[Any]) -> None:
        super().__init__(message)
        self.solution = solution
