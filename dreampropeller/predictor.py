"""How a guess beyond the rolled-out window is made."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dreampropeller.trajectory import Parents, Trajectory
from dreampropeller.tree import Nest, State, copy_nest


class Predictor(abc.ABC):
    """Guesses the states that follow a rolled-out one."""

    def init(self) -> Nest:
        """The predictor's memory at the start of a solve; default: none."""
        return None

    def observe(self, memory: Nest, drifts: Sequence[State]) -> Nest:
        """The memory after an iteration accepted these drifts, in step order."""
        del drifts
        return memory

    def remap(self, memory: Nest, y: State, parents: Parents | None) -> Nest:
        """The memory after a jump to `y`, whose rows come from `parents`."""
        del y, parents
        return memory

    @abc.abstractmethod
    def extend(
        self,
        trajectory: Trajectory[Any],
        step: int,
        y: State,
        carry: Nest,
        memory: Nest,
        count: int,
    ) -> list[State]:
        """Guess the states at steps `step + 1` … `step + count` from the one at `step`.

        `carry` belongs to the caller and must stay as it is.
        """


class RepeatLast(Predictor):
    """The published guess: nothing moves."""

    def extend(
        self,
        trajectory: Trajectory[Any],
        step: int,
        y: State,
        carry: Nest,
        memory: Nest,
        count: int,
    ) -> list[State]:
        """The same state `count` times."""
        del trajectory, step, carry, memory
        return [y] * count


@dataclass(frozen=True)
class Momentum(Predictor):
    r"""Roll the update on with the running mean of the accepted drifts (Eq. 9).

    $\bar g \leftarrow \beta \bar g + (1 - \beta) g$, corrected for its start at zero as
    in Adam. Only entries that follow the state (same name, same shape, floating) are
    averaged: what a drift reports of a buffer is an event, not a direction. With a
    large learning rate the extrapolation can be worse than repeating the last state.

    Args:
        decay: The decay β, from 0 (the last drift) to below 1.
    """

    decay: float = 0.9

    def __post_init__(self) -> None:
        if not (0 <= self.decay < 1):
            raise ValueError(
                f"`predictor.decay` is {self.decay}: write a number from 0 (the last "
                "drift alone) to below 1; 0.9 is usual."
            )

    def init(self) -> Nest:
        """No drift seen yet."""
        return {"mean": {}, "weight": {}}

    def observe(self, memory: Nest, drifts: Sequence[State]) -> Nest:
        """Average the drifts in."""
        mean: State = dict(memory["mean"])
        weight: dict[str, float] = dict(memory["weight"])
        owned: set[str] = set()
        for drift in drifts:
            for name, value in drift.items():
                if not value.is_floating_point() or f"{name}/changed" in drift:
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
        return {"mean": mean, "weight": weight}

    def remap(self, memory: Nest, y: State, parents: Parents | None) -> Nest:
        """Follow the rows; new ones start without a direction."""
        mean: State = {}
        for name, value in memory["mean"].items():
            if parents is not None and name in parents:
                rows = parents[name].to(value.device)
                moved = value[rows.clamp(min=0)]
                moved[rows < 0] = 0
                value = moved
            if name in y and y[name].shape == value.shape:
                mean[name] = value
        return {"mean": mean, "weight": {n: memory["weight"][n] for n in mean}}

    def extend(
        self,
        trajectory: Trajectory[Any],
        step: int,
        y: State,
        carry: Nest,
        memory: Nest,
        count: int,
    ) -> list[State]:
        """Roll out with the mean drift; repeat the state while there is none."""
        drift = {
            name: mean / memory["weight"][name]
            for name, mean in memory["mean"].items()
            if name in y and y[name].shape == mean.shape
        }
        if not drift or count == 0:
            return [y] * count
        carry = copy_nest(carry)
        guesses: list[State] = []
        with torch.no_grad():
            for ahead in range(count):
                y, carry = trajectory.update(step + ahead, y, carry, drift)
                guesses.append(y)
        return guesses


PREDICTORS: Mapping[str, type[Predictor]] = {
    "repeat_last": RepeatLast,
    "momentum": Momentum,
}


def as_predictor(predictor: str | Predictor) -> Predictor:
    """The predictor of a name.

    Raises:
        ValueError: There is none of that name.
    """
    if isinstance(predictor, Predictor):
        return predictor
    if predictor not in PREDICTORS:
        raise ValueError(
            f"`predictor` is {predictor!r}: write one of "
            f"{', '.join(f'`{name}`' for name in PREDICTORS)}, or a `Predictor`."
        )
    return PREDICTORS[predictor]()
