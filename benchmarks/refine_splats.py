"""Refinement of splats: an object of another colour takes the prompt's colour.

    python -m benchmarks.refine_splats [--to FOLDER]

2,000 splats are put on the surface of a blue mushroom and fitted to its images. Their
ply file is the start of "a red mushroom". The result is exported, loaded and rendered
again, with its figures and a strip of images (the fit, the refined splats, the ground
truth).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dreampropeller as dp
from benchmarks.gaussians import CONFIG
from benchmarks.measured import save
from systems import build, quality
from systems.dreamgaussian import DreamGaussian
from systems.quality.truth import fixed_views
from systems.scene.gaussians import ply
from systems.scene.gaussians.growth import GrowthConfig
from systems.scene.gaussians.harmonics import Y0
from systems.scene.gaussians.scene import SplatRendering
from systems.scene.gaussians.splats import neighbour_distance, of_state
from systems.scene.gaussians.trajectory import GrowingGaussians
from systems.settings.config import load
from systems.toybox.truth import Truth, truth

COUNT, FIT_STEPS, STEPS = 2000, 60, 100
BEFORE, AFTER = "a blue mushroom", "a red mushroom"


def on_surface(wanted: Truth, count: int) -> dp.State:
    """Splats on the surface of an object, in its colours."""
    import trimesh

    exact = wanted.mesh(64)
    mesh = trimesh.Trimesh(exact.vertices.numpy(), exact.faces.numpy())
    means = torch.tensor(trimesh.sample.sample_surface(mesh, count, seed=0)[0]).float()
    quats = torch.zeros(count, 4)
    quats[:, 0] = 1
    return {
        "means": means,
        "scales": neighbour_distance(means).log()[:, None].repeat(1, 3),
        "quats": quats,
        "opacities": torch.full((count,), 1.0),
        "sh0": ((wanted.albedo(means) - 0.5) / Y0)[:, None],
    }


def system(initial: Path, *settings: str) -> DreamGaussian:
    """The system that starts from a file, under the new prompt."""
    made = build(
        load(
            CONFIG,
            [
                f"system.prompt_processor.prompt={AFTER}",
                f"system.geometry.initial={initial}",
                f"trainer.max_steps={STEPS}",
                "system.densify.strategy=none",
                *settings,
            ],
        )
    )
    assert isinstance(made, DreamGaussian)
    return made


def fitted(start: DreamGaussian, wanted: Truth) -> dp.State:
    """The splats fitted to images of an object."""

    def loss(
        step: int, y: dp.State
    ) -> tuple[Tensor, Mapping[str, Any], SplatRendering]:
        views = start.views(step)
        seen = torch.func.functional_call(start.scene, y, (views, None, start.random))
        exact = wanted.render(views.cameras, views.height)
        rgb = seen.foreground + (1 - seen.opacity) * 0.5
        goal = exact.over(torch.full((3,), 0.5)).permute(0, 2, 3, 1)
        return (rgb - goal).square().mean(), {}, seen

    trajectory = GrowingGaussians(
        loss,
        dict(start.scene.named_parameters()),
        start.optimizer,
        FIT_STEPS,
        config=GrowthConfig(strategy="none"),
    )
    return dp.solve(trajectory, dp.Sequential()).value


def main() -> None:
    """Fit, refine, export and load; write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--to", type=Path, default=Path("outputs/refine_splats"))
    to = parser.parse_args().to
    folder = to / "refine"
    old, new = truth(BEFORE), truth(AFTER)
    ply.save(folder / "surface.ply", on_surface(old, COUNT))
    y = fitted(system(folder / "surface.ply"), old)
    ply.save(folder / "fitted.ply", of_state(y))
    made = system(folder / "fitted.ply")
    trajectory = made.trajectory()
    start = trajectory.init()[0]
    clock = time.process_time()
    solution = dp.solve(trajectory, made.solver())
    seconds = round(time.process_time() - clock, 1)
    ply.save(folder / "splats.ply", of_state(solution.value))
    loaded = system(folder / "splats.ply")
    views = fixed_views(64)
    again = loaded.scene.state_dict()
    apart = max(
        float(
            (made.render(solution.value, v)[0] - loaded.render(again, v)[0]).abs().max()
        )
        for v in map(views.one, range(0, 16, 3))
    )
    found = {
        "fit, against the old colour": quality.against_truth(made, start, old),
        "fit": quality.against_truth(made, start, new),
        "refined": quality.against_truth(made, solution.value, new),
    }
    report = {
        "splats": COUNT,
        "steps": STEPS,
        "iterations": solution.stats.num_iterations,
        "core_seconds": seconds,
        "reloaded_images_differ_by": apart,
        **{name: one.figures() for name, one in found.items()},
    }
    print(json.dumps(report, indent=2))
    (to / "refine.json").write_text(json.dumps(report, indent=2) + "\n")
    rows = [found["fit"].images, found["refined"].images, found["fit"].wanted]
    strip = torch.cat([torch.cat(list(row[::2]), -1) for row in rows], -2)
    save(strip, to / "refine.png")
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()


if __name__ == "__main__":
    main()
