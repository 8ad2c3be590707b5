r"""Whether a window pays on one device, measured once and recorded.

On one device all drifts of the window share it: a batched window of $P$ steps takes
$s_P$ seconds and accepts $\bar n \le P$ of them, a sequential step takes $s_1$ seconds.
The gain is

$$\frac{s_1}{s_P / \bar n},$$

the sequential seconds per step over the parallel ones; above 1 the window pays. If each
step adds $b$ seconds to a batch, $s_P = s_1 + (P - 1)\, b$, no window gains more than
$s_1 / b$.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dreampropeller.dispatch.base import Dispatcher, InlineDispatcher
from dreampropeller.dispatch.batched import BatchedDispatcher
from dreampropeller.picard import PicardSolver
from dreampropeller.solver import Sequential, Solver, solve
from dreampropeller.trajectory import Trajectory
from dreampropeller.tree import device_of
from dreampropeller.window import SlidingWindow

MARGIN = 1.05
"""Gain from which a window is used: timings scatter, and strides change in a run."""
PROMISE = 1.2
"""Bound on the gain, $s_1 / b$, from which larger windows are measured: steps are
evaluated about 1.15 times each before they are accepted."""


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
    def recorded(
        cls, path: str | Path, measure: Callable[[], Calibration]
    ) -> Calibration:
        """The recorded calibration; measured and recorded if there is none.

        Args:
            path: The file.
            measure: Measures the calibration, such as a `partial` of `calibrate`.

        Raises:
            ValueError: The file holds no calibration.
        """
        path = Path(path)
        if not path.exists():
            print(f"Measuring whether a batched window pays (kept in {path}).")
            path.parent.mkdir(parents=True, exist_ok=True)
            measure().save(path)
        return cls.load(path)

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
    return calibrate_windows(trajectory, solver, (_steps(solver),), iterations)


def calibrate_windows(
    trajectory: Trajectory[Any],
    solver: PicardSolver,
    sizes: Sequence[int] = (2, 4, 8),
    iterations: int = 4,
) -> Calibration:
    """Measure batched windows of several sizes, and return the best.

    Larger windows are left out where a smaller one shows that no window can gain more
    than `PROMISE`, or where there is no memory for one.

    Args:
        trajectory: The trajectory to solve, or a similar one.
        solver: The solver. Where its own window has another size, a `SlidingWindow`
            takes its place.
        sizes: Sizes of the windows, rising.
        iterations: Number of measured iterations of each run.
    """
    if iterations < 1:
        raise ValueError(f"`iterations` is {iterations}: measure 1 or more.")
    y, _ = trajectory.init()
    device, threads = device_name(device_of(y)), torch.get_num_threads()
    plain, _ = _seconds(trajectory, Sequential(), InlineDispatcher, iterations)
    found: list[Calibration] = []
    for size in sizes:
        one = with_window(solver, size)
        try:
            times = _seconds(trajectory, one, BatchedDispatcher, iterations)
        except torch.OutOfMemoryError:
            if not found:
                raise
            break
        found.append(Calibration(device, threads, size, plain, times[0]))
        added = (times[1] - plain) / max(1, size - 1)  # by each further step
        if plain < PROMISE * added:
            break
    return max(found, key=lambda one: one.gain)


def with_window(solver: PicardSolver, size: int) -> PicardSolver:
    """The solver with a window of a size; its own, if that is its initial size."""
    if size == _steps(solver):
        return solver
    return replace(solver, window=SlidingWindow(size))


def choose_solver(
    solver: PicardSolver,
    calibration: Calibration | None,
    device: torch.device | None = None,
) -> Choice:
    """`Sequential` on one device, unless a calibration shows that the window pays.

    A window pays if it was measured to gain by `MARGIN`.

    Args:
        solver: The solver to use if its window pays.
        calibration: Calibration of this device and window; None if there is none.
        device: Device of the state; default: the CPU.
    """
    name, threads = device_name(device or torch.device("cpu")), torch.get_num_threads()
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
    elif not calibration.gain > MARGIN:
        reason = (
            f"a window of {calibration.window} was measured at "
            f"{calibration.gain:.2f}x the plain speed"
        )
    else:
        reason = (
            f"Batched: a window of {calibration.window} was measured at "
            f"{calibration.gain:.2f}x."
        )
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
) -> tuple[float, float]:
    """Seconds per step and per iteration, without the very first iteration."""
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
    spent = marks[-1][0] - first[0]
    count = max(1, len(marks) - 1)
    return spent / (marks[-1][1] - first[1]), spent / count


def device_name(device: torch.device) -> str:
    """The name that a calibration gives a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {platform.machine()}"
