"""A state is continued as the problem it belongs to, and saved where it belongs."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dreampropeller as dp
from dreampropeller import checkpoint
from dreampropeller.checkpoint import CheckpointError
from dreampropeller.identity import AnotherProblem
from tests.helpers import TOYS, tree_equal

SOLVER = dp.PicardSolver(dp.SlidingWindow(3), dp.FixedThreshold(0))


def adam(lr: float = 0.1, **settings: Any) -> Callable[..., torch.optim.Optimizer]:
    return lambda params: torch.optim.Adam(params.values(), lr=lr, **settings)


def two_groups(params: Any) -> torch.optim.Optimizer:
    weight, bias = params.values()
    return torch.optim.Adam([{"params": [weight]}, {"params": [bias]}], lr=0.1)


def problem(
    outputs: int = 2, optimizer: Any = None, num_steps: int = 6, **options: Any
) -> dp.OptimizationTrajectory:
    torch.manual_seed(0)
    return dp.OptimizationTrajectory.from_module(
        nn.Linear(3, outputs),
        lambda step, module: (module(torch.randn(4, 3)) - 1).square().mean(),
        optimizer or adam(),
        num_steps,
        **options,
    )


def half(trajectory: dp.Trajectory[Any]) -> dp.SolverState[Any]:
    return dp.solve(trajectory, SOLVER, max_iterations=2, throw=False).state


CHANGES = {
    "another optimizer": {"optimizer": lambda p: torch.optim.SGD(p.values(), lr=0.1)},
    "another rate": {"optimizer": adam(0.2)},
    "another setting": {"optimizer": adam(weight_decay=0.01)},
    "other groups": {"optimizer": two_groups},
    "a scheduler": {"scheduler": lambda o: torch.optim.lr_scheduler.StepLR(o, 2)},
    "another module": {"outputs": 3},
    "another prompt": {"about": {"prompt": "a blue mug"}},
    "another seed": {"seed": 1},
    "another precision": {"precision": "bf16-mixed"},
    "clipping": {"clip_grad_norm": 1.0},
    "fewer steps": {"num_steps": 5},
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_problem_is_not_continued(change: str) -> None:
    state = half(problem())
    with pytest.raises(AnotherProblem, match=r"was .* and is"):
        dp.solve(problem(**CHANGES[change]), SOLVER, state=state)


def test_solver_and_length_may_differ(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, half(problem()))
    state = checkpoint.load(tmp_path)
    for solver, steps in ((dp.Sequential(), 6), (SOLVER, 9)):
        trajectory = problem(num_steps=steps)
        straight = dp.solve(trajectory, dp.Sequential()).value
        found = dp.solve(trajectory, solver, state=state)
        assert tree_equal(found.value, straight)
        assert found.state.run == state.run


def test_a_longer_run_takes_the_jump_at_the_end_of_the_shorter_one() -> None:
    def growing(num_steps: int) -> dp.Trajectory[Any]:
        trajectory = TOYS["growing"].make()
        trajectory.num_steps = num_steps
        return trajectory

    whole = growing(TOYS["growing"].make().num_steps)
    jump = whole.next_jump(0)
    short = dp.solve(growing(jump), SOLVER).state
    assert short.step == jump
    long = dp.solve(whole, SOLVER, state=short)
    assert tree_equal(long.value, dp.solve(whole, dp.Sequential()).value)


def test_on_purpose_it_goes() -> None:
    state = dataclasses.replace(half(problem()), problem={})
    value = dp.solve(problem(about={"prompt": "other"}), SOLVER, state=state).value
    assert tree_equal(value, dp.solve(problem(), SOLVER).value)


def test_checkpoints_of_another_run_stay(tmp_path: Path) -> None:
    first, second = half(problem()), half(problem())
    assert first.run != second.run
    path = checkpoint.save(tmp_path, first)
    with pytest.raises(CheckpointError, match="of another run"):
        checkpoint.save(tmp_path, second)
    assert path.exists()
    end = dp.solve(problem(), SOLVER, state=checkpoint.load(tmp_path)).state
    checkpoint.save(tmp_path, end)  # the same run, resumed
    assert checkpoint.load(tmp_path).step == 6


def test_a_branch_that_was_given_up_goes(tmp_path: Path) -> None:
    states: list[dp.SolverState[Any]] = []
    for count in (1, 2, 4):
        more: Any = {"state": states[-1]} if states else {}
        state = dp.solve(
            problem(), SOLVER, max_iterations=count, throw=False, **more
        ).state
        states.append(state)
        checkpoint.save(tmp_path, state, keep=9)
    first, _, last = states
    resumed = dp.solve(
        problem(), SOLVER, state=first, max_iterations=1, throw=False
    ).state
    assert first.step < resumed.step < last.step
    path = checkpoint.save(tmp_path, resumed, keep=1)
    assert [path] == list(tmp_path.glob("step-*"))
    assert checkpoint.load(tmp_path).step == resumed.step


def test_two_processes_do_not_write_to_one_folder(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, half(problem()))
    code = (
        "import sys; from dreampropeller import checkpoint; from pathlib import Path; "
        "checkpoint.lock(Path(sys.argv[1]))"
    )
    run = [sys.executable, "-c", code, str(tmp_path)]
    other = subprocess.run(run, capture_output=True, text=True)
    assert "Another process writes to" in other.stderr
