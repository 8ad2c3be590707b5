"""Nothing is lost: every kind of fault ends as it should, and leaves nothing behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.chaos import faults, soak, trials
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


@pytest.mark.chaos
def test_a_process_that_runs_and_fails_over_and_over_does_not_grow(
    tmp_path: Path,
) -> None:
    document = tmp_path / "table.md"
    words = ["--soak", "0.3", "--write", str(document)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.chaos", *words],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| open file descriptors |" in document.read_text()


@pytest.mark.chaos
@pytest.mark.parametrize(
    ("what", "gauges"),
    [
        ("descriptor", ["open file descriptors"]),
        ("tensor", [soak.MEMORY, "live tensors"]),
    ],
)
def test_what_is_left_behind_by_each_run_is_reported(
    what: str, gauges: list[str], tmp_path: Path
) -> None:
    child = Child(leak, what, output=tmp_path / "said")
    try:
        assert child.wait(300) == 0, child.said()
    finally:
        child.end()
    lines = [line for line in child.said().splitlines() if line.startswith("Grown")]
    assert len(lines) == len(gauges), child.said()
    for line, gauge in zip(lines, gauges, strict=True):
        assert line.startswith(f"Grown: {gauge}, from ")


def leak(what: str) -> None:
    """A soak after each of whose runs something is left behind."""
    kept: list[Any] = []
    makers = {
        "descriptor": lambda: os.open(os.devnull, os.O_RDONLY),
        "tensor": lambda: torch.ones(2**21),
    }
    found = soak.soak(
        0, kinds=["undisturbed"], after=lambda: kept.append(makers[what]())
    )
    assert not found.failed, found.failed
    print(*found.grown(), sep="\n")


def test_flat_is_judged_by_quarters_after_a_warm_up() -> None:
    """A tenth is left out; memory may grow by a twentieth, descriptors by none."""
    found = soak.Soak({soak.MEMORY: [], "threads": []})
    found.held[soak.MEMORY] = [900.0] * 4 + [400.0] * 26 + [419.0] * 10
    found.held["threads"] = [1.0] * 4 + [7.0] * 26 + [9.0] * 4 + [7.0] * 6
    assert not found.grown()
    found.held[soak.MEMORY][-9:] = [421.0] * 9
    found.held["threads"][-6:] = [8.0] * 6
    memory, threads = found.grown()
    assert f"{soak.MEMORY}, from 400 in the first quarter to 421 in the last" in memory
    assert "threads, from 7 in the first quarter to 8 in the last" in threads


@pytest.fixture
def random() -> Any:
    import random

    return random.Random(0)
