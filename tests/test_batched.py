"""One call for a window, and when it is worth it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import dreampropeller as dp
from dreampropeller.tree import Aux, State
from tests.helpers import STEPS, TOYS, OrnsteinUhlenbeck, tree_equal

SOLVER = dp.PicardSolver(dp.SlidingWindow(4), dp.FixedThreshold(0))


class Elementwise(OrnsteinUhlenbeck):
    """A drift whose batch is the same arithmetic, entry by entry; counts its calls."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []

    def make_drift(self, device: torch.device) -> Any:
        plain = super().make_drift(device)
        calls = self.calls

        class Batched:
            def __call__(self, step: int, y: State) -> tuple[State, Aux]:
                return plain(step, y)

            def batch(
                self, steps: Sequence[int], ys: Sequence[State]
            ) -> list[tuple[State, Aux]]:
                calls.append(list(steps))
                x = -(torch.stack([y["x"] for y in ys]) ** 3)
                sines = torch.tensor([torch.tensor(s).double().sin() for s in steps])
                rows = x + sines.double()[:, None]
                times = [plain(step, y)[1] for step, y in zip(steps, ys, strict=True)]
                return [({"x": r}, a) for r, a in zip(rows, times, strict=True)]

        return Batched()


def test_a_window_is_one_call() -> None:
    trajectory = Elementwise()
    solution = dp.solve(trajectory, SOLVER, dp.BatchedDispatcher)
    states = TOYS["sde"].loop()
    torch.testing.assert_close(solution.value["x"], states[-1]["x"])
    assert len(trajectory.calls) == solution.stats.num_iterations
    assert sum(map(len, trajectory.calls)) == solution.stats.num_evaluations
    assert trajectory.calls[0] == [0, 1, 2, 3]


def test_a_drift_without_a_batch_is_refused_with_a_reason() -> None:
    for name in ("sde", "quadratic-adam"):
        with pytest.raises(ValueError, match=r"its drift has no `batch\(steps, ys\)`"):
            dp.solve(TOYS[name].make(), SOLVER, dp.BatchedDispatcher)


def test_a_batch_of_the_wrong_length_is_refused() -> None:
    class Short(Elementwise):
        def make_drift(self, device: torch.device) -> Any:
            drift = super().make_drift(device)
            drift.batch = lambda steps, ys: []
            return drift

    with pytest.raises(ValueError, match="returned 0 drifts for 4 steps"):
        dp.solve(Short(), SOLVER, dp.BatchedDispatcher)


def test_the_plain_loop_unless_a_record_shows_a_gain(tmp_path: Path) -> None:
    found = dp.calibrate(Elementwise(), SOLVER, iterations=2)
    assert found.window == 4
    fast = replace(found, batched=found.sequential / 2)
    fast.save(tmp_path / "fast.json")
    assert dp.Calibration.load(tmp_path / "fast.json") == fast
    chosen = dp.choose_solver(SOLVER, fast)
    assert chosen.solver is SOLVER
    assert chosen.dispatcher is dp.BatchedDispatcher
    assert "2.00x" in chosen.reason
    for record, reason in (
        (None, "no calibration"),
        (replace(fast, batched=fast.sequential), "1.00x the plain"),
        (replace(fast, window=8), "of window 8, and 4"),
        (replace(fast, device="abacus"), "is of abacus"),
    ):
        chosen = dp.choose_solver(SOLVER, record)
        assert chosen.solver == dp.Sequential()
        assert reason in chosen.reason
        trajectory = Elementwise()
        plain = dp.solve(trajectory, chosen.solver, chosen.dispatcher)
        assert tree_equal(plain.value, TOYS["sde"].loop()[STEPS])
        assert not trajectory.calls


def test_a_file_that_is_no_record_says_how_to_make_one(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{}")
    for name in ("x.json", "y.json"):
        with pytest.raises(ValueError, match=r"holds no calibration.*Record one with"):
            dp.Calibration.load(tmp_path / name)
    with pytest.raises(ValueError, match="`iterations` is 0"):
        dp.calibrate(Elementwise(), SOLVER, iterations=0)
