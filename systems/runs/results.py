"""What a finished run leaves behind: film, meshes, quality and a report."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import dreampropeller as dp
from systems import build, quality
from systems.base import System
from systems.images import save_film, save_picture
from systems.runs import folders
from systems.runs.recorder import PREVIEW_VIEWS, Recorder
from systems.scene.isosurface import EmptySurface
from systems.scene.mesh_files import save_mesh
from systems.settings.config import Config
from systems.settings.reader import ConfigError


def write(
    folder: Path, system: System, y: dp.State, film: bool = True, mesh: bool = True
) -> dict[str, Any]:
    """Write turntable, mesh and quality of a state; returns what there is to report.

    An empty surface is reported, not raised: the rest is still of use.
    """
    report: dict[str, Any] = {"prompt": system.prompt}
    if film:
        frames = system.turntable(y)
        total = system.cameras.n_test_views
        bar = tqdm(frames, total=total, desc="turntable", unit="frame", leave=False)
        save_film(bar, folder / "turntable.mp4")
        report["turntable"] = "turntable.mp4"
        pictures = torch.stack(list(system.turntable(y, PREVIEW_VIEWS)))
        save_picture(pictures, folder / "preview.png")
        wanted = quality.truth_of(system)
        if wanted is None:
            report["quality"] = quality.by_clip(system, y)
        else:
            measured = quality.against_truth(system, y, wanted)
            report["quality"] = measured.figures()
            both = torch.cat([measured.pictures, measured.wanted])
            save_picture(
                both.repeat_interleave(4, -1).repeat_interleave(4, -2),
                folder / "truth.png",
                quality.NUM_VIEWS,
            )
    if mesh:
        try:
            surface = system.mesh(y)
            report["mesh"] = [path.name for path in save_mesh(surface, folder)]
            report["faces"] = len(surface.faces)
        except EmptySurface as error:
            report["mesh"] = f"none: {error}"
    return report


def write_report(
    folder: Path,
    recorder: Recorder,
    solution: dp.Solution[Any],
    results: dict[str, Any],
) -> dict[str, Any]:
    """Write `report.json`: what was solved, at what cost, and how good it is."""
    stats = solution.stats
    steps = sum(stats.strides)
    report = {
        **results,
        "result": solution.result.value,
        "steps": steps,
        "iterations": stats.num_iterations,
        "evaluations": stats.num_evaluations,
        "steps_per_iteration": round(steps / max(1, stats.num_iterations), 3),
        "seconds": round(time.perf_counter() - recorder.started, 2),
        "solving_seconds": round(recorder.solving, 3),
        "seconds_by_phase": {k: round(v, 3) for k, v in recorder.seconds.items()},
        "workers": recorder.config.dispatch.count,
        "threads": torch.get_num_threads(),
        "gpu_memory": (  # bytes, on the first device
            torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
        ),
        "solver": asdict(recorder.config.solver),
        "environment": folders.environment(),
    }
    folders.write_json(folder / "report.json", report)
    return report


def summary(folder: Path, report: dict[str, Any]) -> str:
    """A run in a few lines."""
    lines = [
        f"{report['prompt']}: {report['steps']} steps" if "prompt" in report else ""
    ]
    if "iterations" in report:
        lines = [
            f"{report['steps']} steps in {report['iterations']} iterations "
            f"({report['steps_per_iteration']:.2f}x fewer), "
            f"{report['evaluations']} evaluations, {report['seconds']:.1f} s on "
            f"{report['workers']} worker(s). {report['result']}"
        ]
        if report["workers"] == 1 and report["evaluations"] > 1.2 * report["steps"]:
            lines.append(
                f"On one worker the plain loop is faster: it takes {report['steps']} "
                "gradients (`solver.name=sequential`)."
            )
    found = report.get("quality")
    if isinstance(found, dict) and "clip_score" in found:
        lines.append(
            f"CLIP score {found['clip_score']:.1f}, R-precision "
            f"{found['r_precision']:.0%} among {found['num_prompts']} prompts."
        )
    elif isinstance(found, dict):
        lines.append(
            f"Against the truth: PSNR {found['psnr']:.1f} dB, "
            f"SSIM {found['ssim']:.2f}, IoU {found['iou']:.2f}; "
            f"right colour in {found['right_colour']:.0%} and "
            f"right object in {found['right_object']:.0%} of the views."
        )
    elif found:
        lines.append(f"Quality {found}.")
    if isinstance(report.get("mesh"), str):
        lines.append(f"Mesh {report['mesh']}")
    lines.append(f"Look into {folder}")
    return "\n".join(line for line in lines if line)


def look(config: Config, film: bool) -> int:
    """Render and measure what a run has reached, or export it; gives the exit code.

    Raises:
        ConfigError: There is no such run.
    """
    if config.resume is None:
        raise ConfigError(
            "Nothing to look at: name a run, `resume=outputs/<name>/<tag>@<time>`, "
            "with the `config.yaml` in it."
        )
    system = build(config)
    state = folders.load_state(config.resume, system)
    folder = folders.folder_of(config.resume)
    made = write(folder, system, state.y, film=film, mesh=not film)
    print(summary(folder, {**made, "steps": state.step}))
    return 0 if film or isinstance(made["mesh"], list) else 1
