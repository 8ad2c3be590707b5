"""Ray actors that die and are replaced: the same bits as one process."""

from __future__ import annotations

import functools
import os
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dreampropeller import (
    DriftThreshold,
    FixedThreshold,
    PicardSolver,
    Secant,
    SlidingWindow,
    State,
    Trajectory,
    WorkerError,
    solve,
)
from dreampropeller.trajectory import Drift
from tests.helpers import TOYS, OrnsteinUhlenbeck, tree_equal

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own, of its imports

from dreampropeller.dispatch.ray import RayDispatcher  # noqa: E402, after the skip

LOOSE = PicardSolver(
    SlidingWindow(5), DriftThreshold(0.1), "auto", acceleration=Secant()
)
EXACT = PicardSolver(SlidingWindow(5), FixedThreshold(0), "momentum")


@pytest.fixture(scope="module", autouse=True)
def _cluster() -> Iterator[None]:
    """One embedded cluster for all tests, as a dispatcher would start it."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    with tempfile.TemporaryDirectory(prefix="dp-") as folder:
        ray.init(
            num_cpus=2,
            num_gpus=0,
            include_dashboard=False,
            object_store_memory=2**27,
            _node_ip_address="127.0.0.1",
            _temp_dir=folder,
            log_to_driver=False,
            configure_logging=False,
            runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}},
        )
        yield
        ray.shutdown()


class Mortal:
    """A toy whose worker is killed in some drifts, the first time each is evaluated."""

    def __init__(
        self,
        name: str,
        folder: Path,
        steps: tuple[int, ...],
        fault: signal.Signals = signal.SIGKILL,
    ) -> None:
        self.name, self.folder, self.steps = name, folder, steps
        self.fault = fault

    def __call__(self) -> Trajectory[Any]:
        toy: Any = TOYS[self.name].make()
        make_drift = toy.make_drift

        def mortal(device: torch.device) -> Drift:
            healthy = make_drift(device)

            def drift(step: int, y: State) -> Any:
                mark = self.folder / str(step)
                if step in self.steps and not mark.exists():
                    mark.touch()
                    os.kill(os.getpid(), self.fault)
                return healthy(step, y)

            return drift

        toy.make_drift = mortal
        return toy


@pytest.mark.chaos
def test_ray_equals_one_process_for_every_toy() -> None:
    for name, toy in TOYS.items():
        alone = solve(toy.make(), LOOSE, check=False)
        spread = functools.partial(RayDispatcher, make=toy.make)
        found = solve(toy.make(), LOOSE, spread, check=False)
        assert tree_equal(found.value, alone.value), name
        assert tree_equal(found.carry, alone.carry), name
        assert found.stats == alone.stats, name


@pytest.mark.parametrize(
    "elastic", [pytest.param(e, marks=pytest.mark.chaos) for e in (False, True)]
)
def test_a_killed_and_replaced_worker_changes_nothing(
    elastic: bool, tmp_path: Path
) -> None:
    """Elastic: the strides may differ, so that threshold 0 is compared."""
    name, solver = "network-adamw", EXACT if elastic else LOOSE
    alone = solve(TOYS[name].make(), solver, check=False)
    steps = (0, 3, 8) if elastic else (3,)
    make = Mortal(name, tmp_path, steps)
    spread = functools.partial(RayDispatcher, make=make, elastic=elastic)
    found = solve(TOYS[name].make(), solver, spread, check=False)
    assert {path.name for path in tmp_path.iterdir()} == set(map(str, steps))
    assert tree_equal(found.value, alone.value)
    assert tree_equal(found.carry, alone.carry)
    if not elastic:
        assert found.stats == alone.stats


@pytest.mark.chaos
def test_a_stopped_worker_is_replaced_and_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name = "network-adamw"
    alone = solve(TOYS[name].make(), LOOSE, check=False)
    make = Mortal(name, tmp_path, (3,), signal.SIGSTOP)
    spread = functools.partial(RayDispatcher, make=make, heartbeat=3)
    found = solve(TOYS[name].make(), LOOSE, spread, check=False)
    assert (tmp_path / "3").exists()
    assert "no sign of life for 3 s and is replaced" in caplog.text
    assert tree_equal(found.value, alone.value)
    assert tree_equal(found.carry, alone.carry)
    assert found.stats == alone.stats


@pytest.mark.chaos
def test_a_long_drift_is_no_silence() -> None:
    """Workers that answer are waited for."""
    spread = functools.partial(RayDispatcher, make=Deadly("sleep"), heartbeat=3)
    found = solve(OrnsteinUhlenbeck(), EXACT, spread, check=False)
    alone = solve(OrnsteinUhlenbeck(), EXACT, check=False)
    assert tree_equal(found.value, alone.value)


@pytest.mark.chaos
def test_a_missing_tail_shortens_the_window_if_elastic(tmp_path: Path) -> None:
    make = Mortal("network-adamw", tmp_path, (2,))
    y, _ = TOYS["network-adamw"].make().init()
    lengths = []
    for elastic in (True, False):
        for path in tmp_path.iterdir():
            path.unlink()
        with RayDispatcher(make(), make=make, elastic=elastic) as workers:
            lengths.append(len(workers.evaluate(range(5), [y] * 5)))
            again = workers.evaluate(range(5), [y] * 5)  # the replaced worker helps
            assert len(again) == 5
    assert lengths == [2, 5]


class Deadly(OrnsteinUhlenbeck):
    """A step that nobody survives, or a drift that raises, or no replica at all."""

    def __init__(self, how: str) -> None:
        self.how = how

    def __call__(self) -> Trajectory[Any]:
        if self.how == "replica":
            raise OSError("no weights here")
        return self

    def make_drift(self, device: torch.device) -> Drift:
        healthy = super().make_drift(device)

        def drift(step: int, y: State) -> Any:
            if step == 2 and self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if step == 2 and self.how == "sleep":
                self.how = ""  # once
                time.sleep(5)
            if step == 2 and self.how == "raise":
                raise ZeroDivisionError("no such image")
            return healthy(step, y)

        return drift


@pytest.mark.chaos
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("kill", "3 workers died while they evaluated step 2.*lack memory"),
        ("raise", "(?s)A worker failed, step 2:.*ZeroDivisionError: no such image"),
        ("replica", "(?s)could not build its replica.*no weights here"),
    ],
)
def test_a_failure_is_heard_with_its_step(how: str, message: str) -> None:
    spread = functools.partial(RayDispatcher, make=Deadly(how))
    with pytest.raises(WorkerError, match=message):
        solve(OrnsteinUhlenbeck(), EXACT, spread, check=False)


class Stillborn:
    """A toy whose first workers are killed while they build their replica."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.count = folder, count

    def __call__(self) -> Trajectory[Any]:
        for number in range(self.count):
            mark = self.folder / str(number)
            if not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return OrnsteinUhlenbeck()


@pytest.mark.chaos
def test_a_worker_that_dies_while_it_starts_is_replaced(tmp_path: Path) -> None:
    alone = solve(OrnsteinUhlenbeck(), EXACT, check=False)
    make = Stillborn(tmp_path, 1)
    spread = functools.partial(RayDispatcher, num_workers=1, make=make)
    found = solve(OrnsteinUhlenbeck(), EXACT, spread, check=False)
    assert (tmp_path / "0").exists()
    assert tree_equal(found.value, alone.value)


@pytest.mark.chaos
def test_workers_that_die_again_and_again_while_they_start_end(tmp_path: Path) -> None:
    make = Stillborn(tmp_path, 9)
    spread = functools.partial(RayDispatcher, num_workers=1, make=make)
    with pytest.raises(WorkerError, match="3 workers died while they started"):
        solve(OrnsteinUhlenbeck(), EXACT, spread, check=False)


@pytest.mark.chaos
def test_a_cluster_that_can_place_no_worker_says_what_it_has() -> None:
    spread = functools.partial(RayDispatcher, num_gpus=1, timeout=2)
    with pytest.raises(
        WorkerError,
        match=r"within 2 s: each of 2 asks Ray for 1 CPU and 1 GPU, and the cluster "
        r"has 2 CPU and 0 GPU, of which \d CPU and 0 GPU are free",
    ):
        solve(OrnsteinUhlenbeck(), EXACT, spread, check=False)
