"""The meshes of sixteen fixed prompts, measured and rendered from their files.

`python -m benchmarks.meshes` solves each scored prompt with the default config, writes
its `mesh.glb`, reads it back, prints a table and writes a contact sheet: for each
prompt three shaded views of the file, then the same first view of the ground truth.
An existing final state is not solved again (`docs/main_job.md`).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import trimesh
from safetensors.torch import load_file, save_file

import dreampropeller as dp
from benchmarks import runs
from systems import build, quality
from systems.base import System
from systems.images import save_sheet
from systems.scene.cameras import Views
from systems.scene.mesh_files import load_glb, save_mesh
from systems.scene.zbuffer import render_mesh
from systems.settings.config import load
from systems.toybox.captions import SCORED, caption
from systems.toybox.truth import Truth

CONFIG = "configs/dreamfusion-toybox.yaml"
VIEWS = 3
SIZE = 128


def table(entries: list[dict[str, Any]]) -> str:
    """A Markdown table with the means in its last row."""
    lines = [
        "| prompt | 3D IoU | Chamfer distance | bodies | level | volume | true |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {entry['prompt']} | {entry['iou_3d']:.2f} | {entry['chamfer']:.3f} | "
        f"{entry['bodies']} | {entry['level']:.1f} | {entry['volume']:.2f} | "
        f"{entry['true_volume']:.2f} |"
        for entry in entries
    ]
    iou, distance = (runs.mean(entries, name) for name in ("iou_3d", "chamfer"))
    whole = sum(entry["bodies"] == 1 for entry in entries)
    lines.append(
        f"| **mean** | {iou:.3f} | {distance:.3f} | one body in {whole} of "
        f"{len(entries)} | | | |"
    )
    return "\n".join(lines)


def state_of(system: System, path: Path) -> dp.State:
    """The final state of a run, from a file if it exists."""
    if not path.exists():
        solution = dp.solve(system.trajectory(), system.solver(), throw=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in solution.value.items()}, path)
    return load_file(path)


def true_mesh(wanted: Truth) -> Any:
    """The ground truth as a mesh, extracted like ours."""
    found = wanted.mesh()
    return trimesh.Trimesh(
        found.vertices.numpy(),
        found.faces.numpy(),
        vertex_colors=(found.colours.numpy() * 255).round().astype(np.uint8),
        process=False,
    )


def views(system: System) -> Views:
    """Views of the sheet: as the turntable, from the front left and two more sides."""
    found = system.cameras.turntable(VIEWS)
    found.cameras.azimuth.add_(35.0)
    return Views(found.cameras, found.cameras.axes()[0], SIZE, SIZE)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default=CONFIG)
    parser.add_argument("--count", type=int, default=len(SCORED), help="prompts")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--set", nargs="*", default=[], help="further settings")
    parser.add_argument("--to", type=Path, default=Path("outputs/meshes"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    entries, rows = [], []
    for colour, name in SCORED[: arguments.count]:
        prompt = caption(colour, name, None, normal=False)
        job = runs.job(arguments.config, prompt, *arguments.set)
        system = build(load(job["config"], job["settings"]))
        folder = arguments.to / prompt.replace(" ", "_")
        surface = system.mesh(state_of(system, folder / "state.safetensors"))
        mesh = load_glb(save_mesh(surface, folder)[0])
        mesh.metadata["level"] = surface.metadata["level"]
        wanted = quality.truth_of(system)
        assert wanted is not None
        exact = true_mesh(wanted)
        figures = quality.measure_mesh(mesh, wanted).figures()
        entry = {"prompt": prompt, "true_volume": float(exact.volume), **figures}
        print(json.dumps(entry), flush=True)
        entries.append(entry)
        around = views(system)
        rows += [render_mesh(mesh, around)[0], render_mesh(exact, around.one(0))[0]]
    save_sheet(torch.cat(rows), arguments.to / "sheet.png", 2 * (VIEWS + 1))
    text = table(entries)
    (arguments.to / "table.md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
