"""Growing splats, sequentially and with windows: cost, quality, mesh.

    python -m benchmarks.gaussians [--workers 2] [--logged] [--to FOLDER]

Three toybox prompts with two seeds (`configs/dreamgaussian-toybox.yaml`) give a table
and a contact sheet. Growth cuts the windows: with
one growth every n steps, a window of w accepts at most n / ceil(n / w) steps per
iteration, which is reported as the ceiling.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from benchmarks import runs
from benchmarks.measured import (
    SEQUENTIAL,
    entries_of,
    make_parser,
    measured,
    problem,
    publish,
)
from systems.settings.config import load

CONFIG = "configs/dreamgaussian-toybox.yaml"
PROMPTS = ("mushroom", "tree", "rocket")
SEEDS = (0, 1)
SETTINGS = ["trainer.max_steps=100", "system.densify.interval=25"]
"""Three growths in a run; they cut the windows more often than the config's."""
ROWS = {
    SEQUENTIAL: ["solver.name=sequential"],
    "window 8": ["solver.window.size=8"],
    "window 16": ["solver.window.size=16"],
}


def jobs() -> list[dict[str, Any]]:
    """All runs, the first seed's first."""
    return [
        runs.job(
            CONFIG,
            runs.prompt_of(name),
            *SETTINGS,
            *settings,
            f"seed={seed}",
            row=row,
            seed=seed,
        )
        for seed in SEEDS
        for row, settings in ROWS.items()
        for name in PROMPTS
    ]


def solve(to: Path, wanted: runs.Job) -> dict[str, Any]:
    """Solve a job, measure images and mesh, and save a strip of images."""
    entry, _, state = measured(wanted, to)
    return {**entry, "splats": len(state["geometry.means"])}


def table(entries: list[dict[str, Any]]) -> str:
    """Means over the prompts and seeds common to all rows, as Markdown."""
    settings = load(CONFIG, [f"system.prompt_processor.prompt={PROMPTS[0]}", *SETTINGS])
    steps, every = settings.trainer.max_steps, settings.system["densify"]["interval"]
    lines = [
        "| | runs | iterations | fewer | ceiling | gradients | PSNR | IoU | chamfer | "
        "splats | core seconds |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    rows = {row: [e for e in entries if e["row"] == row] for row in ROWS}
    sequential = {problem(e): e for e in rows[SEQUENTIAL]}
    for row, found in rows.items():
        found = [e for e in found if problem(e) in sequential]
        if not found:
            continue
        size = int(row.split()[-1]) if row != SEQUENTIAL else 1
        pieces = [every] * (steps // every) + [steps % every] * (steps % every > 0)
        least = sum(math.ceil(piece / size) for piece in pieces)
        change = sum(e["psnr"] - sequential[problem(e)]["psnr"] for e in found)
        few = runs.mean(found, "iterations")
        shapes = [e for e in found if e["chamfer"] is not None]
        lines.append(
            f"| {row} | {len(found)} | {few:.1f} | {steps / few:.2f} | "
            f"{steps / least:.2f} | {runs.mean(found, 'evaluations'):.0f} | "
            f"{runs.mean(found, 'psnr'):.2f} ({change / len(found):+.2f}) | "
            f"{runs.mean(found, 'iou'):.3f} | {runs.mean(shapes, 'chamfer'):.4f} | "
            f"{runs.mean(found, 'splats'):.0f} | "
            f"{runs.mean(found, 'cpu_seconds'):.0f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the missing jobs, and write table and sheet."""
    arguments = make_parser(__doc__, "gaussians").parse_args()
    entries = entries_of(arguments, jobs(), solve)
    publish(arguments, table(entries), entries, len(ROWS))


if __name__ == "__main__":
    main()
