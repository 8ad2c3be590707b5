"""Growing splats, sequentially and with windows: cost, quality, mesh.

    python -m benchmarks.gaussians [--workers 2] [--logged]

Three toybox prompts with two seeds (`configs/dreamgaussian-toybox.yaml`) give a table
and a contact sheet in `benchmarks/results/gaussians/`. Growth cuts the windows: with
one growth every n steps, a window of w accepts at most n / ceil(n / w) steps per
iteration, which is reported as the ceiling.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks import runs
from benchmarks.measured import measured
from systems.settings.config import load

CONFIG = "configs/dreamgaussian-toybox.yaml"
FOLDER = Path("benchmarks/results/gaussians")
PROMPTS = ("mushroom", "tree", "rocket")
SEEDS = (0, 1)
SETTINGS = ["trainer.max_steps=100", "system.densify.interval=25"]
"""Three growths in a run; they cut the windows more often than the config's."""
SEQUENTIAL = "sequential"
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


def solve(wanted: runs.Job) -> dict[str, Any]:
    """Solve a job, measure images and mesh, and save a strip of images."""
    entry, _, state = measured(wanted, FOLDER / "images", name_of(wanted))
    return {**entry, "splats": len(state["geometry.means"])}


def name_of(wanted: runs.Job) -> str:
    """File name of a run."""
    words = f"{wanted['prompt']} {wanted['row']} {wanted['seed']}"
    return words.replace(" ", "-")


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
    sequential = {(e["prompt"], e["seed"]): e for e in rows[SEQUENTIAL]}
    for row, found in rows.items():
        found = [e for e in found if (e["prompt"], e["seed"]) in sequential]
        if not found:
            continue
        size = int(row.split()[-1]) if row != SEQUENTIAL else 1
        pieces = [every] * (steps // every) + [steps % every] * (steps % every > 0)
        least = sum(math.ceil(piece / size) for piece in pieces)
        change = sum(
            e["psnr"] - sequential[e["prompt"], e["seed"]]["psnr"] for e in found
        )
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


def sheet(
    entries: list[dict[str, Any]],
    prompts: Sequence[str],
    num_rows: int = len(ROWS),
    folder: Path = FOLDER,
) -> Image.Image:
    """The ground truth, then the rows, for each complete prompt and seed."""
    strips = []
    for seed in SEEDS:
        for prompt in prompts:
            found = [e for e in entries if (e["prompt"], e["seed"]) == (prompt, seed)]
            if len(found) < num_rows:
                continue
            files = [prompt.replace(" ", "-"), *map(name_of, found)]
            strips.append([Image.open(folder / "images" / f"{f}.png") for f in files])
    width, height = strips[0][0].size
    whole = Image.new("RGB", (width * len(strips), height * (num_rows + 1)))
    for column, files in enumerate(strips):
        for row, file in enumerate(files):
            whole.paste(file, (column * width, row * height))
    return whole


def main() -> None:
    """Run the missing jobs, and write table and sheet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--logged", action="store_true", help="only what was run")
    arguments = parser.parse_args()
    log = FOLDER / "runs.jsonl"
    if arguments.logged:
        entries = runs.logged(
            jobs(), log, lambda e: (e["prompt"], e["seed"]), SEQUENTIAL
        )
    else:
        entries = runs.run_all(jobs(), log, arguments.workers, solve)
    text = table(entries)
    (FOLDER / "table.md").write_text(text)
    print(text)
    prompts = [runs.prompt_of(name) for name in PROMPTS]
    sheet(entries, prompts).save(FOLDER / "sheet.png")


if __name__ == "__main__":
    main()
