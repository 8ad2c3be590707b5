"""A script that threestudio imports again while it embeds prompts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SCRIPT = """
import multiprocessing
from dreampropeller.adapters.threestudio import accelerate
from tests.adapters.standin.systems import DreamFusionLike
from tests.adapters.threestudio_runs import SYSTEMS, build


def embed():
    pass


class Embedding(DreamFusionLike):
    def on_fit_start(self):
        super().on_fit_start()
        process = multiprocessing.get_context("spawn").Process(target=embed)
        process.start()
        process.join()
        assert process.exitcode == 0, "prompt embedding process failed!"


def main():
    _, data = build("dreamfusion-like")
    system = Embedding(SYSTEMS["dreamfusion-like"])
    print(accelerate(system, data, num_steps=2, verify=False).state.step)


"""


@pytest.mark.long
def test_a_script_without_a_guard_is_told_so(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(f"{SCRIPT}main()\n")
    run = subprocess.run(
        [sys.executable, "-W", "ignore", str(script)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    advice = 'put what it does under `if __name__ == "__main__":`'
    assert advice in run.stderr, run.stderr
    assert run.stderr.count("Traceback") == 1, "of the failed embedding alone"
