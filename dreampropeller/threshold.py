r"""Thresholds: the error up to which a step counts as converged.

Slot $i$ passes when $e_i \le \varepsilon$ (Eq. 4); a NaN fails. A threshold may learn
from an iteration's drifts `before` it gives $\varepsilon$, and adapts `after`.
"""

from __future__ import annotations

import abc
import itertools
import math
from dataclasses import dataclass
from typing import Literal

from dreampropeller.checks import is_number
from dreampropeller.component import Component, M, Memory
from dreampropeller.rollout import Rollout
from dreampropeller.trajectory import Parents
from dreampropeller.tree import State, mean_square


class Threshold(Component[M], abc.ABC):
    """The largest error that passes, and its adaptation.

    Attributes:
        measures_guesses: Whether a slot's drift is compared with the one at the state
            that was rolled out for it, which must then be its next guess.
    """

    measures_guesses: bool = False

    @property
    def exact(self) -> bool:
        """Whether states are compared bit by bit (Eq. 7), whatever the solver's norm.

        Default: False.
        """
        return False

    @abc.abstractmethod
    def bound(self, memory: M) -> float:
        """The largest error that passes in this iteration."""

    def error(self, memory: M, step: int, distance: float) -> float:
        """The error of a guess of the state at a step; default: its distance.

        Args:
            memory: The memory after `before`.
            step: The compared state's step.
            distance: Distance of the new state from the guess in the solver's norm.
        """
        del memory, step
        return distance

    def weight(self, memory: M, error: float) -> float:
        """Weight of the corrected drift of a guess that did not pass; default: 1.

        Only guesses depend on it: accepted steps use drifts of guesses that passed.

        Args:
            memory: The memory after `before`.
            error: The error of the guess.
        """
        del memory, error
        return 1.0

    def most(self, memory: M, length: int, remaining: int) -> int:
        """The largest number of steps to accept, whatever passes; default: all.

        Args:
            memory: The memory after `before`.
            length: Number of steps evaluated, at least 1.
            remaining: Number of steps before the next jump or the end.
        """
        del memory, remaining
        return length

    def limit(self, memory: M, rollout: Rollout) -> int:
        """The largest number of steps to accept, in view of all of them; default: all.

        Args:
            memory: The memory after `before`.
            rollout: The rollout; its stride is the number of steps that passed.
        """
        del memory
        return rollout.stride


@dataclass(frozen=True)
class FixedMemory(Memory):
    """Memory of a relative `FixedThreshold`.

    Attributes:
        unit: Median squared update of the previous iteration; 0: not yet known.
    """

    unit: float = 0.0


@dataclass(frozen=True)
class FixedThreshold(Threshold[FixedMemory | None]):
    r"""A fixed threshold.

    The error is absolute, in the units of the norm: the mean square of a parameter's
    change unless another norm is given. It depends on the learning rate and on the
    scale of the parameters, so it must be chosen per problem. Zero compares the
    states bit by bit: the solve then equals `Sequential` (`test_picard.py`).

    With `relative`, the unit is the median squared update of the previous iteration (in
    mean squares, whatever the solver's norm): a guess passes while its error is at most
    $\sqrt{v}$ optimizer steps, with $v$ the value. This is independent of the scale of
    the parameters and of the learning rate, but not of how much the drift changes
    within a step. In the first iteration there is no unit yet, and only the anchor's
    step is accepted.

    Args:
        value: The largest error that passes, at least 0.
        relative: Whether `value` is in units of squared updates.
    """

    value: float
    relative: bool = False

    def __post_init__(self) -> None:
        if not (is_number(self.value) and 0 <= self.value < math.inf):
            raise ValueError(
                f"`value` is {self.value!r}: write a finite number, at least "
                "0 (0 reproduces the sequential run exactly)."
            )

    @property
    def exact(self) -> bool:
        """Whether the threshold is zero."""
        return self.value == 0

    @property
    def _has_unit(self) -> bool:
        return self.relative and not self.exact

    def init(self) -> FixedMemory | None:
        """The unit of a relative value, not yet known."""
        return FixedMemory() if self._has_unit else None

    def bound(self, memory: FixedMemory | None) -> float:
        """The value times its unit."""
        return self.value * memory.unit if memory else self.value

    def most(self, memory: FixedMemory | None, length: int, remaining: int) -> int:
        """One step while the unit is not known."""
        del remaining
        return 1 if memory and not memory.unit else length

    def after(self, memory: FixedMemory | None, rollout: Rollout) -> FixedMemory | None:
        """Measure the updates if they are the unit."""
        if memory is None:
            return None
        updates = sorted(
            float(mean_square(new, old))
            for old, new in itertools.pairwise(rollout.states)
        )
        median = updates[len(updates) // 2]
        return FixedMemory(median) if 0 < median < math.inf else memory

    def jumped(
        self, memory: FixedMemory | None, y: State, parents: Parents | None
    ) -> FixedMemory | None:
        """Keep the unit: a jump does not change the size of a step."""
        del y, parents
        return memory


@dataclass(frozen=True)
class EMAMemory(Memory):
    """Memory of an `EMAThreshold`.

    Attributes:
        value: The running threshold.
    """

    value: float


@dataclass(frozen=True)
class EMAThreshold(Threshold[EMAMemory]):
    r"""An exponential moving average of the window's own error (Eq. 8).

    The published rule of DreamPropeller.

    After each iteration, $\varepsilon \leftarrow \beta\varepsilon + (1 - \beta) a$ with
    $a$ the window's mean error or the error at its middle *position*
    $\lfloor L/2 \rfloor$ (published as "median"). The rule sets the speed, not the
    error: the initial value is forgotten within some twenty iterations, about half of
    the window passes whatever the error is, and the distance from the sequential run is
    not controlled. Use it to reproduce published results.

    Args:
        value: The initial value, in the units of the norm; published for DreamFusion:
            5e-6.
        ema_decay: The decay β, from 0 to 1; published: 0.9.
        adaptivity: The window's error $a$: "median" or "mean".

    References:
        Zhou et al. 2024, arXiv 2311.17082, Algorithm 2.
    """

    value: float = 5e-6
    ema_decay: float = 0.9
    adaptivity: Literal["median", "mean"] = "median"

    def __post_init__(self) -> None:
        if not (is_number(self.value) and 0 <= self.value < math.inf):
            raise ValueError(
                f"`value` is {self.value!r}: write a finite number, at least 0."
            )
        if not (is_number(self.ema_decay) and 0 <= self.ema_decay <= 1):
            raise ValueError(
                f"`ema_decay` is {self.ema_decay!r}: write a number from 0 "
                "(follow the last window) to 1 (never adapt); published: 0.9."
            )
        if self.adaptivity not in ("median", "mean"):
            raise ValueError(
                f"`adaptivity` is {self.adaptivity!r}: write `median` (the "
                "error at the window's middle) or `mean`."
            )

    def init(self) -> EMAMemory:
        """The initial value."""
        return EMAMemory(float(self.value))

    def bound(self, memory: EMAMemory) -> float:
        """The running value."""
        return memory.value

    def after(self, memory: EMAMemory, rollout: Rollout) -> EMAMemory:
        """Average the window's error; a non-finite one is ignored."""
        errors = rollout.errors
        if self.adaptivity == "median":
            aggregate = errors[len(errors) // 2]
        else:
            aggregate = sum(errors) / len(errors)
        # The published code lets a NaN in here, and then never accepts a step again.
        if not math.isfinite(aggregate):
            return memory
        return EMAMemory(
            self.ema_decay * memory.value + (1 - self.ema_decay) * aggregate
        )

    def jumped(self, memory: EMAMemory, y: State, parents: Parents | None) -> EMAMemory:
        """Keep the running value."""
        del y, parents
        return memory
