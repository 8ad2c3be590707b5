"""Solves a job, and measures the object by its images and its mesh."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import dreampropeller as dp
from benchmarks import runs
from systems import build, quality
from systems.images import to_bytes
from systems.scene.isosurface import EmptySurface
from systems.settings.config import load


def measured(
    wanted: runs.Job, images: Path, name: str
) -> tuple[dict[str, Any], quality.Quality, dp.State]:
    """Solve a job, and write every fourth view beside the ground truth's.

    Args:
        wanted: The job.
        images: Folder of the strips of images.
        name: File name of the job's own strip.

    Returns:
        The entry for the log, the quality with its images, and the final state.
    """
    system = build(load(wanted["config"], wanted["settings"]))
    truth = quality.truth_of(system)
    assert truth is not None, "benchmarks need prompts of the toybox"
    trajectory = system.trajectory()
    start, cpu = time.perf_counter(), time.process_time()
    solution = dp.solve(trajectory, system.solver())
    cost = {
        "seconds": round(time.perf_counter() - start, 2),
        "cpu_seconds": round(time.process_time() - cpu, 2),
        "iterations": solution.stats.num_iterations,
        "evaluations": solution.stats.num_evaluations,
        "strides": solution.stats.strides,
    }
    found = quality.against_truth(system, solution.value, truth)
    save(torch.cat(list(found.images[::4]), -1), images / f"{name}.png")
    wide = torch.cat(list(found.wanted[::4]), -1)
    save(wide, images / f"{wanted['prompt'].replace(' ', '-')}.png")
    try:
        mesh = quality.measure_mesh(system.mesh(solution.value), truth)
        shape = {name: mesh.figures()[name] for name in ("chamfer", "iou_3d")}
    except EmptySurface:
        shape = {"chamfer": None, "iou_3d": None}
    entry = {**wanted, **cost, **found.figures(), **shape}
    return entry, found, solution.value


def save(image: Tensor, path: Path) -> None:
    """Write an image, magnified four times."""
    path.parent.mkdir(parents=True, exist_ok=True)
    large = image.repeat_interleave(4, -1).repeat_interleave(4, -2)
    Image.fromarray(to_bytes(large)).save(path)
