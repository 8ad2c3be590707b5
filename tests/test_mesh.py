"""Ranks in rows and columns: a window's steps over the rows, views over the columns."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

import dreampropeller as dp
from dreampropeller.verification import NotReproducible, deviation
from tests import sharded
from tests.helpers import tree_equal
from tests.processes import group_of
from tests.sharded import LOOSE, exact, trajectory

ROUNDING = 1e-12
"""Double precision; a sum in another order."""


def inline(views: int) -> Any:
    return functools.partial(dp.InlineDispatcher, views=views)


def test_a_mesh_is_one_process_with_as_many_shards(
    free_port: int, tmp_path: Path
) -> None:
    """Bit for bit at any threshold; and the whole step up to a rounding."""
    job = (sharded.solve_on_meshes, str(tmp_path))
    with group_of(4, free_port, tmp_path, *job) as ranks:
        for rank in ranks:
            assert rank.wait(120) == 0, rank.said()
    answers = [
        torch.load(tmp_path / str(rank) / "found", weights_only=False)
        for rank in range(4)
    ]
    whole = dp.solve(trajectory(), dp.Sequential()).value
    for views in (1, 2, 4):
        alone = dp.solve(trajectory(), dp.Sequential(), inline(views))
        assert deviation(alone.value, whole) < ROUNDING
        logged: list[Any] = []
        loose = dp.solve(
            trajectory(),
            LOOSE,
            inline(views),
            on_iteration=lambda _, it, log=logged: log.append(it.aux),
        )
        for answer in answers:
            for window in (1, 5):
                value, carry = answer[f"{views}/{window}"]
                assert tree_equal(value, alone.value), (views, window)
                assert tree_equal(carry, alone.carry), (views, window)
            expected = (loose.value, loose.stats.strides, logged)
            assert tree_equal(answer[f"{views}/loose"], expected), views
            # A checkpoint of two columns goes on with any number of them.
            assert deviation(answer[f"resumed/{views}"], whole) < ROUNDING
            if views == 2:
                assert tree_equal(answer["resumed/2"], alone.value)
    for rank, answer in enumerate(answers):
        drift, join, wrong, mesh = answer["errors"]
        assert "On rank 3, step 3:" in drift, rank
        assert "ZeroDivisionError: no such image" in drift, rank
        assert "KeyError: 'loss'" in join, rank
        assert "On rank 1" in join, rank
        assert "deviates from that of the whole step by" in wrong, rank
        assert "write one of 1, 2, 4, or start another number" in mesh, rank


@pytest.mark.parametrize(
    ("who", "axis"),
    [
        (1, "of the same row"),
        pytest.param(2, "of another", marks=pytest.mark.long),
    ],
)
def test_a_killed_rank_of_either_axis_is_named_by_all_others(
    who: int, axis: str, free_port: int, tmp_path: Path
) -> None:
    with group_of(4, free_port, tmp_path, sharded.solve_and_lose, who) as ranks:
        ranks[who].wait_for("fault", 90)
        others = [rank for number, rank in enumerate(ranks) if number != who]
        assert [rank.wait(60) for rank in others] == [2, 2, 2], axis
    for rank in others:
        assert "lost contact with another rank" in rank.said()
    assert any(f"rank {who} " in rank.said() for rank in others)


def test_a_split_that_is_not_the_step_is_refused_in_one_process_too() -> None:
    def half(index: int, count: int) -> Any:
        return sharded.split(0, count)  # both shards have the first views

    problem = trajectory(loss=dp.ShardedLoss(sharded.whole_loss, half))
    with pytest.raises(NotReproducible, match="in 2 shards deviates"):
        dp.solve(problem, exact(2), inline(2))
    plain = dp.OptimizationTrajectory(
        lambda step, y: y["x"].square().sum(),
        {"x": torch.ones(2)},
        lambda named: torch.optim.SGD(named.values(), lr=0.1),
        2,
    )
    with pytest.raises(ValueError, match="its loss is not a `dreampropeller"):
        dp.solve(plain, exact(2), inline(2))
    with pytest.raises(ValueError, match="`views` is 0: write at least 1"):
        dp.InlineDispatcher(plain, views=0)
