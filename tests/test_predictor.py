"""`auto` goes as far along momentum's way as turns out right."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from dreampropeller import (
    DriftThreshold,
    FittedMomentum,
    InlineDispatcher,
    Iteration,
    Momentum,
    OptimizationTrajectory,
    PicardSolver,
    SlidingWindow,
    State,
    solve,
)
from dreampropeller.predictor import Probe
from tests.helpers import JUMPS, TOYS, noise, rolled_out

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
def test_auto_goes_as_far_as_momentum_is_right(rate: float, repeats: bool) -> None:
    seen, iterations = run(rate, "auto")
    shares = [it.diagnostics["momentum_share"] for it in seen[len(seen) // 3 :]]
    share = sum(shares) / len(shares)
    # The claim behind it, on the same problem.
    _, momentum = run(rate, "momentum")
    _, repeat = run(rate, "repeat_last")
    assert (repeat < momentum) == repeats
    assert share < 0.4 if repeats else share > 0.9
    assert iterations <= 1.1 * min(repeat, momentum) + 1


def state(value: float) -> State:
    return {"x": torch.tensor([value])}


@pytest.mark.parametrize(
    ("momentum", "best"),
    [
        (1.5, 1.0),  # from 2, half the way to 1: more would have been better
        (1.0, 1.0),
        (0.0, 0.5),  # twice the way
        (-2.0, 0.25),
        (3.0, 0.0),  # the wrong way
        (math.nan, 0.0),
        (math.inf, 0.0),
    ],
)
def test_shares_worked_by_hand(momentum: float, best: float) -> None:
    auto = FittedMomentum()
    probe = Probe(7, state(momentum), state(2.0))
    memory = replace(auto.init(), fraction=0.5, probe=probe)
    seen = [state(0.0), state(0.0), state(1.0)]
    judged = auto.after(memory, rolled_out([5, 6], [], [], states=seen))
    assert judged.fraction == pytest.approx(0.7 * 0.5 + 0.3 * best)
    assert auto.choice(judged) == round(16 * judged.fraction)
    assert judged.probe is None
    told = auto.diagnostics(judged)
    assert told["residual_momentum"] == pytest.approx(abs(momentum - 1), nan_ok=True)
    assert told["residual_repeat_last"] == 1.0
    for begin, count in ((7, 3), (6, 1), (2, 4)):  # not among the new states
        seen = [state(0.0)] * count
        other = auto.after(memory, rolled_out([begin], [], [], states=seen))
        assert other.fraction == 0.5
        assert "residual_momentum" not in auto.diagnostics(other)


@pytest.mark.parametrize("choice", [0, 4, 16])
def test_guesses_lie_between_repeating_and_momentum(choice: int) -> None:
    trajectory = make(0.1)
    y, carry = trajectory.init()
    y = {**y, "count": torch.tensor(3)}
    auto = FittedMomentum()
    ones: State = {"x": torch.ones(16, dtype=torch.float64)}
    memory = auto.after(auto.init(), rolled_out([0], [], [ones]))
    far, _ = Momentum().extend(trajectory, 0, y, carry, memory.momentum, 5)
    memory = replace(memory, used=choice, age=3)
    guesses, after = auto.extend(trajectory, 0, y, carry, memory, 5)
    for guess, end in zip(guesses, far, strict=True):
        expected = y["x"] + choice / 16 * (end["x"] - y["x"])
        assert torch.allclose(guess["x"], expected)
        assert choice < 16 or torch.equal(guess["x"], end["x"])
        assert guess["count"] == 3
    assert after.probe is not None
    assert after.probe.step == 3
    assert torch.equal(after.probe.momentum["x"], far[2]["x"])


class Seen(InlineDispatcher):
    """Keeps the states at which drifts were evaluated."""

    def evaluate(self, steps: Any, ys: Any) -> Any:
        _SEEN[steps[0]] = [y["points"] for y in ys]
        return super().evaluate(steps, ys)


_SEEN: dict[int, list[torch.Tensor]] = {}


@pytest.mark.parametrize("predictor", ["momentum", "auto"])
def test_after_a_jump_guesses_are_predicted_from_the_mean_drift(predictor: str) -> None:
    """The mean follows its rows, so the anchor need not be repeated."""
    errors: dict[str, dict[int, float]] = {}
    later = [jump for jump in JUMPS if jump]
    for name in ("repeat_last", predictor):
        found = errors.setdefault(name, {})
        solver = PicardSolver(SlidingWindow(4), DriftThreshold(1e6), name)
        solve(
            TOYS["growing"].make(),
            solver,
            Seen,
            on_iteration=lambda _, it, found=found: found.update(
                {it.begin: it.errors[0]}
            ),
        )
        for jump in later:
            repeats = torch.equal(_SEEN[jump][1], _SEEN[jump][0])
            assert repeats == (name == "repeat_last")
        assert torch.equal(_SEEN[0][1], _SEEN[0][0]), "no drift to average yet"
    for jump in later:
        assert errors[predictor][jump] < 0.5 * errors["repeat_last"][jump]
