r"""Whether a run forgets or amplifies the errors of its guesses.

A step that was evaluated at two guesses, $\Delta y$ apart, with drifts $\Delta g$
apart, tells what it makes of an error in that direction. Over a window the state moves
by $b_p$ per unit of drift, so that with $\Delta y' = \Delta y + b\,\Delta g$ an error
grows per step by the factor $1 + \gamma$, to first order in $b$:

$$b_p = \frac{\langle \sum_i g_{i,p},\; y_{w,p} - y_{0,p} \rangle}
             {\lVert \sum_i g_{i,p} \rVert^2}, \qquad
  \gamma = \frac{\sum_p b_p \langle \Delta g_p, \Delta y_p \rangle}
                {\sum_p \lVert \Delta y_p \rVert^2},$$

over the tensors $p$ of the state and the steps that were evaluated twice. This costs no
evaluation. It is exact for gradient descent on a quadratic. Momentum delays a drift's
effect, and $b$ counts all of it; an optimizer that scales each entry (Adam) is taken at
its mean scale per tensor. What `update` does without the drift (weight decay, the
linear part of a sampler) is not seen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dreampropeller.component import FULL, Component, Memory
from dreampropeller.rollout import Evaluation, Rollout
from dreampropeller.trajectory import Parents
from dreampropeller.tree import State, moving, widened

_START = 0.1


@dataclass(frozen=True)
class GrowthMemory(Memory):
    """Memory of a `Growth`.

    Attributes:
        held: Guess and drift of the steps that will be evaluated again.
        gains: Displacement per unit of drift, $b$, by tensor.
        rate: Growth of an error per step, γ, measured in this iteration; None if no
            step was evaluated twice.
    """

    held: dict[int, tuple[State, State]] = field(default_factory=dict, metadata=FULL)
    gains: dict[str, float] = field(default_factory=dict)
    rate: float | None = None


class Growth(Component[GrowthMemory]):
    """Measures γ; it changes nothing else."""

    def init(self) -> GrowthMemory:
        """Nothing is known."""
        return GrowthMemory()

    def before(self, memory: GrowthMemory, evaluation: Evaluation) -> GrowthMemory:
        """Measure what the steps evaluated twice make of an error."""
        products: list[tuple[Tensor, float]] = []
        squares: list[Tensor] = []
        for step, guess, drift in zip(
            evaluation.steps, evaluation.guesses[:-1], evaluation.drifts, strict=True
        ):
            if step not in memory.held:
                continue
            old_guess, old_drift = memory.held[step]
            for name, value in moving(guess, drift).items():
                if name not in old_drift or name not in memory.gains:
                    continue
                move = (widened(guess[name]) - widened(old_guess[name])).reshape(-1)
                change = (widened(value) - widened(old_drift[name])).reshape(-1)
                products.append((change @ move, memory.gains[name]))
                squares.append(move @ move)
        return replace(memory, held={}, rate=_ratio(products, squares))

    def after(self, memory: GrowthMemory, rollout: Rollout) -> GrowthMemory:
        """Keep the steps that will be evaluated again, and how far drifts moved."""
        held = {
            rollout.steps[slot]: (
                rollout.guesses[slot],
                moving(rollout.guesses[slot], rollout.drifts[slot]),
            )
            for slot in rollout.repeated
        }
        gains = _gains(rollout) if held else memory.gains
        return replace(memory, held=held, gains=gains)

    def jumped(
        self, memory: GrowthMemory, y: State, parents: Parents | None
    ) -> GrowthMemory:
        """Begin anew, and keep the rate of the iteration that led to the jump."""
        del y, parents
        return GrowthMemory(rate=memory.rate)

    def diagnostics(self, memory: GrowthMemory) -> dict[str, float]:
        """The growth of an error per step."""
        return {} if memory.rate is None else {"growth": memory.rate}


def _gains(rollout: Rollout) -> dict[str, float]:
    """Displacement per unit of drift over the window, by tensor."""
    total: State = {}
    for y, drift in zip(rollout.states, rollout.used, strict=False):
        for name, value in moving(y, drift).items():
            value = widened(value)
            total[name] = total[name] + value if name in total else value
    first, last = rollout.states[0], rollout.states[-1]
    gains: dict[str, float] = {}
    for name, value in total.items():
        value = value.reshape(-1)
        displacement = (widened(last[name]) - widened(first[name])).reshape(-1)
        gain = float(value @ displacement) / (float(value @ value) or math.nan)
        if math.isfinite(gain):
            gains[name] = gain
    return gains


def _ratio(
    products: Sequence[tuple[Tensor, float]], squares: Sequence[Tensor]
) -> float | None:
    if not squares:
        return None
    gains = [gain for _, gain in products]
    dots = torch.stack([dot.double() for dot, _ in products]).tolist()
    size = float(torch.stack([square.double() for square in squares]).sum())
    grown = sum(gain * dot for gain, dot in zip(gains, dots, strict=True))
    rate = grown / size if size > 0 else math.nan
    return rate if math.isfinite(rate) else None


@dataclass(frozen=True)
class Growths:
    """Growth of an error per step: means over the measured iterations by their steps.

    Attributes:
        start: Over the first tenth of the steps; None if nothing was measured there.
        mean: Over the run.
    """

    start: float | None
    mean: float

    @classmethod
    def over(
        cls, rates: Sequence[float | None], strides: Sequence[int]
    ) -> Growths | None:
        """The means of a run's rates (`Stats`); None if none was measured."""
        end = sum(strides)
        known: list[tuple[int, int, float]] = []
        begin = 0
        for rate, stride in zip(rates, strides, strict=False):
            if rate is not None:
                known.append((begin, stride, rate))
            begin += stride
        mean = _mean([(stride, rate) for _, stride, rate in known])
        if mean is None:
            return None
        early = [(stride, rate) for at, stride, rate in known if at < _START * end]
        return cls(_mean(early), mean)

    @property
    def sentence(self) -> str:
        """What the run makes of an error."""
        said = f"The run {_says(self.mean)} errors of guesses: {_per_step(self.mean)}"
        if self.start is not None:
            said += f" ({_per_step(self.start)} at the start)"
        return f"{said}, in linear approximation."


def _mean(weighted: Sequence[tuple[int, float]]) -> float | None:
    weight = sum(stride for stride, _ in weighted)
    return sum(stride * rate for stride, rate in weighted) / weight if weight else None


def _says(rate: float) -> str:
    return "amplifies" if rate > 0 else "forgets"


def _per_step(rate: float) -> str:
    return f"{100 * rate:+.2g} % per step"
