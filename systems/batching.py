"""Whether a run on one device evaluates its window in one batched call."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import dreampropeller as dp
from dreampropeller.calibration import (
    Choice,
    calibrate_windows,
    device_name,
    with_window,
)
from systems.settings.config import Config
from systems.settings.reader import ConfigError

WINDOWS = (2, 4, 8)
"""Windows that are measured."""


def choose(
    config: Config,
    trajectory: dp.Trajectory[Any],
    solver: dp.PicardSolver,
    device: torch.device,
) -> Choice:
    """The solver and dispatcher of a run, if `dispatch.batch` is "auto" or "always".

    Args:
        config: Config of the run.
        trajectory: Trajectory of the run.
        solver: Solver that the config describes.
        device: Device of the run.
    """
    if config.dispatch.batch == "always":
        if solver.threshold.exact:
            raise ConfigError(
                "`dispatch.batch` is `always`, which is close to single steps, and "
                "threshold 0 asks for bitwise equality: write `dispatch.batch=never`, "
                "or a threshold above 0."
            )
        return Choice(solver, dp.BatchedDispatcher, "Batched, as the config says.")
    plain = dp.Sequential(non_finite=solver.non_finite)
    if solver.threshold.exact:
        reason = "threshold 0 asks for bitwise equality, which no batch keeps"
    elif not hasattr(trajectory.make_drift(device), "batch"):
        reason = "its steps cannot be one batched call"
    else:
        path = record_of(config, device)
        # The measurement of a short run must not cost more than it can gain.
        iterations = 4 if trajectory.num_steps >= 1000 else 2
        measure = functools.partial(
            calibrate_windows, trajectory, solver, WINDOWS, iterations
        )
        found = dp.Calibration.recorded(path, measure)
        return dp.choose_solver(with_window(solver, found.window), found, device)
    return Choice(plain, dp.InlineDispatcher, f"The sequential run: {reason}.")


def record_of(config: Config, device: torch.device) -> Path:
    """The file with the calibration of a config.

    Prompt, image and seed do not matter; the length only where settings follow it.

    Args:
        config: Config of the run.
        device: Device of the run.
    """
    relevant = (
        {**config.system, "prompt_processor": None},
        {
            k: v
            for k, v in config.data.items()
            if k not in ("image", "image_path", "more")
        },
        config.trainer.precision,
        replace(config.solver, name="picard"),
        device_name(device),
        torch.get_num_threads(),
    )
    digest = hashlib.blake2b(repr(relevant).encode(), digest_size=4).hexdigest()
    return Path(config.exp_root_dir) / config.name / f"calibration-{digest}.json"
