"""PIADM-SDE and PIADM-ODE: a reverse diffusion solved block by block."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor

from dreampropeller.differential import Corrector, DiffusionTrajectory, Grid, Score
from dreampropeller.dispatch.base import Dispatcher, InlineDispatcher
from dreampropeller.picard import PicardSolver
from dreampropeller.solution import Solution
from dreampropeller.solver import Sequential, solve
from dreampropeller.threshold import FixedThreshold
from dreampropeller.window import BlockWindow, SlidingWindow

UNCHECKED = (
    "Every block was iterated {depth} times, and nothing measured the error that is "
    "left: compare with `form='sequential'` of the same start and seed, or write a "
    "greater `depth` ({longest} is exact)."
)
"""What a depth below the longest block does not say of the samples."""


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
        The solution; `value["x"]` holds the samples, `stats` rounds and calls. Blocks
        have no error check: `note` says so where the depth is less than the longest
        block, and is empty where the samples are those of the sequential form.

    Raises:
        TypeError: An argument is of another kind.
        ValueError: A number is out of range, or a shape does not fit.
        NotConverged: The score is not finite at an accepted state.
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
    solution = solve(trajectory, solver, dispatcher or InlineDispatcher)
    ends = [0, *trajectory.boundaries]
    longest = max(end - begin for begin, end in itertools.pairwise(ends))
    if form != "block" or depth >= longest:
        return solution
    return replace(solution, note=UNCHECKED.format(depth=depth, longest=longest))
