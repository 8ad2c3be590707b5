"""How a guess beyond the rolled-out window is made."""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dreampropeller.checks import is_number, is_whole
from dreampropeller.trajectory import Parents, Trajectory
from dreampropeller.tree import Nest, State, copy_nest, mean_square

SIXTEENTHS = 16
"""Steps in which `Auto` tells its share, which ranks have to agree on."""


class Predictor(abc.ABC):
    """Guesses the states that follow a rolled-out one."""

    def init(self) -> Nest:
        """The predictor's memory at the start of a solve; default: none."""
        return None

    def observe(self, memory: Nest, drifts: Sequence[State]) -> Nest:
        """The memory after an iteration accepted these drifts, in step order."""
        del drifts
        return memory

    def judge(self, memory: Nest, step: int, states: Sequence[State]) -> Nest:
        """The memory once states from `step` on have been rolled out."""
        del step, states
        return memory

    def choice(self, memory: Nest) -> int:
        """A decision that all ranks have to share; default: there is none."""
        del memory
        return 0

    def settle(self, memory: Nest, choice: int) -> Nest:
        """The memory with the shared decision, which is rank 0's."""
        del choice
        return memory

    def diagnostics(self, memory: Nest) -> dict[str, float]:
        """What the predictor believes, by name, to log; default: nothing."""
        del memory
        return {}

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
    ) -> tuple[list[State], Nest]:
        """Guess the states at steps `step + 1` … `step + count` from the one at `step`.

        `carry` belongs to the caller and must stay as it is.

        Returns:
            The guesses, and the memory after them.
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
    ) -> tuple[list[State], Nest]:
        """The same state `count` times."""
        del trajectory, step, carry
        return [y] * count, memory


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
        if not (is_number(self.decay) and 0 <= self.decay < 1):
            raise ValueError(
                f"`predictor.decay` is {self.decay!r}: write a number from 0 (the last "
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
    ) -> tuple[list[State], Nest]:
        """Roll out with the mean drift; repeat the state while there is none."""
        drift = {
            name: mean / memory["weight"][name]
            for name, mean in memory["mean"].items()
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
class Auto(Predictor):
    r"""As far along the way of `Momentum` as has proved right of late (ours, Eq. 13).

    $\hat y_j = y + \alpha\,(\hat y^{\text{momentum}}_j - y)$ lies between `RepeatLast`
    ($\alpha = 0$) and `Momentum` ($\alpha = 1$). When the middle one of the new slots
    is rolled out, the α that would have guessed it best (least squares, within 0 and 1)
    is averaged in, $\alpha \leftarrow 0.7\,\alpha + 0.3\,\alpha^*$, and rounded to
    sixteenths. It starts at 1. While it rounds to 0, momentum is tried every
    `probe_every` iterations alone, for its guesses cost as many updates as there are
    new slots. Two states are kept.

    Args:
        decay: See `Momentum`.
        probe_every: Iterations between two trials of a momentum that is not used, at
            least 1.
    """

    decay: float = 0.9
    probe_every: int = 4

    def __post_init__(self) -> None:
        self._momentum()
        if not is_whole(self.probe_every) or self.probe_every < 1:
            raise ValueError(
                f"`predictor.probe_every` is {self.probe_every!r}: write a whole "
                "number, 1 or more."
            )

    def _momentum(self) -> Momentum:
        return Momentum(self.decay)

    def init(self) -> Nest:
        """No residual yet."""
        return {
            "momentum": self._momentum().init(),
            "share": 1.0,
            "used": SIXTEENTHS,
            "age": 0,
            "probe": {},
            "residuals": {},
        }

    def observe(self, memory: Nest, drifts: Sequence[State]) -> Nest:
        """Average the drifts in."""
        momentum = self._momentum().observe(memory["momentum"], drifts)
        return {**memory, "momentum": momentum}

    def judge(self, memory: Nest, step: int, states: Sequence[State]) -> Nest:
        """Compare the residuals where the guessed step was rolled out."""
        memory = {**memory, "residuals": {}}
        if not memory["probe"]:
            return memory
        slot = memory["probe"]["step"] - step
        after = {**memory, "probe": {}}
        if not 0 < slot < len(states):
            return after  # the window was cut
        momentum, repeat = memory["probe"]["momentum"], memory["probe"]["repeat_last"]
        residual = float(mean_square(states[slot], momentum))
        repeated = float(mean_square(states[slot], repeat))
        way = float(mean_square(momentum, repeat))
        after["residuals"] = {
            "residual_momentum": math.sqrt(residual),
            "residual_repeat_last": math.sqrt(repeated),
        }
        if way == 0:
            return after
        # ⟨a, b⟩ / ‖b‖² for the ways a to the state and b to the guess.
        best = (repeated + way - residual) / (2 * way)
        # A guess that is not finite is no way to go.
        best = min(max(best, 0.0), 1.0) if math.isfinite(best) else 0.0
        after["share"] = 0.7 * memory["share"] + 0.3 * best
        return after

    def choice(self, memory: Nest) -> int:
        """The share α in sixteenths."""
        return round(SIXTEENTHS * memory["share"])

    def settle(self, memory: Nest, choice: int) -> Nest:
        """Do what rank 0 decided."""
        return {**memory, "used": choice}

    def diagnostics(self, memory: Nest) -> dict[str, float]:
        """The share of momentum's way that is guessed.

        In iterations that measured them, the roots of both residuals too.
        """
        return {"momentum_share": memory["used"] / SIXTEENTHS, **memory["residuals"]}

    def remap(self, memory: Nest, y: State, parents: Parents | None) -> Nest:
        """The mean drift follows the rows; guesses of the old structure go."""
        momentum = self._momentum().remap(memory["momentum"], y, parents)
        return {**memory, "momentum": momentum, "probe": {}}

    def extend(
        self,
        trajectory: Trajectory[Any],
        step: int,
        y: State,
        carry: Nest,
        memory: Nest,
        count: int,
    ) -> tuple[list[State], Nest]:
        """Guess, and remember what momentum said of the middle slot."""
        if count == 0:
            return [], memory
        if not memory["used"] and memory["age"] + 1 < self.probe_every:
            return [y] * count, {**memory, "age": memory["age"] + 1}
        guesses, _ = self._momentum().extend(
            trajectory, step, y, carry, memory["momentum"], count
        )
        middle = (count + 1) // 2
        probe = {
            "step": step + middle,
            "momentum": guesses[middle - 1],
            "repeat_last": y,
        }
        share = memory["used"] / SIXTEENTHS
        between = [_between(y, guess, share) for guess in guesses]
        return between, {**memory, "age": 0, "probe": probe}


def _between(start: State, end: State, share: float) -> State:
    """A share of the way from one state to another; what is not a number has ended."""
    if share == 0:
        return start
    if share == 1:
        return end
    return {
        name: torch.lerp(start[name], value, share)
        if value.is_floating_point() and start[name].shape == value.shape
        else value
        for name, value in end.items()
    }


PREDICTORS: Mapping[str, type[Predictor]] = {
    "repeat_last": RepeatLast,
    "momentum": Momentum,
    "auto": Auto,
}


def as_predictor(predictor: str | Predictor) -> Predictor:
    """The predictor of a name.

    Raises:
        ValueError: There is none of that name.
    """
    if isinstance(predictor, Predictor):
        return predictor
    if not isinstance(predictor, str) or predictor not in PREDICTORS:
        raise ValueError(
            f"`predictor` is {predictor!r}: write one of "
            f"{', '.join(f'`{name}`' for name in PREDICTORS)}, or a `Predictor`."
        )
    return PREDICTORS[predictor]()
