"""Claims over random small trajectories, windows, thresholds and bad guesses."""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dreampropeller import (
    AdaptiveWindow,
    DriftThreshold,
    EMAThreshold,
    FittedMomentum,
    FixedThreshold,
    Momentum,
    PicardSolver,
    Sequential,
    SlidingWindow,
    State,
    StepRandom,
    Threshold,
    Trajectory,
    Window,
    solve,
)
from dreampropeller.trajectory import Drift, Parents
from tests.helpers import tree_equal


class Random(Trajectory[dict[str, Any]]):
    """A non-linear recurrence with momentum, jumps, and guesses that are not finite."""

    def __init__(
        self, seed: int, num_steps: int, jumps: frozenset[int], poison: float
    ) -> None:
        self.random = StepRandom(seed)
        self.num_steps = num_steps
        self.jumps = sorted(jump for jump in jumps if jump < num_steps)
        self.poison = poison

    def init(self) -> tuple[State, dict[str, Any]]:
        x = torch.randn(3, generator=self.random.generator(0, "start")).double()
        return {"x": x, "n": torch.tensor(0)}, {"m": torch.zeros(3).double(), "t": [0]}

    def make_drift(self, device: torch.device) -> Drift:
        def drift(step: int, y: State) -> tuple[State, dict[str, float]]:
            x = y["x"]
            # A function of the state alone, which the true trajectory seldom meets.
            if math.sin(1e6 * float(x.sum())) > 1 - self.poison:
                return {"x": x * math.nan}, {}
            noise = torch.randn(1, generator=self.random.generator(step, "noise"))
            return {"x": torch.sin(3 * x) + noise.double(), "n": torch.tensor(1)}, {}

        return drift

    def update(
        self, step: int, y: State, carry: dict[str, Any], drift: State
    ) -> tuple[State, dict[str, Any]]:
        carry["m"].mul_(0.8).add_(drift["x"])
        carry["t"][0] += 1
        moved = y["n"] + drift["n"] if "n" in drift else y["n"]
        return {"x": y["x"] - 0.05 * carry["m"], "n": moved}, carry

    def next_jump(self, step: int) -> int:
        return next((jump for jump in self.jumps if jump > step), self.num_steps)

    def jump(
        self, step: int, y: State, carry: dict[str, Any]
    ) -> tuple[State, dict[str, Any], Parents | None]:
        rows = torch.cat([torch.arange(len(y["x"])), torch.tensor([-1])])
        x = torch.cat([y["x"], y["x"].mean()[None]])
        carry = {"m": torch.cat([carry["m"], carry["m"].new_zeros(1)]), "t": carry["t"]}
        return {**y, "x": x}, carry, {"x": rows}


trajectories = st.builds(
    Random,
    seed=st.integers(0, 10**6),
    num_steps=st.integers(1, 18),
    jumps=st.frozensets(st.integers(0, 17), max_size=3),
    poison=st.sampled_from([0.0, 0.0, 0.05]),
)
windows = st.one_of(
    st.builds(SlidingWindow, st.integers(1, 24)),
    st.builds(AdaptiveWindow, st.integers(1, 4), st.integers(8, 24), st.integers(1, 2)),
)
predictors = st.sampled_from(
    ["repeat_last", "momentum", Momentum(0.0), "auto", FittedMomentum(0.5, 1)]
)
thresholds = st.one_of(
    st.builds(FixedThreshold, st.floats(0, 1), st.booleans()),
    st.builds(DriftThreshold, st.floats(0, 2), st.integers(2, 5), st.integers(1, 9)),
    st.builds(
        EMAThreshold,
        st.floats(0, 1),
        st.floats(0, 1),
        st.sampled_from(["mean", "median"]),
    ),
)


@settings(max_examples=50, deadline=None)
@given(trajectories, windows, predictors)
def test_zero_threshold_is_sequential(
    trajectory: Random, window: Window, predictor: Any
) -> None:
    plain = solve(trajectory, Sequential("skip"))
    solver = PicardSolver(window, FixedThreshold(0), predictor, non_finite="skip")
    solution = solve(trajectory, solver)
    assert tree_equal(solution.value, plain.value)
    assert tree_equal(solution.carry, plain.carry)
    assert solution.stats.num_iterations <= trajectory.num_steps


@settings(max_examples=50, deadline=None)
@given(trajectories, windows, thresholds, predictors, st.integers(0, 20))
def test_any_solve_ends_and_resumes_where_it_was(
    trajectory: Random,
    window: Window,
    threshold: Threshold,
    predictor: Any,
    pause: int,
) -> None:
    solver = PicardSolver(window, threshold, predictor, non_finite="skip")
    whole = solve(trajectory, solver)
    assert sum(whole.stats.strides) == trajectory.num_steps
    assert all(1 <= stride <= 24 for stride in whole.stats.strides)
    assert whole.carry["t"][0] <= trajectory.num_steps
    half = solve(trajectory, solver, max_iterations=pause, throw=False)
    resumed = solve(trajectory, solver, state=half.state)
    assert tree_equal(resumed.value, whole.value)
    assert resumed.stats == whole.stats
