"""Texture of a given mesh, sequentially and with windows: cost and quality.

    python -m benchmarks.texture [--workers 2] [--logged]
    python -m benchmarks.texture --raster
    python -m benchmarks.texture --picture docs/texture.png RUN RUN

The true mesh of a white toybox object takes the prompt of another colour
(`configs/texture-toybox.yaml`): three prompts with two seeds give a table and a contact
sheet. An interrupted benchmark resumes from its log.
Images of 32 pixels hide what a texel does, so PSNR is measured on images of 128 pixels
as well.

`--raster` times the rasteriser alone: 102,400 faces at 256², four views. `--picture`
draws the meshes that runs were given and those that they wrote.
"""

from __future__ import annotations

import math
import resource
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import trimesh
from PIL import Image
from torch.nn.functional import avg_pool2d

import dreampropeller as dp
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
from systems import build, quality
from systems.base import System
from systems.images import to_bytes
from systems.quality.truth import GREY, fixed_views
from systems.scene.cameras import Cameras, Views
from systems.scene.mesh_files import load_glb, save_mesh
from systems.scene.renderers import raster, silhouettes
from systems.scene.zbuffer import render_mesh
from systems.settings.config import load
from systems.toybox.truth import Truth, truth

CONFIG = "configs/texture-toybox.yaml"
MESHES = Path("outputs/texture/meshes")
PROMPTS = {
    "chair": "a red chair",
    "mug": "a blue mug",
    "rocket": "an orange rocket",
}
"""Colours alone: the first embedded prior knows no finishes."""
ROWS = {
    SEQUENTIAL: ["solver.name=sequential"],
    **{f"window {size}": [f"solver.window.size={size}"] for size in (8, 16, 32)},
}
AIMS = {"window 8": 7, "window 16": 13, "window 32": 20}
"""Times fewer iterations that were aimed at, within 0.2 dB."""
LARGE = 128
"""Side of the larger images, in pixels."""
PICTURE = 160
"""Side of an image of `--picture`, in pixels."""
RESOLUTION = 64
"""Grid points per side from which the true mesh is made."""


def white_mesh(name: str) -> Path:
    """The true mesh of a white object, as a file."""
    file = MESHES / name / "mesh.glb"
    if not file.exists():
        found = truth(f"a white {name}").mesh(RESOLUTION)
        mesh = trimesh.Trimesh(
            found.vertices.numpy(),
            found.faces.numpy(),
            vertex_colors=(found.colours.numpy() * 255).round().astype(np.uint8),
            process=False,
        )
        save_mesh(mesh, file.parent)
    return file


def jobs() -> list[dict[str, Any]]:
    """All runs, the first seed's first."""
    return [
        runs.job(
            CONFIG,
            prompt,
            f"system.geometry.mesh={white_mesh(name)}",
            *settings,
            f"seed={seed}",
            row=row,
            seed=seed,
        )
        for seed in SEEDS
        for name, prompt in PROMPTS.items()
        for row, settings in ROWS.items()
    ]


def large_psnr(system: System, y: dp.State, wanted: Truth) -> float:
    """PSNR over images of `LARGE` pixels, dB."""
    views = fixed_views(2 * LARGE)
    errors = []
    for number in range(len(views.cameras)):
        view = views.one(number)
        image = avg_pool2d(system.render(y, view, grey=GREY)[0], 2)
        exact = wanted.render(view.cameras, LARGE).over(torch.full((3,), GREY))
        errors.append(float((image - exact).square().mean()))
    return -10 * math.log10(sum(errors) / len(errors))


def solve(to: Path, wanted: runs.Job) -> dict[str, Any]:
    """Solve a job, measure it, and save a strip of images."""
    entry, _, y = measured(wanted, to)
    system = build(load(wanted["config"], wanted["settings"]))
    goal = quality.truth_of(system)
    assert goal is not None
    start = system.trajectory().init()[0]
    blank = quality.against_truth(system, start, goal)
    return {
        **entry,
        "large_psnr": round(large_psnr(system, y, goal), 4),
        "white_psnr": round(blank.psnr, 4),
    }


def table(entries: list[dict[str, Any]]) -> str:
    """Means over the prompts and seeds of each row, as Markdown."""
    example = load(CONFIG, entries[0]["settings"])
    steps = example.trainer.max_steps
    lines = [
        "| | runs | iterations | fewer | aim | gradients | PSNR | at 128 pixels | "
        "right colour | white mesh |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    sequential = {problem(e): e for e in entries if e["row"] == SEQUENTIAL}
    for row in ROWS:
        found = [e for e in entries if e["row"] == row]
        found = [e for e in found if problem(e) in sequential]
        if not found:
            continue
        few = runs.mean(found, "iterations")
        change = [e["psnr"] - sequential[problem(e)]["psnr"] for e in found]
        lines.append(
            f"| {row} | {len(found)} | {few:.1f} | {steps / few:.2f} | "
            f"{AIMS.get(row, '')} | {runs.mean(found, 'evaluations'):.0f} | "
            f"{runs.mean(found, 'psnr'):.2f} ({sum(change) / len(change):+.2f}, worst "
            f"{min(change):+.2f}) | {runs.mean(found, 'large_psnr'):.2f} | "
            f"{runs.mean(found, 'right_colour'):.2f} | "
            f"{runs.mean(found, 'white_psnr'):.2f} |"
        )
    lowest = min(e["psnr"] for e in entries)
    lines += ["", f"Lowest PSNR of all runs: {lowest:.2f} dB. {runs.cost(entries)}"]
    return "\n".join(lines) + "\n"


def time_rasteriser(repeats: int = 5) -> str:
    """Median seconds of each part of an image and its gradient, on one thread."""
    torch.set_num_threads(1)
    large, little = trimesh.creation.icosphere(6), trimesh.creation.icosphere(5)
    whole: Any = trimesh.util.concatenate(
        [large, little.apply_scale(0.3).apply_translation([0.9, 0.4, 0.3])]
    )
    bumps = whole.vertices + 0.02 * np.sin(20 * whole.vertices)
    vertices = torch.from_numpy(bumps).float().requires_grad_()
    faces, uv = torch.from_numpy(np.array(whole.faces)), torch.rand(len(vertices), 2)
    texture = torch.rand(1024, 1024, 3, requires_grad=True)
    around = torch.arange(4)
    cameras = Cameras(
        90.0 * around, 20 + 0.0 * around, 2.6 + 0.0 * around, 50.0 + 0 * around
    )
    views = Views(cameras, cameras.axes()[0], 256, 256)
    adjacency = silhouettes.Adjacency.of(faces)
    spent: dict[str, list[float]] = {}
    for _ in range(repeats):
        clock = [time.process_time()]
        seen = raster.Embree(vertices, faces)
        clock.append(time.process_time())
        found = raster.rasterize(vertices, faces, views, seen)
        clock.append(time.process_time())
        colours = raster.sample(texture, found.interpolate(uv, faces))
        image = found.image(torch.cat([colours, torch.ones_like(colours[:, :1])], -1))
        clock.append(time.process_time())
        image = silhouettes.antialias(image, found, vertices, faces, views, adjacency)
        clock.append(time.process_time())
        torch.autograd.grad(image.square().mean(), [vertices, texture])
        clock.append(time.process_time())
        parts = ("hierarchy", "visibility", "texture", "antialiasing", "backward")
        for part, begin, end in zip(parts, clock, clock[1:], strict=False):
            spent.setdefault(part, []).append(end - begin)
    medians = {part: statistics.median(values) for part, values in spent.items()}
    again = sum(medians.values()) - medians["hierarchy"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    lines = [f"{part}: {value:.2f} s" for part, value in medians.items()]
    return "\n".join(
        [
            f"{len(faces)} faces, 4 views of 256², one thread of {runs.machine()}",
            *lines,
            f"together {again:.2f} s, and {medians['hierarchy']:.2f} s once per shape",
            f"peak memory of the process: {peak:.2f} GiB",
        ]
    )


def picture(folders: Sequence[str]) -> torch.Tensor:
    """A row per run: its mesh as given, the written one without light, and its map."""
    one = torch.ones(3)
    cameras = Cameras(torch.tensor([35.0, 155, 275]), 18 * one, 2.4 * one, 42 * one)
    views = Views(cameras, cameras.axes()[0], 2 * PICTURE, 2 * PICTURE)
    rows = []
    for folder in map(Path, folders):
        given = load(folder / "config.yaml").system["geometry"]["mesh"]
        white, _ = render_mesh(load_glb(Path(given)), views.one(0))
        mesh: Any = load_glb(folder / "mesh.glb")
        shown, _ = render_mesh(mesh, views, ambient=1.0)
        images = avg_pool2d(torch.cat([white, shown]), 2)
        texels = mesh.visual.material.baseColorTexture.convert("RGB")
        small = np.asarray(texels.resize((PICTURE, PICTURE))) / 255
        rows.append(torch.cat([*images, torch.from_numpy(small).movedim(-1, 0)], -1))
    return torch.cat(rows, -2)


def main() -> None:
    """Run the missing jobs, and write table and sheet."""
    parser = make_parser(__doc__, "texture")
    parser.add_argument("--raster", action="store_true", help="the rasteriser alone")
    parser.add_argument("--picture", nargs="+", metavar="FILE RUN", help="draw runs")
    arguments = parser.parse_args()
    if arguments.picture:
        path, *folders = arguments.picture
        Image.fromarray(to_bytes(picture(folders))).save(path)
        return
    if arguments.raster:
        print(time_rasteriser())
        return
    entries = entries_of(arguments, jobs(), solve)
    publish(arguments, table(entries), entries, len(ROWS))


if __name__ == "__main__":
    main()
