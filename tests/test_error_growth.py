"""What the measured growth says of recurrences whose growth is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dreampropeller import (
    DriftThreshold,
    FixedThreshold,
    OptimizationTrajectory,
    PicardSolver,
    Secant,
    Sequential,
    SlidingWindow,
    State,
    checkpoint,
    solve,
)
from dreampropeller.error_growth import Growths
from tests.helpers import TOYS, noise, tree_equal

RATE = 0.02


def descent(
    curvature: float, momentum: float = 0.0, num_steps: int = 60
) -> OptimizationTrajectory:
    """An error grows by `-RATE * curvature` per step, whatever the noise."""

    def loss(step: int, y: State) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        x = y["x"]
        return (curvature * x.square() / 2 + 0.3 * noise(step, 4) * x).sum(), {}

    return OptimizationTrajectory(
        loss,
        {"x": torch.ones(4, dtype=torch.float64)},
        lambda params: torch.optim.SGD(
            params.values(), lr=RATE * (1 - momentum), momentum=momentum
        ),
        num_steps=num_steps,
    )


def rates(
    trajectory: OptimizationTrajectory, solver: PicardSolver | None = None
) -> list[float]:
    solver = solver or PicardSolver(SlidingWindow(8), DriftThreshold(0.1))
    found = solve(trajectory, solver).stats.growth
    assert found[0] is None  # nothing has been evaluated twice
    return [rate for rate in found if rate is not None]


@pytest.mark.parametrize("curvature", [3.0, -2.0])
@pytest.mark.parametrize("acceleration", [None, Secant()])
def test_a_linear_recurrence_tells_its_own_factor(
    curvature: float, acceleration: Secant | None
) -> None:
    solver = PicardSolver(
        SlidingWindow(8), DriftThreshold(0.1), acceleration=acceleration
    )
    found = rates(descent(curvature), solver)
    assert len(found) > 5
    assert found == pytest.approx([-RATE * curvature] * len(found), rel=1e-9)


@pytest.mark.parametrize("curvature", [3.0, -2.0])
def test_momentum_delays_growth_and_does_not_hide_it(curvature: float) -> None:
    found = rates(descent(curvature, momentum=0.8, num_steps=200))
    later = found[len(found) // 2 :]
    share = sum(later) / len(later) / (-RATE * curvature)
    assert 0.5 < share < 1.5


def test_growth_is_relative_to_each_tensor_s_own_rate() -> None:
    """A tensor ten times as fast forgets ten times as fast."""

    def loss(step: int, y: State) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        parts = [(y[name].square() / 2).sum() for name in ("slow", "fast")]
        return sum(parts, torch.zeros(())) + 0.1 * (
            noise(step, 4) * y["fast"]
        ).sum(), {}

    start = {name: torch.ones(4, dtype=torch.float64) for name in ("slow", "fast")}

    def optimizer(params: Any) -> torch.optim.Optimizer:
        slow = {"params": [params["slow"]], "lr": 1e-12}
        return torch.optim.SGD([slow, {"params": [params["fast"]]}], lr=RATE)

    found = rates(OptimizationTrajectory(loss, start, optimizer, num_steps=40))
    assert found == pytest.approx([-RATE] * len(found), rel=1e-6)


def test_measuring_changes_no_step() -> None:
    for toy in TOYS.values():
        with_it, without = (
            solve(
                toy.make(),
                PicardSolver(SlidingWindow(5), DriftThreshold(0.1), growth=on),
            )
            for on in (True, False)
        )
        assert tree_equal(with_it.value, without.value)
        assert with_it.stats.strides == without.stats.strides
        assert with_it.stats.num_evaluations == without.stats.num_evaluations
        assert set(without.stats.growth) == {None}


@pytest.mark.parametrize(
    "solver",
    [
        Sequential(),
        PicardSolver(SlidingWindow(4), FixedThreshold(0)),
        PicardSolver(SlidingWindow(4), DriftThreshold(0)),
        PicardSolver(SlidingWindow(4), FixedThreshold(1e-3)),
    ],
)
def test_nothing_is_measured_where_nothing_is_kept(solver: PicardSolver) -> None:
    stats = solve(descent(1.0, num_steps=9), solver).stats
    assert stats.growth == [None] * stats.num_iterations


def test_a_resumed_run_measures_the_same(tmp_path: Path) -> None:
    solver = PicardSolver(SlidingWindow(5), DriftThreshold(0.05))
    whole = solve(descent(3.0), solver)
    half = solve(descent(3.0), solver, max_iterations=6, throw=False)
    checkpoint.save(tmp_path, half.state)
    resumed = solve(descent(3.0), solver, state=checkpoint.load(tmp_path))
    assert resumed.stats == whole.stats
    assert any(rate is not None for rate in whole.stats.growth[6:])


def test_means_weigh_iterations_by_their_steps() -> None:
    found = Growths.over([None, 0.2, -0.01, None, -0.02], [1, 4, 45, 40, 10])
    assert found is not None
    assert found.start == pytest.approx(0.2 * 4 / 49 - 0.01 * 45 / 49)
    assert found.mean == pytest.approx((0.2 * 4 - 0.01 * 45 - 0.02 * 10) / 59)
    assert Growths.over([None, 0.3], [50, 50]) == Growths(None, 0.3)
    assert Growths.over([None], [1]) is None


@pytest.mark.parametrize(("rate", "says"), [(0.034, "amplifies"), (-0.034, "forgets")])
def test_the_sentence_says_which(rate: float, says: str) -> None:
    sentence = Growths(None, rate).sentence
    assert f"The run {says} errors" in sentence
    assert f"{100 * rate:+.2g} % per step" in sentence
    assert "at the start" not in sentence
    assert "+5 % per step at the start" in Growths(0.05, rate).sentence
