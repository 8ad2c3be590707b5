"""PIADM-SDE and PIADM-ODE: a reverse diffusion solved block by block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor

from dreampropeller.differential import Corrector, DiffusionTrajectory, Grid, Score
from dreampropeller.dispatch.base import Dispatcher
from dreampropeller.picard import PicardSolver
from dreampropeller.solution import Solution
from dreampropeller.solver import Sequential, solve
from dreampropeller.threshold import FixedThreshold
from dreampropeller.window import BlockWindow, SlidingWindow


def piadm(
    score: Score,
    start: Tensor,
    grid: Grid,
    kind: Literal["sde", "ode"] = "sde",
    *,
    depth: int = 4,
    corrector: Corrector | None = None,
    seed: int = 0,
    form: str = "block",
    window: int = 16,
    tolerance: float = 1e-4,
    dispatcher: Callable[[Any], Dispatcher] | None = None,
) -> Solution[Any]:
    r"""Sample by PIADM-SDE or PIADM-ODE, or by the same integrator in another form.

    Args:
        score: Score $S(s, x)$: `GaussianMixtureScore`, `DenoiserScore` or a function.
        start: Standard normal noise, shape ``(samples, ...)``.
        grid: Blocks and small steps.
        kind: Kind of the dynamics: "sde" or "ode".
        depth: Number $K$ of Picard iterations per block, for the form "block" only.
        corrector: Corrector of the ODE after every block; the published algorithm has
            one.
        seed: Seed of the noise after the start.
        form: Solver: "block" is PIADM, "sliding" a sliding window, "sequential" the
            sequential run.
        window: Size of the sliding window.
        tolerance: Largest mean square error that passes in the sliding window.
        dispatcher: Dispatcher of the scores; default: one after another.

    Returns:
        The solution; `value["x"]` holds the samples, `stats` rounds and calls.
    """
    trajectory = DiffusionTrajectory(score, start, grid, kind, corrector, seed)
    if form == "block":
        solver: Any = PicardSolver(
            BlockWindow(trajectory.boundaries, depth), FixedThreshold(0)
        )
    elif form == "sliding":
        solver = PicardSolver(SlidingWindow(window), FixedThreshold(tolerance))
    elif form == "sequential":
        solver = Sequential()
    else:
        raise ValueError(
            f"`form` is {form!r}: write 'block', 'sliding' or 'sequential'."
        )
    if dispatcher is None:
        return solve(trajectory, solver)
    return solve(trajectory, solver, dispatcher)
