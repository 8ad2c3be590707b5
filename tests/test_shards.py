"""A step split between shards of its views: the same numbers, added up in order."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dreampropeller as dp
from dreampropeller.dispatch.batched import deviation
from dreampropeller.sharded_loss import RATIO
from dreampropeller.shards import added_up
from dreampropeller.verification import NotReproducible
from tests.helpers import tree_equal
from tests.sharded import VIEWS, Scene, split, trajectory, whole_loss

CPU = torch.device("cpu")
ROUNDING = 1e-12
"""Double precision; a sum in another order."""


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("views", [1, 4, 5, 8])
def test_slices_hold_every_view_once_and_differ_by_one(count: int, views: int) -> None:
    slices = [dp.Shard(index, count).of(views) for index in range(count)]
    assert [i for one in slices for i in range(views)[one]] == list(range(views))
    sizes = [len(range(views)[one]) for one in slices]
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) - min(sizes) <= 1


def test_a_shard_draws_the_numbers_that_its_views_have_in_the_whole() -> None:
    whole = dp.StepRandom(3)

    def drawn(random: dp.StepRandom, n: int) -> list[Tensor]:
        numbers, several = random.draws(7, "a"), random.draws(7, "b")
        return [
            numbers.rand(n, 1, 1, 3),
            numbers.randn(n, 4),  # goes on where the first ended
            numbers.randint(0, 100, n),
            several.randn(2, n, 5, axis=1).movedim(1, 0),
        ]

    expected = drawn(whole, VIEWS)
    parts = []
    for index in range(3):
        shard = dp.Shard(index, 3)
        random = dp.ShardRandom(3, shard, lambda step: VIEWS)
        n = len(range(VIEWS)[shard.of(VIEWS)])
        parts.append(drawn(random, n))
        one = torch.rand(2, generator=random.generator(7, "of the step"))
        other = torch.rand(2, generator=whole.generator(7, "of the step"))
        assert torch.equal(one, other)
        with pytest.raises(ValueError, match="axis 0 is not that of the views"):
            random.draws(7, "a").rand(n + 1)
    for found, wanted in zip(zip(*parts, strict=True), expected, strict=True):
        assert torch.equal(torch.cat(found), wanted)
    plain = torch.rand(VIEWS, 1, 1, 3, generator=whole.generator(7, "a"))
    assert torch.equal(expected[0], plain)


@pytest.mark.parametrize("count", [2, 3, 7])
def test_shards_add_up_to_the_step(count: int) -> None:
    """To a rounding; uneven slices weigh by their views, and empty ones nothing."""
    problem = trajectory()
    y, _ = problem.init()
    wanted, logged = problem.make_drift(CPU)(4, y)
    drifts = [problem.make_shard(CPU, index, count) for index in range(count)]
    parts = [drift(4, y) for drift in drifts]
    found, aux = problem.join_shards(parts)
    assert found.keys() == wanted.keys()
    assert deviation(found, wanted) < ROUNDING
    assert aux == pytest.approx(logged, rel=ROUNDING)
    # A buffer changes once, and a parameter moves where a view saw it.
    assert tree_equal(found["count"], wanted["count"])
    assert tree_equal(found["seen"], wanted["seen"])
    assert [("seen" in drift) for drift, _ in parts] == [True] + [False] * (count - 1)
    assert sum("last" in drift for drift, _ in parts) == 1
    if count > VIEWS:
        assert parts[-1] == ({}, {})


def test_a_quotient_without_a_count_is_zero() -> None:
    part = {f"{RATIO}share/x": torch.zeros(2)}
    aux = {f"{RATIO}share/{k}": v for k, v in (("count", 0), ("amount", 0))}
    aux |= {f"{RATIO}share/weight": 3.0, "loss": 1.0}
    found, scalars = trajectory().join_shards([(part, aux), ({"x": torch.ones(2)}, {})])
    assert tree_equal(found, {"x": torch.ones(2)})
    assert scalars == {"loss": 1.0, "share": 0.0}


def test_an_overflow_of_one_shard_is_one_of_the_step() -> None:
    """Half precision: the step is left out, and the scale falls once."""
    problem = trajectory("16-mixed")
    y, carry = problem.init()
    good = problem.make_shard(CPU, 0, 2)(0, y)[0]
    bad = problem.make_shard(CPU, 1, 2)(0, y)[0]
    bad = {"precision/found_inf": torch.tensor(True)}
    found, _ = problem.join_shards([(good, {}), (bad, {})])
    after, _ = problem.update(0, y, carry, found)
    assert torch.equal(after["points"], y["points"])
    assert int(after["precision/scale"][0]) == int(y["precision/scale"][0]) - 1


def test_parts_are_added_in_their_order_and_left_alone() -> None:
    values = [torch.tensor([v]) for v in (1e8, 1.0, -1e8)]
    parts = [({"x": value}, {"a": 1.0}) for value in values]
    total, aux = added_up(parts)
    assert total["x"].item() == 0.0  # (1e8 + 1) − 1e8 in single precision
    assert aux == {"a": 3.0}
    assert [value.item() for value in values] == [1e8, 1.0, -1e8]


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (whole_loss, "its loss is not a `dreampropeller.ShardedLoss`"),
        (
            dp.ShardedLoss(whole_loss, lambda index, count: whole_loss),
            r"returned a `tuple`: return `dreampropeller.Contribution",
        ),
    ],
)
def test_what_cannot_be_split_says_what_to_write(loss: Any, message: str) -> None:
    problem = dp.OptimizationTrajectory.from_module(
        Scene(), loss, lambda named: torch.optim.SGD(named.values(), lr=0.1), 3
    )
    with pytest.raises((ValueError, TypeError), match=message):
        problem.make_shard(CPU, 0, 2)(0, problem.init()[0])


def test_a_batch_still_finds_the_loss_of_a_sharded_one() -> None:
    batched = dp.BatchedLoss(lambda step, module: module, lambda parts: [])
    problem = dp.OptimizationTrajectory.from_module(
        Scene(),
        dp.ShardedLoss(batched, split),
        lambda named: torch.optim.SGD(named.values(), lr=0.1),
        3,
    )
    assert hasattr(problem.make_drift(CPU), "batch")


def test_a_shard_is_repeated_now_and_then_after_a_check() -> None:
    """As a whole step is: the check's verdict outlives the building of shards."""
    ticks = iter(range(10**6))  # whose place cannot be read
    torch.manual_seed(0)
    module = nn.Linear(3, 1)
    data = torch.randn(4, 3)

    def part(index: int, count: int) -> Any:
        own = dp.Shard(index, count).of(4)

        def loss(step: int, module: Any) -> dp.Contribution:
            late = 1e-3 * max(next(ticks) - 400, 0)
            return dp.Contribution(module(data[own]).square().sum() / 4 * (1 + late))

        return loss

    def whole(step: int, module: Any) -> Tensor:
        return module(data).square().mean()

    made = dp.OptimizationTrajectory.from_module(
        module,
        dp.ShardedLoss(whole, part),
        lambda named: torch.optim.SGD(named.values(), lr=1e-3),
        num_steps=300,
    )
    spread = functools.partial(dp.InlineDispatcher, views=2)
    with pytest.raises(NotReproducible, match="twice in a row"):
        dp.solve(made, dp.Sequential(), spread)


def test_a_shard_without_a_hit_and_one_that_goes_backward() -> None:
    torch.manual_seed(0)
    module = nn.Linear(3, 1)

    def split(loss: Any) -> Any:
        return dp.OptimizationTrajectory.from_module(
            module,
            dp.ShardedLoss(
                lambda step, m: loss(m).loss, lambda i, n: lambda s, m: loss(m)
            ),
            lambda named: torch.optim.SGD(named.values()),
            num_steps=2,
        )

    constant = split(lambda m: dp.Contribution(torch.zeros(())))
    y, _ = constant.init()
    assert constant.make_shard(CPU, 0, 2)(0, y) == ({}, {})

    def backward(m: Any) -> dp.Contribution:
        m(torch.ones(1, 3)).sum().backward()
        return dp.Contribution(m(torch.ones(1, 3)).sum())

    with pytest.raises(ValueError, match="shard 1 goes backward itself"):
        split(backward).make_shard(CPU, 1, 2)(0, y)
