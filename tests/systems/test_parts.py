"""`--parts`: pieces of a surface in one colour, one palette for several objects."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trimesh
from sklearn.metrics import adjusted_rand_score

import launch
from benchmarks.parts import shaded
from systems.quality.parts import Palette, find_parts
from systems.scene.mesh_files import save_mesh, with_texture
from systems.scene.meshes import atlas
from systems.toybox.objects import OBJECTS


def agreement(name: str, mesh: Any, found: Palette, index: int = 0) -> float:
    """The adjusted Rand index of the parts and the object's own."""
    centres = torch.from_numpy(mesh.triangles_center.copy()).float()
    own = OBJECTS[name].distances(centres).argmin(-1)
    return adjusted_rand_score(own, found.parts[index].labels)


@pytest.mark.parametrize(
    ("colour", "name", "parts"),
    # The snowman's hat, body and nose.
    [("red", "mushroom", 2), ("green", "snowman", 3), ("pink", "ice cream cone", 2)],
)
def test_parts_are_those_of_the_object(colour: str, name: str, parts: int) -> None:
    mesh = shaded(f"a {colour} {name}")
    found = find_parts([mesh])
    assert found.parts[0].count == parts
    assert agreement(name, mesh, found) > 0.9
    assert found.parts[0].shares.sum() == pytest.approx(1)
    again = find_parts([mesh])
    assert (again.parts[0].labels == found.parts[0].labels).all()


def test_pieces_apart_are_parts_and_crumbs_are_none() -> None:
    ball: Any = trimesh.creation.icosphere(3)
    red, blue = np.array([200, 20, 20]), np.array([20, 20, 200])
    colours = np.tile(red, (len(ball.vertices), 1))
    colours[np.abs(ball.vertices[:, 2]) > 0.8] = blue  # two caps
    colours[np.argmax(ball.vertices[:, 0])] = blue  # and a dot
    ball.visual.vertex_colors = colours.astype(np.uint8)
    found = find_parts([ball])
    assert found.parts[0].count == 3
    assert len(found.colours) == 2


def test_seams_of_a_texture_part_nothing(tmp_path: Path) -> None:
    mesh = shaded("a red mushroom", 24)
    origin, faces, uv = atlas.unwrap(mesh.vertices, mesh.faces, 256)
    texels = atlas.Texels.of(uv, faces, 256)
    colours = np.asarray(mesh.visual.vertex_colors)[origin, :3] / 255
    corners = colours[faces[texels.face[texels.inside]]]
    image = texels.image((corners * texels.weights[..., None]).sum(1))
    textured = with_texture(mesh.vertices[origin], faces, None, uv, image)
    save_mesh(textured, tmp_path)
    assert len(origin) > len(mesh.vertices)
    assert launch.main(["--parts", str(tmp_path)]) == 0
    assert len(json.loads((tmp_path / "parts.json").read_text())["parts"]) == 2
    assert agreement("mushroom", mesh, find_parts([textured])) > 0.9


def test_runs_share_a_palette_and_get_their_files(tmp_path: Path) -> None:
    names = {"red mushroom": "mushroom", "red tree": "tree"}
    meshes = [shaded(f"a {name}") for name in names]
    runs = [tmp_path / name.replace(" ", "-") for name in names]
    for folder, mesh in zip(runs, meshes, strict=True):
        folder.mkdir()
        save_mesh(mesh, folder)
    assert launch.main(["--parts", *map(str, runs)]) == 0
    palettes = []
    for folder in runs:
        found = json.loads((folder / "parts.json").read_text())
        palettes.append(found["palette"])
        scene: Any = trimesh.load(folder / "parts.glb", process=False)
        assert len(scene.geometry) == len(found["parts"]) == 2
        assert (folder / "parts.png").stat().st_size > 1000
        page = (folder / "parts.html").read_text()
        assert all(colour in page for colour in found["palette"])
        assert "$" not in page.partition("base64")[0]
    assert palettes[0] == palettes[1]
    assert len(palettes[0]) == 3  # red, white and brown
    assert launch.main(["--parts", f"resume={runs[0]}"]) == 0
    assert len(json.loads((runs[0] / "parts.json").read_text())["palette"]) == 2


def test_surfaces_that_have_no_parts_get_a_sentence() -> None:
    def ball() -> Any:
        made: Any = trimesh.creation.icosphere(1)
        made.visual.vertex_colors = np.full((len(made.vertices), 4), 200, np.uint8)
        return made

    one, flat, broken = ball(), ball(), ball()
    one.faces = one.faces[:1]
    flat.vertices = np.zeros_like(flat.vertices)
    broken.vertices[3, 0] = np.nan
    for meshes, message in (
        ([], r"write `find_parts\(\[mesh\]\)`"),
        ([one], "has 1 face, and parts are found among at least two"),
        ([ball(), one], "has 1 face,"),
        ([flat], "has no area"),
        ([broken], "corners that are not finite: export it again"),
    ):
        with pytest.raises(ValueError, match=message):
            find_parts(meshes)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([], "write `--parts resume=run`"),
        (["resume={}"], "write it with `python launch.py --export"),
        (["{}", "solver.name=picard"], "`solver.name=picard` has no effect here"),
        (["{}", "--config", "x.yaml"], "`--config x.yaml` has no effect on `--parts`"),
        (["{}/nowhere"], "there is nothing to resume"),
    ],
)
def test_what_has_no_parts_is_refused(
    words: list[str],
    complaint: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert launch.main(["--parts", *(word.format(tmp_path) for word in words)]) == 2
    assert complaint.lower() in capsys.readouterr().err.lower()
