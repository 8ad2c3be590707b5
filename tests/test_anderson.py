"""Anderson acceleration moves guesses, never what is accepted, and saves iterations."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dreampropeller import (
    Anderson,
    FixedThreshold,
    PicardSolver,
    Sequential,
    SlidingWindow,
    SolverState,
    State,
    Trajectory,
    checkpoint,
    solve,
)
from dreampropeller.solution import Iteration
from dreampropeller.trajectory import Drift
from tests.helpers import JUMPS, TOYS, make_quadratic, rolled_out, tree_equal

EXACT = FixedThreshold(0)


class Stiff(Trajectory[None]):
    """x' = -A x + f(t) by Euler steps, time constants a thousand apart."""

    num_steps = 96
    start: Tensor = 1 + torch.cos(torch.arange(24, dtype=torch.float64))
    rates: Tensor = torch.logspace(-2, 1, 24, dtype=torch.float64)
    size = 0.05  # the fastest component is halved by a step

    def init(self) -> tuple[State, None]:
        return {"x": self.start.clone()}, None

    def make_drift(self, device: torch.device) -> Drift:
        mixing = torch.roll(torch.eye(24, dtype=torch.float64), 1, 1) * 0.5

        def drift(step: int, y: State) -> tuple[State, dict[str, float]]:
            force = torch.sin(self.size * step * self.rates)
            return {"x": force - self.rates * y["x"] + mixing @ y["x"]}, {}

        return drift

    def update(
        self, step: int, y: State, carry: None, drift: State
    ) -> tuple[State, None]:
        return {"x": y["x"] + self.size * drift["x"]}, carry


def stiff(acceleration: Anderson | None, window: int, threshold: float) -> Any:
    solver = PicardSolver(
        SlidingWindow(window),
        FixedThreshold(threshold),
        "momentum",
        acceleration=acceleration,
    )
    return solve(Stiff(), solver)


@pytest.mark.parametrize(
    "window", [16, *(pytest.param(n, marks=pytest.mark.long) for n in (32, 96))]
)
def test_a_stiff_linear_equation_takes_fewer_iterations(window: int) -> None:
    exact = solve(Stiff(), Sequential()).value["x"]
    plain = stiff(None, window, 1e-10)
    helped = stiff(Anderson(), window, 1e-10)
    assert helped.stats.num_iterations < 0.75 * plain.stats.num_iterations
    errors = [float((s.value["x"] - exact).abs().max()) for s in (plain, helped)]
    assert errors[1] <= 2 * errors[0] < 1e-4
    more = stiff(Anderson(memory=4), window, 1e-10)
    assert more.stats.num_iterations < helped.stats.num_iterations


@pytest.mark.parametrize(
    ("window", "acceleration"),
    [
        (2, Anderson(memory=1, order=5)),
        (7, Anderson()),
        (64, Anderson(memory=3, order=2)),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", TOYS)
def test_zero_threshold_is_sequential_and_ends_in_time(
    name: str, window: int, acceleration: Anderson
) -> None:
    trajectory, loop = TOYS[name].make(), TOYS[name].loop()
    iterations = 0

    def check(state: SolverState[Any], iteration: Iteration) -> None:
        nonlocal iterations
        iterations += 1
        # After k iterations the first k steps are exact.
        assert state.step >= iterations
        assert tree_equal(state.y, loop[state.step])

    solver = PicardSolver(
        SlidingWindow(window), EXACT, "momentum", acceleration=acceleration
    )
    solution = solve(trajectory, solver, on_iteration=check)
    assert tree_equal(solution.value, loop[-1])
    assert tree_equal(solution.carry, solve(trajectory, Sequential()).carry)


def test_the_guesses_behind_k_exact_ones_are_exact_after_an_iteration() -> None:
    """Picard's finite termination holds of the guesses, not of the anchor alone."""
    exact: list[State] = [Stiff().init()[0]]
    solve(Stiff(), Sequential(), on_iteration=lambda s, _: exact.append(s.y))
    solver = PicardSolver(
        SlidingWindow(8), FixedThreshold(1e-30), acceleration=Anderson()
    )
    half = solve(Stiff(), solver, max_iterations=4, throw=False).state
    known = [exact[half.step + i] for i in range(1, 6)]
    half.guesses[: len(known)] = known
    found = solve(Stiff(), solver, state=half, max_iterations=1, throw=False).state
    assert found.step == half.step + 6
    assert tree_equal(found.y, exact[found.step])


@pytest.mark.parametrize("order", [None, 3])
@pytest.mark.parametrize("name", TOYS)
def test_resumed_equals_uninterrupted(
    name: str, order: int | None, tmp_path: Path
) -> None:
    solver = PicardSolver(
        SlidingWindow(5), FixedThreshold(1e-6), acceleration=Anderson(order=order)
    )
    whole = solve(TOYS[name].make(), solver)
    half = solve(TOYS[name].make(), solver, max_iterations=2, throw=False)
    assert half.state.acceleration.records or half.state.step in JUMPS
    checkpoint.save(tmp_path, half.state)
    resumed = solve(TOYS[name].make(), solver, state=checkpoint.load(tmp_path))
    assert tree_equal(resumed.value, whole.value)
    assert tree_equal(resumed.carry, whole.carry)
    assert resumed.stats == whole.stats


def test_a_state_is_continued_with_and_without() -> None:
    plain = PicardSolver(SlidingWindow(5), EXACT)
    helped = PicardSolver(SlidingWindow(5), EXACT, acceleration=Anderson())
    for first, second in ((plain, helped), (helped, plain), (Sequential(), helped)):
        half = solve(make_quadratic(), first, max_iterations=3, throw=False)
        end = solve(make_quadratic(), second, state=half.state)
        assert tree_equal(end.value, TOYS["quadratic-adam"].loop()[-1])
    assert solve(make_quadratic(), plain).state.acceleration is None


def test_a_jump_starts_the_history_anew() -> None:
    seen: list[int] = []

    def look(state: SolverState[Any], iteration: Iteration) -> None:
        del iteration
        if state.step in JUMPS:
            assert state.acceleration.records == []
        elif state.guesses:
            records = state.acceleration.records
            assert 1 <= len(records) <= 2
            seen.append(len(records))
            assert records[0].step == state.step
            assert records[0].states[1].keys() == state.y.keys()
            assert records[0].states[1]["points"].shape == state.y["points"].shape

    solver = PicardSolver(
        SlidingWindow(12), FixedThreshold(1e-12), acceleration=Anderson()
    )
    solve(TOYS["growing"].make(), solver, on_iteration=look)
    assert max(seen) == 2


def x(*values: float, dtype: torch.dtype = torch.float64) -> State:
    return {"x": torch.tensor(values, dtype=dtype)}


def corrected(
    before: tuple[list[State], list[State]],
    now: tuple[list[State], list[State]],
    **settings: Any,
) -> Any:
    """Two iterations over the same steps."""
    anderson = Anderson(memory=1, **{"ridge": 1e-12, **settings})
    first = anderson.corrected(anderson.init(), 3, *before)
    assert tree_equal(first.corrected, before[1][1:])  # no history yet: plain
    return anderson.corrected(first.memory, 3, *now)


def test_a_linear_map_worked_by_hand() -> None:
    """G = x / 2 + 3 at the second state: its fixed point is 6, found by a secant."""
    before = [x(0.0), x(0.0)], [x(0.0), x(3.0)]
    now = [x(0.0), x(3.0)], [x(0.0), x(4.5)]
    (guess,) = corrected(before, now).corrected
    assert float(guess["x"]) == pytest.approx(6.0)


def test_later_residuals_do_not_count() -> None:
    guesses = [x(0.0, 1.0), x(2.0, 0.5), x(1.0, 1.0), x(3.0, 0.2)]
    moved = [x(0.1, 1.0), x(2.5, 0.7), x(1.4, 0.8), x(3.1, 0.9)]
    again = [x(0.12, 1.1), x(2.6, 0.9), x(1.5, 0.5), x(3.0, 1.9)]
    whole = corrected((guesses, moved), (moved, again)).corrected
    part = corrected((guesses[:3], moved[:3]), (moved[:3], again[:3])).corrected
    assert tree_equal(whole[:2], part)
    assert not torch.equal(whole[0]["x"], again[1]["x"])


def test_nothing_moves_behind_exact_guesses() -> None:
    """Bit by bit, the sign of zero too."""
    before = [x(1.0), x(3.0), x(0.0)], [x(2.0), x(4.0), x(1.0)]
    settled = [x(2.0), x(4.0), x(-0.0)]
    found = corrected(before, (settled, settled))
    assert tree_equal(found.corrected, settled[1:])
    assert found.trusted == 2


@pytest.mark.parametrize("limit", [0.5, 4.0])
def test_corrections_that_grow_are_not_trusted(limit: float) -> None:
    """The second residual hardly changed: its secant points far away."""
    before = [x(0.0), x(0.0), x(0.0)], [x(0.0), x(3.0), x(1.0)]
    now = [x(0.0), x(3.0), x(1.0)], [x(0.0), x(4.5), x(9.0)]
    found = corrected(before, now, limit=limit)
    # It moves the first one by 1.5, as much as its residual.
    assert found.trusted == (0 if limit < 1 else 2)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e300])
def test_what_is_not_finite_is_not_trusted(bad: float) -> None:
    before = [x(0.0), x(0.0), x(0.0)], [x(0.0), x(3.0), x(bad)]
    now = [x(0.0), x(3.0), x(bad)], [x(0.0), x(4.5), x(-bad)]
    found = corrected(before, now)
    taken = found.guesses(found.trusted)
    assert found.trusted >= 1
    assert float(taken[0]["x"]) == pytest.approx(6.0)
    assert tree_equal(taken[1], now[1][2])


def test_types_stay_and_only_floating_entries_move() -> None:
    def states(*values: float) -> list[State]:
        return [
            {**x(v, dtype=torch.float16), "n": torch.tensor([int(v)])} for v in values
        ]

    found = corrected(
        (states(0, 0), states(0, 3)), (states(0, 3), states(0, 4.5)), limit=9.0
    )
    assert found.corrected[0]["x"].dtype == torch.float16
    assert float(found.corrected[0]["x"]) == pytest.approx(6.0, rel=1e-2)
    assert found.corrected[0]["n"].tolist() == [4]


def test_a_step_that_was_out_of_the_window_has_no_history() -> None:
    anderson = Anderson(memory=2)
    states = [x(float(i), 1.0) for i in range(6)]
    moved = [x(float(i) + 0.5, 0.9**i) for i in range(6)]
    first = anderson.corrected(anderson.init(), 0, states[:3], moved[:3])
    second = anderson.corrected(first.memory, 1, moved[1:5], states[1:5])
    # Steps 3 and 4 were not in the first window.
    assert tree_equal(second.corrected[1:], states[3:5])
    assert not torch.equal(second.corrected[0]["x"], states[2]["x"])


def test_order_one_updates_every_guess_by_itself() -> None:
    trajectory = Stiff()
    drift = trajectory.make_drift(torch.device("cpu"))
    guesses = [{"x": trajectory.start * (1 + i)} for i in range(4)]
    drifts = [drift(i, y)[0] for i, y in enumerate(guesses)]
    rolled = [guesses[0]]
    for i in range(4):
        rolled.append(trajectory.update(i, rolled[-1], None, drifts[i])[0])
    seen = replace(
        rolled_out(range(4), [*guesses, guesses[-1]], drifts, states=rolled),
        carries=[None] * 4,
    )

    def propose(anderson: Anderson) -> list[State]:
        return anderson.new_states(trajectory, seen)

    alone = [trajectory.update(i, guesses[i], None, drifts[i])[0] for i in range(4)]
    assert tree_equal(propose(Anderson(order=1)), [guesses[0], *alone])
    assert tree_equal(propose(Anderson(order=4)), rolled)
    assert tree_equal(propose(Anderson(order=9)), rolled)
    assert tree_equal(propose(Anderson()), rolled)
