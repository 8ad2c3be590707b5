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

CONFIG = "configs/dreamgaussian-toybox.yaml"
FOLDER = Path("benchmarks/results/gaussians")
PROMPTS = ("mushroom", "tree", "rocket")
SEEDS = (0, 1)
SETTINGS = ["trainer.max_steps=100", "system.densify.interval=25"]
"""Three growths in a run; they cut the windows more often than the config's."""
PLAIN = "sequential"
ROWS = {
    PLAIN: ["solver.name=sequential"],
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
    system = build(load(wanted["config"], wanted["settings"]))
    truth = quality.truth_of(system)
    assert truth is not None
    trajectory = system.trajectory()
    start, cpu = time.perf_counter(), time.process_time()
    solution = dp.solve(trajectory, system.solver())
    entry = {
        **wanted,
        "seconds": round(time.perf_counter() - start, 2),
        "cpu_seconds": round(time.process_time() - cpu, 2),
        "iterations": solution.stats.num_iterations,
        "evaluations": solution.stats.num_evaluations,
        "strides": solution.stats.strides,
        "splats": len(solution.value["geometry.means"]),
    }
    found = quality.against_truth(system, solution.value, truth)
    strip = torch.cat(list(found.images[::4]), -1)
    save(strip, FOLDER / "images" / f"{runs.name_of(wanted)}.png")
    wide = torch.cat(list(found.wanted[::4]), -1)
    save(wide, FOLDER / "images" / f"{wanted['prompt'].replace(' ', '-')}.png")
    try:
        mesh = quality.measure_mesh(system.mesh(solution.value), truth)
        chamfer = mesh.figures()["chamfer"]
    except EmptySurface:
        chamfer = None
    return {**entry, **found.figures(), "chamfer": chamfer}


def save(image: Tensor, path: Path) -> None:
    """Write an image, magnified four times."""
    path.parent.mkdir(parents=True, exist_ok=True)
    large = image.repeat_interleave(4, -1).repeat_interleave(4, -2)
    Image.fromarray(to_bytes(large)).save(path)


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
    plain = {(e["prompt"], e["seed"]): e for e in rows[PLAIN]}
    for row, found in rows.items():
        found = [e for e in found if (e["prompt"], e["seed"]) in plain]
        if not found:
            continue
        size = int(row.split()[-1]) if row != PLAIN else 1
        pieces = [every] * (steps // every) + [steps % every] * (steps % every > 0)
        least = sum(math.ceil(piece / size) for piece in pieces)
        change = sum(e["psnr"] - plain[e["prompt"], e["seed"]]["psnr"] for e in found)
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


def sheet_of(
    entries: list[dict[str, Any]],
    problems: list[tuple[str, int]],
    rows: list[str],
    folder: Path,
) -> Image.Image:
    """The ground truth, then the rows, for each complete problem.

    Args:
        entries: Entries of the log.
        problems: Prompt and seed of the columns.
        rows: Rows of a complete problem.
        folder: Folder of the strips.
    """
    strips = []
    for problem in problems:
        found = [e for e in entries if (e["prompt"], e["seed"]) == problem]
        if {e["row"] for e in found} < set(rows):
            continue
        found.sort(key=lambda e: rows.index(e["row"]))
        files = [problem[0].replace(" ", "-"), *map(runs.name_of, found)]
        strips.append([Image.open(folder / f"{file}.png") for file in files])
    width, height = strips[0][0].size
    whole = Image.new("RGB", (width * len(strips), height * (len(rows) + 1)))
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
        entries = runs.logged(jobs(), log, lambda e: (e["prompt"], e["seed"]), PLAIN)
    else:
        entries = runs.run_all(jobs(), log, arguments.workers, solve)
    text = table(entries)
    (FOLDER / "table.md").write_text(text)
    print(text)
    problems = [(runs.prompt_of(name), seed) for seed in SEEDS for name in PROMPTS]
    sheet_of(entries, problems, list(ROWS), FOLDER / "images").save(
        FOLDER / "sheet.png"
    )


if __name__ == "__main__":
    main()
