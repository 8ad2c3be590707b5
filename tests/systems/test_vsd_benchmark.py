"""The tables of variational score distillation, from runs written by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dreampropeller as dp
from benchmarks import vsd
from benchmarks.vsd_groups import SceneOnly
from systems import quality
from tests.systems.scenes import small


def entry(job: dict[str, Any], iterations: int, psnr: float) -> dict[str, Any]:
    figures = {"psnr": psnr, "iou": 0.5, "right_colour": 1.0, "right_object": 0.5}
    return {
        **job,
        **figures,
        "right_finish": 0.75,
        **{"chamfer": None, "saturation": 0.25, "cpu_seconds": 3.0},
        **{"iterations": iterations, "evaluations": 120, "strides": [50, 50]},
    }


def test_runs_are_counted_from_their_own_sequential_run() -> None:
    plan = vsd.PLANS["vsd"]
    jobs = vsd.jobs(plan)
    assert len(jobs) == 2 * 3 * 3 * 2
    found = [
        entry(job, 100 if job["row"] == vsd.SEQUENTIAL else 20, 20.0 + 2 * job["seed"])
        for job in jobs
        # Of the second seed the sequential run alone, and a run without its own.
        if job["seed"] == 0 or job["row"] == vsd.SEQUENTIAL or job["kind"] == "SDS"
        if not (
            job["seed"] == 1 and job["kind"] == "SDS" and job["row"] == vsd.SEQUENTIAL
        )
    ]
    lines = vsd.table(plan, found).splitlines()
    assert len(lines) == 2 + 6
    assert lines[2].startswith("| VSD, sequential | 6 | 100.0 | 1.00 | 1.20 | 21.00")
    assert lines[3].startswith(
        "| VSD, window 8 | 3 | 20.0 | 5.00 | 1.20 | 20.00 (+0.00)"
    )
    assert lines[6].startswith("| SDS, window 8 | 3 |")


def test_saturation_by_hand() -> None:
    truth = torch.full((1, 3, 2, 2), quality.GREY)
    images = torch.rand(1, 3, 2, 2)  # what is behind the object does not count
    truth[0, :, 0] = torch.tensor([[0.8, 0.4], [0.2, 0.4], [0.2, 0.2]])
    images[0, :, 0] = torch.tensor([[0.8, 0.4], [0.0, 0.4], [0.2, 0.0]])
    wanted = (1 + 1 - 0.75 - 0.5) / 2
    assert vsd.excess_saturation(images, truth) == pytest.approx(wanted)


@pytest.mark.long
def test_a_criterion_over_one_group_is_the_threshold_itself() -> None:
    """Where the group is the whole state, as without a LoRA."""

    def strides(threshold: dp.DriftThreshold) -> list[int]:
        solver = dp.PicardSolver(dp.SlidingWindow(4), threshold, predictor="auto")
        trajectory = small("trainer.max_steps=12").trajectory()
        return dp.solve(trajectory, solver).stats.strides

    assert strides(SceneOnly(0.05)) == strides(dp.DriftThreshold(0.05))
