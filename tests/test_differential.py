"""Reverse diffusions: integrators, corrector, blocks of fixed depth."""

from __future__ import annotations

import itertools
import math
import random
from typing import Literal

import pytest
import torch
from torch import Tensor

from dreampropeller import (
    BlockWindow,
    EMAThreshold,
    FixedThreshold,
    NotConverged,
    PicardSolver,
    Sequential,
    solve,
)
from dreampropeller.differential import (
    Corrector,
    DiffusionTrajectory,
    Grid,
    check_arguments,
    langevin_covariance,
)
from dreampropeller.piadm import piadm
from dreampropeller.scores import DenoiserScore, GaussianMixtureScore

Kind = Literal["sde", "ode"]
GRID = Grid(horizon=3.0, step=0.1, stop=0.05)
CASES: list[tuple[Kind, Corrector | None]] = [
    ("sde", None),
    ("ode", None),
    ("ode", Corrector(0.4, 2, 5)),
]
each = pytest.mark.parametrize(("kind", "corrector"), CASES)


def noise(num: int, dim: int, seed: int = 0) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    return torch.randn(num, dim, generator=source, dtype=torch.float64)


def two(dim: int) -> GaussianMixtureScore:
    means = torch.zeros(2, dim, dtype=torch.float64)
    means[:, 0] = torch.tensor([1.5, -1.5])
    variances = torch.linspace(0.1, 1, dim, dtype=torch.float64).expand(2, dim)
    return GaussianMixtureScore(torch.tensor([0.3, 0.7]).double(), means, variances)


def normal(s: float, x: Tensor) -> Tensor:
    """The score of a standard normal, at every time."""
    del s
    return -x


@each
def test_full_depth_is_the_sequential_loop_bit_for_bit(
    kind: Kind, corrector: Corrector | None
) -> None:
    start = noise(3, 2)
    whole = piadm(
        two(2), start, GRID, kind, corrector=corrector, form="sequential", seed=4
    )
    deep = piadm(two(2), start, GRID, kind, corrector=corrector, depth=99, seed=4)
    assert torch.equal(deep.value["x"], whole.value["x"])
    shallow = piadm(two(2), start, GRID, kind, corrector=corrector, depth=1, seed=4)
    assert not torch.equal(shallow.value["x"], whole.value["x"])


@pytest.mark.parametrize("case", range(4))
@each
def test_after_k_iterations_the_first_k_steps_of_a_block_are_exact(
    kind: Kind, corrector: Corrector | None, case: int
) -> None:
    """Random grids; a block is sequential from the state at its own start."""
    draw = random.Random(case)
    block, stop = draw.uniform(0.3, 1.0), draw.uniform(0.05, 0.3)
    horizon, step = stop + draw.uniform(0.4, 2.0), block * draw.uniform(0.1, 0.4)
    grid, depth = Grid(horizon, step, block, stop), draw.randint(1, 5)
    trajectory = DiffusionTrajectory(two(2), noise(3, 2), grid, kind, corrector, case)
    seen: list[Tensor] = []

    def recorded(s: float, x: Tensor) -> Tensor:
        seen.append(x)
        return two(2)(s, x)

    trajectory.score = recorded
    window = BlockWindow(trajectory.boundaries, depth)
    solve(trajectory, PicardSolver(window, FixedThreshold(0)), check=False)
    states = iter(seen)
    for begin, end in itertools.pairwise([0, *trajectory.boundaries]):
        rounds = [
            [next(states) for _ in range(begin, end)]
            for _ in range(min(depth, end - begin))
        ]
        y, carry = {"x": rounds[0][0]}, trajectory.init()[1]
        for step, later in enumerate(range(begin, begin + len(rounds))):
            for guesses in rounds[step:]:
                assert torch.equal(guesses[step], y["x"])
            drift = {"score": two(2)(trajectory.steps[later].time, y["x"])}
            y, carry = trajectory.update(later, y, carry, drift)
    assert next(states, None) is None


@each
def test_rounds_and_calls_are_counted(kind: Kind, corrector: Corrector | None) -> None:
    trajectory = DiffusionTrajectory(two(2), noise(1, 2), GRID, kind, corrector)
    stats = piadm(two(2), noise(1, 2), GRID, kind, corrector=corrector, depth=3).stats
    assert stats.num_iterations == 3 * len(trajectory.boundaries)
    assert stats.num_evaluations == 3 * trajectory.num_steps


def test_grid_steps_cover_the_time_and_shrink_towards_the_data() -> None:
    blocks = Grid(horizon=5.0, step=0.2, stop=1e-3).blocks()
    assert len(blocks) == 5
    flat = [small for block in blocks for small in block]
    assert sum(small.length for small in flat) == pytest.approx(5.0 - 1e-3)
    for one, after in itertools.pairwise(flat):
        assert one.time - one.length == pytest.approx(after.time)
    assert all(small.length <= 0.2 * min(1, small.time) + 1e-12 for small in blocks[-1])


def test_ode_leaves_a_standard_normal_alone() -> None:
    start = noise(5, 3)
    end = piadm(normal, start, GRID, "ode", form="sequential").value["x"]
    torch.testing.assert_close(end, start, rtol=1e-13, atol=1e-13)


def test_sde_keeps_the_variance_of_a_standard_normal_to_first_order() -> None:
    errors = []
    for step in (0.2, 0.1, 0.05):
        variance = 1.0
        for small in Grid(4.0, step, 1.0, 1e-2).blocks()[0]:
            e = small.length
            growth = math.exp(e / 2) - 2 * math.expm1(e / 2)
            variance = growth**2 * variance + math.expm1(e)
        errors.append(abs(variance - 1))
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.2)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.2)
    end = piadm(normal, noise(40_000, 1), Grid(1.5, 0.05, stop=0.5), "sde", depth=30)
    assert float(end.value["x"].var()) == pytest.approx(1, abs=0.06)


def test_two_half_steps_of_the_corrector_are_one() -> None:
    for g, e in ((2.0, 0.1), (0.7, 1.5), (1e-3, 0.01), (2.0, 1e-3), (1.0, 0.6)):
        half_u, half_v, half_uv = langevin_covariance(g, e / 2)
        q, r = math.exp(-g * e / 2), -math.expm1(-g * e / 2) / g
        whole = langevin_covariance(g, e)
        both = (
            half_u + 2 * r * half_uv + r**2 * half_v + half_u,
            q**2 * half_v + half_v,
            q * (half_uv + r * half_v) + half_uv,
        )
        assert both == pytest.approx(whole, rel=1e-14)  # to rounding


@pytest.mark.parametrize(
    ("dim", "num"),
    [
        (2, 2000),
        (8, 600),
        pytest.param(2, 10_000, marks=pytest.mark.long),
        pytest.param(8, 10_000, marks=pytest.mark.long),
    ],
)
@each
def test_samples_have_the_law_of_the_data(
    kind: Kind, corrector: Corrector | None, dim: int, num: int
) -> None:
    score = two(dim)
    grid = Grid(horizon=6.0, step=0.05, stop=1e-2)
    end = piadm(score, noise(num, dim), grid, kind, corrector=corrector, depth=8)
    x, source = end.value["x"], torch.Generator().manual_seed(5)
    exact = score.sample(1e-2, num, source)
    many = min(num, 600 if num < 10_000 else 3000)
    assert energy_p_value(x[:many], exact[:many]) > 0.01
    assert float((x[:, 0] > 0).double().mean()) == pytest.approx(
        0.3, abs=2 / math.sqrt(num)
    )


def test_corrector_keeps_the_law_it_starts_from() -> None:
    score, source = two(2), torch.Generator().manual_seed(1)
    start = score.sample(0.5, 3000, source)
    grid = Grid(horizon=0.5 + 1e-9, step=1e-9, stop=0.5)
    corrector = Corrector(time=2.0, blocks=2, steps=60)
    end = piadm(score, start, grid, "ode", corrector=corrector, form="sequential")
    exact = score.sample(0.5, 600, source)
    assert energy_p_value(end.value["x"][:600], exact) > 0.01
    assert float((end.value["x"] - start).square().mean()) > 0.2  # it moves
    shrink = math.exp(-0.5)
    means, weights = math.sqrt(shrink) * score.means, score.weights
    mean = weights @ means
    spread = shrink * score.variances + 1 - shrink + means.square()
    variance = weights @ spread - mean.square()
    deviation = (variance / len(start)).sqrt()
    assert ((end.value["x"].mean(0) - mean).abs() < 4 * deviation).all()
    torch.testing.assert_close(end.value["x"].var(0), variance, rtol=0.1, atol=0)


def test_corrector_leaves_a_normal_up_to_the_first_order_of_its_step() -> None:
    r"""With $S = -u / \lambda$ all is linear: the exact moments of $(u, v)$."""
    g, scale, time = 2.0, 0.5, 2.0

    def moments(steps: int) -> Tensor:
        e = time / steps
        q, r = math.exp(-g * e), -math.expm1(-g * e) / g
        move = torch.tensor([[1 - (e - r) / (g * scale), r], [-r / scale, q]])
        var_u, var_v, both = langevin_covariance(g, e)
        added = torch.tensor([[var_u, both], [both, var_v]])
        found = torch.diag(torch.tensor([scale, 1.0]))
        for _ in range(steps):
            found = move @ found @ move.T + added
        return found

    errors = [abs(float(moments(n)[0, 0]) - scale) for n in (20, 40, 80)]
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.1)
    start = noise(20_000, 1) * math.sqrt(scale)
    grid = Grid(horizon=0.5 + 1e-9, step=1e-9, stop=0.5)
    corrector = Corrector(time=time, steps=20, friction=g)
    score = lambda s, x: -x / scale  # noqa: E731
    end = piadm(score, start, grid, "ode", corrector=corrector, form="sequential")
    expected = float(moments(20)[0, 0])
    assert float(end.value["x"].var()) == pytest.approx(expected, rel=0.03)


def energy_p_value(x: Tensor, y: Tensor, permutations: int = 199) -> float:
    """The permutation p-value of the energy distance between two samples."""
    both = torch.cat([x, y])
    distances = torch.cdist(both, both)
    source = torch.Generator().manual_seed(0)
    sign = torch.cat([torch.ones(len(x)), -torch.ones(len(y))]).double()

    def statistic(sign: Tensor) -> float:
        return float(-(sign @ distances @ sign))

    found = statistic(sign)
    others = [
        statistic(sign[torch.randperm(len(sign), generator=source)])
        for _ in range(permutations)
    ]
    return (1 + sum(other >= found for other in others)) / (permutations + 1)


def rounds(dim: int, kind: Kind) -> tuple[int, int]:
    """The smallest depth with an error below 1e-4, and the longest block's steps."""
    step = 2 / dim if kind == "sde" else 1 / math.sqrt(dim)
    grid = Grid(horizon=math.log(dim) + 2, step=min(step, 1.0), stop=1e-2)
    start, score = noise(1, dim), two(dim)
    exact = piadm(score, start, grid, kind, form="sequential").value["x"]
    trajectory = DiffusionTrajectory(score, start, grid, kind)
    ends = [0, *trajectory.boundaries]
    most = max(b - a for a, b in itertools.pairwise(ends))
    for depth in range(1, most + 1):
        end = piadm(score, start, grid, kind, depth=depth).value["x"]
        if float((end - exact).square().mean()) <= 1e-4:
            return depth, most
    raise AssertionError("the full depth is exact")


@pytest.mark.parametrize("kind", ["sde", "ode"])
def test_depth_grows_much_slower_than_the_steps_of_a_block(kind: Kind) -> None:
    few, short = rounds(4, kind)
    many, long = rounds(32, kind)
    assert long >= 2 * short
    assert many <= few + 5
    assert many / few < (long / short) ** 0.75


@pytest.mark.parametrize("kind", ["sde", "ode"])
def test_errors_fall_faster_with_every_iteration_and_long_blocks_need_more(
    kind: Kind,
) -> None:
    """As (L h)^k / k!: the reason for blocks of length O(1)."""
    start, score = noise(4, 4), two(4)

    def errors(block: float, depths: tuple[int, ...]) -> list[float]:
        grid = Grid(horizon=2.5, step=0.1, block=block, stop=0.5)
        exact = piadm(score, start, grid, kind, form="sequential").value["x"]
        ends = [piadm(score, start, grid, kind, depth=depth) for depth in depths]
        return [float((end.value["x"] - exact).square().mean()) for end in ends]

    logs = [math.log(error) for error in errors(2.0, (1, 3, 5, 7))]
    gains = [a - b for a, b in itertools.pairwise(logs)]
    assert gains == sorted(gains)  # concave
    short, middle, long = (errors(block, (3,))[0] for block in (0.5, 1.0, 2.0))
    assert short < middle / 3 < long / 9


def test_denoiser_score_is_that_of_the_predicted_noise() -> None:
    alphas = torch.linspace(0.999, 0.01, 50).double()
    mixture = two(2)

    def denoiser(x: Tensor, timestep: Tensor) -> Tensor:
        s = float(-alphas[timestep].log())
        return -mixture(s, x) * math.sqrt(-math.expm1(-s))

    score = DenoiserScore(denoiser, alphas)
    assert score.horizon == pytest.approx(-math.log(0.01))
    x = noise(4, 2)
    s = float(-alphas[20].log())
    torch.testing.assert_close(score(s, x), mixture(s, x))


def test_blocks_end_at_their_boundaries_after_a_resume_between_them() -> None:
    trajectory = DiffusionTrajectory(two(2), noise(1, 2), GRID, "sde")
    size = trajectory.boundaries[0]
    state = solve(trajectory, Sequential(), max_iterations=1, throw=False).state
    solver = PicardSolver(BlockWindow(size, 2), FixedThreshold(0))
    found = solve(trajectory, solver, state=state).stats.strides
    ends = list(itertools.accumulate(found))
    assert {end for end in ends if end > 1} == {
        min(end, trajectory.num_steps)
        for end in range(size, trajectory.num_steps + size, size)
    }


def test_bad_settings_get_a_sentence() -> None:
    start = noise(1, 2)
    with pytest.raises(ValueError, match=r"`EMAThreshold` would cut them"):
        PicardSolver(BlockWindow(4, 2), EMAThreshold(1.0))
    with pytest.raises(ValueError, match="belongs to the ODE"):
        piadm(normal, start, GRID, "sde", corrector=Corrector())
    with pytest.raises(ValueError, match="write a time before `horizon`"):
        Grid(horizon=1.0, step=0.1, stop=2.0)
    with pytest.raises(ValueError, match="`depth` is 0"):
        BlockWindow([3], 0)
    with pytest.raises(ValueError, match="ascending"):
        BlockWindow([3, 3], 1)
    with pytest.raises(ValueError, match="'sliding'"):
        piadm(normal, start, GRID, form="fast")


def test_a_depth_below_the_block_says_that_nothing_measured_the_error() -> None:
    start = noise(1, 2)
    note = piadm(two(2), start, GRID, depth=2).note
    assert "compare with `form='sequential'`" in note
    longest = int(note.split("(")[1].split()[0])
    assert piadm(two(2), start, GRID, depth=longest - 1).note
    assert not piadm(two(2), start, GRID, depth=longest).note
    assert not piadm(two(2), start, GRID, form="sequential").note


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"start": noise(2, 2).numpy()}, "`start` is a `ndarray`: write `torch.randn"),
        (
            {"start": torch.ones(2, 2, dtype=torch.long)},
            "holds `torch.int64`",
        ),
        ({"start": noise(2, 2) / 0}, "`start` holds NaN or infinity"),
        ({"grid": None}, r"`grid` is None: write `Grid\(horizon=6.0, step=0.05\)`"),
        ({"score": two(2).means}, "`score` is a `Tensor`: write a function"),
        ({"corrector": 0.5}, r"`corrector` is a `float`: write `Corrector\(\)`"),
    ],
)
def test_arguments_of_another_kind_get_a_sentence(
    changed: dict[str, object], message: str
) -> None:
    """Asked directly, because tests check the types of annotated arguments."""
    arguments = {"score": normal, "start": noise(2, 2), "grid": GRID}
    check_arguments(**arguments, corrector=None)
    with pytest.raises((TypeError, ValueError), match=message):
        check_arguments(**{**arguments, "corrector": None, **changed})


def test_shapes_that_would_be_broadcast_are_refused() -> None:
    with pytest.raises(ValueError, match=r"dimension 2: write `start=torch\.randn"):
        piadm(two(2), noise(5, 1), GRID)
    with pytest.raises(ValueError, match="return one number per coordinate"):
        piadm(lambda s, x: x[:, :1], noise(5, 2), GRID)


@pytest.mark.parametrize("form", ["block", "sequential"])
def test_a_score_that_is_not_finite_says_what_to_write_for_piadm(form: str) -> None:
    def broken(s: float, x: Tensor) -> Tensor:
        return -x / (0.0 if s < 1 else 1.0)

    with pytest.raises(NotConverged, match="write a smaller `step`") as error:
        piadm(broken, noise(2, 2), GRID, form=form)
    assert "learning rate" not in str(error.value)


def test_mixtures_that_are_none_get_a_sentence() -> None:
    good = vars(two(2))
    for name, value, message in (
        ("weights", torch.tensor([-0.5, 1.5]), "not negative"),
        ("weights", torch.tensor([0.5]), "one row per component"),
        ("variances", -good["variances"], "`variances` holds a negative number"),
        ("means", good["means"] * math.nan, "`means` holds NaN"),
        ("means", good["means"][0], "write 2 axes"),
        ("weights", torch.tensor([1, 2]), "no tensor of floating numbers"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            GaussianMixtureScore(**{**good, name: value})


def test_a_schedule_is_asked_within_its_times() -> None:
    alphas = torch.linspace(0.999, 0.01, 50).double()
    score = DenoiserScore(lambda x, t: x, alphas)
    grid = Grid(score.horizon, 0.5, stop=score.stop)
    assert piadm(score, noise(1, 2), grid, "ode", depth=2).value["x"].isfinite().all()
    for horizon, stop in ((9.0, score.stop), (score.horizon, 1e-5)):
        with pytest.raises(ValueError, match="outside the schedule, which holds 0"):
            DiffusionTrajectory(score, noise(1, 2), Grid(horizon, 0.5, stop=stop))
    for wrong, message in (
        (alphas.flip(0), "does not fall from below 1 to above 0"),
        (torch.cat([alphas, alphas.new_zeros(1)]), "zero terminal SNR"),
        (alphas + 0.5, "does not fall"),
        (alphas[None], "no tensor of shape"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            DenoiserScore(lambda x, t: x, wrong)


def test_sliding_window_reaches_the_sequential_samples() -> None:
    start = noise(2, 2)
    whole = piadm(two(2), start, GRID, form="sequential")
    slid = piadm(two(2), start, GRID, form="sliding", window=8, tolerance=1e-10)
    error = float((slid.value["x"] - whole.value["x"]).square().mean())
    assert error < 1e-6
    assert slid.stats.num_iterations < whole.stats.num_iterations
