"""Small runs of the real systems, for the tests; importable by spawned ranks."""

from __future__ import annotations

import functools
from typing import Any

import torch

import dreampropeller as dp
from systems import build
from systems.dreamfusion import DreamFusion
from systems.settings.config import load

TOYBOX = "configs/dreamfusion-toybox.yaml"
SMALL = (
    "system.prompt_processor.prompt=a red mushroom",
    "system.guidance.pretrained_model_name_or_path=toybox",
    "quality.size=32",
    "trainer.max_steps=40",
    "data.batch_size=1",
    "data.width=16",
    "data.height=16",
    "data.eval_width=16",
    "data.eval_height=16",
    "data.n_test_views=3",
    "system.geometry.resolution=8",
    "system.geometry.isosurface_resolution=24",
    "system.renderer.num_samples_per_ray=24",
    "system.renderer.occupancy.resolution=8",
    "system.renderer.occupancy.update_every=4",
    "system.renderer.occupancy.warmup_steps=8",
)
"""Seconds instead of minutes, with everything on that a real run has."""


def small(*overrides: str, config: str = TOYBOX) -> DreamFusion:
    system = build(load(config, [*SMALL, *overrides]))
    assert isinstance(system, DreamFusion)
    return system


def solve_exactly(window: int) -> dict[str, Any]:
    """Threshold 0 on this rank; also two drifts, in the reverse order of steps."""
    trajectory = small().trajectory()
    y, _ = trajectory.init()
    drift = trajectory.make_drift(torch.device("cpu"))
    drifts = {step: drift(step, y) for step in (17, 4)}
    solver = dp.PicardSolver(dp.SlidingWindow(window), dp.FixedThreshold(0), "momentum")
    dispatcher = functools.partial(dp.DistributedDispatcher, timeout=120.0)
    solution = dp.solve(trajectory, solver, dispatcher)
    return {"value": solution.value, "drifts": drifts}
