"""What the drift-relative threshold promises, on drifts whose secants are known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from dreampropeller import (
    DriftThreshold,
    Evaluation,
    FixedThreshold,
    InlineDispatcher,
    Iteration,
    OptimizationTrajectory,
    PicardSolver,
    Rollout,
    Secant,
    Sequential,
    SlidingWindow,
    Solver,
    SolverState,
    State,
    Trajectory,
    checkpoint,
    solve,
)
from dreampropeller.drift_threshold import DriftMemory
from dreampropeller.secants import Measurement, believed
from dreampropeller.trajectory import Drift
from tests.helpers import STEPS, TOYS, noise, rolled_out, tree_equal


class Descent(Trajectory[None]):
    """Gradient descent on a noisy quadratic; every secant is the curvature."""

    def __init__(
        self, rate: float, num_steps: int = 60, curvature: float = 1.0
    ) -> None:
        self.rate, self.num_steps, self.curvature = rate, num_steps, curvature

    def init(self) -> tuple[State, None]:
        return {"x": torch.ones(4, dtype=torch.float64)}, None

    def make_drift(self, device: torch.device) -> Drift:
        def drift(step: int, y: State) -> tuple[State, dict[str, float]]:
            return {"x": self.curvature * y["x"] + 0.3 * noise(step, 4)}, {}

        return drift

    def update(
        self, step: int, y: State, carry: None, drift: State
    ) -> tuple[State, None]:
        return {"x": y["x"] - self.rate * drift["x"]}, carry


def observe(
    steps: list[int], drifts: list[float], distances: list[float], stride: int
) -> Rollout:
    values = [{"x": torch.tensor([value])} for value in drifts]
    guesses = [*values, values[-1]]
    return rolled_out(steps, guesses, values, stride, values, distances)


def learn(
    threshold: DriftThreshold, memory: Any, steps: list[int], drifts: list[float]
) -> Any:
    values = [{"x": torch.tensor([value])} for value in drifts]
    return threshold.before(memory, Evaluation(steps, [*values, values[-1]], values))


def test_secants_worked_by_hand() -> None:
    threshold = DriftThreshold(0.5)
    memory = learn(threshold, threshold.init(), [0, 1, 2], [2.0, 4.0, 1.0])
    assert threshold.most(memory, 3, 9) == 1  # nothing is known
    # Slots 1 and 2 are held back; their next guesses are 0.1 and 0.5 away.
    memory = threshold.after(
        memory, observe([0, 1, 2], [2.0, 4.0, 1.0], [0.01, 0.25, 4.0], stride=1)
    )
    memory = learn(threshold, memory, [1, 2, 3], [5.0, 2.0, 3.0])
    assert threshold.most(memory, 3, 9) == 3
    # Step 1: |5 - 4| / 5 / 0.1 = 2. Step 2: |2 - 1| / median(5, 2, 3) / 0.5 = 2/3.
    assert threshold.error(memory, 1, 0.04) == pytest.approx(2 * 0.2)
    assert threshold.error(memory, 2, 0.04) == pytest.approx(2 / 3 * 0.2)
    assert threshold.error(memory, 9, 0.04) == pytest.approx(2 * 0.2)  # the larger
    assert threshold.bound(memory) == 0.5
    found = threshold.diagnostics(memory)
    assert found["secant"] == pytest.approx(2)
    assert found["measured_drift_error"] == pytest.approx((1 / 5 + 1 / 3) / 2)


def test_tensors_count_by_the_way_they_moved() -> None:
    """A loud drift that moves little must not drown a quiet one that moves much."""

    def state(loud: float, quiet: float) -> State:
        return {"loud": torch.tensor([loud]), "quiet": torch.tensor([quiet])}

    threshold = DriftThreshold(0.5)
    steps, drifts = [0, 1], [state(100.0, 1.0), state(100.0, 1.0)]
    states = [state(0.0, 0.0), state(0.1, 1.0), state(0.3, 4.0)]
    seen = rolled_out(steps, states, drifts, 1, states, [0.25, 1.0])
    again = Evaluation([1], states[1:], [state(300.0, 1.25)])
    memory = threshold.after(threshold.init(), seen)
    memory = threshold.before(memory, again)
    # Off by 2/3 and by 1/5; ways of 0.3 and 4; the new guess is 0.5 away.
    ways = math.hypot(0.3, 4.0)
    expected = math.hypot(0.3 / ways * 2 / 3, 4 / ways / 5)
    assert memory.measured == pytest.approx(expected)
    assert threshold.error(memory, 1, 0.25) == pytest.approx(expected)
    # Nothing is known of what a drift moves: Euclidean.
    memory = replace(threshold.after(threshold.init(), seen), moved={})
    memory = threshold.before(memory, again)
    expected = math.hypot(200, 0.25) / math.hypot(300, 1.25)
    assert memory.measured == pytest.approx(expected)


def test_one_small_anchor_of_four_is_no_unit() -> None:
    """Step 6's error is measured in units of twice the largest; a jump forgets them."""
    threshold = DriftThreshold(0.5)
    before = DriftMemory(anchors=[{"x": 10.0}, {"x": 0.1}, {"x": 1.0}])
    held = {6: ({"x": torch.tensor([0.0])}, 1.0)}

    def measured(memory: DriftMemory) -> float:
        seen = learn(threshold, replace(memory, held=held), [5, 6], [0.1, 300.0])
        assert seen.measured is not None
        return seen.measured

    assert measured(before) == pytest.approx(300 / 20)
    after = threshold.jumped(before, {"x": torch.ones(1)}, {})
    assert measured(after) == pytest.approx(300 / 0.2)
    skipped = threshold.before(
        replace(before, held=held), Evaluation([5], [{"x": torch.ones(1)}] * 2, [{}])
    )
    assert skipped.anchors == before.anchors


def test_secants_of_far_guesses_are_not_believed() -> None:
    """Distances of 1, 1, 1 and 100, relative changes of 0.1, 0.2, 0.3 and 2."""
    near = [Measurement(step, 0.1 * step, 1.0) for step in (1, 2, 3)]
    far = Measurement(4, 2.0, 100.0)
    found = believed([*near, far], math.inf)
    assert found == pytest.approx({1: 0.1, 2: 0.2, 3: 0.3, 4: 0.3})
    # Alike at both ends, by chance: a quarter of what earlier iterations measured.
    alike = Measurement(4, 0.5, 100.0)
    assert believed([*near, alike], math.inf)[4] == pytest.approx(0.005)
    assert believed([*near, alike], 0.6) == pytest.approx(
        {1: 0.15, 2: 0.2, 3: 0.3, 4: 0.15}
    )
    # None is certain: the largest.
    unsure = [Measurement(1, 3.0, 30.0), Measurement(2, 2.0, 4.0)]
    assert believed(unsure, math.inf) == pytest.approx({1: 0.5, 2: 0.5})
    assert believed([], 1.0) == {}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_numbers_fail_and_teach_nothing(bad: float) -> None:
    threshold = DriftThreshold(0.5)
    memory = threshold.after(
        threshold.init(), observe([0, 1, 2], [2.0, 4.0, 1.0], [0.01, bad, 1.0], 1)
    )
    memory = learn(threshold, memory, [1, 2], [5.0, 2.0])
    assert all(math.isfinite(k) for part in memory.secants for k in part)
    assert memory.secants == [[pytest.approx(2)]]
    error = threshold.error(memory, 1, bad)
    assert not error <= threshold.bound(memory)


@pytest.mark.parametrize("rate", [0.002, 0.02, 0.2])
@pytest.mark.parametrize("predictor", ["repeat_last", "momentum"])
def test_drifts_of_accepted_steps_are_off_by_the_tolerance_at_most(
    rate: float, predictor: str
) -> None:
    """The promise itself: secants are exact here, and so is the estimate."""
    tolerance = 0.1
    trajectory = Descent(rate)
    evaluated: dict[int, State] = {}  # the last drift of each step, and the norms

    def drift_of(step: int, y: State) -> State:
        return trajectory.make_drift(torch.device("cpu"))(step, y)[0]

    class Spy(Descent):
        def make_drift(self, device: torch.device) -> Drift:
            inner = trajectory.make_drift(torch.device("cpu"))

            def drift(step: int, y: State) -> tuple[State, dict[str, float]]:
                evaluated[step] = inner(step, y)[0]
                return evaluated[step], {}

            return drift

    solver = PicardSolver(SlidingWindow(8), DriftThreshold(tolerance), predictor)
    anchors: dict[int, State] = {0: trajectory.init()[0]}
    seen: list[Iteration] = []

    def check(state: SolverState[Any], iteration: Iteration) -> None:
        seen.append(iteration)
        y = anchors[iteration.begin]
        # The secants' unit is at least the median norm of a window that had this step.
        norms = sorted(float(g["x"].norm()) for g in evaluated.values())
        for step in range(iteration.begin, iteration.end):
            off = float((drift_of(step, y)["x"] - evaluated[step]["x"]).norm())
            assert off <= tolerance * norms[-1] + 1e-12
            y, _ = trajectory.update(step, y, None, evaluated[step])
        assert tree_equal(y, state.y)
        anchors[state.step] = y

    solution = solve(Spy(rate), solver, on_iteration=check)
    assert solution.stats.strides[0] == 1
    if rate == 0.002:
        assert solution.stats.num_iterations <= 60 / 8 + 4
    # A larger rate moves the drift more in a step: the stride adapts by itself.
    assert solution.stats.num_iterations >= {0.002: 8, 0.02: 9, 0.2: 20}[rate]


@pytest.mark.parametrize(
    ("window", "acceleration", "gains"),
    [(32, Secant(), True), (16, Secant(), False), (32, None, False)],
)
def test_a_wide_window_overshoots_less_when_bad_drifts_are_damped(
    window: int, acceleration: Secant | None, gains: bool
) -> None:
    def strides(half_weight: float | None) -> list[int]:
        solver = PicardSolver(
            SlidingWindow(window),
            DriftThreshold(half_weight=half_weight),
            acceleration=acceleration,
        )
        return solve(Descent(0.3, 150), solver).stats.strides

    damped, plain = strides(0.5), strides(None)
    assert len(damped) < 0.9 * len(plain) if gains else damped == plain


@pytest.mark.parametrize("acceleration", [None, Secant()])
@pytest.mark.parametrize("window", [8, 16, 32])
@pytest.mark.parametrize(("power", "rate"), [(3, 0.1), (3, 0.2), (5, 0.07)])
def test_guesses_that_run_away_spoil_nothing(
    power: int, rate: float, window: int, acceleration: Secant | None
) -> None:
    """Their drifts are huge, a bad unit of errors, and their slopes belong far away."""

    class Stiff(Descent):
        def init(self) -> tuple[State, None]:
            return {"x": torch.full((3,), 1.5, dtype=torch.float64)}, None

        def make_drift(self, device: torch.device) -> Drift:
            return lambda step, y: ({"x": y["x"] ** power}, {})

    wanted = solve(Stiff(rate), Sequential()).value["x"]
    solver = PicardSolver(SlidingWindow(window), acceleration=acceleration)
    found = solve(Stiff(rate), solver).value["x"]
    assert (found - wanted).abs().max() < 0.15 * wanted.abs().max()


def himmelblau(step: int, y: State) -> torch.Tensor:
    a, b = y["x"]
    return (a**2 + b - 11) ** 2 + (a + b**2 - 7) ** 2


def network() -> tuple[Any, State]:
    """Regression with batches of 32; its guesses run far away with momentum."""
    random = torch.Generator().manual_seed(0)
    x = torch.rand(512, 2, generator=random) * 2 - 1
    wanted = torch.sin(3 * x[:, 0]) * x[:, 1]
    shapes = {"w1": (2, 32), "b1": (32,), "w2": (32, 32), "w3": (32,)}
    y = {
        name: torch.randn(shape, generator=random) / (32**0.5 if "1" not in name else 1)
        for name, shape in shapes.items()
    }

    def loss(step: int, y: State) -> torch.Tensor:
        one = slice(None)
        if step >= 0:
            one = torch.randint(512, (32,))
        hidden = torch.tanh(torch.tanh(x[one] @ y["w1"] + y["b1"]) @ y["w2"])
        return (hidden @ y["w3"] - wanted[one]).square().mean()

    return loss, y


@pytest.mark.parametrize("acceleration", [None, Secant()])
@pytest.mark.parametrize("seed", [None, 0, 1])
def test_descents_with_momentum_end_where_the_loop_does(
    seed: int | None, acceleration: Secant | None
) -> None:
    """A secant measured at guesses that ran away says nothing of short distances."""
    if seed is None:
        loss, rate = himmelblau, 0.005
        y = {"x": torch.tensor([0.1, -0.1])}
    else:
        rate = 0.1
        loss, y = network()

    def end(solver: Solver) -> float:
        trajectory = OptimizationTrajectory(
            loss,
            y,
            lambda params: torch.optim.SGD(params.values(), rate, momentum=0.9),
            100,
            seed=seed or 0,
        )
        return float(loss(-1, solve(trajectory, solver).value))

    wanted = end(Sequential())
    found = end(PicardSolver(SlidingWindow(8), acceleration=acceleration))
    assert found < 3 * wanted + 0.02


def test_one_step_is_accepted_where_drifts_are_too_large_for_a_norm() -> None:
    huge = [1e200, 1e200, 1e200]
    values = [{"x": torch.tensor([value], dtype=torch.float64)} for value in huge]
    seen = rolled_out([0, 1, 2], [*values, values[-1]], values, 3, values, [0.1] * 3)
    threshold = DriftThreshold(0.5)
    assert threshold.limit(threshold.init(), seen) == 1


def test_no_step_with_a_damped_drift_is_accepted() -> None:
    class Greedy(SlidingWindow):
        def stride(self, memory: None, passed: Sequence[bool]) -> int:
            return len(passed)

    def check(_: Any, iteration: Iteration) -> None:
        assert iteration.threshold is not None
        failed = [error > iteration.threshold for error in iteration.errors]
        known = all(map(math.isfinite, iteration.errors))
        assert not known or not any(failed[: iteration.stride - 1])

    solver = PicardSolver(Greedy(32), DriftThreshold(), acceleration=Secant())
    solve(Descent(0.3, 150), solver, on_iteration=check)


def test_a_rank_that_damps_what_rank_0_accepts_uses_it_in_full() -> None:
    """Devices of different models may round an error to either side of the bound."""
    rank0: list[SolverState[Any]] = []

    def solver(tolerance: float) -> PicardSolver:
        threshold = DriftThreshold(tolerance)
        return PicardSolver(SlidingWindow(32), threshold, acceleration=Secant())

    solve(Descent(0.3), solver(0.2), on_iteration=lambda s, _: rank0.append(s))
    differed = 0
    for before, after in pairwise(rank0):

        class Other(InlineDispatcher):
            wanted = after.step - before.step

            def agree(self, numbers: Sequence[int]) -> list[int]:
                nonlocal differed
                if len(numbers) > 1:  # not the stride
                    return list(numbers)
                differed += numbers[0] < self.wanted
                return [self.wanted]

        options = {"max_iterations": 1, "throw": False}
        other = solve(Descent(0.3), solver(0.1), Other, state=before, **options)
        assert tree_equal(other.value, after.y)
        # It damps what lies ahead, a little more here, since its bound is stricter.
        assert len(other.state.guesses) == len(after.guesses)
        ahead = zip(other.state.guesses, after.guesses, strict=True)
        apart = [float((one["x"] - two["x"]).abs().max()) for one, two in ahead]
        assert max(apart, default=0) < 0.3
    assert differed


def test_stride_does_not_depend_on_the_scale_of_the_problem() -> None:
    solver = PicardSolver(SlidingWindow(8), DriftThreshold(0.1))
    plain = solve(Descent(0.02), solver).stats.strides
    assert {5, 7, 8} <= set(plain)

    class Scaled(Descent):
        """The same problem in other units of the state and of the drift."""

        def init(self) -> tuple[State, None]:
            return {"x": torch.full((4,), 1024.0, dtype=torch.float64)}, None

        def make_drift(self, device: torch.device) -> Drift:
            inner = super().make_drift(torch.device("cpu"))
            return lambda step, y: (
                {"x": 16 * inner(step, {"x": y["x"] / 1024})[0]["x"]},
                {},
            )

        def update(
            self, step: int, y: State, carry: None, drift: State
        ) -> tuple[State, None]:
            return super().update(step, y, carry, {"x": drift["x"] * 64})

    assert solve(Scaled(0.02), solver).stats.strides == plain


def test_a_slot_is_held_back_now_and_then_when_everything_passes() -> None:
    solver = PicardSolver(SlidingWindow(4), DriftThreshold(1e6, hold_every=12))
    strides = solve(Descent(0.01, num_steps=40), solver).stats.strides
    # One step without a secant; then it is measured, and again every third iteration;
    # the last window holds nothing back.
    assert strides == [1, 4, 4, 3, 4, 4, 3, 4, 4, 3, 4, 2]
    assert solve(Descent(0.01, num_steps=4), solver).stats.strides == [1, 3]


@pytest.mark.parametrize(("window", "every"), [(2, 8), (5, 4), (8, 2), (32, 2)])
def test_one_slot_in_sixteen_is_held_back(window: int, every: int) -> None:
    solver = PicardSolver(SlidingWindow(window), DriftThreshold(1e6))
    num_steps = 1 + 2 * (every * window - 1) + window
    first = [16] if window == 32 else []  # half a wide window with the first secants
    strides = solve(Descent(0.01, num_steps=num_steps + sum(first)), solver)
    round_ = [*[window] * (every - 1), window - 1]
    assert strides.stats.strides == [1, *first, *round_, *round_, window]


def test_constant_drift_needs_no_second_look() -> None:
    solver = PicardSolver(SlidingWindow(8), DriftThreshold(0.01, hold_every=64))
    solution = solve(Descent(0.1, num_steps=57, curvature=0.0), solver)
    assert solution.stats.strides == [1, *[8] * 7]


def test_rounding_is_no_evidence() -> None:
    threshold = DriftThreshold(0.1)
    memory = replace(threshold.init(), secants=[[2.0]])
    seen = observe([0, 1], [1.0, 1.0], [1e-16, 1.0], stride=1)
    memory = learn(threshold, threshold.after(memory, seen), [1, 2], [1 + 2e-7, 1.0])
    assert memory.secants == [[2.0]]
    assert memory.age == 0


def test_only_the_secants_of_the_last_measurements_count() -> None:
    threshold = DriftThreshold(0.5, memory=2)
    memory = threshold.init()
    for drift in (9.0, 3.0, 3.0):
        seen = observe([0, 1], [1.0, 1.0], [0.25, 1.0], stride=1)
        memory = learn(threshold, threshold.after(memory, seen), [1, 2], [drift, drift])
    # |3 - 1| / 3 / 0.5; the 9 / 9 / 0.5 of before is forgotten.
    assert threshold.error(memory, 9, 1.0) == pytest.approx(4 / 3)
    # An iteration that measured nothing pushes nothing out.
    assert threshold.error(learn(threshold, memory, [2], [3.0]), 9, 1.0) == (
        pytest.approx(4 / 3)
    )


def test_an_iteration_that_measured_a_whole_window_does_not_outvote_later_ones() -> (
    None
):
    threshold = DriftThreshold(0.5)

    def error(*secants: list[float]) -> float:
        return threshold.error(replace(threshold.init(), secants=list(secants)), 9, 1.0)

    assert error([1.0] * 63) == 1.0
    assert error([1.0] * 63, [9.0]) == 1.0
    assert error([1.0] * 63, [9.0], [7.0], [8.0]) == 8.0
    assert error([1.0] * 32, [3.0] * 32) == 3.0
    assert error([1.0, 2.0, 3.0, 4.0], [5.0]) == 4.0


PULL = 0.04


class Drowned(Trajectory[None]):
    """A pull to zero in one entry, and in the other noise that cancels in pairs.

    The noise is most of a drift's norm; the pull is all that remains in the sum.
    """

    def __init__(self, noise: float) -> None:
        self.noise, self.num_steps = noise, 48
        self.evaluated: dict[int, State] = {}

    def init(self) -> tuple[State, None]:
        return {"x": torch.tensor([1.0, 0.0], dtype=torch.float64)}, None

    def of(self, step: int, y: State) -> State:
        noise = torch.tensor(self.noise * (-1) ** step, dtype=torch.float64)
        return {"x": torch.stack([y["x"][0], noise])}

    def make_drift(self, device: torch.device) -> Drift:
        def drift(step: int, y: State) -> tuple[State, dict[str, float]]:
            self.evaluated[step] = self.of(step, y)
            return self.evaluated[step], {}

        return drift

    def update(
        self, step: int, y: State, carry: None, drift: State
    ) -> tuple[State, None]:
        return {"x": y["x"] - PULL * drift["x"]}, carry


def drowned(noise: float, sums: bool) -> tuple[list[int], list[float], float]:
    """Strides, the share by which each displacement is off, and the final pull."""
    trajectory = Drowned(noise)
    solver = PicardSolver(SlidingWindow(32), DriftThreshold(0.1, sums=sums))
    anchors = {0: trajectory.init()[0]}
    off: list[float] = []

    def check(state: SolverState[Any], iteration: Iteration) -> None:
        y, error = anchors[iteration.begin], 0.0
        for step in range(iteration.begin, iteration.end):
            used = trajectory.evaluated[step]
            error += float((trajectory.of(step, y)["x"] - used["x"]).norm())
            y, _ = trajectory.update(step, y, None, used)
        displacement = float((y["x"] - anchors[iteration.begin]["x"]).norm())
        off.append(PULL * error / displacement)
        anchors[state.step] = y

    solution = solve(trajectory, solver, on_iteration=check)
    return solution.stats.strides, off, float(solution.value["x"][0])


def test_errors_that_each_pass_are_bounded_in_sum() -> None:
    exact = (1 - PULL) ** 48
    strides, off, value = drowned(noise=8.0, sums=False)
    assert strides == [1, 16, 31]  # every step passes …
    assert max(off) > 0.4  # … and half of a displacement is wrong
    assert value < 0
    strides, off, value = drowned(noise=8.0, sums=True)
    assert max(off) < 0.11  # the tolerance is 0.1
    assert value == pytest.approx(exact, rel=0.15)
    assert len(strides) == 5


def test_the_sum_of_aligned_drifts_is_bounded_by_each_of_them() -> None:
    assert drowned(noise=0.0, sums=True) == drowned(noise=0.0, sums=False)


def test_the_longest_stretch_that_passes_by_hand() -> None:
    threshold = DriftThreshold(0.5)
    memory = replace(threshold.init(), secants=[[1.0]])
    drifts = [1.0, -2.0, 2.0, 2.0]
    seen = observe([0, 1, 2, 3], drifts, [0.0, 0.0, 0.0, 0.0], stride=4)
    # Errors of the drifts 0, .3, .3, .3, so 0, .6, 1.2, 1.8 in all, of 1, 1, 1, 3.
    seen = replace(seen, errors=[0.3, 0.3, 0.3, 0.3])
    assert threshold.limit(memory, seen) == 1
    assert threshold.limit(memory, replace(seen, errors=[0.1, 0.1, 0.1, 9.0])) == 4
    # .4, .8 of 1 and 1, but 1.2 of 3: the longest counts.
    assert threshold.limit(memory, replace(seen, errors=[0.2, 0.2, 0.2, 9.0])) == 4
    assert threshold.limit(memory, replace(seen, stride=3, errors=[0.2] * 4)) == 2
    assert DriftThreshold(0.5, sums=False).limit(memory, seen) == 4
    assert DriftThreshold(0.0).limit(memory, seen) == 4
    still = observe([0, 1], [0.0, 0.0], [0.0, 0.0], stride=2)
    assert threshold.limit(memory, still) == 2  # there is no error to add up


def test_a_run_that_warms_up_is_judged_by_a_quarter() -> None:
    bounds: dict[int, float | None] = {}
    solver = PicardSolver(SlidingWindow(4), DriftThreshold(1e6, warmup=6))
    solve(
        Descent(0.02),
        solver,
        on_iteration=lambda _, seen: bounds.update({seen.begin: seen.threshold}),
    )
    # A window that begins within the warm-up may reach beyond it.
    assert {begin for begin in bounds if 0 < begin < 6}
    assert all(bounds[begin] == (2.5e5 if begin < 6 else 1e6) for begin in bounds)


@pytest.mark.parametrize("toy", TOYS)
@pytest.mark.parametrize("window", [1, 2, 7, 64])
def test_tolerance_zero_is_sequential(toy: str, window: int) -> None:
    solver = PicardSolver(SlidingWindow(window), DriftThreshold(0), "momentum")
    solution = solve(TOYS[toy].make(), solver)
    assert tree_equal(solution.value, TOYS[toy].loop()[-1])


@pytest.mark.parametrize("toy", TOYS)
def test_a_small_tolerance_stays_close_and_a_window_of_one_is_sequential(
    toy: str,
) -> None:
    loop = TOYS[toy].loop()[-1]
    solver = PicardSolver(SlidingWindow(5), DriftThreshold(1e-3))
    solution = solve(TOYS[toy].make(), solver)
    assert solution.stats.num_iterations < STEPS
    for name, value in solution.value.items():
        torch.testing.assert_close(value, loop[name], rtol=0.02, atol=0.02)
    alone = PicardSolver(SlidingWindow(1), DriftThreshold(0.5))
    solution = solve(TOYS[toy].make(), alone)
    assert tree_equal(solution.value, loop)
    assert solution.stats.strides == [1] * STEPS


@pytest.mark.parametrize("toy", ["network-sgd", "growing"])
def test_a_checkpoint_goes_on_as_if_nothing_had_happened(
    toy: str, tmp_path: Path
) -> None:
    solver = PicardSolver(SlidingWindow(5), DriftThreshold(0.05), "momentum")
    whole = solve(TOYS[toy].make(), solver)
    for pause in range(1, whole.stats.num_iterations):
        half = solve(TOYS[toy].make(), solver, max_iterations=pause, throw=False)
        checkpoint.save(tmp_path / str(pause), half.state)
        state = checkpoint.load(tmp_path / str(pause))
        resumed = solve(TOYS[toy].make(), solver, state=state)
        assert tree_equal(resumed.value, whole.value)
        assert resumed.stats == whole.stats
        assert tree_equal(resumed.state.threshold, whole.state.threshold)


def test_secants_outlive_a_jump_and_what_belongs_to_steps_does_not() -> None:
    memories: dict[int, Any] = {}
    solver = PicardSolver(SlidingWindow(5), DriftThreshold(1e6))
    solve(
        TOYS["growing"].make(),
        solver,
        on_iteration=lambda state, _: memories.update({state.step: state.threshold}),
    )
    assert {5, 9} <= memories.keys()
    for step in (5, 9):
        assert memories[step].secants
        assert not memories[step].held
        assert not memories[step].own
    assert memories[1].held
    forgotten = solver.threshold.jumped(memories[5], {}, None)
    assert forgotten == solver.threshold.init()


def test_the_first_iteration_after_a_jump_trusts_the_secants_of_before() -> None:
    """And not one step alone, which it is while there is none."""
    begins: dict[int, int] = {}
    solver = PicardSolver(SlidingWindow(4), DriftThreshold(1e6))
    solve(
        TOYS["growing"].make(),
        solver,
        on_iteration=lambda _, it: begins.update({it.begin: it.stride}),
    )
    assert begins[0] == 1
    assert begins[5] == 4  # up to the next jump


@pytest.mark.parametrize(
    ("length", "remaining", "most"),
    [
        (8, 20, 4),  # 4 + 8 + 8 takes no longer than 8 + 8 + 4
        (8, 17, 4),  # 1 + 8 + 8 would do; half is enough
        (8, 23, 7),
        (8, 24, 8),
        (8, 8, 8),
        (3, 4, 2),
        (1, 9, 1),
    ],
)
def test_after_a_jump_slots_are_held_back_where_that_is_free(
    length: int, remaining: int, most: int
) -> None:
    threshold = DriftThreshold()
    known = replace(threshold.init(), secants=[[1.0]])
    after = threshold.jumped(known, {}, {})
    assert threshold.most(after, length, remaining) == most
    assert most + length * (math.ceil(remaining / length) - 1) >= remaining
    assert threshold.most(known, length, remaining) == length


def test_a_jump_costs_no_iteration_and_gives_secants_at_once() -> None:
    """Steps 5 to 8 in windows of three, between two jumps."""
    seen: dict[int, Any] = {}
    solver = PicardSolver(SlidingWindow(3), DriftThreshold(1e6))
    solve(
        TOYS["growing"].make(),
        solver,
        on_iteration=lambda state, it: seen.update({it.begin: (it.stride, state)}),
    )
    assert [seen[step][0] for step in (5, 7)] == [2, 2]
    assert seen[5][1].threshold.held.keys() == {7}
    assert not seen[5][1].threshold.fresh


def test_relative_threshold_counts_optimizer_steps() -> None:
    """Off by at most ten updates passes, whatever their size."""
    strides = []
    for rate in (1e-6, 1e-3):
        solver = PicardSolver(SlidingWindow(8), FixedThreshold(100.0, relative=True))
        drift = Descent(rate, num_steps=33, curvature=0.0)
        strides.append(solve(drift, solver).stats.strides)
    assert strides[0] == strides[1]
    assert strides[0][0] == 1
    assert max(strides[0]) == 8
    exact = PicardSolver(SlidingWindow(8), FixedThreshold(0, relative=True))
    solution = solve(TOYS["network-sgd"].make(), exact)
    assert tree_equal(solution.value, TOYS["network-sgd"].loop()[-1])
    plain = PicardSolver(SlidingWindow(8), FixedThreshold(0))
    assert solution.stats == solve(TOYS["network-sgd"].make(), plain).stats
