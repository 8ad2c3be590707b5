"""A run of `launch.py` that takes a second: a small network instead of a scene."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

import dreampropeller as dp
import launch
import systems
from dreampropeller import StepRandom
from systems.files import written
from systems.problem import Problem

NAME = "chaos-network"
STEPS = 24
RANDOM = StepRandom(5)
CONFIG = f"""
name: chaos
tag: run
system_type: {NAME}
system: {{}}
solver:
  window: {{size: 4}}
  threshold: {{name: drift}}
  predictor: auto
  acceleration: {{name: secant}}
trainer: {{max_steps: {STEPS}}}
checkpoint: {{every_n_train_steps: 6, lean_every_n_seconds: null}}
"""

FAULTS: dict[str, Callable[..., None]] = {}
"""What is called at a place of a run: "drift" with step and rank, and so on."""


def reach(place: str, *details: Any) -> None:
    """Let a fault happen here."""
    if place in FAULTS:
        FAULTS[place](*details)


def loss(step: int, y: dp.State) -> Tensor:
    inputs = torch.rand(8, 2, generator=RANDOM.generator(step, "data"))
    output = torch.tanh(inputs @ y["w"].T + y["b"]) @ y["v"]
    y["seen"] += 1
    return (output - torch.sin(3 * inputs[:, 0])).square().mean() + 1e-3 * step


class Network(dp.OptimizationTrajectory):
    """A trajectory whose drift and update let faults happen."""

    def __init__(self, num_steps: int) -> None:
        generator = RANDOM.generator(0, "start")
        shapes = {"w": (32, 2), "b": (32,), "v": (32,)}
        super().__init__(
            loss,
            {name: torch.randn(s, generator=generator) for name, s in shapes.items()},
            lambda params: torch.optim.Adam(params.values(), lr=0.02),
            num_steps,
            buffers={"seen": torch.zeros((), dtype=torch.int64)},
            clip_grad_norm=1.0,
        )

    def make_drift(self, device: torch.device) -> Any:
        healthy = super().make_drift(device)

        def drift(step: int, y: dp.State) -> tuple[dp.State, dp.Aux]:
            time.sleep(0.003)
            reach("drift", step)
            found, aux = healthy(step, y)
            reach("drift done", step, found)
            return found, aux

        return drift

    def update(self, step: int, y: dp.State, carry: Any, drift: dp.State) -> Any:
        after = super().update(step, y, carry, drift)
        reach("update", step, after[0])
        return after


class NetworkProblem(Problem):
    """The problem that `launch.py --train` runs."""

    sections = frozenset({"trainer", "checkpoint", "resume", "system", "tag"})
    section_types: ClassVar[Mapping[str, type]] = {}

    @property
    def title(self) -> str:
        return "a small network"

    @property
    def num_steps(self) -> int:
        return self.config.trainer.max_steps

    @property
    def is_reproducible(self) -> bool:
        return False  # the check would meet the faults, before the run

    def trajectory(self) -> Network:
        reach("load")
        return Network(self.num_steps)

    def write(self, folder: Path, y: dp.State) -> dict[str, Any]:
        reach("export", folder)
        with written(folder / "result.txt") as part:
            part.write_text("\n".join(map(str, y["w"].flatten().tolist())))
        return {"written": ["result.txt"]}


def run(words: list[str]) -> int:
    """`launch.py`, for this problem."""
    register()
    return launch.main(words)


def register() -> None:
    """Make the problem known to this process."""
    registered: Any = systems.PROBLEMS
    registered[NAME] = "tests.chaos.problem.NetworkProblem"
