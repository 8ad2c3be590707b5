"""The carries that a rollout passes through, where the solve may continue."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from dreampropeller.rollout import Rollout
from dreampropeller.trajectory import Trajectory
from dreampropeller.tree import Nest, copy_nest


@dataclass
class Carries:
    """The carry where the solve may continue: at the start, a likely stride, the end.

    If the acceleration needs it, also the carry before each update.
    """

    start: Nest
    likely: tuple[int, Nest] | None = None
    last: Nest = None
    all: list[Nest] = field(default_factory=list)

    def keep(self, stride: int, carry: Nest) -> None:
        """Keep the carry at the first failure, which the rollout past it consumes."""
        if self.likely is None:
            self.likely = stride, copy_nest(carry)

    def at(self, trajectory: Trajectory[Any], rollout: Rollout) -> Nest:
        """The carry at the stride."""
        if rollout.stride == 0:
            return self.start
        if rollout.stride == len(rollout.steps):
            return self.last
        if self.likely is not None and self.likely[0] == rollout.stride:
            return self.likely[1]
        # A stride other than the first failure's (decided by rank 0, or by another kind
        # of window): repeat the rollout, which is deterministic, as far as the stride.
        carry = copy_nest(self.start)
        with torch.no_grad():
            for slot in range(rollout.stride):
                if rollout.updates(slot):
                    step, y = rollout.steps[slot], rollout.states[slot]
                    _, carry = trajectory.update(step, y, carry, rollout.used[slot])
        return carry
