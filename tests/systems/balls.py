"""A system with a state of its own kind: balls whose number grows, no optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import trimesh
from torch import Tensor, nn

import dreampropeller as dp
from systems.base import System
from systems.scene.cameras import RandomCameras, Views
from systems.settings.config import Config
from systems.settings.reader import read


@dataclass(frozen=True)
class BallsConfig:
    """`system`.

    Args:
        prompt: Its title.
        growth: The step at which each ball gets a twin.
        stop: A file to make at `growth`, as a person would.
    """

    prompt: str = "a red sphere"
    growth: int = 4
    stop: str = ""


class Growing(dp.Trajectory[Tensor]):
    """Radii drift to a half, with noise of the step; the carry is their momentum."""

    def __init__(self, config: BallsConfig, num_steps: int, seed: int) -> None:
        self.config, self.num_steps = config, num_steps
        self.random = dp.StepRandom(seed)

    def init(self) -> tuple[dp.State, Tensor]:
        return {"balls": torch.tensor([[0.0, 0.0, 0.0, 0.2]])}, torch.zeros(1)

    def make_drift(self, device: torch.device) -> dp.Drift:
        def drift(step: int, y: dp.State) -> tuple[dp.State, dp.Aux]:
            if step == self.config.growth and self.config.stop:
                Path(self.config.stop).touch()
            noise = torch.randn(1, generator=self.random.generator(step, "noise"))
            pull = 0.5 - y["balls"][:, 3] + 0.01 * noise
            return {"pull": pull}, {"pull": float(pull.mean())}

        del device
        return drift

    def update(
        self, step: int, y: dp.State, carry: Tensor, drift: dp.State
    ) -> tuple[dp.State, Tensor]:
        del step
        speed = 0.5 * carry + 0.3 * drift["pull"]
        balls = y["balls"].clone()
        balls[:, 3] += speed
        return {"balls": balls}, speed

    def next_jump(self, step: int) -> int:
        return self.config.growth if step < self.config.growth else self.num_steps

    def jump(
        self, step: int, y: dp.State, carry: Tensor
    ) -> tuple[dp.State, Tensor, dp.Parents | None]:
        del step
        rows = torch.arange(len(carry)).repeat(2)
        return {"balls": y["balls"][rows]}, carry[rows], {"balls": rows}


class Balls(System):
    """Red balls at the origin."""

    section_types: ClassVar[Mapping[str, type]] = {
        "data": RandomCameras,
        "system": BallsConfig,
    }

    def __init__(self, config: Config, device: torch.device | None = None) -> None:
        super().__init__(config, device)
        self.settings = read(BallsConfig, config.system, "system")
        self._scene = nn.Module()
        self._scene.register_buffer("balls", torch.zeros(1, 4))

    @property
    def title(self) -> str:
        return self.settings.prompt

    @property
    def scene(self) -> nn.Module:
        return self._scene

    def about(self) -> dict[str, Any]:
        return {"prompt": self.settings.prompt, "seed": self.config.seed}

    def rows_vary(self, name: str) -> bool:
        return name == "balls"

    def trajectory(self) -> Growing:
        return Growing(self.settings, self.num_steps, self.config.seed)

    def render(
        self, y: dp.State, views: Views, grey: float | None = None
    ) -> tuple[Tensor, Tensor]:
        origins, directions = views.cameras.rays(views.height, views.width)
        along = (origins * directions).sum(-1)
        distance = (origins.square().sum(-1) - along.square()).clamp(min=0).sqrt()
        opacity = (distance < y["balls"][:, 3].mean()).float()[:, None]
        red = torch.tensor([0.9, 0.1, 0.1])[None, :, None, None]
        behind = 1.0 if grey is None else grey
        return opacity * red + (1 - opacity) * behind, opacity

    def mesh(self, y: dp.State) -> trimesh.Trimesh:
        mesh: Any = trimesh.creation.icosphere(2, float(y["balls"][:, 3].mean()))
        mesh.visual.vertex_colors = [230, 25, 25, 255]
        return mesh
