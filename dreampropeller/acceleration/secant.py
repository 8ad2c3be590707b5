r"""Drifts corrected to the states they are used at (Eqs. 18 and 19).

An iteration uses the drift $g_j$ of a guess $\hat y_j$ at another state $y_j$, rolled
out from the anchor. With a diagonal estimate $\Lambda$ of the drift's slope it uses

$$g_j + \Lambda\,(y_j - \hat y_j), \qquad
  \Lambda = \max\Bigl(0,\; \frac{\sum_a \Delta g_a \Delta y_a}
                              {\sum_a \Delta y_a^2 + p}\Bigr)$$

instead, entry by entry, where $\Delta$ are the differences between two evaluations of
one step and $p$ keeps the slopes of entries that hardly moved small. A state pulled
back to a target makes the plain iteration overshoot, the more the wider the window;
this takes the pull into account.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dreampropeller.checks import is_number
from dreampropeller.threshold import Observation
from dreampropeller.tree import Nest, State, moving


@dataclass(frozen=True)
class Secant:
    r"""Correct the drifts of guesses by the slopes seen between iterations (Eq. 18).

    A slot that was not accepted is evaluated again, so slopes cost no evaluation. A
    guess that equals its state is not corrected: at threshold 0 the result is that of
    `Sequential` bit for bit (`test_secant.py`). Only slopes that pull back (not below
    zero) are used: descent on a loss. It keeps two states, and a drift and a guess of
    each slot that is evaluated again.

    Args:
        decay: Weight of the sums of the iterations before, from 0 to below 1.
        shrinkage: $p$, in units of the mean of $\sum_a \Delta y_a^2$, above 0.
    """

    decay: float = 0.7
    shrinkage: float = 1.0

    def __post_init__(self) -> None:
        if not (is_number(self.decay) and 0 <= self.decay < 1):
            raise ValueError(
                f"`acceleration.decay` is {self.decay!r}: write a number from 0 to "
                "below 1, as 0.7."
            )
        if not (is_number(self.shrinkage) and 0 < self.shrinkage < math.inf):
            raise ValueError(
                f"`acceleration.shrinkage` is {self.shrinkage!r}: write a number above "
                "0, as 1."
            )

    def init(self) -> Nest:
        """No slope yet: drifts stay as they are."""
        return {"held": {}, "products": {}, "squares": {}}

    def learn(
        self,
        memory: Nest,
        steps: Sequence[int],
        guesses: Sequence[State],
        drifts: Sequence[State],
    ) -> Nest:
        """The memory after the drifts of steps evaluated before are known again."""
        products, squares = {}, {}
        for step, guess, drift in zip(steps, guesses, drifts, strict=True):
            if step not in memory["held"]:
                continue
            old_guess, old_drift = memory["held"][step]
            for name in moving(guess, drift).keys() & old_drift.keys():
                change = _wide(drift[name]) - _wide(old_drift[name])
                move = _wide(guess[name]) - _wide(old_guess[name])
                _add(products, name, change * move)
                _add(squares, name, move.square())
        for name in memory["products"]:
            if squares:
                _add(products, name, self.decay * memory["products"][name])
                _add(squares, name, self.decay * memory["squares"][name])
        kept = {k: memory[k] for k in ("products", "squares")}
        new = {"products": products, "squares": squares} if squares else kept
        return {"held": {}, **new}

    def slopes(self, memory: Nest) -> State:
        r"""The diagonal $\Lambda$; an entry for each tensor that has been measured."""
        found = {}
        for name, products in memory["products"].items():
            squares = memory["squares"][name]
            slope = products / (squares + self.shrinkage * squares.mean())
            found[name] = slope.nan_to_num(0, 0, 0).clamp(min=0)
        return found

    def correct(self, slopes: State, drift: State, y: State, guess: State) -> State:
        """The drift of a guess, corrected to a state."""
        moved = {
            name: torch.addcmul(
                _wide(drift[name]), slope, _wide(y[name]) - _wide(guess[name])
            ).to(drift[name].dtype)
            for name, slope in slopes.items()
            if name in drift
        }
        return {**drift, **moved}

    def hold(self, memory: Nest, observation: Observation) -> Nest:
        """Keep what will be evaluated again.

        Args:
            memory: The memory after `learn`.
            observation: The iteration, with the drifts as they were evaluated.
        """
        seen = observation
        held = {
            seen.steps[slot]: (guess, moving(guess, drift))
            for slot, (guess, drift) in enumerate(
                zip(seen.guesses[:-1], seen.drifts, strict=True)
            )
            if slot >= seen.stride
        }
        return {**memory, "held": held}


def _add(sums: State, name: str, value: Tensor) -> None:
    sums[name] = sums[name] + value if name in sums else value


def _wide(value: Tensor) -> Tensor:
    """Squares of half-precision numbers underflow."""
    return value.float() if value.dtype.itemsize < 4 else value
