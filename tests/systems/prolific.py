"""Tiny runs of ProlificDreamer, for tests and for the ranks they start."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import dreampropeller as dp
from dreampropeller import checkpoint
from systems import build
from systems.prolificdreamer import ProlificDreamer
from systems.settings.config import load

ROOT = Path(__file__).parent.parent.parent
CPU = torch.device("cpu")
STEPS = 6
TINY = (
    "system.prompt_processor.prompt=a",
    "data.width=[8,12]",
    "data.height=[8,12]",
    "data.resolution_milestones=[3]",
    "system.geometry.pos_encoding_config.n_levels=2",
    "system.geometry.pos_encoding_config.log2_hashmap_size=6",
    "system.renderer.num_samples_per_ray=12",
    f"trainer.max_steps={STEPS}",
)
COARSE = (*TINY, "system.renderer.occupancy.resolution=4")


def models(folder: Path, adapted: Path | None = None) -> list[str]:
    name, where = "pretrained_model_name_or_path", "system.guidance."
    return [
        f"{where}{name}={folder}",
        f"{where}{name}_lora={adapted or folder}",
    ]


def tiny(
    folder: Path, *settings: str, path: Path | None = None, adapted: Path | None = None
) -> ProlificDreamer:
    path = path or ROOT / "configs" / "prolificdreamer-sd.yaml"
    system = build(load(path, [*COARSE, *models(folder, adapted), *settings]))
    assert isinstance(system, ProlificDreamer)
    return system


def exact(window: int) -> dp.PicardSolver:
    return dp.PicardSolver(dp.SlidingWindow(window), dp.FixedThreshold(0), "momentum")


def whole_window(window: int) -> dp.PicardSolver:
    """Accepts everything: what is wrong in a guess shows in the result."""
    return dp.PicardSolver(dp.SlidingWindow(window), dp.FixedThreshold(1e9))


RUNS = {
    "exact": ("shared", exact(4)),
    "shared": ("shared", whole_window(4)),
    "local": ("local", whole_window(4)),
}


def solve_on(
    name: str,
    folder: Path,
    dispatcher: Callable[[dp.Trajectory[Any]], dp.Dispatcher] = dp.InlineDispatcher,
) -> dp.State:
    lora, solver = RUNS[name]
    system = tiny(folder, f"system.guidance.lora={lora}")
    checks = system.is_reproducible
    return dp.solve(system.trajectory(), solver, dispatcher, check=checks).value


def solve_on_ranks(folder: Path, cache: str) -> dict[str, dp.State]:
    """All runs."""
    os.environ["XDG_CACHE_HOME"] = cache
    dispatcher = functools.partial(dp.DistributedDispatcher, timeout=120.0)
    found = {name: solve_on(name, folder, dispatcher) for name in RUNS}
    return found


def solve_until_killed(folder: Path, cache: str, into: Path) -> None:
    """Save each iteration, and die without a word half way."""
    os.environ["XDG_CACHE_HOME"] = cache
    torch.set_num_threads(1)

    def save(state: dp.SolverState[Any], iteration: dp.Iteration) -> None:
        del iteration
        checkpoint.save(into, state)
        if state.step >= STEPS // 2:
            os.kill(os.getpid(), 9)

    dp.solve(tiny(folder).trajectory(), exact(3), on_iteration=save)
