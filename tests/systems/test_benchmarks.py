"""The commands behind the published figures run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.systems.scenes import SMALL, TOYBOX


def command(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", f"benchmarks.{name}", *arguments]
    return subprocess.run(line, capture_output=True, text=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_figures_are_refused_without_a_gpu(tmp_path: Path) -> None:
    done = command("gpu", "--to", str(tmp_path))
    assert done.returncode == 2
    assert "no CUDA device" in done.stderr
    assert not list(tmp_path.iterdir())


def test_the_gpu_command_fills_its_file(tmp_path: Path) -> None:
    missing = tmp_path / "missing.yaml"
    done = command(
        "gpu",
        *("--cpu", "--configs", TOYBOX, str(missing), "--steps", "6"),
        *("--runs", str(tmp_path / "runs"), "--to", str(tmp_path)),
        *("--set", *(s for s in SMALL if "prompt" not in s and "max_steps" not in s)),
    )
    assert done.returncode == 0, done.stderr
    filled = json.loads((tmp_path / "gpu-cpu.json").read_text())
    plain, fast, *refused = filled["runs"]
    assert plain["iterations"] == 6 > fast["iterations"]
    assert plain["quality"]["psnr"] > 0
    assert filled["environment"]["gpu"] is None
    assert all("missing.yaml" in entry["not_run"] for entry in refused)
    assert "not run" in done.stdout
