r"""Anderson acceleration of the guesses, kept triangular (Eqs. 15 to 17).

A Picard iteration maps guesses $\hat y_j$ of the window's states to new ones $G_j$.
With residuals $r_j = G_j - \hat y_j$ and differences $\Delta$ to the iteration before,
the next guess of state $j$ is

$$\hat y_j \leftarrow G_j - \sum_{a=1}^{m} \gamma_{j,a}\, \Delta^{(a)} G_j, \qquad
  \gamma_j = \arg\min_\gamma \sum_{i \le j} \Bigl\lVert r_i - \sum_a \gamma_a\,
  \Delta^{(a)} r_i \Bigr\rVert^2 + \lambda \tau_j \lVert \gamma \rVert^2 .$$

The sum ends at $j$: a guess never depends on the residuals of later states, just as a
state never depends on later ones. Where all earlier residuals are zero nothing changes,
so steps that the Picard iteration solves in k iterations stay solved.

References:
    Tang et al. 2024, arXiv 2402.09970 (triangular Anderson acceleration, ParaTAA);
    Walker and Ni 2011, SIAM J. Numer. Anal. 49 (the unrestricted method).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor

from dreampropeller.acceleration.base import Acceleration, Proposal
from dreampropeller.checks import is_number, is_whole
from dreampropeller.component import FULL, Memory
from dreampropeller.rollout import Rollout
from dreampropeller.trajectory import Trajectory
from dreampropeller.tree import State, norm, widened


@dataclass(frozen=True)
class Record(Memory):
    """The record of one iteration.

    Attributes:
        step: Step of the first state.
        residuals: $r_j$ over the floating entries, shape ``(states,)``.
        states: $G_j$, likewise.
    """

    step: int
    residuals: list[State]
    states: list[State]


@dataclass(frozen=True)
class AndersonMemory(Memory):
    """Memory of an `Anderson`.

    Attributes:
        records: Past iterations, the newest first, at most `memory`.
    """

    records: list[Record] = field(default_factory=list, metadata=FULL)


@dataclass(frozen=True)
class Anderson(Acceleration[AndersonMemory]):
    r"""Correct the next guesses by the residuals of past iterations (Eqs. 15 to 17).

    Only guesses change: the anchor is rolled out as usual, and steps pass by the same
    comparison, so at threshold 0 the result is that of `Sequential` bit for
    bit (`test_anderson.py`). It is meant for smooth drifts without noise of their own,
    as those of an ODE sampler: differences of two iterations must be secants.

    Only floating entries are corrected. Two states are kept per slot and iteration.

    Args:
        memory: Number $m$ of past iterations, at least 1.
        order: Number of updates from a guess to the new state that it is compared with,
            at least 1; it costs `order` updates per slot, and a copy of the carry.
            None: roll out from the anchor, as in the published Picard iteration.
        ridge: Regularisation $\lambda$ of the least squares, relative to the mean
            diagonal $\tau_j$ of its matrix, above 0.
        limit: Largest length of a correction, relative to its residual. From the first
            state whose correction is longer or not finite, guesses are not corrected.
    """

    memory: int = 2
    order: int | None = None
    ridge: float = 1e-4
    limit: float = 4.0

    def __post_init__(self) -> None:
        order = 1 if self.order is None else self.order
        for name, number in (("memory", self.memory), ("order", order)):
            if not is_whole(number) or number < 1:
                raise ValueError(
                    f"`{name}` is {number!r}: write a whole number, 1 "
                    "or more, as `Anderson(memory=2)`, or `acceleration=None` for none."
                )
        for name, share in (("ridge", self.ridge), ("limit", self.limit)):
            if not (is_number(share) and 0 < share < math.inf):
                raise ValueError(f"`{name}` is {share!r}: write a number above 0.")

    moves_guesses = True

    @property
    def needs_carries(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether new states are rolled out from guesses."""
        return self.order is not None

    def init(self) -> AndersonMemory:
        """The memory before any iteration."""
        return AndersonMemory()

    def propose(
        self, memory: AndersonMemory, trajectory: Trajectory[Any], rollout: Rollout
    ) -> Proposal[AndersonMemory]:
        """Correct the guesses of the states that are still to be solved."""
        if not rollout.ahead:
            return Proposal([], [], 0, self.init())
        states = self.new_states(trajectory, rollout)
        first = rollout.stride or _first_moved(rollout)
        found = self.corrected(
            memory,
            rollout.steps[0] + first,
            rollout.guesses[first : len(states)],
            states[first:],
        )
        exact = states[rollout.stride + 1 : first + 1]
        return Proposal(
            [*exact, *found.plain],
            [*exact, *found.corrected],
            len(exact) + found.trusted,
            found.memory,
        )

    def new_states(self, trajectory: Trajectory[Any], rollout: Rollout) -> list[State]:
        """The new states $G$, each rolled out over `order` updates.

        Args:
            trajectory: Trajectory of the update.
            rollout: The iteration; its carries are consumed.
        """
        if self.order is None:
            return list(rollout.states)
        made = list(rollout.states[: self.order + 1])
        with torch.no_grad():
            for begin in range(1, len(rollout.used) - self.order + 1):
                y, carry = rollout.guesses[begin], rollout.carries[begin]
                for slot in range(begin, begin + self.order):
                    step, drift = rollout.steps[slot], rollout.used[slot]
                    y, carry = trajectory.update(step, y, carry, drift)
                made.append(y)
        return made

    def corrected(
        self,
        memory: AndersonMemory,
        step: int,
        guesses: Sequence[State],
        states: Sequence[State],
    ) -> Proposal[AndersonMemory]:
        """The next guesses of states (Eqs. 15 to 17).

        Args:
            memory: Past iterations.
            step: Step of the first state, the new anchor, where the first guess failed.
                Its residual counts; it is not corrected.
            guesses: Guesses of the states, shape ``(ahead + 1,)``.
            states: The states from `new_states`, shape ``(ahead + 1,)``.
        """
        residuals = [
            _difference(state, guess)
            for state, guess in zip(states, guesses, strict=True)
        ]
        now = Record(step, residuals, [_floating(state) for state in states])
        records = [now, *memory.records[: self.memory]]
        ahead: list[State] = []
        trusted = len(states) - 1
        matrix = torch.zeros(self.memory, self.memory, dtype=torch.float64)
        right = torch.zeros(self.memory, dtype=torch.float64)
        for index, state in enumerate(states):
            seen = _seen(records, step + index)
            columns = [_difference(a, b) for (a, _), (b, _) in itertools.pairwise(seen)]
            count = len(columns)  # never grows along the window: late slots are new
            matrix[:count, :count] += _products(columns, columns)
            right[:count] += _products(columns, [residuals[index]])[:, 0]
            if index == 0:
                continue
            weights = self._solved(matrix[:count, :count], right[:count])
            moves = [_difference(a, b) for (_, a), (_, b) in itertools.pairwise(seen)]
            correction = _combined(moves, weights)
            longest = self.limit * norm(residuals[index])
            # A NaN is not within bounds either.
            if correction and not norm(correction) <= longest:
                trusted = min(trusted, index - 1)
            moved = {
                name: (widened(state[name]) - move).to(state[name].dtype)
                for name, move in correction.items()
            }
            ahead.append({**state, **moved})
        after = AndersonMemory(records[: self.memory])
        return Proposal(states[1:], ahead, trusted, after)

    def _solved(
        self,
        matrix: Float64[Tensor, "columns columns"],
        right: Float64[Tensor, " columns"],
    ) -> list[float]:
        """Weights of the columns; zeros if there is nothing to correct."""
        mean = float(matrix.diagonal().sum()) / max(1, len(right))
        if not 0 < mean < math.inf or not bool(right.any()):
            return [0.0] * len(right)
        identity = torch.eye(len(right), dtype=matrix.dtype)
        return torch.linalg.solve(matrix + self.ridge * mean * identity, right).tolist()


def _first_moved(rollout: Rollout) -> int:
    """The first state that differs from its guess: exact, like all drifts before."""
    moved = (slot + 1 for slot, far in enumerate(rollout.distances) if far != 0)
    return next(moved, len(rollout.steps))


def _seen(records: Sequence[Record], step: int) -> list[tuple[State, State]]:
    """Residual and new state of a step, by iteration, the newest first.

    It ends where the step was not in the window: older records belong to another guess.
    """
    found: list[tuple[State, State]] = []
    for record in records:
        index = step - record.step
        if not 0 <= index < len(record.states):
            break
        found.append((record.residuals[index], record.states[index]))
    return found


def _floating(state: State) -> State:
    return {n: value for n, value in state.items() if value.is_floating_point()}


def _difference(new: State, old: State) -> State:
    """Difference over the floating entries; half precision is widened first."""
    return {name: widened(new[name]) - widened(old[name]) for name in _floating(new)}


def _products(
    rows: Sequence[State], columns: Sequence[State]
) -> Float64[Tensor, "rows columns"]:
    """Inner products over all entries, on the CPU."""
    total = torch.zeros(len(rows), len(columns), dtype=torch.float64)
    if not rows:
        return total
    for name in rows[0]:
        left = torch.stack([row[name].flatten() for row in rows])
        right = torch.stack([column[name].flatten() for column in columns])
        total += (left @ right.T).to("cpu", torch.float64)
    return total


def _combined(moves: Sequence[State], weights: Sequence[float]) -> State:
    """The weighted sum; empty where all weights are zero, so that bits stay."""
    if not any(weights):
        return {}
    return {
        name: torch.stack(
            [w * move[name] for move, w in zip(moves, weights, strict=True)]
        ).sum(0)
        for name in moves[0]
    }
