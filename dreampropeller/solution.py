"""What a solve gives back: the value, how it ended, and what it cost."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from dreampropeller.tree import Aux, State

if TYPE_CHECKING:
    from dreampropeller.solver import SolverState

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
        'solved; lower the learning rate, or set `non_finite="skip"` to leave such '
        "steps out."
    )
    STOPPED = "Stopped on request (by `on_iteration`) before the end of the trajectory."


@dataclass
class Stats:
    """What a solve cost, resumed parts included.

    Attributes:
        num_evaluations: Drifts evaluated (NFE).
        strides: Steps accepted in each iteration.
    """

    num_evaluations: int = 0
    strides: list[int] = field(default_factory=list)

    @property
    def num_iterations(self) -> int:
        """Number of iterations: the sequential depth of the solve."""
        return len(self.strides)


@dataclass(frozen=True)
class Iteration:
    """What one iteration did, for `on_iteration`.

    Attributes:
        begin: The anchor's step before the iteration.
        window: Number of slots evaluated.
        stride: Number of steps accepted.
        errors: Error of each rolled-out slot as the threshold measures it, shape
            ``(slots,)``; with `DriftThreshold` the estimated relative drift errors.
        threshold: The largest error that passed; None for the sequential solver.
        aux: What the drifts logged at the accepted steps, in order.
        seconds: Where the time went, by phase, in seconds.
        diagnostics: What threshold and predictor believe, by name.
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
        stats: What it cost.
        state: The whole solver state, to continue from or to save.
    """

    value: State
    carry: C
    result: Result
    stats: Stats
    state: SolverState[C]


class NotConverged(RuntimeError):
    """The solve ended before the last step; `solution` holds what was reached."""

    def __init__(self, message: str, solution: Solution[Any]) -> None:
        super().__init__(message)
        self.solution = solution
