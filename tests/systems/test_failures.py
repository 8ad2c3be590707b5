"""An exception in the middle of a run loses the iteration in progress, and no other."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import dreampropeller as dp
from dreampropeller import CheckpointError, checkpoint
from dreampropeller.trajectory import Drift
from systems.runs.last_state import LastState
from systems.runs.recorder import Recorder
from tests.helpers import TOYS, tree_equal

EXACT = dp.PicardSolver(dp.SlidingWindow(4), dp.FixedThreshold(0), "momentum")
LOOSE = dp.PicardSolver(
    dp.SlidingWindow(4), dp.DriftThreshold(0.2), "auto", acceleration=dp.Secant()
)
SOLVERS = {"exact": EXACT, "loose": LOOSE, "sequential": dp.Sequential()}


class Saving(Recorder):
    """Saves where the run fails, and nowhere else."""

    def __init__(self, folder: Path) -> None:
        super().__init__([folder / "stop"])
        self.folder = folder
        self.reached = 0

    def record(self, state: dp.SolverState[Any], iteration: dp.Iteration) -> None:
        self.reached = state.step

    def save(self, state: dp.SolverState[Any]) -> None:
        checkpoint.save(self.folder, state)

    def finish(self, solution: dp.Solution[Any]) -> None:
        raise AssertionError("the run was to fail")


def failing(
    name: str, where: str, error: BaseException, at: int = 7
) -> dp.Trajectory[Any]:
    """A toy that fails at a step, in its drift or in the middle of its update."""
    toy: Any = TOYS[name].make()
    make_drift, update = toy.make_drift, toy.update

    def broken_drift(device: torch.device) -> Drift:
        healthy = make_drift(device)

        def drift(step: int, y: dp.State) -> Any:
            if step == at and where == "drift":
                raise error
            return healthy(step, y)

        return drift

    def broken_update(step: int, y: dp.State, carry: Any, drift: dp.State) -> Any:
        after = update(step, y, carry, drift)  # has consumed the carry
        if step == at and where == "update":
            raise error
        return after

    toy.make_drift, toy.update = broken_drift, broken_update
    return toy


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", ["network-adamw", "grid", "growing"])
@pytest.mark.parametrize(
    "error", [ZeroDivisionError("no image"), KeyboardInterrupt()], ids=["error", "^C"]
)
def test_a_drift_that_raises_leaves_a_checkpoint_that_resumes_bit_for_bit(
    name: str, solver: str, error: BaseException, tmp_path: Path
) -> None:
    whole = dp.solve(TOYS[name].make(), SOLVERS[solver], check=False)
    recorder = Saving(tmp_path)
    with pytest.raises(type(error)):
        recorder.run(
            lambda told: dp.solve(
                failing(name, "drift", error),
                SOLVERS[solver],
                on_iteration=told,
                check=False,
            )
        )
    state = checkpoint.load(tmp_path)
    assert 0 < state.step == recorder.reached
    resumed = dp.solve(TOYS[name].make(), SOLVERS[solver], state=state, check=False)
    assert tree_equal(resumed.value, whole.value)
    assert tree_equal(resumed.carry, whole.carry)
    assert resumed.stats == whole.stats


@pytest.mark.parametrize(("solver", "saved"), [("exact", True), ("sequential", False)])
def test_a_state_that_an_update_has_consumed_is_not_saved(
    solver: str, saved: bool, tmp_path: Path
) -> None:
    """`PicardSolver` rolls out on a copy, `Sequential` on the carry itself."""
    recorder = Saving(tmp_path)
    trajectory = failing("network-adamw", "update", KeyError("gone"))
    with pytest.raises(KeyError):
        recorder.run(
            lambda told: dp.solve(
                trajectory, SOLVERS[solver], on_iteration=told, check=False
            )
        )
    assert recorder.reached > 0
    if not saved:
        assert not list(tmp_path.glob("step-*"))
        return
    whole = dp.solve(TOYS["network-adamw"].make(), SOLVERS[solver])
    state = checkpoint.load(tmp_path)
    resumed = dp.solve(TOYS["network-adamw"].make(), SOLVERS[solver], state=state)
    assert tree_equal(resumed.value, whole.value)


def test_an_error_of_the_checkpoint_does_not_hide_the_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Full(Saving):
        def save(self, state: dp.SolverState[Any]) -> None:
            raise CheckpointError("The disk is full.")

    trajectory = failing("network-adamw", "drift", ZeroDivisionError("no image"))
    with pytest.raises(ZeroDivisionError):
        Full(tmp_path).run(
            lambda told: dp.solve(trajectory, EXACT, on_iteration=told, check=False)
        )
    assert "note: The disk is full." in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.y["x"].add_(1),
        lambda state: state.carry["m"][0].mul_(2),
        lambda state: state.carry["m"].append(3),
        lambda state: state.carry.update(count=2),
        lambda state: state.guesses[0]["x"].zero_(),
        lambda state: state.carry.update(n=state.carry["n"].clone()),
    ],
)
def test_whatever_writes_into_a_state_is_noticed(
    change: Callable[[dp.SolverState[Any]], Any],
) -> None:
    carry = {"m": [torch.ones(3), 2.5], "count": 1, "n": torch.zeros(2)}
    state = dp.SolverState(3, {"x": torch.ones(4)}, carry, [{"x": torch.zeros(4)}])
    last = LastState()
    assert last.intact() is None
    last.keep(state)
    assert last.intact() is state
    assert float(state.carry["m"][0].sum()) == 3  # reading is no writing
    assert last.intact() is state
    change(state)
    assert last.intact() is None


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_a_checkpoint_has_the_mode_that_the_umask_gives(
    umask: int, tmp_path: Path
) -> None:
    before = os.umask(umask)
    try:
        path = checkpoint.save(tmp_path, dp.SolverState(1, {"x": torch.ones(2)}, None))
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


def test_a_lean_checkpoint_stands_beside_the_full_ones(tmp_path: Path) -> None:
    def names() -> list[str]:
        return sorted(path.name for path in tmp_path.glob("step-*"))

    def save(step: int, lean: bool = False) -> None:
        y = {"x": torch.full((3,), float(step))}
        checkpoint.save(tmp_path, dp.SolverState(step, y, None, run="r"), lean=lean)

    for step in (1, 2, 3):
        save(step)
    for step in (4, 5):
        save(step, lean=True)
    full = ["step-00000002.safetensors", "step-00000003.safetensors"]
    assert names() == [*full, "step-00000005.lean.safetensors"]
    assert checkpoint.load(tmp_path).step == 5
    save(5)  # a full one of the same step replaces it
    assert names() == [full[1], "step-00000005.safetensors"]
    save(9, lean=True)
    save(6)  # the run was resumed before step 9
    assert names() == ["step-00000005.safetensors", "step-00000006.safetensors"]
    assert checkpoint.load(tmp_path).step == 6
