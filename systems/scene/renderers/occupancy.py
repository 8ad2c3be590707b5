r"""Occupancy grid in pure torch: which cells the renderer needs to query.

Each cell keeps a running maximum of the density sampled in it (T. Müller et al., 2022,
arXiv 2201.05989, appendix C.2),

$$o \leftarrow \max(\gamma\,o,\ \sigma(x)\,\delta)$$

at a random point x of the cell, with the step size δ of the renderer. It is evolving
state: a buffer that changes while a drift is evaluated, and so part of the trajectory's
state (Eq. 19 of `docs/method.md`). Cells that were never sampled hold −1 and count as
occupied.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from dreampropeller import StepRandom
from systems.settings.checks import at_least, between


@dataclass(frozen=True)
class OccupancyConfig:
    """An occupancy grid (`system.renderer.occupancy`).

    Args:
        resolution: Cells per side.
        decay: Decay γ per refresh.
        threshold: Value above which a cell counts as occupied; the mean of the grid if
            that is smaller.
        update_every: Number of steps between two refreshes.
        warmup_steps: Step before which all cells are refreshed; afterwards the occupied
            ones and a quarter of the others.
    """

    resolution: int = 32
    decay: float = 0.95
    threshold: float = 0.01
    update_every: int = 16
    warmup_steps: int = 256

    def __post_init__(self) -> None:
        at_least("resolution", self.resolution, 2)
        between("decay", self.decay, 0, 1)
        at_least("threshold", self.threshold, 0)
        at_least("update_every", self.update_every, 1)
        at_least("warmup_steps", self.warmup_steps, 0)


class Occupancy(nn.Module):
    """The grid over the cube of side 2 · radius.

    Args:
        config: Settings of the grid.
        radius: Half the side of the cube.
    """

    value: Tensor

    def __init__(self, config: OccupancyConfig, radius: float) -> None:
        super().__init__()
        self.config = config
        self.radius = radius
        self.register_buffer("value", -torch.ones(config.resolution**3))

    def refresh(
        self,
        step: int,
        density: Callable[[Tensor], Tensor],
        step_size: float,
        random: StepRandom,
    ) -> None:
        """Sample the field again, if a refresh is due at this step.

        Args:
            step: The step on the trajectory.
            density: Density at points ``(points, 3)``.
            step_size: δ, the length between two samples of a ray.
            random: Source of the points.
        """
        if step % self.config.update_every:
            return
        generator = random.generator(step, "occupancy")
        side, cells = self.config.resolution, len(self.value)
        corner = torch.cartesian_prod(*[torch.arange(side)] * 3)
        where = (corner + torch.rand(cells, 3, generator=generator)) / side * 2 - 1
        points = (where * self.radius).to(self.value)
        if step < self.config.warmup_steps:
            due = torch.ones_like(self.value, dtype=torch.bool)
        else:
            lot = torch.rand(cells, generator=generator).to(self.value.device)
            due = self.occupied() | (lot < 0.25)
        with torch.no_grad():
            met = density(points[due]) * step_size
            fresh = torch.maximum(self.value[due] * self.config.decay, met)
            self.value[due] = fresh

    def occupied(self) -> Bool[Tensor, " cells"]:
        """The cells that the renderer queries."""
        known = self.value >= 0
        mean = (self.value * known).sum() / known.sum().clamp(min=1)
        return ~known | (self.value > mean.clamp(max=self.config.threshold))

    def contains(self, points: Float[Tensor, "*batch 3"]) -> Bool[Tensor, "*batch"]:
        """Whether points of the cube lie in occupied cells."""
        side = self.config.resolution
        scaled = (points / self.radius + 1) * (side / 2)
        x, y, z = scaled.long().clamp(0, side - 1).unbind(-1)
        return self.occupied()[(x * side + y) * side + z]
