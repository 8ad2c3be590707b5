"""Growing splats: threshold 0 is the sequential run, through jumps, ranks and death."""

from __future__ import annotations

import functools
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dreampropeller as dp
from dreampropeller import checkpoint
from dreampropeller.tree import State, copy_nest
from systems.scene.gaussians import growth
from systems.scene.gaussians.growth import GrowthConfig
from tests.helpers import tree_equal
from tests.rank_pool import RankPool
from tests.systems.gaussians.runs import (
    CPU,
    GROWTH,
    RATES,
    RELOCATION,
    STEPS,
    exact,
    make,
    solve_on_ranks,
    solve_until_killed,
)

JUMPS = [8, 16, 20, 24, 32, 40, 48, 56]


@functools.cache
def sequential() -> dp.Solution[Any]:
    return dp.solve(make(), dp.Sequential())


def loop(config: GrowthConfig) -> tuple[State, dict[str, int]]:
    """The same run by hand: autograd, Adam, its state moved by hand; and events."""
    trajectory = make(config)
    y, _ = trajectory.init()
    drift = trajectory.make_drift(CPU)
    adam = {n: (torch.zeros_like(v), torch.zeros_like(v)) for n, v in y.items()}
    seen = growth.nothing_seen(len(y["geometry.means"]), y["geometry.means"])
    events: dict[str, int] = {"clone": 0, "split": 0, "prune": 0, "reset": 0}
    random = dp.StepRandom(0)
    for step in range(STEPS):
        splats = {n.removeprefix("geometry."): v for n, v in y.items()}
        if step and step % config.interval == 0:
            before = len(splats["means"])
            splats, rows = growth.densify(
                splats, seen, config, 200, random.generator(step, "growth")
            )
            counts = torch.bincount(rows.parents[rows.born], minlength=before)
            events["clone"] += int((counts == 1).sum())
            events["split"] += int((counts == 2).sum())
            events["prune"] += before - len(rows.parents.unique())
            adam = {n: (rows.take(m), rows.take(v)) for n, (m, v) in adam.items()}
            seen = growth.nothing_seen(len(rows.parents), splats["means"])
        if step and step % config.reset_interval == 0:
            splats = growth.reset_opacities(splats, config)
            events["reset"] += 1
            zero = torch.zeros_like(splats["opacities"])
            adam["geometry.opacities"] = (zero, zero)
        y = {f"geometry.{n}": v for n, v in splats.items()}
        found, _ = drift(step, y)
        seen = growth.counted(seen, {n: found[f"seen/{n}"] for n in seen})
        for name in y:
            parameter = torch.nn.Parameter(y[name].clone())
            rate = RATES[name.removeprefix("geometry.")]
            optimizer = torch.optim.Adam(
                [parameter], rate, betas=(0.9, 0.99), eps=1e-15
            )
            mean, square = adam[name]
            optimizer.state[parameter] = {
                "step": torch.tensor(float(step)),
                "exp_avg": mean.clone(),
                "exp_avg_sq": square.clone(),
            }
            parameter.grad = found[name]
            optimizer.step()
            state = optimizer.state[parameter]
            adam[name] = (state["exp_avg"], state["exp_avg_sq"])
            y[name] = parameter.detach()
    return y, events


def test_sequential_is_the_loop_by_hand_and_everything_happens() -> None:
    value, events = loop(GROWTH)
    assert min(events.values()) > 0, events
    assert tree_equal(sequential().value, value)


def test_threshold_zero_is_sequential_through_growth() -> None:
    trajectory, jumps, step = make(), [], -1
    while (step := trajectory.next_jump(step)) < STEPS:
        jumps.append(step)
    assert jumps == JUMPS
    solution = dp.solve(trajectory, exact(7))
    assert tree_equal(solution.value, sequential().value)
    assert tree_equal(solution.carry, sequential().carry)


def test_two_ranks_are_one(two_ranks: RankPool) -> None:
    for answer in two_ranks(solve_on_ranks, 4):
        assert tree_equal(answer["value"], sequential().value)
        assert tree_equal(answer["carry"], sequential().carry)


@pytest.mark.parametrize(
    "step",
    [
        pytest.param(23, id="before a jump"),
        pytest.param(24, id="after a jump", marks=pytest.mark.long),
    ],
)
def test_a_killed_run_resumes_to_the_same_bits(step: int, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=solve_until_killed, args=(tmp_path, step))
    process.start()
    process.join(600)
    assert process.exitcode == -9
    state = checkpoint.load(tmp_path)
    assert state.step == step
    solution = dp.solve(make(), exact(3), state=state)
    assert tree_equal(solution.value, sequential().value)
    assert tree_equal(solution.carry, sequential().carry)


def test_relocation_is_sequential_too() -> None:
    wanted = dp.solve(make(RELOCATION), dp.Sequential())
    found = dp.solve(make(RELOCATION), exact(3))
    assert len(wanted.value["geometry.means"]) > 60
    assert tree_equal(found.value, wanted.value)
    assert tree_equal(found.carry, wanted.carry)
    noisy, still = (
        dp.solve(
            make(GrowthConfig(**{**vars(RELOCATION), "noise": noise})),
            dp.Sequential(),
            max_iterations=RELOCATION.interval + 1,
            throw=False,
        ).value
        for noise in (RELOCATION.noise, 0.0)
    )
    assert not tree_equal(noisy, still)


def test_each_accepted_step_counts_once() -> None:
    """However often it was evaluated, and whatever guesses saw."""
    trajectory = make(GrowthConfig(interval=100))
    counts: list[Tensor] = []

    def look(state: dp.SolverState[Any], iteration: dp.Iteration) -> None:
        del iteration
        counts.append(state.carry["seen"]["count"].clone())

    loose = dp.PicardSolver(dp.SlidingWindow(8), dp.DriftThreshold(0.5), "momentum")
    solution = dp.solve(trajectory, loose, on_iteration=look)
    assert solution.stats.num_evaluations > STEPS
    # Every splat is in front of both cameras of each step.
    for steps, count in zip(
        torch.tensor(solution.stats.strides).cumsum(0).tolist(), counts, strict=True
    ):
        assert float(count.max()) == 2 * steps


def test_moments_follow_their_rows_and_the_born_start_at_zero() -> None:
    trajectory = make()
    y, carry = trajectory.init()
    drift = trajectory.make_drift(CPU)
    for step in range(8):
        y, carry = trajectory.update(step, y, carry, drift(step, y)[0])
    before = copy_nest(carry)
    after, carry, parents = trajectory.jump(8, y, carry)
    assert parents is not None
    rows = parents["geometry.means"]
    assert len(rows) == len(after["geometry.means"]) > len(y["geometry.means"])
    born = torch.arange(len(rows)) >= rows.diff().lt(0).nonzero()[0, 0] + 1
    moved = carry["optimizers"][0]["state"]["geometry.means"]["exp_avg"]
    old = before["optimizers"][0]["state"]["geometry.means"]["exp_avg"]
    assert torch.equal(moved[~born], old[rows[~born]])
    assert not moved[born].any()
    assert old.any(-1).sum() > 20
    assert not carry["seen"]["count"].any()
