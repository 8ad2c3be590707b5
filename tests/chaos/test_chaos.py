"""Nothing is lost: every kind of fault ends as it should, and leaves nothing behind."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.chaos import faults, trials
from tests.chaos.faults import Fault
from tests.chaos.trials import Trial, command, leaves_nothing
from tests.processes import Child, rank_environ

SHORT = [
    ("a rank is killed", 1),
    ("disk full under a checkpoint", 0),
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


@pytest.mark.chaos
def test_ranks_that_torchrun_starts_again_continue_in_their_folder(
    tmp_path: Path, random: Any
) -> None:
    """Torchrun's store outlives its ranks: it holds the name of the folder.

    It also holds where the dead ranks listened, which rank 0, the first to return, must
    not read.
    """
    trial = Trial(tmp_path, random)
    trial.words = command(trial)
    make: Any = vars(torch.distributed)["TCPStore"]
    store = make("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    trial.port = trials.free_port()
    with leaves_nothing(trial):
        for attempt, codes in enumerate(([2, -9], [0, 0])):
            ranks = []
            for rank in range(2):
                fault = [Fault("kill", "drift", 9)] if rank == 1 - attempt else []
                environ = {
                    **rank_environ(rank, 2, store.port),
                    "TORCHELASTIC_USE_AGENT_STORE": "True",
                    "TORCHELASTIC_RESTART_COUNT": str(attempt),
                    "TMPDIR": str(tmp_path),
                }
                job = (faults.run, trial.words, fault if attempt == 0 else [])
                output = tmp_path / f"said-{attempt}-{rank}"
                ranks.append(Child(*job, output=output, environ=environ))
                trial.children.append(ranks[-1])
                if attempt:
                    ranks[0].wait_for("Restart 1, from step", 60)
                    time.sleep(1)
            assert [rank.wait(60) for rank in ranks] == codes, trial.said()
        assert "from step 0" not in trial.said()
        assert os.listdir(trial.out / "chaos") == [trial.run.name]  # one folder
        trial.compare()


@pytest.fixture
def random() -> Any:
    import random

    return random.Random(0)
