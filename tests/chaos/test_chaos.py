"""Nothing is lost: every kind of fault ends as it should, and leaves nothing behind."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.chaos import faults, problem, trials
from tests.chaos.faults import Fault
from tests.chaos.trials import Trial, command, leaves_nothing
from tests.processes import Child, rank_environ

SHORT = [
    ("a rank is killed", 1),
    ("a rank is stopped", 3),
    ("a drift raises", 0),
    ("NaN", 0),
    ("a rank disagrees", 1),
    ("disk full under a checkpoint", 0),
    ("a checkpoint is flipped", 0),
    ("two runs in one folder", 0),
    ("a port is taken", 0),
]
"""Kinds and seeds of the normal run; `pytest -m chaos` runs all kinds."""


@pytest.mark.parametrize(("kind", "seed"), SHORT)
def test_a_fault_loses_nothing(kind: str, seed: int, tmp_path: Path) -> None:
    assert trials.run(kind, seed, tmp_path)


@pytest.mark.chaos
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", trials.KINDS)
def test_every_kind_of_fault_loses_nothing(
    kind: str, seed: int, tmp_path: Path
) -> None:
    assert trials.run(kind, seed, tmp_path)


def test_a_run_that_torchrun_starts_again_continues_in_its_folder(
    tmp_path: Path, random: Any
) -> None:
    """Torchrun's store, which outlives its ranks, holds the name of the folder."""
    trial = Trial(tmp_path, random)
    trial.words = command(trial)
    make: Any = vars(torch.distributed)["TCPStore"]
    store = make("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    trial.port = trials.free_port()
    with leaves_nothing(trial):
        for attempt in range(2):
            fault = Fault("kill", "replace", 3) if attempt == 0 else None
            environ = {
                **rank_environ(0, 1, store.port),
                "TORCHELASTIC_USE_AGENT_STORE": "True",
                "TORCHELASTIC_RESTART_COUNT": str(attempt),
                "TMPDIR": str(tmp_path),
            }
            child = Child(
                faults.run,
                trial.words,
                [fault] if fault else [],
                output=tmp_path / str(attempt),
                environ=environ,
            )
            trial.children.append(child)
            assert child.wait(60) == (-9, 0)[attempt], trial.said()
        begun = trial.saved()
        assert "Restart 1, from step" in trial.said()
        assert "from step 0" not in trial.said()
        assert begun == problem.STEPS
        assert os.listdir(trial.out / "chaos") == [trial.run.name]  # one folder
        trial.compare()


@pytest.fixture
def random() -> Any:
    import random

    return random.Random(0)
