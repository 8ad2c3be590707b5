"""The benchmarks run, and what they promise of memory holds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "overhead.py"


def run(*arguments: str) -> dict[str, float]:
    command = [sys.executable, str(SCRIPT), *arguments]
    return json.loads(subprocess.check_output(command, text=True))


def test_peak_memory_of_a_solve_is_bounded() -> None:
    found = run("--memory", "--window", "3")
    # At least the guesses, the new states, the drifts and the moments are held.
    assert 3 * 3 < found["peak_in_parameters"] <= found["bound"] == 5 * 3 + 8


@pytest.mark.long
def test_overhead_is_split_into_phases_that_add_up() -> None:
    found = run("--window", "2", "--sleep", "0.05", "--iterations", "2")
    assert set(found["phases_s"]) >= {"drift", "update", "norm", "rollout", "predict"}  # pyright: ignore[reportArgumentType]
    assert 0 < found["beyond_s"] + found["optimizer_steps_s"] < found["wall_s"]
