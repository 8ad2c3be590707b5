"""The secant correction saves iterations, and never moves what is exact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dreampropeller import (
    DriftThreshold,
    Evaluation,
    FixedThreshold,
    OptimizationTrajectory,
    PicardSolver,
    Secant,
    Sequential,
    SlidingWindow,
    SolverState,
    State,
    checkpoint,
    solve,
)
from dreampropeller.acceleration.secant import SecantMemory
from dreampropeller.rollout import Rollout
from dreampropeller.solution import Iteration
from tests.helpers import JUMPS, TOYS, make_quadratic, noise, rolled_out, tree_equal

EXACT = FixedThreshold(0)
CURVATURE = torch.linspace(0.5, 2.0, 6, dtype=torch.float64)


def pulled(step: int, y: State) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A quadratic with noisy gradients, steep for its learning rate."""
    x = y["x"]
    loss = (CURVATURE * (x - noise(step, 6)).square() / 2).sum()
    return loss, {"loss": loss}


def make_pulled() -> OptimizationTrajectory:
    return OptimizationTrajectory(
        pulled,
        {"x": torch.ones(6, dtype=torch.float64)},
        lambda params: torch.optim.SGD(params.values(), lr=0.3, momentum=0.5),
        num_steps=60,
    )


def test_a_steep_quadratic_takes_fewer_iterations() -> None:
    exact = solve(make_pulled(), Sequential()).value["x"]

    def run(acceleration: Secant | None) -> Any:
        solver = PicardSolver(
            SlidingWindow(16), FixedThreshold(1e-6), acceleration=acceleration
        )
        return solve(make_pulled(), solver)

    plain, helped = run(None), run(Secant())
    assert helped.stats.num_iterations < 0.6 * plain.stats.num_iterations
    errors = [float((s.value["x"] - exact).abs().max()) for s in (plain, helped)]
    assert max(errors) < 2e-3  # the root of the threshold, and a little


@pytest.mark.parametrize("window", [1, 2, 7, 64])
@pytest.mark.parametrize("name", TOYS)
def test_zero_threshold_is_sequential_and_ends_in_time(name: str, window: int) -> None:
    trajectory, loop = TOYS[name].make(), TOYS[name].loop()
    iterations = 0

    def check(state: SolverState[Any], iteration: Iteration) -> None:
        nonlocal iterations
        iterations += 1
        # After k iterations the first k steps are exact.
        assert state.step >= iterations
        assert tree_equal(state.y, loop[state.step])

    solver = PicardSolver(
        SlidingWindow(window), EXACT, "momentum", acceleration=Secant()
    )
    solution = solve(trajectory, solver, on_iteration=check)
    assert tree_equal(solution.value, loop[-1])
    assert tree_equal(solution.carry, solve(trajectory, Sequential()).carry)


@pytest.mark.parametrize("threshold", [FixedThreshold(1e-6), DriftThreshold()])
@pytest.mark.parametrize("name", TOYS)
def test_resumed_equals_uninterrupted(
    name: str, threshold: Any, tmp_path: Path
) -> None:
    solver = PicardSolver(SlidingWindow(5), threshold, acceleration=Secant())
    whole = solve(TOYS[name].make(), solver)
    half = solve(TOYS[name].make(), solver, max_iterations=2, throw=False)
    memory = half.state.acceleration
    assert memory.held or memory.products or half.state.step in JUMPS
    checkpoint.save(tmp_path, half.state)
    resumed = solve(TOYS[name].make(), solver, state=checkpoint.load(tmp_path))
    assert tree_equal(resumed.value, whole.value)
    assert tree_equal(resumed.carry, whole.carry)
    assert resumed.stats == whole.stats


def test_a_state_is_continued_with_and_without() -> None:
    plain = PicardSolver(SlidingWindow(5), EXACT)
    helped = PicardSolver(SlidingWindow(5), EXACT, acceleration=Secant())
    for first, second in ((plain, helped), (helped, plain), (Sequential(), helped)):
        half = solve(make_quadratic(), first, max_iterations=3, throw=False)
        end = solve(make_quadratic(), second, state=half.state)
        assert tree_equal(end.value, TOYS["quadratic-adam"].loop()[-1])


def test_slopes_follow_their_rows_through_a_jump() -> None:
    learnt: dict[int, Any] = {}

    def look(state: SolverState[Any], iteration: Iteration) -> None:
        del iteration
        learnt[state.step] = state.acceleration, len(state.y["points"])

    solver = PicardSolver(
        SlidingWindow(12), FixedThreshold(1e-12), acceleration=Secant()
    )
    solve(TOYS["growing"].make(), solver, on_iteration=look)
    assert {5, 9} <= learnt.keys()
    for step in (5, 9):  # the last row of these jumps is new
        memory, rows = learnt[step]
        assert memory.squares["points"].shape == (rows,)
        assert memory.squares["points"][:-1].all()
        assert not memory.squares["points"][-1]
        assert not memory.held


def test_slopes_of_before_a_jump_wait_for_the_first_of_after_it() -> None:
    """They are kept, with their rows, but correct nothing until then."""
    one = torch.ones(2)
    rows = {"x": torch.tensor([0, 0, 1])}
    memory = SecantMemory({}, {"x": one}, {"x": one})
    fresh = Secant().jumped(memory, {"x": torch.ones(3)}, rows)

    def seen(step: int, *guesses: float) -> Rollout:
        ys = [{"x": torch.full((3,), guess)} for guess in (*guesses, guesses[-1])]
        return rolled_out(range(step, step + len(guesses)), ys, ys[:-1])

    window = seen(5, 0.0, 1.0)
    waiting = Secant().before(fresh, window)
    assert not waiting.slopes
    measured = Secant().before(Secant().after(waiting, window), seen(6, 2.0))
    # A drift that equals the guess has slope 1; 0.7 of the sums of before count, too.
    sums = 1 + Secant().decay
    assert torch.equal(measured.slopes["x"], torch.full((3,), sums / (2 * sums)))
    assert Secant().before(measured, seen(7, 3.0)).slopes.keys() == {"x"}
    assert Secant().before(memory, window).slopes.keys() == {"x"}, "without a jump"


def test_without_a_row_map_slopes_are_forgotten() -> None:
    y = {"a": torch.ones(3), "b": torch.ones(2)}
    memory = SecantMemory({}, dict(y), dict(y))
    after = Secant().jumped(memory, y, {"a": torch.tensor([2, -1, 0])})
    assert after.products["a"].tolist() == [1, 0, 1]
    assert torch.equal(after.products["b"], y["b"])
    assert Secant().jumped(memory, {"b": y["b"]}, {}).products.keys() == {"b"}
    assert Secant().jumped(memory, y, None) == Secant().init()


def seen_twice(
    secant: Secant, old: State, new: State, drifts: tuple[State, State]
) -> Any:
    """The memory after one step was evaluated at two guesses."""
    first = rolled_out([3, 4], [old, old, old], [drifts[0]] * 2)
    held = secant.after(secant.init(), first)
    assert held.held.keys() == {4}
    return secant.before(held, Evaluation([4], [new, new], [drifts[1]]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_slopes_of_a_diagonal_map_worked_by_hand(dtype: torch.dtype) -> None:
    """Slopes 2, 1, -1: the last pushes away, and is not used."""
    slope = torch.tensor([2.0, 1.0, -1.0], dtype=dtype)
    old, new = {"x": torch.zeros(3, dtype=dtype)}, {"x": torch.ones(3, dtype=dtype)}
    drifts = {"x": slope * old["x"]}, {"x": slope * new["x"]}
    secant = Secant(shrinkage=0.5)
    memory = seen_twice(secant, old, new, drifts)
    # Σ ΔgΔy = a, Σ Δy² = 1, so p = 1/2: a / 1.5.
    expected = torch.tensor([4 / 3, 2 / 3, 0.0])
    assert torch.allclose(memory.slopes["x"].float(), expected)
    corrected = secant.correct(memory, drifts[0], new, old)["x"]
    assert corrected.dtype == dtype
    assert torch.allclose(corrected.float(), expected, atol=1e-3)


def test_buffers_and_what_did_not_move_are_left_alone() -> None:
    old = {"x": torch.zeros(2), "grid": torch.zeros(2)}
    drift = {"x": -torch.zeros(2), "grid": torch.ones(2), "grid/changed": old["x"] == 0}
    secant = Secant()
    memory = seen_twice(secant, old, old, (drift, drift))
    assert memory.slopes.keys() == {"x"}
    assert not memory.slopes["x"].any()
    moved = {"x": torch.ones(2), "grid": torch.ones(2)}
    assert secant.correct(memory, drift, moved, old)["grid"] is drift["grid"]


def test_old_slopes_fade() -> None:
    secant = Secant(decay=0.5)
    zero, one = {"x": torch.zeros(1)}, {"x": torch.ones(1)}
    memory = seen_twice(secant, zero, one, (zero, {"x": torch.full((1,), 4.0)}))
    # One entry, so p = 1: 4 / (1 + 1).
    assert float(memory.slopes["x"]) == pytest.approx(2.0)
    memory = secant.after(memory, rolled_out([5, 6], [zero] * 3, [zero] * 2))
    memory = secant.before(memory, Evaluation([6], [one, one], [one]))
    # Products 1 + 4 / 2 over squares 1 + 1 / 2, and as much again.
    assert float(memory.slopes["x"]) == pytest.approx(1.0)


def test_slopes_that_overshoot_the_nearest_pairs_leave_out_the_distant() -> None:
    """Distances of 1 and slope 1 near, 100 and 1000 far: the far ones outvote it."""
    near, far = {"x": torch.ones(1)}, {"x": torch.full((1,), 100.0)}
    zero = {"x": torch.zeros(1)}
    secant = Secant(shrinkage=1e-6)

    def slope(steep: float, past: float | None = None) -> float:
        held = {step: (zero, zero) for step in range(1, 5)}
        sums = {} if past is None else {"x": torch.full((1,), past)}
        memory = SecantMemory(held, sums, {"x": torch.ones(1)} if sums else {})
        drifts = [zero, near, *[{"x": steep * far["x"]}] * 3]
        seen = Evaluation(range(5), [zero, near, far, far, far, far], drifts)
        return float(secant.before(memory, seen).slopes["x"])

    assert slope(2) == pytest.approx(2, rel=1e-3)
    assert slope(7) == pytest.approx(7, rel=1e-3)
    assert slope(1000) == pytest.approx(1, rel=1e-3)
    # What earlier iterations saw counts, unless it does not fit either.
    assert slope(1000, past=2) == pytest.approx((1 + 0.7 * 2) / 1.7, rel=1e-3)
    assert slope(1000, past=1e6) == pytest.approx(1, rel=1e-3)


def test_an_entry_that_ran_away_does_not_drown_the_others() -> None:
    """Its squares make p so large that all slopes would be 0, for many iterations."""
    zero, near = {"x": torch.zeros(2)}, {"x": torch.ones(2)}
    for away in (1e9, 1e30):  # the squares of the second are infinite
        far = {"x": torch.tensor([away, 1.0])}
        memory = SecantMemory({1: (zero, zero), 2: (zero, zero)})
        flat = {"x": torch.tensor([0.0, 1.0])}  # where it went, nothing pulls
        seen = Evaluation(range(3), [zero, near, far, far], [zero, near, flat])
        found = Secant().before(memory, seen)
        assert found.slopes["x"].tolist() == pytest.approx([0.5, 0.5])
        assert found.squares["x"].tolist() == [1, 1]


def test_slopes_are_tried_where_the_anchor_is_skipped() -> None:
    zero, near = {"x": torch.zeros(1)}, {"x": torch.ones(1)}
    far = {"x": torch.full((1,), 100.0)}
    memory = SecantMemory({step: (zero, zero) for step in range(5)})
    drifts = [{}, near, *[{"x": 1000 * far["x"]}] * 3]
    seen = Evaluation(range(5), [zero, near, far, far, far, far], drifts, skips=True)
    found = Secant().before(memory, seen)
    assert found.slopes["x"].tolist() == [0.5]
    assert found.units == {"x": 1.0}


def test_a_correction_is_no_multiple_of_the_drift() -> None:
    slope, zero = {"x": torch.full((2,), 100.0)}, {"x": torch.zeros(2)}
    drift = {"x": torch.tensor([3.0, 4.0])}
    memory = SecantMemory(slopes=slope, units={"x": 10.0})
    found = Secant().correct(memory, drift, {"x": torch.tensor([1.0, 0.0])}, zero)["x"]
    assert 0 < found[0] - 3 < 100
    assert found.norm() <= 4 * 10 + 5
    near = Secant().correct(memory, drift, {"x": torch.tensor([0.1, 0.0])}, zero)["x"]
    assert torch.equal(near, torch.tensor([13.0, 4.0]))
    away = Secant().correct(memory, drift, {"x": torch.tensor([1e37, 0.0])}, zero)["x"]
    assert torch.equal(away, drift["x"])  # an infinite one says nothing
