r"""What error counts as converged.

Slot $i$ passes when $e_i \le \varepsilon$ (Eq. 4); a NaN fails. A threshold may learn
from the drifts of an iteration before it gives $\varepsilon$, and adapts afterwards.
"""

from __future__ import annotations

import abc
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dreampropeller.checks import is_number
from dreampropeller.tree import Nest, State, mean_square


@dataclass(frozen=True)
class Observation:
    """What a threshold may learn from: one rolled-out window.

    Attributes:
        steps: The steps evaluated, shape ``(window,)``.
        guesses: States the drifts were evaluated at, then the last, which was only
            compared, shape ``(window + 1,)``.
        states: The anchor and the states rolled out from it, shape ``(window + 1,)``.
        drifts: The drifts, shape ``(window,)``.
        errors: Errors of `states[1:]` against `guesses[1:]`, as the threshold measures
            them, shape ``(window,)``.
        distances: The same in the solver's norm, shape ``(window,)``.
        stride: The steps accepted.
    """

    steps: Sequence[int]
    guesses: Sequence[State]
    states: Sequence[State]
    drifts: Sequence[State]
    errors: Sequence[float]
    distances: Sequence[float] = ()
    stride: int = 1


class Threshold(abc.ABC):
    """The largest error that passes, and how it adapts.

    Attributes:
        exact: Compare states bit by bit (Eq. 7) and ignore the solver's norm.
    """

    exact: bool = False

    @abc.abstractmethod
    def init(self) -> Nest:
        """The threshold's memory at the start of a solve."""

    def learn(
        self,
        memory: Nest,
        steps: Sequence[int],
        guesses: Sequence[State],
        drifts: Sequence[State],
    ) -> Nest:
        """The memory once an iteration's drifts are known; default: unchanged.

        Args:
            memory: The memory before.
            steps: The steps evaluated, shape ``(window,)``.
            guesses: The states they were evaluated at, shape ``(window,)``.
            drifts: Their drifts, finite, shape ``(window,)``.
        """
        del steps, guesses, drifts
        return memory

    @abc.abstractmethod
    def bound(self, memory: Nest) -> float:
        """The largest error that passes in this iteration."""

    def error(self, memory: Nest, step: int, distance: float) -> float:
        """The error of a guess of the state at a step; default: its distance.

        Args:
            memory: The memory after `learn`.
            step: The compared state's step.
            distance: Distance of the new state from the guess in the solver's norm.
        """
        del memory, step
        return distance

    def limit(self, memory: Nest, length: int, remaining: int) -> int:
        """The most steps to accept, whatever passes; default: all.

        Args:
            memory: The memory after `learn`.
            length: The steps evaluated, at least 1.
            remaining: Steps before the next jump or the end.
        """
        del memory, remaining
        return length

    def diagnostics(self, memory: Nest) -> dict[str, float]:
        """What the threshold believes, by name, to log; default: nothing."""
        del memory
        return {}

    def jumped(self, memory: Nest) -> Nest:
        """The memory after a jump, when no drift fits any more; default: unchanged."""
        return memory

    def adapt(self, memory: Nest, observation: Observation) -> Nest:
        """The memory after an iteration; default: unchanged."""
        del observation
        return memory


@dataclass(frozen=True)
class FixedThreshold(Threshold):
    r"""An error that never adapts.

    The error is absolute, in the units of the norm: the mean square of a parameter's
    change unless another norm is given. It depends on the learning rate and on the
    scale of the parameters, so it must be chosen for each problem. Zero compares the
    states bit by bit: the solve then equals `Sequential` (`test_picard.py`).

    With `relative`, the unit is the median squared update of the iteration before (by
    mean squares, whatever the solver's norm): a guess passes while it is off by at most
    $\sqrt{v}$ optimizer steps. That is free of the scale of parameters and learning
    rate, but not of how much the drift changes within a step. In the first iteration
    there is no unit yet, and only the anchor's step is accepted.

    Args:
        value: The largest error that passes, at least 0.
        relative: Whether `value` counts squared updates.
    """

    value: float
    relative: bool = False

    def __post_init__(self) -> None:
        if not (is_number(self.value) and 0 <= self.value < math.inf):
            raise ValueError(
                f"`threshold.value` is {self.value!r}: write a finite number, at least "
                "0 (0 reproduces the sequential run exactly)."
            )

    @property
    def exact(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the threshold is zero."""
        return self.value == 0

    @property
    def _has_unit(self) -> bool:
        return self.relative and not self.exact

    def init(self) -> Nest:
        """The unit of a relative value, 0 while it is not known."""
        return {"unit": 0.0} if self._has_unit else None

    def bound(self, memory: Nest) -> float:
        """The value, in its unit."""
        return self.value * memory["unit"] if self._has_unit else self.value

    def limit(self, memory: Nest, length: int, remaining: int) -> int:
        """One step while the unit is not known."""
        del remaining
        return 1 if self._has_unit and not memory["unit"] else length

    def adapt(self, memory: Nest, observation: Observation) -> Nest:
        """Measure the updates, when they are the unit."""
        if not self._has_unit:
            return memory
        updates = sorted(
            float(mean_square(new, old))
            for old, new in itertools.pairwise(observation.states)
        )
        median = updates[len(updates) // 2]
        return {"unit": median} if 0 < median < math.inf else memory


@dataclass(frozen=True)
class EMAThreshold(Threshold):
    r"""The published rule: follow the window's own error (Eq. 8).

    After each iteration, $\varepsilon \leftarrow \beta\varepsilon + (1 - \beta) a$ with
    $a$ the window's mean error or the error at its middle *position*
    $\lfloor L/2 \rfloor$ (published as "median"). The rule sets the speed, not the
    error: the initial value is forgotten within some twenty iterations, about half a
    window passes whatever the error is, and the distance from the sequential run
    floats. Use it to reproduce published results.

    Args:
        threshold: The initial value, in the units of the norm.
        ema_decay: The decay β, from 0 to 1; published: 0.9.
        adaptivity: "median" or "mean".

    References:
        Zhou et al. 2024, arXiv 2311.17082, Algorithm 2.
    """

    threshold: float
    ema_decay: float
    adaptivity: Literal["median", "mean"]

    def __post_init__(self) -> None:
        if not (is_number(self.threshold) and 0 <= self.threshold < math.inf):
            raise ValueError(
                f"`threshold.value` is {self.threshold!r}: write a finite number, at "
                "least 0."
            )
        if not (is_number(self.ema_decay) and 0 <= self.ema_decay <= 1):
            raise ValueError(
                f"`threshold.ema_decay` is {self.ema_decay!r}: write a number from 0 "
                "(follow the last window) to 1 (never adapt); published: 0.9."
            )
        if self.adaptivity not in ("median", "mean"):
            raise ValueError(
                f"`threshold.adaptivity` is {self.adaptivity!r}: write `median` (the "
                "error at the window's middle) or `mean`."
            )

    def init(self) -> Nest:
        """The initial value."""
        return float(self.threshold)  # its kind is what a resumed run knows it by

    def bound(self, memory: Nest) -> float:
        """The running value."""
        return memory

    def adapt(self, memory: Nest, observation: Observation) -> Nest:
        """Move towards the window's error; a non-finite one teaches nothing."""
        errors = observation.errors
        if self.adaptivity == "median":
            aggregate = errors[len(errors) // 2]
        else:
            aggregate = sum(errors) / len(errors)
        # The published code lets a NaN in here, and then never accepts a step again.
        if not math.isfinite(aggregate):
            return memory
        return self.ema_decay * memory + (1 - self.ema_decay) * aggregate
