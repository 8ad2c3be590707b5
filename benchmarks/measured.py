"""Benchmarks of objects: by their images and their mesh, with a contact sheet.

The log, the strips of images, the table and the sheet of a benchmark lie in one folder;
a published one only receives table and sheet if it is named explicitly.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable, Sequence
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

SEQUENTIAL = "sequential"
"""Row of the sequential runs."""


def make_parser(description: str | None, name: str) -> argparse.ArgumentParser:
    """Options of a benchmark whose log is in `outputs/<name>` by default."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--workers", type=int, default=2, help="processes of 1 thread")
    parser.add_argument("--logged", action="store_true", help="only what was run")
    runs.add_places(parser, name)
    return parser


def problem(entry: runs.Job) -> tuple[Any, ...]:
    """The labels that a run shares with its sequential run."""
    return entry.get("kind"), entry["prompt"], entry["seed"]


def entries_of(
    arguments: argparse.Namespace,
    jobs: Sequence[runs.Job],
    solve: Callable[[Path, runs.Job], dict[str, Any]],
) -> list[dict[str, Any]]:
    """Run the missing jobs, or read what was run.

    Args:
        arguments: Options of `make_parser`.
        jobs: The jobs.
        solve: Solves a job, with its images in a folder; importable.
    """
    log = arguments.to / "runs.jsonl"
    if arguments.logged:
        return runs.logged(jobs, log, problem, SEQUENTIAL)
    how = functools.partial(solve, arguments.to)
    return runs.run_all(jobs, log, arguments.workers, how)


def publish(
    arguments: argparse.Namespace,
    text: str,
    entries: Sequence[dict[str, Any]],
    num_rows: int,
    name: str = "",
) -> None:
    """Print a table, and write it with a sheet of the complete problems.

    Args:
        arguments: Options of `make_parser`.
        text: The table.
        entries: Entries in the order of the table's rows.
        num_rows: Number of runs of a complete problem; its column is the ground truth
            and these.
        name: Name of both files; default: `table.md` and `sheet.png`.
    """
    print(text)
    folder = runs.tables_of(arguments)
    (folder / f"{name or 'table'}.md").write_text(text, encoding="utf-8")
    columns: dict[Any, list[Path]] = {}
    for entry in entries:
        prompt, images = entry["prompt"], arguments.to / "images"
        column = columns.setdefault(
            (entry["seed"], prompt), [images / f"{prompt.replace(' ', '-')}.png"]
        )
        column.append(images / f"{name_of(entry)}.png")
    whole = [column for column in columns.values() if len(column) == num_rows + 1]
    if whole:
        sheet(whole).save(folder / f"{name or 'sheet'}.png")


def name_of(wanted: runs.Job) -> str:
    """File name of a run's images."""
    labels = (wanted.get(key) for key in ("prompt", "kind", "row", "seed"))
    return " ".join(str(x) for x in labels if x is not None).replace(" ", "-")


SHAPE = ("chamfer", "iou_3d", "normal_error")
"""Figures of a mesh in the entries."""


def sheet(columns: Sequence[Sequence[Path]]) -> Image.Image:
    """Images side by side, each column from the top."""
    images = [[Image.open(path) for path in column] for column in columns]
    width, height = images[0][0].size
    whole = Image.new("RGB", (width * len(images), height * len(images[0])))
    for x, column in enumerate(images):
        for y, image in enumerate(column):
            whole.paste(image, (x * width, y * height))
    return whole


def measured(
    wanted: runs.Job, to: Path
) -> tuple[dict[str, Any], quality.Quality, dp.State]:
    """Solve a job, and write every fourth view beside the ground truth's.

    Args:
        wanted: The job.
        to: Folder of the benchmark.

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
    images = to / "images"
    save(torch.cat(list(found.images[::4]), -1), images / f"{name_of(wanted)}.png")
    wide = torch.cat(list(found.wanted[::4]), -1)
    save(wide, images / f"{wanted['prompt'].replace(' ', '-')}.png")
    try:
        mesh = quality.measure_mesh(system.mesh(solution.value), truth)
        shape = {name: mesh.figures()[name] for name in SHAPE}
    except EmptySurface:
        shape = {name: None for name in SHAPE}
    entry = {**wanted, **cost, **found.figures(), **shape}
    return entry, found, solution.value


def save(image: Tensor, path: Path) -> None:
    """Write an image, magnified four times."""
    path.parent.mkdir(parents=True, exist_ok=True)
    large = image.repeat_interleave(4, -1).repeat_interleave(4, -2)
    Image.fromarray(to_bytes(large)).save(path)
