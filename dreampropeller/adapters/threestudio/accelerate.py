r"""Any unmodified threestudio system, accelerated.

    from dreampropeller.adapters.threestudio import accelerate

    dm = threestudio.find(cfg.data_type)(cfg.data)
    system = threestudio.find(cfg.system_type)(cfg.system)
    solution = accelerate(system, dm, num_steps=10000, window=8)

Run it under `torchrun --nproc-per-node=8`: the window is spread over the ranks. How to
prepare such a run is in `docs/threestudio.md`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch

from dreampropeller.acceleration.base import Acceleration
from dreampropeller.adapters.lightning.host import Keyed
from dreampropeller.adapters.threestudio.trajectory import (
    ThreestudioTrajectory,
)
from dreampropeller.dispatch.base import Dispatcher, InlineDispatcher
from dreampropeller.dispatch.distributed import DistributedDispatcher
from dreampropeller.drift_threshold import DriftThreshold
from dreampropeller.picard import PicardSolver
from dreampropeller.predictor import Predictor
from dreampropeller.solution import Solution, SolverState
from dreampropeller.solver import Listener, solve
from dreampropeller.threshold import Threshold
from dreampropeller.trajectory import Trajectory
from dreampropeller.window import SlidingWindow


def accelerate(
    system: Any,
    datamodule: Any,
    *,
    num_steps: int,
    window: int = 8,
    threshold: Threshold[Any] | None = None,
    predictor: str | Predictor[Any] = "momentum",
    acceleration: Acceleration[Any] | None = None,
    config: Any = None,
    state: SolverState[Any] | None = None,
    verify: bool = True,
    on_iteration: Listener | Sequence[Listener] | None = None,
    random: Keyed | None = None,
) -> Solution[Any]:
    """Train a system in place.

    Under `torchrun`, or within a process group, the window is spread over the ranks.
    In a single process every drift is evaluated here, which is right but no faster:
    the gain comes from further devices.

    Args:
        system: See `ThreestudioTrajectory`.
        datamodule: See `ThreestudioTrajectory`.
        num_steps: The number of steps.
        window: Number of steps evaluated at once; one per device is a good start.
        threshold: Error up to which a step counts as converged; default:
            `DriftThreshold()`.
        predictor: Initial guess of new steps.
        acceleration: See `PicardSolver`.
        config: The experiment's config, for its seed and precision.
        state: State to resume from.
        verify: Check first that drifts do not depend on the order of evaluation.
        on_iteration: See `solve`.
        random: Keying of the random streams, instead of the seed.
    """
    trajectory = ThreestudioTrajectory(
        system, datamodule, config, num_steps=num_steps, random=random
    )
    solver = PicardSolver(
        SlidingWindow(window),
        threshold or DriftThreshold(),
        predictor,
        acceleration=acceleration,
    )
    solution = solve(
        trajectory,
        solver,
        dispatcher(),
        state=state,
        on_iteration=on_iteration,
        check=verify,
    )
    trajectory.settle(solution.state.step, solution.value)
    return solution


def dispatcher() -> Callable[[Trajectory[Any]], Dispatcher]:
    """The ranks of a process group or of `torchrun`, or this process alone."""
    grouped = torch.distributed.is_available() and torch.distributed.is_initialized()
    if grouped or {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        return DistributedDispatcher
    return InlineDispatcher
