"""The main job over its fixed prompts: images and meshes against their ground truth.

`python -m benchmarks.main_job` makes the object of each scored prompt with the default
config, and measures its images and, read back from `mesh.glb`, its mesh. It prints a
table and writes two contact sheets: for each prompt eight views and below them the
ground truth's; and three shaded views of the mesh's file beside that of the ground
truth (`docs/main_job.md`). `--held-out` takes sixteen combinations of object, colour
and finish that the prior was not trained on. An interrupted benchmark resumes from its
log; final states, meshes and images are beside it.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import trimesh
from safetensors.torch import save_file
from torch import Tensor

import dreampropeller as dp
from benchmarks import runs
from benchmarks.measured import sheet
from systems import build, quality
from systems.base import System
from systems.images import save_sheet
from systems.scene.cameras import Views
from systems.scene.isosurface import EmptySurface
from systems.scene.mesh_files import load_glb, save_mesh
from systems.scene.zbuffer import render_mesh
from systems.settings.config import load
from systems.toybox.captions import HELD_OUT, SCORED, caption
from systems.toybox.truth import Truth

CONFIG = "configs/dreamfusion-toybox.yaml"
SHOWN, SIDES, SIDE = 8, 3, 128
"""Views of the volume and of the mesh in the sheets, and the latter's pixels."""
FIGURES: Mapping[str, tuple[str, str]] = {
    "psnr": ("PSNR, dB", ".1f"),
    "union_psnr": ("within the silhouettes", ".1f"),
    "ssim": ("SSIM", ".2f"),
    "iou": ("IoU", ".2f"),
    "right_colour": ("colour", ".0%"),
    "right_object": ("object", ".0%"),
    "iou_3d": ("mesh: 3D IoU", ".2f"),
    "chamfer_share": ("Chamfer, of the diagonal", ".1%"),
    "bodies": ("bodies", ".1f"),
    "iterations": ("iterations", ".0f"),
}
"""Heading and format of a figure."""


def held_out(count: int = 16) -> list[str]:
    """Prompts of held-out pairs with a finish: striped and spotted in turn.

    The stripes or spots are white, and black on white bodies.
    """
    chosen = HELD_OUT[:: len(HELD_OUT) // count][:count]
    marks = ("stripes", "spots")
    return [
        f"{caption(colour, name, None, normal=False)} with "
        f"{'black' if colour == 'white' else 'white'} {marks[i % 2]}"
        for i, (colour, name) in enumerate(chosen)
    ]


def true_mesh(wanted: Truth) -> Any:
    """The ground truth as a mesh, extracted like ours."""
    found = wanted.mesh()
    return trimesh.Trimesh(
        found.vertices.numpy(),
        found.faces.numpy(),
        vertex_colors=(found.colours.numpy() * 255).round().astype(np.uint8),
        process=False,
    )


def sides(system: System) -> Views:
    """Views of a mesh: as the turntable, from the front left and two more sides."""
    found = system.cameras.turntable(SIDES)
    found.cameras.azimuth.add_(35.0)
    return Views(found.cameras, found.cameras.axes()[0], SIDE, SIDE)


def mesh_of(
    system: System, y: dp.State, wanted: Truth, folder: Path
) -> tuple[dict[str, Any], Tensor]:
    """Figures of the mesh as read from its file, and its views beside the truth's.

    Args:
        system: System of the state.
        y: Final state.
        wanted: The ground truth.
        folder: Folder of the file.
    """
    exact, around = true_mesh(wanted), sides(system)
    beside = render_mesh(exact, around.one(0))[0]
    diagonal = float(np.linalg.norm(np.ptp(exact.vertices, axis=0)))
    try:
        surface = system.mesh(y)
    except EmptySurface:
        none = {"iou_3d": 0.0, "chamfer_share": 1.0, "bodies": 0}
        return none, torch.cat([torch.ones_like(beside)] * SIDES + [beside])
    mesh = load_glb(save_mesh(surface, folder)[0])
    mesh.metadata["level"] = surface.metadata.get("level")
    figures = quality.measure_mesh(mesh, wanted).figures()
    figures["chamfer_share"] = round(figures["chamfer"] / diagonal, 5)
    return figures, torch.cat([render_mesh(mesh, around)[0], beside])


def solve(to: Path, wanted: runs.Job) -> dict[str, Any]:
    """Make an object, measure it, and leave its files in a folder of its own.

    Args:
        to: Folder of the benchmark.
        wanted: The job.
    """
    system = build(load(wanted["config"], wanted["settings"]))
    truth = quality.truth_of(system)
    assert truth is not None, "benchmarks need prompts of the toybox"
    start = time.perf_counter()
    solution = dp.solve(system.trajectory(), system.solver(), throw=False)
    seconds = round(time.perf_counter() - start, 2)
    folder = folder_of(to, wanted)
    folder.mkdir(parents=True, exist_ok=True)
    final = {k: v.contiguous() for k, v in solution.value.items()}
    save_file(final, folder / "state.safetensors")
    found = quality.against_truth(system, solution.value, truth)
    pairs = torch.cat([found.images[:SHOWN], found.wanted[:SHOWN]])
    save_sheet(pairs, folder / "volumes.png", SHOWN)
    shape, strip = mesh_of(system, solution.value, truth, folder)
    save_sheet(strip, folder / "meshes.png", SIDES + 1)
    return {
        **wanted,
        **found.figures(),
        **shape,
        "steps": sum(solution.stats.strides),
        "iterations": solution.stats.num_iterations,
        "evaluations": solution.stats.num_evaluations,
        "seconds": seconds,
    }


def folder_of(to: Path, entry: runs.Job) -> Path:
    """Folder of a run's files."""
    return to / f"{entry['prompt'].replace(' ', '_')}-{entry['seed']}"


def table(entries: Sequence[dict[str, Any]]) -> str:
    """A Markdown table with the means in its last row."""
    heads = " | ".join(name for name, _ in FIGURES.values())
    means = {name: runs.mean(entries, name) for name in FIGURES}
    several = len({entry["seed"] for entry in entries}) > 1
    lines = [f"| prompt | {heads} |", "|---" * (len(FIGURES) + 1) + "|"]
    for entry in [*entries, {"prompt": "**mean**", **means}]:
        seed = f", seed {entry['seed']}" if several and "seed" in entry else ""
        row = " | ".join(format(entry[k], how) for k, (_, how) in FIGURES.items())
        lines.append(f"| {entry['prompt']}{seed} | {row} |")
    return "\n".join(lines)


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default=CONFIG)
    names = [name for _, name in SCORED]
    parser.add_argument("--objects", nargs="+", default=names, choices=names)
    parser.add_argument("--held-out", action="store_true", help="other prompts")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--workers", type=int, default=2, help="processes of 1 thread")
    parser.add_argument("--set", nargs="*", default=[], help="further settings")
    runs.add_places(parser, "main_job")
    return parser


def jobs(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Every run."""
    prompts = [runs.prompt_of(name) for name in arguments.objects]
    if arguments.held_out:
        prompts = held_out()
    return [
        runs.job(arguments.config, prompt, f"seed={seed}", *arguments.set, seed=seed)
        for seed in arguments.seeds
        for prompt in prompts
    ]


def main() -> None:
    """Command line."""
    arguments = make_parser().parse_args()
    how = functools.partial(solve, arguments.to)
    log = arguments.to / "runs.jsonl"
    entries = runs.run_all(jobs(arguments), log, arguments.workers, how)
    text = f"{table(entries)}\n\n{runs.cost(entries)}\n"
    folder = runs.tables_of(arguments)
    (folder / "table.md").write_text(text, encoding="utf-8")
    places = [folder_of(arguments.to, entry) for entry in entries]
    for name in ("volumes", "meshes"):
        files = [place / f"{name}.png" for place in places]
        columns = [files[i::2] for i in range(min(2, len(files)))]
        sheet(columns).save(folder / f"{name}.png")
    print(text)


if __name__ == "__main__":
    main()
