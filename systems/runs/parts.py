"""`--parts`: the parts of the meshes of finished runs, as files and a page."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import torch

from systems.extras import command
from systems.files import written
from systems.images import save_image
from systems.quality.parts import Palette, Parts, find_parts
from systems.runs import folders
from systems.scene.cameras import Cameras, Views
from systems.scene.mesh_files import load_glb, to_glb
from systems.scene.zbuffer import render_mesh
from systems.settings.reader import ConfigError

TEMPLATE = Path(__file__).with_name("parts.html")
TURN = 0.382
"""Difference in hue of two consecutive parts on the page: nearly the golden section."""
VIEWS, SIZE = 3, 256


def run(words: Sequence[str], config: Path | None = None) -> int:
    """Find the parts of runs, and write them into their folders.

    Args:
        words: Run folders, or ``resume=FOLDER``.
        config: A config, which has no effect and is refused.

    Raises:
        ConfigError: There is no run or no mesh.
        ImportError: scikit-learn is not installed.
    """
    if config is not None:
        raise ConfigError(
            f"`--config {config}` has no effect on `--parts`, which reads the meshes "
            "of finished runs: leave it out."
        )
    places = [word.removeprefix("resume=") for word in words]
    wrong = [place for place in places if place.startswith("-") or "=" in place]
    if wrong or not places:
        raise ConfigError(
            "The parts of what? Write `--parts resume=RUN`, or `--parts RUN RUN …` for "
            "several runs that share a palette."
            + (f" `{wrong[0]}` has no effect here." if wrong else "")
        )
    runs = [folders.folder_of(place) for place in places]
    meshes = [_mesh(folder) for folder in runs]
    found = find_parts(meshes)
    for folder, mesh, parts in zip(runs, meshes, found.parts, strict=True):
        write(folder, mesh, found, parts)
        print(f"{_summary(parts)} {folder / 'parts.html'}")
    return 0


def write(folder: Path, mesh: Any, palette: Palette, parts: Parts) -> None:
    """Write ``parts.glb`` (an object per part), ``parts.json``, the page, its image."""
    with written(folder / "parts.glb") as part:
        part.write_bytes(to_glb(*separate(mesh, parts, palette.colours[parts.colours])))
    entries = [
        {
            "share": round(float(share), 4),
            "palette": int(index),
            "colour": _hex(palette.colours[index]),
        }
        for share, index in zip(parts.shares, parts.colours, strict=True)
    ]
    folders.write_json(
        folder / "parts.json",
        {"palette": [_hex(one) for one in palette.colours], "parts": entries},
    )
    title = str(folders.report(folder).get("title", folder.name))
    marks = np.stack([hue(number) for number in range(parts.count)])
    rows = "\n".join(
        f"<tr><td>{number + 1}</td><td>{_swatch(mark)}</td>"
        f"<td>{_swatch(palette.colours[index])}</td><td>{share:.1%}</td></tr>"
        for number, (mark, index, share) in enumerate(
            zip(marks, parts.colours, parts.shares, strict=True)
        )
    )
    image = folder / "parts.png"
    save_image(_sheet(mesh, parts, palette.colours[parts.colours], marks), image, VIEWS)
    text = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=html.escape(title),
        summary=_summary(parts),
        palette=" ".join(_swatch(one) for one in palette.colours),
        rows=rows,
        image=base64.b64encode(image.read_bytes()).decode(),
    )
    with written(folder / "parts.html") as part:
        part.write_text(text, encoding="utf-8")


def _mesh(folder: Path) -> Any:
    path = folder / "mesh.glb"
    if not path.exists():
        raise ConfigError(
            f"`{folder}` has no `mesh.glb`: write it with `{command('export')} "
            f"resume={folder}`."
        )
    mesh: Any = load_glb(path)
    if mesh.visual.kind == "texture":  # the renderer reads colours at the vertices
        mesh.visual = mesh.visual.to_color()
    return mesh


def separate(mesh: Any, parts: Parts, colours: np.ndarray) -> list[Any]:
    """A mesh per part, in one colour each."""
    import trimesh

    found = []
    for number, colour in enumerate(colours):
        faces = mesh.faces[parts.labels == number]
        kept, faces = np.unique(faces, return_inverse=True)
        found.append(
            trimesh.Trimesh(
                mesh.vertices[kept],
                faces.reshape(-1, 3),
                vertex_colors=np.tile(_bytes(colour), (len(kept), 1)),
                process=False,
            )
        )
    return found


def _sheet(
    mesh: Any, parts: Parts, colours: np.ndarray, marks: np.ndarray
) -> torch.Tensor:
    """Rows of views: as found, in the palette, and a mark for each part."""
    import trimesh

    azimuth = torch.arange(VIEWS) * 360.0 / VIEWS + 35
    same = torch.ones(VIEWS)
    cameras = Cameras(azimuth, 20 * same, 2.6 * same, 45 * same)
    views = Views(cameras, cameras.axes()[0], SIZE, SIZE)
    rows = [render_mesh(mesh, views)[0]]
    for kind in (colours, marks):
        whole = trimesh.util.concatenate(separate(mesh, parts, kind))
        rows.append(render_mesh(whole, views)[0])
    return torch.cat(rows)


def _summary(parts: Parts) -> str:
    colours = len(set(parts.colours.tolist()))
    return (
        f"{parts.count} {'part' if parts.count == 1 else 'parts'} in {colours} "
        f"{'colour' if colours == 1 else 'colours'}."
    )


def hue(number: int) -> np.ndarray:
    """A colour that differs from those of the neighbouring numbers."""
    import colorsys

    return np.array(colorsys.hsv_to_rgb(0.02 + TURN * number % 1, 0.62, 0.92))


def _bytes(colour: np.ndarray) -> np.ndarray:
    return (np.clip(colour, 0, 1) * 255).round().astype(np.uint8)


def _hex(colour: np.ndarray) -> str:
    return "#" + "".join(f"{value:02x}" for value in _bytes(colour))


def _swatch(colour: np.ndarray) -> str:
    code = _hex(colour)
    return f'<span class="swatch" style="background:{code}"></span> <code>{code}</code>'
