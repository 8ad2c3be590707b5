"""Predictors: initial guesses of the states beyond the rolled-out window."""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from dreampropeller.checks import is_number, is_whole
from dreampropeller.component import FULL, Component, M, Memory
from dreampropeller.rollout import Rollout
from dreampropeller.trajectory import Parents, Trajectory
from dreampropeller.tree import (
    Nest,
    State,
    copy_nest,
    is_continuous,
    mean_square,
    take_rows,
)

SIXTEENTHS = 16
"""Resolution of the fitted fraction; an integer, so that ranks agree on it exactly."""


class Predictor(Component[M], abc.ABC):
    """Guesses the states that follow a rolled-out state."""

    def choice(self, memory: M) -> int:
        """A decision that all ranks must share; default: none."""
        del memory
        return 0

    def settle(self, memory: M, choice: int) -> M:
        """The memory with rank 0's decision."""
        del choice
        return memory

    def knows(self, memory: M) -> bool:
        """Whether a memory is enough to guess from after a jump; default: no."""
        del memory
        return False

    @abc.abstractmethod
    def extend(
        self,
        trajectory: Trajectory[Any],
        step: int,
        y: State,
        carry: Nest,
        memory: M,
        count: int,
    ) -> tuple[list[State], M]:
        """Guess the states at steps `step + 1` … `step + count` from the one at `step`.

        `carry` belongs to the caller and must stay as it is.

        Returns:
            The guesses, and the memory after them.
        """


class RepeatLast(Predictor[None]):
    """The published predictor: repeat the last state."""

    def extend(
        self,
        trajectory: Trajectory[Any],
        step: int,
        y: State,
        carry: Nest,
        memory: None,
        count: int,
    ) -> tuple[list[State], None]:
        """The same state `count` times."""
        del trajectory, step, carry
        return [y] * count, memory


@dataclass(frozen=True)
class MomentumMemory(Memory):
    """Memory of a `Momentum`.

    Attributes:
        mean: Decayed sum of the drifts, by name.
        weight: Sum of their weights, which is below 1 at the start.
    """

    mean: State = field(default_factory=dict)
    weight: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Momentum(Predictor[MomentumMemory]):
    r"""Roll the update on with the running mean of the accepted drifts (Eq. 10).

    $\bar g \leftarrow \beta \bar g + (1 - \beta) g$, corrected for its start at zero as
    in Adam. Only entries that follow the state (same name, same shape, floating) are
    averaged: the drift of a buffer is an event, not a direction. With a
    large learning rate the extrapolation can be worse than repeating the last state.

    Args:
        decay: The decay β, from 0 (the last drift) to below 1.
    """

    decay: float = 0.9

    def __post_init__(self) -> None:
        if not (is_number(self.decay) and 0 <= self.decay < 1):
            raise ValueError(
                f"`decay` is {self.decay!r}: write a number from 0 (the last "
                "drift alone) to below 1; 0.9 is usual."
            )

    def init(self) -> MomentumMemory:
        """The memory before any drift."""
        return MomentumMemory()

    def knows(self, memory: MomentumMemory) -> bool:
        """Once there is a mean."""
        return bool(memory.mean)

    def after(self, memory: MomentumMemory, rollout: Rollout) -> MomentumMemory:
        """Add the drifts of the accepted steps to the mean."""
        mean, weight = dict(memory.mean), dict(memory.weight)
        owned: set[str] = set()
        for drift in rollout.used[: rollout.stride]:
            for name, value in drift.items():
                if not is_continuous(value) or f"{name}/changed" in drift:
                    continue
                if name not in mean or mean[name].shape != value.shape:
                    mean[name], weight[name] = value * (1 - self.decay), 1 - self.decay
                    owned.add(name)
                    continue
                if name not in owned:  # the memory of the anchor stays as it is
                    mean[name] = mean[name].clone()
                    owned.add(name)
                mean[name].lerp_(value, 1 - self.decay)
                weight[name] += (1 - weight[name]) * (1 - self.decay)
        return MomentumMemory(mean, weight)

    def jumped(
        self, memory: MomentumMemory, y: State, parents: Parents | None
    ) -> MomentumMemory:
        """Map the rows; the mean drift of new rows is zero."""
        moved = {
            name: take_rows(value, parents[name])
            if parents is not None and name in parents
            else value
            for name, value in memory.mean.items()
        }
        mean = {
            name: value
            for name, value in moved.items()
            if name in y and y[name].shape == value.shape
        }
        return MomentumMemory(mean, {name: memory.weight[name] for name in mean})

    def extend(
        self,
        trajectory: Trajectory[Any],
        step: int,
        y: State,
        carry: Nest,
        memory: MomentumMemory,
        count: int,
    ) -> tuple[list[State], MomentumMemory]:
        """Roll out with the mean drift; repeat the state while there is no mean."""
        drift = {
            name: mean / memory.weight[name]
            for name, mean in memory.mean.items()
            if name in y and y[name].shape == mean.shape
        }
        if not drift or count == 0:
            return [y] * count, memory
        carry = copy_nest(carry)
        guesses: list[State] = []
        with torch.no_grad():
            for ahead in range(count):
                y, carry = trajectory.update(step + ahead, y, carry, drift)
                guesses.append(y)
        return guesses, memory


@dataclass(frozen=True)
class Probe(Memory):
    """Both guesses of a step, to be compared with its rolled-out state.

    Attributes:
        step: The step.
        momentum: The guess of `Momentum`.
        repeat_last: The state that `RepeatLast` would repeat.
    """

    step: int
    momentum: State
    repeat_last: State


@dataclass(frozen=True)
class FittedMemory(Memory):
    """Memory of a `FittedMomentum`.

    Attributes:
        momentum: The running mean of the drifts.
        fraction: Running average of the fraction α.
        used: The fraction in use, in sixteenths, as decided by rank 0.
        age: Number of iterations since momentum was last tried.
        probe: Guesses to be compared; None if there are none.
        residuals: Root-mean-square errors found in this iteration, by name.
    """

    momentum: MomentumMemory = field(default_factory=MomentumMemory)
    fraction: float = 1.0
    used: int = SIXTEENTHS
    age: int = 0
    probe: Probe | None = field(default=None, metadata=FULL)
    residuals: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class FittedMomentum(Predictor[FittedMemory]):
    r"""Extrapolate along momentum, by a fraction fitted to recent iterations (Eq. 11).

    $\hat y_j = y + \alpha\,(\hat y^{\text{momentum}}_j - y)$ lies between `RepeatLast`
    ($\alpha = 0$) and `Momentum` ($\alpha = 1$). When the middle one of the new slots
    is rolled out, the α that would have guessed it best (least squares, from 0 to 1) is
    averaged, $\alpha \leftarrow 0.7\,\alpha + 0.3\,\alpha^*$, and rounded to
    sixteenths, so that all ranks agree on it exactly. It starts at 1. While it rounds
    to 0, momentum is tried only every `probe_every` iterations, because its guesses
    cost one update per new slot. Two states are kept.

    Args:
        decay: See `Momentum`.
        probe_every: Number of iterations between two trials of momentum while its
            fraction is 0, at least 1.
    """

    decay: float = 0.9
    probe_every: int = 4

    def __post_init__(self) -> None:
        Momentum(self.decay)  # refuses a decay out of range
        if not is_whole(self.probe_every) or self.probe_every < 1:
            raise ValueError(
                f"`probe_every` is {self.probe_every!r}: write a whole "
                "number, 1 or more."
            )

    @property
    def _momentum(self) -> Momentum:
        return Momentum(self.decay)

    def init(self) -> FittedMemory:
        """The memory before any residual."""
        return FittedMemory()

    def knows(self, memory: FittedMemory) -> bool:
        """Once there is a mean."""
        return bool(memory.momentum.mean)

    def after(self, memory: FittedMemory, rollout: Rollout) -> FittedMemory:
        """Fit the fraction if a probed step was rolled out; average the drifts."""
        fraction, residuals = self._fitted(memory, rollout)
        return replace(
            memory,
            momentum=self._momentum.after(memory.momentum, rollout),
            fraction=fraction,
            residuals=residuals,
            probe=None,
        )

    def _fitted(
        self, memory: FittedMemory, rollout: Rollout
    ) -> tuple[float, dict[str, float]]:
        """The fraction, and the residuals of both guesses, by name."""
        probe, states = memory.probe, rollout.states
        if probe is None:
            return memory.fraction, {}
        slot = probe.step - rollout.steps[0]
        if not 0 < slot < len(states):
            return memory.fraction, {}  # the window was cut
        residual = float(mean_square(states[slot], probe.momentum))
        repeated = float(mean_square(states[slot], probe.repeat_last))
        whole = float(mean_square(probe.momentum, probe.repeat_last))
        residuals = {
            "residual_momentum": math.sqrt(residual),
            "residual_repeat_last": math.sqrt(repeated),
        }
        if whole == 0:
            return memory.fraction, residuals
        # ⟨a, b⟩ / ‖b‖² for the displacements a to the state and b to the guess.
        best = (repeated + whole - residual) / (2 * whole)
        # Ignore guesses that are not finite.
        best = min(max(best, 0.0), 1.0) if math.isfinite(best) else 0.0
        return 0.7 * memory.fraction + 0.3 * best, residuals

    def choice(self, memory: FittedMemory) -> int:
        """The fraction α in sixteenths."""
        return round(SIXTEENTHS * memory.fraction)

    def settle(self, memory: FittedMemory, choice: int) -> FittedMemory:
        """Adopt the fraction that rank 0 decided."""
        return replace(memory, used=choice)

    def diagnostics(self, memory: FittedMemory) -> dict[str, float]:
        """The fraction of momentum's displacement in the guess.

        In iterations that measured them, also the roots of both residuals.
        """
        return {"momentum_share": memory.used / SIXTEENTHS, **memory.residuals}

    def jumped(
        self, memory: FittedMemory, y: State, parents: Parents | None
    ) -> FittedMemory:
        """Map the rows of the mean drift; drop guesses of the old structure."""
        momentum = self._momentum.jumped(memory.momentum, y, parents)
        return replace(memory, momentum=momentum, probe=None)

    def extend(
        self,
        trajectory: Trajectory[Any],
        step: int,
        y: State,
        carry: Nest,
        memory: FittedMemory,
        count: int,
    ) -> tuple[list[State], FittedMemory]:
        """Guess the states, and keep the momentum guess of the middle slot."""
        if count == 0:
            return [], memory
        if not memory.used and memory.age + 1 < self.probe_every:
            return [y] * count, replace(memory, age=memory.age + 1)
        guesses, _ = self._momentum.extend(
            trajectory, step, y, carry, memory.momentum, count
        )
        middle = (count + 1) // 2
        probe = Probe(step + middle, guesses[middle - 1], y)
        fraction = memory.used / SIXTEENTHS
        between = [_between(y, guess, fraction) for guess in guesses]
        return between, replace(memory, age=0, probe=probe)


def _between(start: State, end: State, fraction: float) -> State:
    """Interpolate two states; non-floating entries are taken from `end`."""
    if fraction == 0:
        return start
    if fraction == 1:
        return end
    return {
        name: torch.lerp(start[name], value, fraction)
        if is_continuous(value) and start[name].shape == value.shape
        else value
        for name, value in end.items()
    }


PREDICTORS: Mapping[str, type[Predictor[Any]]] = {
    "repeat_last": RepeatLast,
    "momentum": Momentum,
    "auto": FittedMomentum,
}


def as_predictor(predictor: str | Predictor[Any]) -> Predictor[Any]:
    """The predictor with a given name.

    Raises:
        ValueError: There is no predictor of that name.
    """
    if isinstance(predictor, Predictor):
        return predictor
    if not isinstance(predictor, str) or predictor not in PREDICTORS:
        raise ValueError(
            f"`predictor` is {predictor!r}: write one of "
            f"{', '.join(f'`{name}`' for name in PREDICTORS)}, or a `Predictor`."
        )
    return PREDICTORS[predictor]()
