"""Components of ten lines, and what a window or a trajectory may add."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from dreampropeller import (
    Acceleration,
    Anderson,
    FixedThreshold,
    Memory,
    PicardSolver,
    Predictor,
    Rollout,
    Secant,
    Sequential,
    SlidingWindow,
    State,
    Threshold,
    Window,
    checkpoint,
    solve,
)
from dreampropeller.tree import take_rows
from tests.helpers import TOYS, OrnsteinUhlenbeck, make_quadratic, tree_equal


@dataclass(frozen=True)
class Largest(Memory):
    value: float = 1e-3


class HalfOfTheLargest(Threshold[Largest]):
    """Pass what is below half of the largest error of the iteration before."""

    def init(self) -> Largest:
        return Largest()

    def bound(self, memory: Largest) -> float:
        return memory.value / 2

    def after(self, memory: Largest, rollout: Rollout) -> Largest:
        return Largest(max(rollout.errors))


@dataclass(frozen=True)
class Slope(Memory):
    last: State
    change: State


class Linear(Predictor[Slope | None]):
    """Move on as far as the last accepted step did."""

    def after(self, memory: Slope | None, rollout: Rollout) -> Slope:
        old, new = rollout.states[rollout.stride - 1 :][:2]
        return Slope(new, {name: new[name] - old[name] for name in new})

    def extend(
        self, trajectory: Any, step: int, y: State, carry: Any, memory: Any, count: int
    ) -> tuple[list[State], Any]:
        change = memory.change if memory else {}
        moved = [{n: y[n] + i * d for n, d in change.items()} for i in range(1, count)]
        return [y, *moved][:count], memory


@dataclass(frozen=True)
class Seen(Memory):
    drifts: dict[int, State]


class Averaged(Acceleration[Seen]):
    """Use the mean of a step's last two drifts where its guess is still off."""

    def init(self) -> Seen:
        return Seen({})

    def correct(self, memory: Seen, drift: State, y: State, guess: State) -> State:
        old = next(iter(memory.drifts.values()), drift)
        return {name: (value + old[name]) / 2 for name, value in drift.items()}

    def after(self, memory: Seen, rollout: Rollout) -> Seen:
        return Seen({rollout.steps[i]: rollout.drifts[i] for i in rollout.repeated})


OWN = PicardSolver(
    SlidingWindow(5), HalfOfTheLargest(), Linear(), acceleration=Averaged()
)


@pytest.mark.parametrize("name", ["quadratic-adam", "growing"])
def test_own_components_are_solved_with_saved_and_resumed(
    name: str, tmp_path: Path
) -> None:
    whole = solve(TOYS[name].make(), OWN)
    assert whole.stats.num_iterations < 12
    for pause in range(1, whole.stats.num_iterations):
        half = solve(TOYS[name].make(), OWN, max_iterations=pause, throw=False)
        path = checkpoint.save(tmp_path / str(pause), half.state)
        state = checkpoint.load(path)
        assert type(state.threshold) is Largest
        resumed = solve(TOYS[name].make(), OWN, state=state)
        assert tree_equal(resumed.value, whole.value)
        assert tree_equal(resumed.carry, whole.carry)
        assert resumed.stats == whole.stats


@pytest.mark.parametrize("name", TOYS)
def test_own_components_are_exact_in_a_window_of_one(name: str) -> None:
    solver = PicardSolver(SlidingWindow(1), HalfOfTheLargest(), acceleration=Averaged())
    assert tree_equal(solve(TOYS[name].make(), solver).value, TOYS[name].loop()[-1])


@dataclass(frozen=True)
class Depth(Memory):
    count: int = 0


@dataclass(frozen=True)
class Block(Window[Depth]):
    """Iterate a block so often, then accept all of it."""

    size: int
    depth: int

    def init(self) -> Depth:
        return Depth()

    def length(self, memory: Depth, step: int, remaining: int) -> int:
        return min(self.size, remaining)

    def stride(self, memory: Depth, passed: Sequence[bool]) -> int:
        return len(passed) if memory.count + 1 == self.depth else 0

    def after(self, memory: Depth, rollout: Rollout) -> Depth:
        return Depth(0 if rollout.stride else memory.count + 1)


@pytest.mark.parametrize(
    ("name", "acceleration"),
    [
        *((name, None) for name in TOYS),
        *(("network-adamw", one) for one in (Secant(), Anderson(), Anderson(2, 2))),
    ],
)
def test_a_block_accepts_nothing_until_its_depth(
    name: str, acceleration: Acceleration[Any] | None, tmp_path: Path
) -> None:
    """At a depth of its size the block is solved exactly (finite termination)."""
    solver = PicardSolver(
        Block(3, 3), FixedThreshold(1.0), "momentum", acceleration=acceleration
    )
    solution = solve(TOYS[name].make(), solver)
    assert solution.stats.strides[:3] == [0, 0, 3]
    assert set(solution.stats.strides[::3]) == {0}
    assert tree_equal(solution.value, TOYS[name].loop()[-1])
    assert tree_equal(solution.carry, solve(TOYS[name].make(), Sequential()).carry)
    for pause in (1, 2, 4):
        half = solve(TOYS[name].make(), solver, max_iterations=pause, throw=False)
        path = checkpoint.save(tmp_path / str(pause), half.state)
        state = checkpoint.load(path)
        resumed = solve(TOYS[name].make(), solver, state=state)
        assert tree_equal(resumed.value, solution.value)
        assert resumed.stats == solution.stats


def test_a_memory_that_is_not_known_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = solve(make_quadratic(), OWN, max_iterations=2, throw=False)
    path = checkpoint.save(tmp_path, half.state)
    monkeypatch.setattr(Memory, "kinds", classmethod(lambda cls: iter(())))
    with pytest.raises(checkpoint.CheckpointError, match=r"Largest.*import the module"):
        checkpoint.load(path)


def test_guesses_that_move_are_refused_where_they_are_measured() -> None:
    """By what the components say of themselves, not by their names."""

    class Measuring(HalfOfTheLargest):
        measures_guesses = True

    class Moving(Averaged):
        moves_guesses = True

    PicardSolver(SlidingWindow(4), Measuring(), acceleration=Averaged())
    PicardSolver(SlidingWindow(4), HalfOfTheLargest(), acceleration=Moving())
    with pytest.raises(ValueError, match=r"`Measuring` mea.*`Moving` puts"):
        PicardSolver(SlidingWindow(4), Measuring(), acceleration=Moving())


def test_rows_are_taken_and_new_ones_are_zero() -> None:
    rows = torch.arange(6.0).view(3, 2)
    taken = take_rows(rows, torch.tensor([2, -1, 0, 2]))
    assert taken.tolist() == [[4.0, 5.0], [0.0, 0.0], [0.0, 1.0], [4.0, 5.0]]
    taken += 1
    assert rows.tolist() == [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]


def test_a_step_is_not_split_unless_its_trajectory_says_how() -> None:
    class Views(OrnsteinUhlenbeck):
        def make_shard(self, device: torch.device, index: int, count: int) -> Any:
            whole = self.make_drift(device)
            return lambda step, y: ({"x": whole(step, y)[0]["x"] / count}, {})

    device, y = torch.device("cpu"), {"x": torch.ones(3).double()}
    plain = OrnsteinUhlenbeck()
    whole = plain.make_drift(device)(0, y)[0]["x"]
    assert torch.equal(plain.make_shard(device, 0, 1)(0, y)[0]["x"], whole)
    with pytest.raises(ValueError, match=r"`OrnsteinUhlenbeck` cannot split.*2 shards"):
        plain.make_shard(device, 1, 2)
    parts = [Views().make_shard(device, i, 2)(0, y)[0]["x"] for i in range(2)]
    assert torch.equal(parts[0] + parts[1], whole)
