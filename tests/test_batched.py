"""One call for a window, and when it is worth it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import dreampropeller as dp
from dreampropeller import calibration
from dreampropeller.tree import Aux, State
from dreampropeller.verification import NotReproducible
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
    solution = dp.solve(trajectory, SOLVER, dp.BatchedDispatcher, check=False)
    states = TOYS["sde"].loop()
    torch.testing.assert_close(solution.value["x"], states[-1]["x"])
    assert len(trajectory.calls) == solution.stats.num_iterations
    assert sum(map(len, trajectory.calls)) == solution.stats.num_evaluations
    assert trajectory.calls[0] == [0, 1, 2, 3]


def test_a_drift_without_a_batch_is_refused_with_a_reason() -> None:
    for name in ("sde", "quadratic-adam"):
        with pytest.raises(ValueError, match=r"its drift has no `batch\(steps, ys\)`"):
            dp.solve(TOYS[name].make(), SOLVER, dp.BatchedDispatcher)


class Narrow(Elementwise):
    """A batch that fails where a step is not at its exact state, or always."""

    def __init__(self, only_guesses: bool) -> None:
        super().__init__()
        self.only_guesses = only_guesses

    def make_drift(self, device: torch.device) -> Any:
        drift = super().make_drift(device)
        exact, whole = TOYS["sde"].loop()[5]["x"], drift.batch

        def batch(steps: Sequence[int], ys: Sequence[State]) -> Any:
            for step, y in zip(steps, ys, strict=True):
                off = not torch.allclose(y["x"], exact, rtol=1e-9)
                if step == 5 and (off or not self.only_guesses):
                    raise IndexError("out of range")
            return whole(steps, ys)

        drift.batch = batch
        return drift


def test_what_fails_at_a_guess_alone_cuts_the_window_of_a_batch() -> None:
    solver = dp.PicardSolver(dp.SlidingWindow(4), dp.FixedThreshold(0))
    found = dp.solve(Narrow(True), solver, dp.BatchedDispatcher, check=False)
    torch.testing.assert_close(found.value["x"], TOYS["sde"].loop()[-1]["x"])
    with pytest.raises(IndexError, match="out of range"):
        dp.solve(Narrow(False), solver, dp.BatchedDispatcher, check=False)


def test_a_batch_of_the_wrong_length_is_refused() -> None:
    class Short(Elementwise):
        def make_drift(self, device: torch.device) -> Any:
            drift = super().make_drift(device)
            drift.batch = lambda steps, ys: []
            return drift

    with pytest.raises(ValueError, match="returned 0 drifts for 2 steps"):
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
        (replace(fast, batched=fast.sequential / 1.04), "1.04x the plain"),
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


def test_a_batch_in_another_order_is_refused() -> None:
    class Swapped(Elementwise):
        def make_drift(self, device: torch.device) -> Any:
            drift = super().make_drift(device)
            batch = drift.batch
            drift.batch = lambda steps, ys: batch(steps, ys)[::-1]
            return drift

    with pytest.raises(NotReproducible, match=r"drift of step 0 in a batch deviates"):
        dp.solve(Swapped(), SOLVER, dp.BatchedDispatcher)


class Noisy(torch.nn.Module):
    """Draws from the global generators, replaces one buffer and writes into another."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 3)
        self.frozen = torch.nn.Parameter(torch.ones(3), requires_grad=False)
        self.seen: torch.Tensor
        self.count: torch.Tensor
        self.register_buffer("seen", torch.zeros(3))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, step: int) -> torch.Tensor:
        x = torch.nn.functional.dropout(self.layer(torch.randn(2, 3)), 0.5)
        self.seen = self.seen + x.detach().sum(0)
        self.count += step
        return x * self.frozen


def noisy(**options: Any) -> dp.OptimizationTrajectory:
    torch.manual_seed(0)
    loss = dp.BatchedLoss(
        lambda step, module: (module(step), step),
        lambda parts: [
            (0.01 * x.square().sum() + step, {"x": x.sum()}) for x, step in parts
        ],
    )

    def optimizer(named: Any) -> torch.optim.Optimizer:
        return torch.optim.Adam(named.values(), lr=0.1)

    return dp.OptimizationTrajectory.from_module(Noisy(), loss, optimizer, 6, **options)


@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed"])
def test_a_batch_of_a_module_is_its_steps(precision: str) -> None:
    """The same random numbers, buffers and scalars; gradients to a rounding."""
    trajectory = noisy(precision=precision)
    y, carry = trajectory.init()
    drift: Any = trajectory.make_drift(torch.device("cpu"))
    other, _ = trajectory.update(0, y, carry, drift(0, y)[0])
    state = torch.get_rng_state()
    found = drift.batch([3, 1, 4], [y, other, y])
    assert torch.equal(torch.get_rng_state(), state)
    for (one, aux), step, at in zip(found, (3, 1, 4), (y, other, y), strict=True):
        wanted, logged = drift(step, at)
        assert one.keys() == wanted.keys()
        assert {"layer.weight", "seen", "seen/changed", "count"} <= one.keys()
        for name, value in wanted.items():
            torch.testing.assert_close(one[name], value, rtol=1e-5, atol=1e-5)
        assert aux == pytest.approx(logged, rel=1e-5)
    solver = dp.PicardSolver(dp.SlidingWindow(3), dp.FixedThreshold(1e-12))
    batched = dp.solve(trajectory, solver, dp.BatchedDispatcher)
    plain = dp.solve(trajectory, dp.Sequential())
    for name, value in plain.value.items():
        torch.testing.assert_close(batched.value[name], value, rtol=1e-4, atol=1e-4)


class Clock(Elementwise):
    """A step takes a second; a batch that and `share` of it for each further step."""

    now = 0.0
    num_steps = 60

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def perf_counter(self) -> float:
        return self.now

    def make_drift(self, device: torch.device) -> Any:
        plain, clock = super().make_drift(device), self

        class Timed:
            def __call__(self, step: int, y: State) -> tuple[State, Aux]:
                clock.now += 1
                return plain(step, y)

            def batch(self, steps: list[int], ys: list[State]) -> Any:
                clock.now += 1 + clock.share * (len(steps) - 1)
                return plain.batch(steps, ys)

        return Timed()


@pytest.mark.parametrize(
    ("share", "window", "gain"),
    [(0.2, 8, 8 / 2.4), (0.5, 8, 8 / 4.5), (1.2, 2, 2 / 2.2)],
)
def test_the_best_of_several_windows_is_measured(
    share: float, window: int, gain: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And larger ones are left out where none can pay."""
    clock = Clock(share)
    monkeypatch.setattr(calibration, "time", clock)
    accepting = replace(SOLVER, threshold=dp.FixedThreshold(1e9))
    found = calibration.calibrate_windows(clock, accepting, iterations=1)
    assert found.window == window
    assert found.gain == pytest.approx(gain)
    assert max(map(len, clock.calls)) == window
    choice = dp.choose_solver(calibration.with_window(accepting, window), found)
    pays = dp.PicardSolver if gain > 1 else dp.Sequential
    assert isinstance(choice.solver, pays)
