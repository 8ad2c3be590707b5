"""Growing runs with a cheap loss, for tests and for the ranks they start."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dreampropeller as dp
from dreampropeller import checkpoint
from systems.scene.cameras import RandomCameras
from systems.scene.gaussians.growth import GrowthConfig
from systems.scene.gaussians.scene import (
    SplatRendering,
    SplatScene,
    SplatSceneConfig,
)
from systems.scene.gaussians.trajectory import GrowingGaussians
from systems.settings.reader import read

STEPS = 60
CPU = torch.device("cpu")
RANDOM = dp.StepRandom(4)
CAMERAS = RandomCameras(batch_size=2, height=18, width=20, camera_perturb=0.0)
RATES = {"means": 0.02, "opacities": 0.1, "scales": 0.02, "quats": 0.02, "sh0": 0.02}
GROWTH = GrowthConfig(
    interval=8,
    reset_interval=20,
    gradient_threshold=0.0008,
    percent_dense=0.038,
    min_opacity=0.06,
    reset_opacity=0.07,
    max_scale=0.2,
)
"""Six growths and two resets of opacities in 60 steps, one of them together."""
RELOCATION = GrowthConfig(
    strategy="relocate", interval=8, min_opacity=0.1, rate=1.1, noise=20.0
)


def scene(count: int, opacity: float = 0.1) -> SplatScene:
    config = read(
        SplatSceneConfig,
        {"geometry": {"num_splats": count, "radius": 0.5, "opacity": opacity}},
        "system",
    )
    with RANDOM.scope(count, "scene"):
        return SplatScene(config, CPU)


def make(config: GrowthConfig = GROWTH, max_splats: int = 200) -> GrowingGaussians:
    """Splats that are to look like other splats, from random cameras."""
    made, wanted = scene(40), scene(60, opacity=0.8)
    with torch.no_grad():
        means = wanted.geometry.means
        wanted.geometry.sh0.add_(2 * torch.sin(5 * means)[:, None])
        means.mul_(torch.tensor([1.4, 0.5, 1.0]))

    def loss(
        step: int, y: dp.State
    ) -> tuple[Tensor, Mapping[str, Any], SplatRendering]:
        views = CAMERAS.views(step, RANDOM)
        seen = torch.func.functional_call(made, y, (views, step, RANDOM))
        with torch.no_grad():
            goal = wanted(views, step, RANDOM)
        return (seen.rgb - goal.rgb).square().mean(), {}, seen

    def optimizer(params: Mapping[str, Tensor]) -> torch.optim.Optimizer:
        groups = [
            {"params": [p], "lr": RATES[name.removeprefix("geometry.")]}
            for name, p in params.items()
        ]
        return torch.optim.Adam(groups, betas=(0.9, 0.99), eps=1e-15)

    params = dict(made.named_parameters())
    return GrowingGaussians(
        loss, params, optimizer, STEPS, config=config, max_splats=max_splats
    )


def exact(window: int) -> dp.PicardSolver:
    return dp.PicardSolver(
        dp.SlidingWindow(window),
        dp.FixedThreshold(0),
        "momentum",
        acceleration=dp.Secant(),
    )


def solve_on_ranks(window: int) -> dict[str, Any]:
    dispatcher = functools.partial(dp.DistributedDispatcher, timeout=600.0)
    solution = dp.solve(make(), exact(window), dispatcher)
    return {"value": solution.value, "carry": solution.carry}


def solve_until_killed(folder: Path, step: int) -> None:
    """Save each iteration, and die without a word at a step."""
    torch.set_num_threads(1)

    def save(state: dp.SolverState[Any], iteration: dp.Iteration) -> None:
        del iteration
        checkpoint.save(folder, state)
        if state.step >= step:
            os.kill(os.getpid(), 9)

    dp.solve(make(), exact(3), on_iteration=save)
