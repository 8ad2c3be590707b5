"""How a guess beyond the rolled-out window is made."""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dreampropeller.trajectory import Parents, Trajectory
from dreampropeller.tree import Nest, State, copy_nest, mean_square


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
    r"""Whichever of `Momentum` and `RepeatLast` guessed better of late (ours, Eq. 13).

    Both guess the last new slot; when its state is rolled out, the residuals
    $r = \mathrm{mean\_square}(y, \hat y)$ are compared, and the smoothed
    $\rho \leftarrow 0.7 \rho + 0.3 \log(r_\mathrm{momentum} / r_\mathrm{repeat})$,
    each term within ±2, decides: momentum while $\rho \le 0$. It starts with momentum.
    While repeating, momentum is tried every `probe_every` iterations alone, for its
    guesses cost as many updates as there are new slots. Two states are kept.

    Args:
        decay: See `Momentum`.
        probe_every: Iterations between two trials of the predictor that is not used, at
            least 1.
    """

    decay: float = 0.9
    probe_every: int = 4

    def __post_init__(self) -> None:
        self._momentum()
        if self.probe_every < 1:
            raise ValueError(
                f"`predictor.probe_every` is {self.probe_every}: write 1 or more."
            )

    def _momentum(self) -> Momentum:
        return Momentum(self.decay)

    def init(self) -> Nest:
        """No residual yet."""
        return {
            "momentum": self._momentum().init(),
            "score": 0.0,
            "repeat": 0,
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
        residuals = [
            float(mean_square(states[slot], memory["probe"][name]))
            for name in ("momentum", "repeat_last")
        ]
        after["residuals"] = {
            "residual_momentum": math.sqrt(residuals[0]),
            "residual_repeat_last": math.sqrt(residuals[1]),
        }
        if residuals[0] == residuals[1]:
            return after
        # A guess that is not finite is the worst; the score stays bounded all the same.
        ratio = math.inf
        if math.isfinite(residuals[0]) and residuals[1] > 0:
            ratio = math.log(max(residuals[0] / residuals[1], 1e-9))
        after["score"] = 0.7 * memory["score"] + 0.3 * min(max(ratio, -2.0), 2.0)
        return after

    def choice(self, memory: Nest) -> int:
        """1 to repeat the last state."""
        return int(memory["score"] > 0)

    def settle(self, memory: Nest, choice: int) -> Nest:
        """Do what rank 0 decided."""
        return {**memory, "repeat": choice}

    def diagnostics(self, memory: Nest) -> dict[str, float]:
        """The smoothed log-ratio of residuals: below 0 momentum is better.

        In iterations that measured them, the roots of both residuals too.
        """
        return {
            "momentum_vs_repeat": memory["score"],
            "repeats": float(memory["repeat"]),
            **memory["residuals"],
        }

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
        """Guess by the better one, and remember what both said of the last slot."""
        if count == 0:
            return [], memory
        if memory["repeat"] and memory["age"] + 1 < self.probe_every:
            return [y] * count, {**memory, "age": memory["age"] + 1}
        guesses, _ = self._momentum().extend(
            trajectory, step, y, carry, memory["momentum"], count
        )
        probe = {"step": step + count, "momentum": guesses[-1], "repeat_last": y}
        after = {**memory, "age": 0, "probe": probe}
        return ([y] * count if memory["repeat"] else guesses), after


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
    if predictor not in PREDICTORS:
        raise ValueError(
            f"`predictor` is {predictor!r}: write one of "
            f"{', '.join(f'`{name}`' for name in PREDICTORS)}, or a `Predictor`."
        )
    return PREDICTORS[predictor]()
