r"""What error counts as converged.

Slot $i$ passes when $e_i \le \varepsilon$ (Eq. 4); a NaN fails. A threshold gives
$\varepsilon$ for an iteration and adapts it afterwards.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dreampropeller.tree import Nest, State


@dataclass(frozen=True)
class Observation:
    """What a threshold may learn from: one rolled-out window.

    Attributes:
        steps: The steps evaluated, shape ``(window,)``.
        guesses: States the drifts were evaluated at, then the last, which was only
            compared, shape ``(window + 1,)``.
        states: The anchor and the states rolled out from it, shape ``(window + 1,)``.
        drifts: The drifts, shape ``(window,)``.
        errors: Errors of `states[1:]` against `guesses[1:]`, shape ``(window,)``.
    """

    steps: Sequence[int]
    guesses: Sequence[State]
    states: Sequence[State]
    drifts: Sequence[State]
    errors: Sequence[float]


class Threshold(abc.ABC):
    """The largest error that passes, and how it adapts.

    Attributes:
        exact: Compare states bit by bit (Eq. 7) and ignore the solver's norm.
    """

    exact: bool = False

    @abc.abstractmethod
    def init(self) -> Nest:
        """The threshold's memory at the start of a solve."""

    @abc.abstractmethod
    def bound(self, memory: Nest) -> float:
        """The largest error that passes in this iteration."""

    def adapt(self, memory: Nest, observation: Observation) -> Nest:
        """The memory after an iteration; default: unchanged."""
        del observation
        return memory


@dataclass(frozen=True)
class FixedThreshold(Threshold):
    """An error that never adapts.

    The error is absolute, in the units of the norm: the mean square of a parameter's
    change unless another norm is given. It depends on the learning rate and on the
    scale of the parameters, so it must be chosen for each problem. Zero compares the
    states bit by bit: the solve then equals `Sequential` (`test_picard.py`).

    Args:
        value: The largest error that passes, at least 0.
    """

    value: float

    def __post_init__(self) -> None:
        if not (0 <= self.value < math.inf):
            raise ValueError(
                f"`threshold.value` is {self.value}: write a finite number, at least "
                "0 (0 reproduces the sequential run exactly)."
            )

    @property
    def exact(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the threshold is zero."""
        return self.value == 0

    def init(self) -> Nest:
        """No memory."""
        return None

    def bound(self, memory: Nest) -> float:
        """The value."""
        del memory
        return self.value


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
        if not (0 <= self.threshold < math.inf):
            raise ValueError(
                f"`threshold.value` is {self.threshold}: write a finite number, at "
                "least 0."
            )
        if not (0 <= self.ema_decay <= 1):
            raise ValueError(
                f"`threshold.ema_decay` is {self.ema_decay}: write a number from 0 "
                "(follow the last window) to 1 (never adapt); published: 0.9."
            )
        if self.adaptivity not in ("median", "mean"):
            raise ValueError(
                f"`threshold.adaptivity` is {self.adaptivity!r}: write `median` (the "
                "error at the window's middle) or `mean`."
            )

    def init(self) -> Nest:
        """The initial value."""
        return self.threshold

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
