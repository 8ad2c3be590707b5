r"""Secant correction of drifts to the states they are used at (Eqs. 12 and 13).

An iteration uses the drift $g_j$ of a guess $\hat y_j$ at another state $y_j$, rolled
out from the anchor. With a diagonal estimate $\Lambda$ of the drift's slope it uses

$$g_j + \Lambda\,(y_j - \hat y_j), \qquad
  \Lambda = \max\Bigl(0,\; \frac{\sum_a \Delta g_a \Delta y_a}
                              {\sum_a \Delta y_a^2 + p}\Bigr)$$

instead, entry by entry, where $\Delta$ are the differences between two evaluations of
one step and $p$ keeps the slopes of entries that hardly moved small. If the drift pulls
a state back to a target, the plain iteration overshoots, the more the wider the window;
the correction accounts for the pull.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dreampropeller.acceleration.base import Acceleration
from dreampropeller.checks import is_number
from dreampropeller.component import FULL, Memory
from dreampropeller.rollout import Evaluation, Rollout
from dreampropeller.trajectory import Parents
from dreampropeller.tree import State, moving, norms, take_rows, widened

NEAR = 4
"""Slopes must fit the nearest 1 / `NEAR` of the pairs."""
OVERSHOOT = 8
"""Factor by which what they predict there may be too large."""
DROWNED = 64
"""Factor by which they may explain less of those pairs than the pairs' own slopes."""
LARGEST = 4
"""Norm of a corrected drift beyond which its correction is scaled down.

In units of the drift's own norm, or the anchor's where that is larger.
"""

Sums = tuple[Tensor, Tensor]
Pair = tuple[State, State, State, State]


@dataclass(frozen=True)
class SecantMemory(Memory):
    r"""Memory of a `Secant`.

    Attributes:
        held: Guess and drift of the steps that will be evaluated again.
        products: $\sum_a \Delta g_a \Delta y_a$, decayed, by name.
        squares: $\sum_a \Delta y_a^2$, decayed, by name.
        slopes: The diagonal $\Lambda$, from `before` to `after`.
        units: Norms of the nearest drift, the anchor's, by name, from `before` to
            `after`.
        current: Whether anything was measured since the last jump.
    """

    held: dict[int, tuple[State, State]] = field(default_factory=dict, metadata=FULL)
    products: State = field(default_factory=dict)
    squares: State = field(default_factory=dict)
    slopes: State = field(default_factory=dict, metadata=FULL)
    units: dict[str, float] = field(default_factory=dict)
    current: bool = True


@dataclass(frozen=True)
class Secant(Acceleration[SecantMemory]):
    r"""Correct the drifts of guesses by the slopes seen between iterations (Eq. 12).

    A slot that was not accepted is evaluated again, so slopes cost no evaluation. A
    guess that equals its state is not corrected: at threshold 0 the result is that of
    `Sequential` bit for bit (`test_secant.py`). Only slopes that pull back (not below
    zero) are used, as in descent on a loss. Where the drift is strongly nonlinear,
    distant guesses run away: slopes that do not fit the nearest pairs are measured
    without them, and corrections are bounded (`docs/method.md`). The memory is two
    states, and a drift and a guess per slot that is evaluated again.

    Args:
        decay: Weight of the sums of previous iterations, from 0 to below 1.
        shrinkage: $p$, in units of the mean of $\sum_a \Delta y_a^2$, above 0.
    """

    decay: float = 0.7
    shrinkage: float = 1.0

    def __post_init__(self) -> None:
        if not (is_number(self.decay) and 0 <= self.decay < 1):
            raise ValueError(
                f"`decay` is {self.decay!r}: write a number from 0 to below 1, as 0.7."
            )
        if not (is_number(self.shrinkage) and 0 < self.shrinkage < math.inf):
            raise ValueError(
                f"`shrinkage` is {self.shrinkage!r}: write a number above 0, as 1."
            )

    def init(self) -> SecantMemory:
        """The memory before any slope: drifts are not corrected."""
        return SecantMemory()

    def before(self, memory: SecantMemory, evaluation: Evaluation) -> SecantMemory:
        """Estimate slopes from the steps that were evaluated before."""
        pairs = [
            (guess, drift, *memory.held[step])
            for step, guess, drift in zip(
                evaluation.steps,
                evaluation.guesses[:-1],
                evaluation.drifts,
                strict=True,
            )
            if step in memory.held and drift  # an anchor that is skipped has none
        ]
        near, whole = _near_and_whole(pairs)
        products, squares = memory.products, memory.squares
        if whole:
            found = {
                name: self._fitting(
                    near.get(name), whole.get(name), self._past(memory, name)
                )
                for name in {**whole, **products}
            }
            products = {name: one for name, (one, _) in found.items()}
            squares = {name: one for name, (_, one) in found.items()}
        elif not memory.current:
            return SecantMemory({}, products, squares, current=False)
        slopes = self.slopes(products, squares)
        nearest = {
            name: drift[name]
            for drift in reversed(evaluation.drifts)
            for name in slopes.keys() & drift.keys()
        }
        return SecantMemory({}, products, squares, slopes, norms(nearest))

    def _past(self, memory: SecantMemory, name: str) -> Sums | None:
        if name not in memory.products:
            return None
        return self.decay * memory.products[name], self.decay * memory.squares[name]

    def _fitting(
        self, near: Sums | None, whole: Sums | None, past: Sums | None
    ) -> Sums:
        """The largest set of sums whose slopes fit the nearest pairs."""
        if near is None:
            return _total(whole, past)
        product, square = near
        own = (self._slope(*near) * product).sum()
        for more in (whole, near):
            found = _total(more, past)
            slope = self._slope(*found)
            terms = (slope * product).sum(), (slope.square() * square).sum(), own
            right, predicted, most = torch.stack(terms).tolist()
            # One entry that ran away makes p huge, and the slopes of all others 0.
            if OVERSHOOT * right >= predicted and DROWNED * right >= most:
                return found
        return near

    def slopes(self, products: State, squares: State) -> State:
        r"""The diagonal $\Lambda$, for each tensor that has been measured."""
        return {name: self._slope(p, squares[name]) for name, p in products.items()}

    def _slope(self, product: Tensor, square: Tensor) -> Tensor:
        slope = product / (square + self.shrinkage * square.mean())
        return slope.nan_to_num(0, 0, 0).clamp(min=0)

    def correct(
        self, memory: SecantMemory, drift: State, y: State, guess: State
    ) -> State:
        """Add the slopes times the difference of state and guess (Eq. 12)."""
        moved = {
            name: torch.addcmul(
                widened(drift[name]), slope, widened(y[name]) - widened(guess[name])
            )
            for name, slope in memory.slopes.items()
            if name in drift
        }
        largest = {name: LARGEST * unit for name, unit in memory.units.items()}
        long = {n: norm for n, norm in norms(moved).items() if norm > largest[n]}
        plain = {name: widened(drift[name]) for name in long}
        for name, norm in norms(plain).items():
            share = max(largest[name], LARGEST * norm) / long[name]
            if share < 1:
                correction = moved[name] - plain[name]
                moved[name] = plain[name] + share * correction if share else plain[name]
        return drift | {n: value.to(drift[n].dtype) for n, value in moved.items()}

    def after(self, memory: SecantMemory, rollout: Rollout) -> SecantMemory:
        """Keep guesses and uncorrected drifts of the steps to be evaluated again."""
        held = {
            rollout.steps[slot]: (
                rollout.guesses[slot],
                moving(rollout.guesses[slot], rollout.drifts[slot]),
            )
            for slot in rollout.repeated
        }
        return SecantMemory(
            held, memory.products, memory.squares, current=memory.current
        )

    def jumped(
        self, memory: SecantMemory, y: State, parents: Parents | None
    ) -> SecantMemory:
        """Map the rows; new rows have no slope. Without a map no row has one.

        The slopes of before are not used until some have been measured: where
        rows were split or cloned, several now pull in the place of one.
        """
        if parents is None:
            return self.init()
        products, squares = (
            {
                name: moved
                for name, value in sums.items()
                for moved in [
                    take_rows(value, parents[name]) if name in parents else value
                ]
                if name in y and y[name].shape == moved.shape
            }
            for sums in (memory.products, memory.squares)
        )
        return SecantMemory({}, products, squares, current=False)


def _near_and_whole(pairs: Sequence[Pair]) -> tuple[dict[str, Sums], dict[str, Sums]]:
    """The sums over the nearest pairs, and over all, by name."""
    nearest = math.ceil(len(pairs) / NEAR)
    near: dict[str, Sums] = {}
    whole: dict[str, Sums] = {}
    for count, (guess, drift, old_guess, old_drift) in enumerate(pairs, start=1):
        for name in moving(guess, drift).keys() & old_drift.keys():
            if drift[name].is_complex():
                continue  # a slope is a real number
            change = widened(drift[name]) - widened(old_drift[name])
            move = widened(guess[name]) - widened(old_guess[name])
            whole[name] = _total(whole.get(name), (change * move, move.square()))
        if count == nearest:
            near = dict(whole)
    return near, whole


def _total(one: Sums | None, other: Sums | None) -> Sums:
    if one is None or other is None:
        found = one or other
        assert found is not None
        return found
    return one[0] + other[0], one[1] + other[1]
