"""Guesses of later states from the last estimate of the clean image."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dreampropeller.adapters.diffusers.trajectory import SamplingTrajectory
from dreampropeller.adapters.diffusers.transitions import Estimates
from dreampropeller.component import FULL, Memory
from dreampropeller.predictor import Predictor
from dreampropeller.rollout import Rollout
from dreampropeller.trajectory import Trajectory
from dreampropeller.tree import Nest, State, copy_nest


@dataclass(frozen=True)
class LastOutput(Memory):
    """Memory of a `CleanImage`.

    Attributes:
        step: The last slot's step; -1: none yet.
        x: The state there, shape ``(images, channels, height, width)``.
        model_output: The model output used there.
    """

    step: int = -1
    x: Tensor | None = field(default=None, metadata=FULL)
    model_output: Tensor | None = field(default=None, metadata=FULL)


@dataclass(frozen=True)
class CleanImage(Predictor[LastOutput]):
    """Step the scheduler on as if the window's last estimate of the image were right.

    The noise of stochastic samplers turns the model output from step to step, and the
    estimate of the clean image hardly: new slots of DDPM are guessed better than with
    the last output held (`docs/sampling.md`). For samplers without noise both are the
    same. States beyond the window are not kept, so they are guessed anew from the
    current estimate in each iteration. The idea is that of ParaSolver, which also takes
    the first steps sequentially (`SequentialStart`).
    """

    def init(self) -> LastOutput:
        """Nothing is known yet."""
        return LastOutput()

    def after(self, memory: LastOutput, rollout: Rollout) -> LastOutput:
        """Keep what the last slot used."""
        del memory
        last = len(rollout.steps) - 1
        return LastOutput(
            rollout.steps[last], rollout.states[last]["x"], rollout.corrected[last]["x"]
        )

    def extend(
        self,
        trajectory: Trajectory[Any],
        step: int,
        y: State,
        carry: Nest,
        memory: LastOutput,
        count: int,
    ) -> tuple[list[State], LastOutput]:
        """Guess the states; repeat the last one while there is no estimate."""
        if not isinstance(trajectory, SamplingTrajectory):
            raise TypeError(
                f"`CleanImage` guesses noisy images, and `{type(trajectory).__name__}` "
                "is no `SamplingTrajectory`: write `Momentum()`."
            )
        if memory.x is None or memory.model_output is None or not count:
            return [y] * count, memory
        carry, estimates = copy_nest(carry), Estimates(trajectory)
        clean = estimates.clean(memory.step, memory.x, memory.model_output)
        guesses: list[State] = []
        with torch.no_grad():
            for ahead in range(step, step + count):
                output = estimates.output_of(ahead, y["x"], clean)
                y, carry = trajectory.update(ahead, y, carry, {"x": output})
                guesses.append(y)
        return guesses, memory
