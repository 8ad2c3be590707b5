"""Surfaces, sequentially and with a window: cost, quality, mesh.

    python -m benchmarks.surfaces [--plan PLAN] [--workers 2] [--logged]

Two toybox prompts with two seeds give a table and a contact sheet of TextMesh's first
stage. The plans `magic3d`, `geometry` and `texture` are the second stage of Magic3D and
the later two of ProlificDreamer, beside the stage before, which all their runs start
from. An interrupted benchmark resumes from its log.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks import runs
from benchmarks.gaussians import SEEDS
from benchmarks.measured import (
    SEQUENTIAL,
    entries_of,
    make_parser,
    measured,
    name_of,
    problem,
    publish,
)
from systems.runs import folders
from systems.runs.run import execute
from systems.settings.config import load

COARSE = "configs/dreamfusion-toybox.yaml"
CONFIGS = {
    "textmesh": "configs/textmesh-toybox.yaml",
    "magic3d": "configs/magic3d-refine-toybox.yaml",
    "geometry": "configs/prolificdreamer-geometry-toybox.yaml",
    "texture": "configs/prolificdreamer-texture-toybox.yaml",
}
BEFORE = {
    CONFIGS["magic3d"]: COARSE,
    CONFIGS["geometry"]: COARSE,
    CONFIGS["texture"]: CONFIGS["geometry"],
}
"""The stage that a stage starts from."""
SOURCE = "system.geometry_convert_from"
PROMPTS = ("a red mushroom", "a blue mug")
ROWS = {
    SEQUENTIAL: ["solver.name=sequential"],
    "window 8": ["solver.window.size=8"],
}


def jobs(plan: str = "textmesh") -> list[dict[str, Any]]:
    """All runs of a plan, the first seed's first."""
    return [
        runs.job(CONFIGS[plan], prompt, *settings, f"seed={seed}", row=row, seed=seed)
        for seed in SEEDS
        for prompt in PROMPTS
        for row, settings in ROWS.items()
    ]


def solve(to: Path, wanted: runs.Job) -> dict[str, Any]:
    """Solve a job, measure images and mesh, and save a strip of images."""
    config = BEFORE.get(wanted["config"])
    if config is None:
        return measured(wanted, to)[0]
    first = stage(to.parent / "stages", config, wanted)
    settings = [*wanted["settings"], f"{SOURCE}={first}"]
    entry = measured({**wanted, "settings": settings}, to)[0]
    report = folders.report(first)
    before = {**report["quality"], **report["mesh_quality"]}
    return {**entry, **wanted, "before": before}


def stage(to: Path, path: str, wanted: runs.Job) -> Path:
    """The folder of an earlier stage, which is run once for all plans."""
    named = name_of({k: wanted[k] for k in ("prompt", "seed")})
    folder = to / Path(path).stem / named
    if not folders.report(folder):
        settings = [
            f"system.prompt_processor.prompt={wanted['prompt']}",
            f"seed={wanted['seed']}",
        ]
        if path in BEFORE:
            first = stage(to, BEFORE[path], wanted)
            settings += [f"{SOURCE}={first}", "solver.name=sequential"]
        folder.mkdir(parents=True, exist_ok=True)
        config = load(path, settings)
        folders.write_setup(folder, config)
        execute(config, folder=folder)
    return folder


def table(entries: list[dict[str, Any]]) -> str:
    """Means over the prompts and seeds that have a sequential run, as Markdown."""
    lines = [
        "| | runs | iterations | fewer | gradients | PSNR | IoU | 3D IoU | chamfer | "
        "normals |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    sequential = {problem(e): e for e in entries if e["row"] == SEQUENTIAL}
    for row in ROWS:
        found = [e for e in entries if e["row"] == row and problem(e) in sequential]
        if not found:
            continue
        beside = [sequential[problem(e)] for e in found]
        few, many = (runs.mean(some, "iterations") for some in (found, beside))
        shapes = [e for e in found if e["chamfer"] is not None]
        lines.append(
            f"| {row} | {len(found)} | {few:.1f} | {many / few:.2f} | "
            f"{runs.mean(found, 'evaluations'):.0f} | {runs.mean(found, 'psnr'):.2f} "
            f"({runs.mean(found, 'psnr') - runs.mean(beside, 'psnr'):+.2f}) | "
            f"{runs.mean(found, 'iou'):.3f} | {runs.mean(shapes, 'iou_3d'):.3f} | "
            f"{runs.mean(shapes, 'chamfer'):.4f} | {_normals(shapes)} |"
        )
    before = [e["before"] for e in sequential.values() if "before" in e]
    if before:
        lines.insert(
            2,
            f"| the stage before | {len(before)} | | | | "
            f"{runs.mean(before, 'psnr'):.2f} | {runs.mean(before, 'iou'):.3f} | "
            f"{runs.mean(before, 'iou_3d'):.3f} | "
            f"{runs.mean(before, 'chamfer'):.4f} | {_normals(before)} |",
        )
    return "\n".join([*lines, "", runs.cost(entries)]) + "\n"


def _normals(entries: list[dict[str, Any]]) -> str:
    """The normal error; older logs lack it."""
    if any("normal_error" not in entry for entry in entries):
        return ""
    return f"{runs.mean(entries, 'normal_error'):.1f}°"


def main() -> None:
    """Run the missing jobs, and write table and sheet."""
    parser = make_parser(__doc__, "surfaces")
    parser.add_argument("--plan", choices=list(CONFIGS), default="textmesh")
    arguments = parser.parse_args()
    entries = entries_of(arguments, jobs(arguments.plan), solve)
    name = "" if arguments.plan == "textmesh" else arguments.plan
    publish(arguments, table(entries), entries, len(ROWS), name)


if __name__ == "__main__":
    main()
