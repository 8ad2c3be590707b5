"""Steps that take a known time, for the planner; importable by ranks."""

from __future__ import annotations

import functools
import json
import time
import warnings
from pathlib import Path
from typing import Any

import torch

import dreampropeller as dp
from dreampropeller import measurement
from dreampropeller.cost_model import Costs, predicted, received
from dreampropeller.solution import Iteration
from dreampropeller.trajectory import Drift, Trajectory
from dreampropeller.tree import State

CPU = torch.device("cpu")
VIEWS = 4
FIXED, EACH = 0.02, 0.04
"""Seconds of a drift whatever its views, and of each view."""
BYTES = 4096
"""Of a drift; a multiple of what messages are padded to."""


class Sleeping(Trajectory[None]):
    """A contraction whose drift sleeps for each of its views.

    Args:
        scale: Factor of the known times; the longer, the less another load matters.
    """

    num_steps = 64

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def init(self) -> tuple[State, None]:
        return {"x": torch.ones(BYTES // 4)}, None

    def make_drift(self, device: torch.device) -> Drift:
        return self.make_shard(device, 0, 1)

    def make_shard(self, device: torch.device, index: int, count: int) -> Drift:
        views = len(range(VIEWS)[dp.Shard(index, count).of(VIEWS)])

        def drift(step: int, y: State) -> Any:
            time.sleep(self.scale * (FIXED + EACH * views))
            return {"x": y["x"] * (-0.01 * views / VIEWS)}, {}

        return drift

    def update(
        self, step: int, y: State, carry: None, drift: State
    ) -> tuple[State, None]:
        return {"x": y["x"] + drift["x"]}, carry


def solver(window: int) -> dp.PicardSolver:
    return dp.PicardSolver(dp.SlidingWindow(window), dp.FixedThreshold(1.0))


def measured_costs(window: int, scale: float) -> Costs:
    """As `--plan` measures them, with communication between all ranks of the group."""
    problem = Sleeping(scale)
    y, _ = problem.init()
    drift = problem.make_drift(CPU)
    whole = measurement.seconds_of(drift, 0, y)[1]
    seen = measurement.observe(problem, solver(window), 2)
    latency, bandwidth = measurement.communication(BYTES)
    return Costs(
        measurement.drift_by_views(problem, y, VIEWS, whole),
        seen.rollout,
        seen.strides,
        measurement.segments(problem),
        BYTES,
        latency,
        bandwidth,
    )


def bytes_received(views: int, window: int, iterations: int) -> tuple[int, int]:
    """Bytes per iteration as counted, and as the cost model has them."""
    made: list[Any] = []

    def spread(problem: Any) -> Any:
        made.append(dp.DistributedDispatcher(problem, views=views, timeout=60.0))
        return made[0]

    dp.solve(
        Sleeping(),
        solver(window),
        spread,
        max_iterations=iterations,
        throw=False,
        check=False,
    )
    steps = torch.distributed.get_world_size() // views
    return made[0].num_bytes // iterations, received(steps, views, window) * BYTES


def predict_and_run(
    meshes: list[tuple[int, int, int]], iterations: int, scale: float = 1.0
) -> list[tuple[float, float]]:
    """Predicted and measured seconds per iteration, for (steps, views, window).

    Of the measured ones the least: the others also waited for ranks that a loaded
    machine did not let run.
    """
    costs = measured_costs(max(window for *_, window in meshes), scale)
    found = []
    for steps, views, window in meshes:
        plan = predicted(costs, steps, views, window)
        seen: list[Iteration] = []

        def note(_: Any, iteration: Iteration, seen: Any = seen) -> None:
            seen.append(iteration)

        dp.solve(
            Sleeping(scale),
            solver(window),
            functools.partial(dp.DistributedDispatcher, views=views, timeout=60.0),
            max_iterations=iterations + 1,
            throw=False,
            check=False,
            on_iteration=note,
        )
        seconds = min(sum(one.seconds.values()) for one in seen[1:])
        found.append((plan.seconds / plan.iterations, seconds))
    return found


def in_a_group(
    meshes: list[tuple[int, int, int]], iterations: int, scale: float, folder: str
) -> None:
    """`predict_and_run` in a group of its own; rank 0 writes what it found."""
    warnings.simplefilter("ignore")
    torch.distributed.init_process_group("gloo")
    found = predict_and_run(meshes, iterations, scale)
    if torch.distributed.get_rank() == 0:
        Path(folder, "found.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()
