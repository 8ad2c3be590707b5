"""Overhead of the solver: an iteration at 12.6 M parameters, by phase.

The drift is replaced by a sleep, so the rest of an iteration is overhead. The optimizer
steps, which a sequential run makes too, are timed separately and subtracted.

    python benchmarks/overhead.py                   # inline
    python benchmarks/overhead.py --num-workers 2   # two processes, gloo
    python benchmarks/overhead.py --memory          # peak memory in parameter sizes
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from dreampropeller import (
    DistributedDispatcher,
    EMAThreshold,
    InlineDispatcher,
    OptimizationTrajectory,
    PicardSolver,
    SlidingWindow,
    State,
    launch_workers,
    solve,
)
from dreampropeller.trajectory import Drift

TABLES = {"hash_table": (12_582_912 // 2, 2), "mlp": (64, 64), "head": (64, 4)}
"""A hash grid of instant-ngp's size and a small network: 12.6 M parameters."""


class Sleeping(OptimizationTrajectory):
    """Gradients of the right size after a sleep; nothing is computed."""

    def __init__(self, num_steps: int, seconds: float) -> None:
        params = {name: torch.zeros(shape) for name, shape in TABLES.items()}
        super().__init__(
            lambda step, y: y["mlp"].sum(),
            params,
            lambda p: torch.optim.Adam(p.values(), lr=1e-2),
            num_steps,
        )
        self.gradients = {name: torch.randn(shape) for name, shape in TABLES.items()}
        self.seconds = seconds

    def make_drift(self, device: torch.device) -> Drift:
        """Sleep, then return a copy of the same gradients."""
        del device

        def drift(step: int, y: State) -> tuple[State, dict[str, float]]:
            del step, y
            time.sleep(self.seconds)
            return {name: g.clone() for name, g in self.gradients.items()}, {}

        return drift


def optimizer_step(steps: int) -> float:
    """Median seconds of a plain Adam step over the same parameters."""
    params = [torch.zeros(shape, requires_grad=True) for shape in TABLES.values()]
    optimizer = torch.optim.Adam(params, lr=1e-2)
    seconds = []
    for _ in range(steps):
        for parameter in params:
            parameter.grad = torch.randn_like(parameter)
        start = time.perf_counter()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def measure(
    window: int, seconds: float, iterations: int, predictor: str, distributed: bool
) -> list[dict[str, Any]]:
    """Seconds by phase of each iteration, after two warm-up iterations."""
    torch.set_num_threads(1)
    trajectory = Sleeping(window * (iterations + 2), seconds)
    rows: list[dict[str, Any]] = []
    last = time.perf_counter()

    def record(state: Any, iteration: Any) -> None:
        nonlocal last
        now = time.perf_counter()
        rows.append(
            {"wall": now - last, "stride": iteration.stride} | iteration.seconds
        )
        last = now

    # Everything passes: the longest rollout an iteration can have.
    solver = PicardSolver(
        SlidingWindow(window), EMAThreshold(1e30, 1.0, "median"), predictor
    )
    dispatcher = DistributedDispatcher if distributed else InlineDispatcher
    solve(trajectory, solver, dispatcher, on_iteration=record, check=False)
    return rows[2:]


def report(rows: list[dict[str, Any]], window: int, step: float) -> dict[str, Any]:
    """Medians by phase, and the overhead beyond drift and optimizer steps."""
    names = sorted({name for row in rows for name in row})
    medians = {n: statistics.median(row.get(n, 0.0) for row in rows) for n in names}
    wall = medians["wall"]
    beyond = wall - medians["drift"] - window * step
    named = sum(v for n, v in medians.items() if n not in ("wall", "stride"))
    return {
        "wall_s": round(wall, 4),
        "phases_s": {
            name: round(value, 4)
            for name, value in medians.items()
            if name not in ("wall", "stride")
        },
        "bookkeeping_s": round(wall - named, 4),
        "optimizer_steps_s": round(window * step, 4),
        "beyond_s": round(beyond, 4),
        "beyond_share": round(beyond / wall, 4),
    }


def peak_memory(window: int) -> dict[str, Any]:
    """Peak resident memory of a solve above that before it, in parameter sizes."""
    torch.set_num_threads(1)
    size = 4 * sum(torch.Size(shape).numel() for shape in TABLES.values())
    trajectory = Sleeping(window * 4, 0.0)
    # Current resident memory, not its peak: importing torch peaks higher.
    before = _resident("VmRSS")
    # At most half of the window passes, so the carry at the stride is kept too.
    solver = PicardSolver(SlidingWindow(window), EMAThreshold(1e-30, 0.9, "median"))
    solve(trajectory, solver, check=False)
    after = _resident("VmHWM")
    return {
        "window": window,
        "parameter_bytes": size,
        "peak_in_parameters": round((after - before) / size, 2),
        "bound": 5 * window + 8,
    }


def _resident(name: str) -> int:
    """Resident memory in bytes (Linux): `VmRSS` now, `VmHWM` at its peak.

    `getrusage` would count the memory of the process that started this one too.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith(name + ":")) * 1024


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--window", type=int, default=7)
    parser.add_argument("--sleep", type=float, default=0.5, help="seconds a drift")
    parser.add_argument("--iterations", type=int, default=7)
    parser.add_argument("--predictor", default="repeat_last")
    parser.add_argument("--num-workers", type=int, default=1)
    parser.add_argument("--memory", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    machine = {
        "cpu": platform.processor() or platform.machine(),
        "torch": torch.__version__,
    }
    if arguments.memory:
        print(json.dumps(machine | peak_memory(arguments.window), indent=2))
        return
    distributed = arguments.num_workers > 1
    settings = (
        arguments.window,
        arguments.sleep,
        arguments.iterations,
        arguments.predictor,
        distributed,
    )
    if distributed:
        rows = launch_workers(measure, *settings, num_workers=arguments.num_workers)[0]
    else:
        rows = measure(*settings)
    step = optimizer_step(7)
    found = report(rows, arguments.window, step)
    print(json.dumps(machine | vars(arguments) | found, indent=2))


if __name__ == "__main__":
    main()
