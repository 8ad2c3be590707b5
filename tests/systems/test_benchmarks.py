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


def test_the_frontier_is_computed_drawn_and_resumed(tmp_path: Path) -> None:
    small = [s for s in SMALL if "prompt" not in s and "max_steps" not in s]
    arguments = (
        *("--config", TOYBOX, "--objects", "mug", "--regimes", "small:24:0.005"),
        *("--thresholds", "drift:0.1", "relative:1e6", "--predictors", "auto"),
        *("--windows", "4", "--exact", "--rivals", "8", "--workers", "1"),
        *("--to", str(tmp_path), "--set", *small),
    )
    done = command("pareto", *arguments)
    assert done.returncode == 0, done.stderr
    log = (tmp_path / "runs.jsonl").read_text()
    rows = [json.loads(line) for line in log.splitlines() if line]
    by_row = {row["row"]: row for row in rows}
    plain, exact = by_row["plain loop"], by_row["exact"]
    assert (plain["iterations"], plain["evaluations"]) == (24, 24)
    assert exact["psnr"] == plain["psnr"]  # bit for bit
    # The first step alone, then whole windows; for the drift a slot is held back.
    assert by_row["relative:1e6"]["iterations"] == 7
    assert 7 <= by_row["drift:0.1"]["iterations"] <= exact["iterations"]
    assert sum(row["row"].startswith("T/8") for row in rows) == 10
    text = (tmp_path / "table.md").read_text()
    assert text.count("\n| small |") == 6  # rivals at their best only
    assert (tmp_path / "pareto.png").stat().st_size > 10_000
    again = command("pareto", *arguments)
    assert again.returncode == 0
    assert (tmp_path / "runs.jsonl").read_text() == log
    count = command("pareto", *arguments, "--count")
    assert count.stdout.startswith("14 runs of 126 steps")
    wrong = command("pareto", *arguments, "--thresholds", "drifty")
    assert "`drifty` is no threshold: write `paper:median`" in wrong.stderr
