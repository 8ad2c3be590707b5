"""What an acceleration may do to an iteration; by default nothing."""

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
        plain: Guesses without a correction, shape ``(ahead,)``.
        corrected: The same, corrected, shape ``(ahead,)``.
        trusted: How many of the corrected ones to use, from the first on.
        memory: The memory after this proposal.
    """

    plain: Sequence[State]
    corrected: Sequence[State]
    trusted: int
    memory: M

    def guesses(self, trusted: int) -> list[State]:
        """The next guesses, with as many corrected ones as all ranks trust."""
        return [*self.corrected[:trusted], *self.plain[trusted:]]


class Acceleration(Component[M]):
    """Corrects drifts or guesses by what was seen in past iterations.

    As it stands it corrects nothing.

    Attributes:
        moves_guesses: Whether the next guess of a slot may be another state than the
            one that was rolled out for it.
        needs_carries: Whether `Rollout.carries` are kept for it.
    """

    moves_guesses: bool = False
    needs_carries: bool = False

    def correct(self, memory: M, drift: State, y: State, guess: State) -> State:
        """The drift of a guess, corrected to the state it is used at.

        It is asked where the two differ. `drift`, `y` and `guess` must stay as they
        are.
        """
        del memory, y, guess
        return drift

    def propose(
        self, memory: M, trajectory: Trajectory[Any], rollout: Rollout
    ) -> Proposal[M]:
        """The next guesses; default: the states as they were rolled out."""
        del trajectory
        return Proposal(rollout.ahead, (), 0, memory)
