r"""The record of one Picard iteration, passed from act to act.

An iteration evaluates drifts at guesses (`Evaluation`), rolls the recurrence out with
them and accepts a stride (`Rollout`). Slot $i$ stands for step $t + i$ of the anchor's
step $t$.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dreampropeller.tree import Aux, Nest, State, moving


@dataclass(frozen=True)
class Evaluation:
    """The drifts of a window of guesses.

    Attributes:
        steps: The steps whose drifts can be used, shape ``(window,)``: all that were
            evaluated, up to the first guess whose drift is not finite.
        guesses: The anchor and the guesses that the drifts were evaluated at, then the
            last guess, which is only compared, shape ``(window + 1,)``.
        drifts: The drifts as evaluated, finite, shape ``(window,)``.
        aux: Scalars that the drifts logged, shape ``(window,)``.
        length: Number of steps evaluated, including those after a non-finite drift.
        remaining: Number of steps before the next jump or the end.
        skips: Whether the anchor's drift was not finite; then it is empty here, and its
            update is skipped.
    """

    steps: Sequence[int]
    guesses: Sequence[State]
    drifts: Sequence[State]
    aux: Sequence[Aux] = ()
    length: int = 0
    remaining: int = 0
    skips: bool = False

    def updates(self, slot: int) -> bool:
        """Whether a slot's update is made."""
        return slot > 0 or not self.skips

    def rolled_out(
        self,
        states: Sequence[State],
        used: Sequence[State],
        errors: Sequence[float],
        distances: Sequence[float],
        carries: Sequence[Nest] = (),
        stride: int = 0,
        corrected: Sequence[State] | None = None,
    ) -> Rollout:
        """The same with the rolled-out states; see `Rollout`."""
        return Rollout(
            **vars(self),
            states=states,
            used=used,
            corrected=used if corrected is None else corrected,
            errors=errors,
            distances=distances,
            carries=carries,
            stride=stride,
        )


@dataclass(frozen=True)
class Rollout(Evaluation):
    """A window rolled out from the anchor, and its number of accepted steps.

    Attributes:
        states: The anchor and the states rolled out from it, shape ``(window + 1,)``.
        used: The drifts as they were used, shape ``(window,)``.
        corrected: The drifts as an acceleration corrected them, shape ``(window,)``;
            `used` differs where the threshold damps what it does not trust.
        errors: Errors of `states[1:]` against `guesses[1:]`, as the threshold measures
            them, shape ``(window,)``.
        distances: The errors in the solver's norm, shape ``(window,)``.
        carries: The carry before each update, shape ``(window,)``; empty unless the
            acceleration needs them. A carry is consumed by its use.
        stride: Number of accepted steps.
    """

    states: Sequence[State] = ()
    used: Sequence[State] = ()
    corrected: Sequence[State] = ()
    errors: Sequence[float] = ()
    distances: Sequence[float] = ()
    carries: Sequence[Nest] = ()
    stride: int = 0

    @property
    def ahead(self) -> list[State]:
        """The states rolled out past the new anchor."""
        return list(self.states[self.stride + 1 :])

    @property
    def repeated(self) -> range:
        """Slots whose step is evaluated again at another guess: those not accepted.

        The anchor's slot is not among them: its guess is exact.
        """
        return range(max(1, self.stride), len(self.steps))

    @property
    def undamped(self) -> int:
        """Number of slots before the first whose drift was damped."""
        for slot, (used, whole) in enumerate(
            zip(self.used, self.corrected, strict=True)
        ):
            if used is not whole:
                return slot
        return len(self.used)


def damped(drift: State, y: State, weight: float) -> State:
    """The drift with a weight on the entries that move the state."""
    if weight == 1:
        return drift
    return {**drift, **{name: weight * v for name, v in moving(y, drift).items()}}
