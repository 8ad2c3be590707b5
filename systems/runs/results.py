"""What a finished run leaves behind: film, meshes, quality and a report."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import dreampropeller as dp
from systems import build, quality
from systems.base import System
from systems.runs import folders
from systems.runs.artefacts import (
    FAILED,
    attempt,
    failures,
    judge,
    preview,
    turntable,
)
from systems.runs.recorder import Recorder
from systems.scene.mesh_files import save_mesh
from systems.settings.config import Config
from systems.settings.reader import ConfigError


def write(
    folder: Path, system: System, y: dp.State, film: bool = True, mesh: bool = True
) -> dict[str, Any]:
    """Write turntable, mesh and quality of a state; returns what there is to report.

    Each by itself: of one that fails the report says why, and the rest is written.
    """
    report: dict[str, Any] = {"prompt": system.prompt}
    wanted = quality.truth_of(system)
    surface = attempt(report, "mesh", lambda: system.mesh(y))
    if mesh and surface is not None:
        attempt(report, "mesh", lambda: [p.name for p in save_mesh(surface, folder)])
        attempt(
            report,
            "mesh_quality",
            lambda: quality.measure_mesh(surface, wanted).figures(),
        )
    elif not mesh:
        del report["mesh"]  # it was only wanted for the preview
    if film:
        attempt(report, "turntable", lambda: turntable(folder, system, y))
        attempt(report, "preview", lambda: preview(folder, system, y, surface))
        judge(report, folder, system, y, wanted)
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
    elif found and not found.startswith(FAILED):
        lines.append(f"Quality {found}.")
    if "mesh_quality" in report:
        lines.append(describe_mesh(report["mesh_quality"]))
    lines += failures(report)
    lines.append(f"Look into {folder}")
    return "\n".join(line for line in lines if line)


def describe_mesh(found: dict[str, Any] | str) -> str:
    """The figures of a mesh in a sentence."""
    if isinstance(found, str):
        return ""
    count = found["bodies"]
    parts = [f"{found['faces']} faces in {count} {'body' if count == 1 else 'bodies'}"]
    if "iou_3d" in found:
        parts.append(f"3D IoU {found['iou_3d']:.2f}")
        parts.append(f"Chamfer distance {found['chamfer']:.3f} to the ground truth")
    if not found["watertight"]:
        parts.append("not closed")
    return f"Mesh: {', '.join(parts)}."


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
    return 1 if failures(made) else 0
