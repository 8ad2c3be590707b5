"""The commands behind the published figures run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import sampling
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


def test_our_published_form_takes_the_iterations_of_diffusers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Same seed, window and tolerance; and the sequential pipeline is the reference."""
    bench = sampling.Bench()
    for sampler in ("ddim-100", "ddpm-100"):
        kind, _ = sampling.SAMPLERS[sampler]
        # A divisor of 1000: diffusers takes variances at timesteps that it does not
        # visit otherwise, and the strides then differ now and then.
        monkeypatch.setitem(sampling.SAMPLERS, sampler, (kind, 20))
        job = {"part": "published", "sampler": sampler, "prompt": sampling.PROMPT}
        job |= {"seed": 0, "window": 4, "tolerance": 0.3}
        plain = bench.run({**job, "method": "sequential"})
        assert (plain["iterations"], plain["error"]) == (20, 0)
        theirs = bench.run({**job, "method": "diffusers"})
        ours = bench.run({**job, "method": "published"})
        assert ours["iterations"] == theirs["iterations"] < 20
        assert ours["evaluations"] == theirs["evaluations"]
        assert ours["error"] == pytest.approx(theirs["error"], abs=1e-4)


def test_a_log_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    todo = list(sampling.jobs())
    assert len({sampling.identity(job) for job in todo}) == len(todo)

    class Counted:
        def run(self, job: sampling.Job) -> sampling.Job:
            return {**job, "iterations": 1, "evaluations": 1, "seconds": 0, "error": 0}

    monkeypatch.setattr(sampling, "Bench", Counted)
    log = tmp_path / "log.jsonl"
    sampling.work(log, todo[:2], hours=1)
    sampling.work(log, todo[:3], hours=1)
    assert list(map(sampling.identity, sampling.read(log))) == [
        sampling.identity(job) for job in todo[:3]
    ]
    assert "| ddim-100 | sequential |" in sampling.table(
        sampling.read(log), "published"
    )
