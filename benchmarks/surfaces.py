"""TextMesh's first stage, sequentially and with a window: cost, quality, mesh.

    python -m benchmarks.surfaces [--workers 2] [--logged] [--to FOLDER]

Two toybox prompts with two seeds (`configs/textmesh-toybox.yaml`) give a table and a
contact sheet. An interrupted benchmark resumes from its log.
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
    problem,
    publish,
)

CONFIG = "configs/textmesh-toybox.yaml"
PROMPTS = ("a red mushroom", "a blue mug")
ROWS = {
    SEQUENTIAL: ["solver.name=sequential"],
    "window 8": ["solver.window.size=8"],
}


def jobs() -> list[dict[str, Any]]:
    """All runs, the first seed's first."""
    return [
        runs.job(CONFIG, prompt, *settings, f"seed={seed}", row=row, seed=seed)
        for seed in SEEDS
        for prompt in PROMPTS
        for row, settings in ROWS.items()
    ]


def solve(to: Path, wanted: runs.Job) -> dict[str, Any]:
    """Solve a job, measure images and mesh, and save a strip of images."""
    return measured(wanted, to)[0]


def table(entries: list[dict[str, Any]]) -> str:
    """Means over the prompts and seeds that have a sequential run, as Markdown."""
    lines = [
        "| | runs | iterations | fewer | gradients | PSNR | IoU | 3D IoU | chamfer |",
        "|---|---|---|---|---|---|---|---|---|",
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
            f"{runs.mean(shapes, 'chamfer'):.4f} |"
        )
    return "\n".join([*lines, "", runs.cost(entries)]) + "\n"


def main() -> None:
    """Run the missing jobs, and write table and sheet."""
    arguments = make_parser(__doc__, "surfaces").parse_args()
    entries = entries_of(arguments, jobs(), solve)
    publish(arguments, table(entries), entries, len(ROWS))


if __name__ == "__main__":
    main()
