r"""Does a window pay on one device? Measured, recorded, and only then believed.

On one device the window's drifts share the device: a batched window of $P$ steps costs
$s_P$ seconds and accepts $\bar n \le P$ of them, a plain step costs $s_1$. The gain is

$$\frac{s_1}{s_P / \bar n},$$

sequential seconds a step over parallel ones; above 1 the window pays.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dreampropeller.dispatch.base import Dispatcher, InlineDispatcher
from dreampropeller.dispatch.batched import BatchedDispatcher
from dreampropeller.picard import PicardSolver
from dreampropeller.solver import Sequential, Solver, solve
from dreampropeller.trajectory import Trajectory
from dreampropeller.tree import device_of


@dataclass(frozen=True)
class Calibration:
    """What a window was measured to cost on a device, for one kind of trajectory.

    Args:
        device: The device's name.
        threads: CPU threads in use.
        window: Steps tried at once.
        sequential: Seconds a step of the plain loop.
        batched: Seconds a step, accepted ones alone, of the batched window.
    """

    device: str
    threads: int
    window: int
    sequential: float
    batched: float

    @property
    def gain(self) -> float:
        """How many times faster the batched window is; below 1 it is slower."""
        return self.sequential / self.batched

    def save(self, path: str | Path) -> None:
        """Record it as JSON."""
        Path(path).write_text(json.dumps(asdict(self), indent=2) + "\n", "utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read a record.

        Raises:
            ValueError: It is none.
        """
        try:
            return cls(**json.loads(Path(path).read_text("utf-8")))
        except (OSError, TypeError, ValueError) as error:
            raise ValueError(
                f"`{path}` holds no calibration ({error}). Record one with "
                "`calibrate(trajectory, solver).save(path)`."
            ) from error


@dataclass(frozen=True)
class Choice:
    """How to solve on one device, and why."""

    solver: Solver
    dispatcher: type[Dispatcher]
    reason: str


def calibrate(
    trajectory: Trajectory[Any], solver: PicardSolver, iterations: int = 4
) -> Calibration:
    """Measure a solver's batched window against the plain loop.

    Each runs from step 0: one unmeasured iteration, then so many measured ones.

    Args:
        trajectory: What is to be solved, or one like it.
        solver: Its window is what is measured.
        iterations: Iterations measured of each.
    """
    if iterations < 1:
        raise ValueError(f"`iterations` is {iterations}: measure 1 or more.")
    y, _ = trajectory.init()
    device = device_of(y)
    return Calibration(
        device=_name(device),
        threads=torch.get_num_threads(),
        window=_steps(solver),
        sequential=_seconds(trajectory, Sequential(), InlineDispatcher, iterations),
        batched=_seconds(trajectory, solver, BatchedDispatcher, iterations),
    )


def choose_solver(
    solver: PicardSolver,
    calibration: Calibration | None,
    device: torch.device | None = None,
) -> Choice:
    """The plain loop on one device, unless a calibration shows that the window pays.

    Args:
        solver: What is wanted.
        calibration: A record of this device and window; None: there is none.
        device: Where the state lives; default: the CPU.
    """
    name, threads = _name(device or torch.device("cpu")), torch.get_num_threads()
    if calibration is None:
        reason = "no calibration is recorded (`calibrate` measures one)"
    elif (calibration.device, calibration.threads) != (name, threads):
        reason = (
            f"the calibration is of {calibration.device} with {calibration.threads} "
            f"threads, and this is {name} with {threads}"
        )
    elif calibration.window != _steps(solver):
        reason = (
            f"the calibration is of window {calibration.window}, and "
            f"{_steps(solver)} is asked for"
        )
    elif not calibration.gain > 1:
        reason = f"the window was measured at {calibration.gain:.2f}x the plain speed"
    else:
        reason = f"Batched: the window was measured at {calibration.gain:.2f}x."
        return Choice(solver, BatchedDispatcher, reason)
    plain = Sequential(non_finite=solver.non_finite)
    return Choice(plain, InlineDispatcher, f"The plain loop: {reason}.")


def _steps(solver: PicardSolver) -> int:
    """Steps its window tries at once, at the start of a long solve."""
    return solver.window.length(solver.window.init(), sys.maxsize)


def _seconds(
    trajectory: Trajectory[Any],
    solver: Solver,
    dispatcher: type[Dispatcher],
    iterations: int,
) -> float:
    """Seconds a step over the first iterations, the very first left out."""
    marks: list[tuple[float, int]] = []

    def mark(state: Any, _: Any) -> None:
        marks.append((time.perf_counter(), state.step))  # phases have synchronised

    start = time.perf_counter()
    solve(
        trajectory,
        solver,
        dispatcher,
        max_iterations=iterations + 1,
        throw=False,
        on_iteration=mark,
    )
    first = marks[0] if len(marks) > 1 else (start, 0)  # too short to leave one out
    return (marks[-1][0] - first[0]) / (marks[-1][1] - first[1])


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {platform.machine()}"
