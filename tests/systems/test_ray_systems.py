"""DreamFusion, growing Gaussians, VSD on ranks and on Ray: the bits of one process."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import dreampropeller as dp
from tests.helpers import tree_equal
from tests.systems import prolific, scenes
from tests.systems.gaussians import runs
from tests.systems.test_priors import stable_diffusion as stable_diffusion

pytestmark = [pytest.mark.chaos, pytest.mark.filterwarnings("ignore")]

LOOSE = dp.PicardSolver(
    dp.SlidingWindow(3), dp.DriftThreshold(0.2), "auto", acceleration=dp.Secant()
)


def dreamfusion(folder: Path) -> dp.Trajectory[Any]:
    del folder
    return scenes.small("trainer.max_steps=8").trajectory()


def gaussians(folder: Path) -> dp.Trajectory[Any]:
    del folder
    return runs.make()


def vsd(folder: Path) -> dp.Trajectory[Any]:
    return prolific.tiny(folder, "system.guidance.lora=shared").trajectory()


def mortal(
    make: Callable[[Path], dp.Trajectory[Any]], folder: Path, models: Path
) -> dp.Trajectory[Any]:
    """A replica whose worker is killed once, in the drift of step 2."""
    os.chdir(prolific.ROOT)
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    trajectory: Any = make(models)
    make_drift = trajectory.make_drift

    def make_mortal(device: torch.device) -> Any:
        healthy = make_drift(device)

        def drift(step: int, y: dp.State) -> Any:
            mark = folder / "killed"
            if step == 2 and not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return healthy(step, y)

        return drift

    trajectory.make_drift = make_mortal
    return trajectory


@pytest.mark.parametrize("make", [dreamfusion, gaussians, vsd])
def test_a_system_on_two_actors_one_of_them_killed_equals_one_process(
    make: Callable[[Path], dp.Trajectory[Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stable_diffusion: Path,
) -> None:
    pytest.importorskip("ray")
    from dreampropeller.dispatch.ray import RayDispatcher

    monkeypatch.chdir(prolific.ROOT)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    alone = dp.solve(make(stable_diffusion), LOOSE, check=False)
    replica = functools.partial(mortal, make, tmp_path, stable_diffusion)
    spread = functools.partial(RayDispatcher, make=replica)
    found = dp.solve(make(stable_diffusion), LOOSE, spread, check=False)
    assert (tmp_path / "killed").exists()
    assert tree_equal(found.value, alone.value)
    assert tree_equal(found.carry, alone.carry)
    assert found.stats == alone.stats


def on_rank(
    make: Callable[[Path], dp.Trajectory[Any]], models: Path, cache: Path
) -> tuple[Any, Any, dp.Stats]:
    """The value, carry and figures of a solve, on each rank."""
    os.chdir(prolific.ROOT)
    os.environ["XDG_CACHE_HOME"] = str(cache)
    torch.set_num_threads(1)
    spread = functools.partial(dp.DistributedDispatcher, timeout=240.0)
    found = dp.solve(make(models), LOOSE, spread, check=False)
    return found.value, found.carry, found.stats


@pytest.mark.parametrize("make", [dreamfusion, gaussians, vsd])
def test_a_system_on_two_and_three_ranks_equals_one_process(
    make: Callable[[Path], dp.Trajectory[Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stable_diffusion: Path,
) -> None:
    monkeypatch.chdir(prolific.ROOT)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    alone = dp.solve(make(stable_diffusion), LOOSE, check=False)
    arguments = (make, stable_diffusion, tmp_path / "cache")
    for count in (2, 3):
        ranks = dp.launch_workers(on_rank, *arguments, num_workers=count)
        assert len(ranks) == count
        for value, carry, stats in ranks:
            assert tree_equal(value, alone.value)
            assert tree_equal(carry, alone.carry)
            assert stats == alone.stats
