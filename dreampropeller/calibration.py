r"""Whether a window pays on one device, measured once and recorded.

On one device all drifts of the window share it: a batched window of $P$ steps takes
$s_P$ seconds and accepts $\bar n \le P$ of them, a sequential step takes $s_1$ seconds.
The gain is

$$\frac{s_1}{s_P / \bar n},$$

the sequential seconds per step over the parallel ones; above 1 the window pays.
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
    """The measured cost of a window on a device, for one kind of trajectory.

    Args:
        device: Name of the device.
        threads: Number of CPU threads in use.
        window: Number of steps evaluated at once.
        sequential: Seconds per step of the sequential run.
        batched: Seconds per accepted step of the batched window.
    """

    device: str
    threads: int
    window: int
    sequential: float
    batched: float

    @property
    def gain(self) -> float:
        """Speed-up of the batched window; below 1 it is slower."""
        return self.sequential / self.batched

    def save(self, path: str | Path) -> None:
        """Record the calibration as JSON."""
        Path(path).write_text(json.dumps(asdict(self), indent=2) + "\n", "utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read a recorded calibration.

        Raises:
            ValueError: The file holds no calibration.
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
    """The solver to use on one device, and the reason."""

    solver: Solver
    dispatcher: type[Dispatcher]
    reason: str


def calibrate(
    trajectory: Trajectory[Any], solver: PicardSolver, iterations: int = 4
) -> Calibration:
    """Measure a solver's batched window against the sequential run.

    Each runs from step 0: one unmeasured iteration, then `iterations` measured ones.

    Args:
        trajectory: The trajectory to solve, or a similar one.
        solver: Solver whose window is measured.
        iterations: Number of measured iterations of each run.
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
    """`Sequential` on one device, unless a calibration shows that the window pays.

    Args:
        solver: The solver to use if its window pays.
        calibration: Calibration of this device and window; None if there is none.
        device: Device of the state; default: the CPU.
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
    return Choice(plain, InlineDispatcher, f"The sequential run: {reason}.")


def _steps(solver: PicardSolver) -> int:
    """Steps that the solver's window evaluates at once, initially."""
    return solver.window.length(solver.window.init(), 0, sys.maxsize)


def _seconds(
    trajectory: Trajectory[Any],
    solver: Solver,
    dispatcher: type[Dispatcher],
    iterations: int,
) -> float:
    """Seconds per step over the first iterations, without the very first."""
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
        check=False,
    )
    first = marks[0] if len(marks) > 1 else (start, 0)  # too short to leave one out
    return (marks[-1][0] - first[0]) / (marks[-1][1] - first[1])


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {platform.machine()}"
