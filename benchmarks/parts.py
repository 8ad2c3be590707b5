"""The picture of `docs/mixtures.md`: the parts that are found on true meshes.

    python -m benchmarks.parts

The meshes have light from above and noise in their colours. Above as they are, below
with a colour for each part.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
import trimesh

from systems.images import save_image
from systems.quality.parts import find_parts
from systems.runs.parts import hue, separate
from systems.scene.cameras import Cameras, Views
from systems.scene.zbuffer import render_mesh
from systems.toybox.truth import truth

PROMPTS = ("a red mushroom", "a green snowman", "a pink ice cream cone")
SIZE = 220


def shaded(prompt: str, resolution: int = 40) -> Any:
    """The true mesh, its albedo under light from above and with noise."""
    found = truth(prompt).mesh(resolution)
    mesh: Any = trimesh.Trimesh(
        found.vertices.numpy(), found.faces.numpy(), process=False
    )
    light = 0.7 + 0.3 * mesh.vertex_normals[:, 2:]
    noise = 0.02 * np.random.default_rng(0).normal(size=light.shape)
    colours = (found.colours.numpy() * light + noise).clip(0, 1)
    mesh.visual.vertex_colors = (colours * 255).round().astype(np.uint8)
    return mesh


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--to", type=Path, default=Path("docs/parts.png"))
    to = parser.parse_args().to
    one = torch.ones(1)
    cameras = Cameras(35 * one, 20 * one, 2.6 * one, 45 * one)
    views = Views(cameras, cameras.axes()[0], SIZE, SIZE)
    above, below = [], []
    for prompt in PROMPTS:
        mesh = shaded(prompt)
        (parts,) = find_parts([mesh]).parts
        print(f"{prompt}: {parts.count} parts")
        marks = np.stack([hue(number) for number in range(parts.count)])
        marked: Any = trimesh.util.concatenate(separate(mesh, parts, marks))
        above.append(render_mesh(mesh, views)[0])
        below.append(render_mesh(marked, views)[0])
    save_image(torch.cat([*above, *below]), to, len(PROMPTS))


if __name__ == "__main__":
    main()
