"""`auto` takes the predictor whose guesses turn out better."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from dreampropeller import (
    Auto,
    DriftThreshold,
    Iteration,
    OptimizationTrajectory,
    PicardSolver,
    SlidingWindow,
    State,
    solve,
)
from tests.helpers import noise

STEPS = 80


def make(rate: float) -> OptimizationTrajectory:
    """Adam on a noisy quadratic: it glides at a small rate, and jitters at a large."""

    def loss(step: int, y: State) -> torch.Tensor:
        return (y["x"].square() / 2 + 0.5 * noise(step, 16) * y["x"]).sum()

    return OptimizationTrajectory(
        loss,
        {"x": torch.full((16,), 3.0, dtype=torch.float64)},
        lambda params: torch.optim.Adam(params.values(), lr=rate, betas=(0.5, 0.9)),
        num_steps=STEPS,
    )


def run(rate: float, predictor: Any) -> tuple[list[Iteration], int]:
    seen: list[Iteration] = []
    solver = PicardSolver(SlidingWindow(8), DriftThreshold(1.0), predictor)
    solution = solve(
        make(rate), solver, on_iteration=lambda _, iteration: seen.append(iteration)
    )
    return seen, solution.stats.num_iterations


@pytest.mark.parametrize(("rate", "repeats"), [(0.01, False), (0.3, True)])
def test_auto_takes_the_better_predictor(rate: float, repeats: bool) -> None:
    seen, iterations = run(rate, "auto")
    used = [it.diagnostics["repeats"] for it in seen[len(seen) // 3 :]]
    assert sum(used) / len(used) == pytest.approx(float(repeats), abs=0.1)
    # The claim behind it, on the same problem.
    _, momentum = run(rate, "momentum")
    _, repeat = run(rate, "repeat_last")
    assert (repeat < momentum) == repeats
    assert iterations <= max(repeat, momentum)
    assert iterations <= 1.15 * min(repeat, momentum) + 1


def state(value: float) -> State:
    return {"x": torch.tensor([value])}


@pytest.mark.parametrize(
    ("momentum", "score"),
    [
        (1.5, 0.3 * math.log(0.25)),  # off by 0.5, the other by 1
        (1.0, -0.3 * 2),  # exact: the best there is
        (40.0, 0.3 * 2),
        (math.nan, 0.3 * 2),
        (math.inf, 0.3 * 2),
    ],
)
def test_residuals_worked_by_hand(momentum: float, score: float) -> None:
    auto = Auto()
    probe = {"step": 7, "momentum": state(momentum), "repeat_last": state(2.0)}
    memory = {**auto.init(), "probe": probe}
    judged = auto.judge(memory, 5, [state(0.0), state(0.0), state(1.0)])
    assert judged["score"] == pytest.approx(score)
    assert auto.choice(judged) == int(score > 0)
    assert judged["probe"] == {}
    told = auto.diagnostics(judged)
    assert told["residual_momentum"] == pytest.approx(abs(momentum - 1), nan_ok=True)
    assert told["residual_repeat_last"] == 1.0
    for begin, count in ((7, 3), (6, 1), (2, 4)):  # not among the new states
        other = auto.judge(memory, begin, [state(0.0)] * count)
        assert other["score"] == 0.0
        assert "residual_momentum" not in auto.diagnostics(other)
