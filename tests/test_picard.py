"""What must hold bit for bit on CPU, over trajectory × window × threshold."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dreampropeller import (
    AdaptiveWindow,
    DriftThreshold,
    EMAThreshold,
    FixedThreshold,
    NotConverged,
    PicardSolver,
    Result,
    Sequential,
    SlidingWindow,
    SolverState,
    State,
    Trajectory,
    solve,
)
from dreampropeller.solution import Iteration
from dreampropeller.trajectory import Drift
from tests.helpers import STEPS, TOYS, OrnsteinUhlenbeck, make_quadratic, tree_equal

WINDOWS = (1, 2, 7, 16, 64)
EXACT = FixedThreshold(0)


@pytest.fixture(scope="module", params=TOYS)
def toy(request: pytest.FixtureRequest) -> tuple[Trajectory[Any], list[State]]:
    toy = TOYS[request.param]
    return toy.make(), toy.loop()


def test_sequential_equals_the_loop_by_hand(
    toy: tuple[Trajectory[Any], list[State]],
) -> None:
    trajectory, loop = toy
    seen: list[State] = []
    solution = solve(
        trajectory, Sequential(), on_iteration=lambda state, _: seen.append(state.y)
    )
    assert solution.result is Result.SUCCESS
    assert tree_equal(seen, loop[1:])
    assert solution.stats.num_evaluations == trajectory.num_steps


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("predictor", ["repeat_last", "momentum", "auto"])
def test_zero_threshold_is_sequential_and_ends_in_time(
    toy: tuple[Trajectory[Any], list[State]], window: int, predictor: str
) -> None:
    trajectory, loop = toy
    iterations = 0

    def check(state: SolverState[Any], iteration: Iteration) -> None:
        nonlocal iterations
        iterations += 1
        # Picard's finite termination: after k iterations the first k steps are exact.
        assert state.step >= iterations
        assert tree_equal(state.y, loop[state.step])

    solver = PicardSolver(SlidingWindow(window), EXACT, predictor)
    solution = solve(trajectory, solver, on_iteration=check)
    assert tree_equal(solution.value, loop[-1])
    assert tree_equal(solution.carry, solve(trajectory, Sequential()).carry)
    assert solution.stats.num_iterations == iterations <= trajectory.num_steps


@pytest.mark.parametrize(
    "threshold", [FixedThreshold(1e9), EMAThreshold(1.0, 0.9, "mean")]
)
def test_window_one_is_sequential_at_any_threshold(
    toy: tuple[Trajectory[Any], list[State]], threshold: Any
) -> None:
    trajectory, loop = toy
    solution = solve(trajectory, PicardSolver(SlidingWindow(1), threshold))
    assert tree_equal(solution.value, loop[-1])
    assert solution.stats.num_iterations == trajectory.num_steps


def test_anchor_is_close_and_iterations_fewer_at_a_loose_threshold() -> None:
    solver = PicardSolver(SlidingWindow(8), FixedThreshold(1e-6), "momentum")
    solution = solve(make_quadratic(), solver)
    exact = solve(make_quadratic(), Sequential()).value["x"]
    assert solution.stats.num_iterations <= STEPS / 2
    assert (solution.value["x"] - exact).abs().max() < 0.01


def test_accepted_carry_is_not_touched_by_the_rollout_past_it() -> None:
    """The published code's defect: with aliased moments this diverges."""
    solver = PicardSolver(SlidingWindow(16), FixedThreshold(1e-30))
    solution = solve(TOYS["network-sgd"].make(), solver)
    loop = TOYS["network-sgd"].loop()[-1]
    for name, value in solution.value.items():
        torch.testing.assert_close(value, loop[name], rtol=0, atol=1e-12)


def test_window_larger_than_the_trajectory() -> None:
    trajectory = OrnsteinUhlenbeck()
    solution = solve(trajectory, PicardSolver(SlidingWindow(1000), EXACT))
    assert tree_equal(solution.value, TOYS["sde"].loop()[-1])


def test_logged_scalars_are_those_of_accepted_steps() -> None:
    logged: list[float] = []
    solve(
        OrnsteinUhlenbeck(),
        PicardSolver(SlidingWindow(7), FixedThreshold(1e-12)),
        on_iteration=lambda _, it: logged.extend(aux["t"] for aux in it.aux),
    )
    assert logged == list(range(STEPS))


def test_state_given_to_solve_stays_as_it_is() -> None:
    solver = PicardSolver(SlidingWindow(7), EXACT, "momentum")
    half = solve(make_quadratic(), solver, max_iterations=4, throw=False)
    assert half.result is Result.MAX_ITERATIONS
    ends = [solve(make_quadratic(), solver, state=half.state) for _ in range(2)]
    assert tree_equal(ends[0].value, ends[1].value)
    assert tree_equal(ends[0].value, TOYS["quadratic-adam"].loop()[-1])
    assert ends[0].stats.num_iterations == 4 + len(ends[0].stats.strides[4:])


def test_state_of_another_window_can_be_continued() -> None:
    half = solve(
        make_quadratic(),
        PicardSolver(SlidingWindow(4), EXACT),
        max_iterations=3,
        throw=False,
    )
    for window in (1, 3, 20):
        end = solve(
            make_quadratic(),
            PicardSolver(SlidingWindow(window), EXACT),
            state=half.state,
        )
        assert tree_equal(end.value, TOYS["quadratic-adam"].loop()[-1])


def test_state_of_another_solver_can_be_continued() -> None:
    solvers = [
        Sequential(),
        PicardSolver(SlidingWindow(3), EMAThreshold(0.0, 1.0, "mean"), "momentum"),
        PicardSolver(SlidingWindow(5), EXACT),
        PicardSolver(SlidingWindow(5), FixedThreshold(1e-40, relative=True)),
        PicardSolver(AdaptiveWindow(2, 6), DriftThreshold(1e-18), "auto"),
    ]
    for first in solvers:
        half = solve(make_quadratic(), first, max_iterations=3, throw=False)
        for second in solvers:
            end = solve(make_quadratic(), second, state=half.state)
            assert tree_equal(end.value, TOYS["quadratic-adam"].loop()[-1])


def test_callback_can_stop_the_solve() -> None:
    solution = solve(
        make_quadratic(),
        PicardSolver(SlidingWindow(4), EXACT),
        on_iteration=lambda state, _: state.step >= 5,
    )
    assert solution.result is Result.STOPPED
    assert 5 <= solution.state.step < STEPS


def test_only_true_stops_and_every_listener_is_asked() -> None:
    """A function that returns something else, such as a path, does not stop a solve."""
    heard: list[str] = []

    def log(state: SolverState[Any], _: Iteration) -> str:
        heard.append(f"step {state.step}")
        return heard[-1]

    def stop(state: SolverState[Any], _: Iteration) -> bool:
        heard.append("stop?")
        return state.step >= 5

    solver = PicardSolver(SlidingWindow(4), EXACT)
    assert solve(make_quadratic(), solver, on_iteration=log).state.step == STEPS
    heard.clear()
    solution = solve(make_quadratic(), solver, on_iteration=[stop, log])
    assert solution.result is Result.STOPPED
    assert len(heard) == 2 * solution.stats.num_iterations
    assert heard[-1] == f"step {solution.state.step}"


class Poisoned(OrnsteinUhlenbeck):
    """Not finite at one step, at every state or only far from the solution."""

    def __init__(self, step: int, only_guesses: bool) -> None:
        self.step, self.only_guesses = step, only_guesses
        self.exact = TOYS["sde"].loop()[step]["x"]

    def make_drift(self, device: torch.device) -> Drift:
        healthy = super().make_drift(device)

        def drift(step: int, y: State) -> tuple[State, dict[str, float]]:
            value, aux = healthy(step, y)
            guessed = not torch.equal(y["x"], self.exact)
            if step == self.step and (guessed or not self.only_guesses):
                value = {"x": value["x"] * float("nan")}
            return value, aux

        return drift


@pytest.mark.parametrize("window", WINDOWS)
def test_bad_guess_cuts_the_window_and_is_no_error(window: int) -> None:
    solution = solve(Poisoned(9, True), PicardSolver(SlidingWindow(window), EXACT))
    assert tree_equal(solution.value, TOYS["sde"].loop()[-1])


@pytest.mark.parametrize(
    "solver", [Sequential(), PicardSolver(SlidingWindow(7), EXACT)]
)
def test_bad_drift_at_the_anchor_ends_the_solve_there(solver: Any) -> None:
    with pytest.raises(NotConverged, match=r"Step 9: not finite in x") as caught:
        solve(Poisoned(9, False), solver)
    solution = caught.value.solution
    assert solution.result is Result.NON_FINITE
    assert solution.state.step == 9
    assert tree_equal(solution.value, TOYS["sde"].loop()[9])


@pytest.mark.parametrize("window", WINDOWS)
def test_skipped_step_counts_and_changes_nothing(window: int) -> None:
    plain = solve(Poisoned(9, False), Sequential(non_finite="skip"))
    solver = PicardSolver(SlidingWindow(window), EXACT, non_finite="skip")
    solution = solve(Poisoned(9, False), solver)
    assert tree_equal(solution.value, plain.value)
    assert solution.carry == plain.carry == [STEPS - 1]
    assert sum(solution.stats.strides) == STEPS


def test_nan_error_fails_and_does_not_poison_the_threshold() -> None:
    bounds: list[float | None] = []
    solver = PicardSolver(
        SlidingWindow(4),
        EMAThreshold(1e9, 0.5, "mean"),
        norm=lambda new, old: torch.tensor(float("nan")),
    )
    solution = solve(
        OrnsteinUhlenbeck(),
        solver,
        on_iteration=lambda _, it: bounds.append(it.threshold),
    )
    assert set(solution.stats.strides) == {1}
    assert set(bounds) == {1e9}
    assert tree_equal(solution.value, TOYS["sde"].loop()[-1])


class Scaled(OrnsteinUhlenbeck):
    """The error of the state at step 10 has no unit, the others a tiny one."""

    def error_scale(self, step: int) -> float:
        return 0.0 if step == 10 else 1e30


def test_error_scale_is_that_of_the_compared_state() -> None:
    ends: list[int] = []
    solve(
        Scaled(),
        PicardSolver(SlidingWindow(8), FixedThreshold(1.0)),
        on_iteration=lambda state, _: ends.append(state.step),
    )
    assert ends == [8, 10, 12]


def test_grid_is_iterated_and_tested() -> None:
    """The published code carries the grid, but neither iterates nor compares it."""
    trajectory = TOYS["grid"].make()
    y, _ = trajectory.init()
    drift, _ = trajectory.make_drift(torch.device("cpu"))(4, y)
    assert {"grid", "grid/changed", "occupied", "count"} <= drift.keys()
    assert drift["grid/changed"].tolist() == [False, True, False, False, False]
    untouched, _ = trajectory.make_drift(torch.device("cpu"))(5, y)
    assert untouched.keys() == {"x"}
