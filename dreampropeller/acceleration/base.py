"""The interface of accelerations; the default changes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic

from dreampropeller.component import Component, M
from dreampropeller.rollout import Rollout
from dreampropeller.trajectory import Trajectory
from dreampropeller.tree import State


@dataclass(frozen=True)
class Proposal(Generic[M]):
    """The next guesses of the states past the new anchor.

    Attributes:
        plain: Guesses without correction, shape ``(ahead,)``.
        corrected: Corrected guesses, shape ``(ahead,)``.
        trusted: Number of corrected guesses to use, from the first on.
        memory: The memory after this proposal.
    """

    plain: Sequence[State]
    corrected: Sequence[State]
    trusted: int
    memory: M

    def guesses(self, trusted: int) -> list[State]:
        """The next guesses, of which the first `trusted` are corrected."""
        return [*self.corrected[:trusted], *self.plain[trusted:]]


class Acceleration(Component[M]):
    """Corrects drifts or guesses by means of past iterations.

    The default corrects nothing.

    Attributes:
        moves_guesses: Whether the next guess of a slot may differ from the state that
            was rolled out for it.
        needs_carries: Whether the acceleration needs `Rollout.carries`.
    """

    moves_guesses: bool = False
    needs_carries: bool = False

    def correct(self, memory: M, drift: State, y: State, guess: State) -> State:
        """The drift of a guess, corrected to the state it is used at.

        Called where the two differ. `drift`, `y` and `guess` must not be changed.
        """
        del memory, y, guess
        return drift

    def propose(
        self, memory: M, trajectory: Trajectory[Any], rollout: Rollout
    ) -> Proposal[M]:
        """The next guesses; default: the rolled-out states."""
        del trajectory
        return Proposal(rollout.ahead, (), 0, memory)
