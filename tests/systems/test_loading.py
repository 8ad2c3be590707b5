"""Meshes from anywhere: each is handled, or refused in a sentence that helps."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trimesh
from PIL import Image
from trimesh.visual import ColorVisuals, TextureVisuals
from trimesh.visual.material import PBRMaterial

from systems.scene.colours import to_linear
from systems.scene.mesh_files import save_mesh
from systems.scene.meshes.atlas import Texels, unwrap, usable
from systems.scene.meshes.loading import (
    MeshConfig,
    Surface,
    decimate,
    load_source,
    load_surface,
)
from systems.scene.meshes.reading import MeshError

SIDE = 48


def load(path: Path, **settings: Any) -> Surface:
    config = MeshConfig(str(path), **{"texture_resolution": SIDE, **settings})
    return load_surface(config)


def solid(surface: Surface) -> trimesh.Trimesh:
    """The shape without its seams."""
    mesh = trimesh.Trimesh(surface.vertices, surface.faces, process=False)
    mesh.merge_vertices(merge_tex=True, merge_norm=True)
    return mesh


def box(*extents: float) -> Any:
    return trimesh.creation.box(extents or (1.0, 1.2, 0.8))


def painted(mesh: Any, *colours: tuple[int, int, int]) -> Any:
    """Vertex colours: the first where x is negative, the last elsewhere."""
    left = np.asarray(mesh.vertices)[:, :1] < 0
    mesh.visual = ColorVisuals(
        mesh, vertex_colors=np.where(left, colours[0], colours[-1]).astype(np.uint8)
    )
    return mesh


def textured(mesh: Any, colour: str, factor: float = 1.0) -> Any:
    uv = np.asarray(mesh.vertices)[:, :2] * 0.3 + 0.5
    material = PBRMaterial(
        baseColorTexture=Image.new("RGB", (4, 4), colour),
        baseColorFactor=[factor, factor, factor, 1.0],
    )
    mesh.visual = TextureVisuals(uv=uv, material=material)
    return mesh


def written(mesh: Any, path: Path) -> Path:
    mesh.export(path)
    return path


def gltf_with(path: Path, **entries: Any) -> Path:
    """A glb whose tree has been edited."""
    raw = box().export(file_type="glb")
    size = struct.unpack("<I", raw[12:16])[0]
    tree = {**json.loads(raw[20 : 20 + size]), **entries}
    text = json.dumps(tree).encode()
    text += b" " * (-len(text) % 4)
    rest = raw[20 + size :]
    head = struct.pack(
        "<4sIII4s", b"glTF", 2, 20 + len(text) + len(rest), len(text), b"JSON"
    )
    path.write_bytes(head + text + rest)
    return path


def two_materials(folder: Path) -> Path:
    scene = trimesh.Scene()
    left, right = box(0.6, 0.6, 0.6), box(0.6, 0.6, 0.6)
    scene.add_geometry(textured(left, "red"), transform=_moved(-0.4))
    scene.add_geometry(textured(right, "blue"), transform=_moved(0.4))
    return written(scene, folder / "a.glb")


def _moved(x: float) -> np.ndarray:
    matrix = np.eye(4)
    matrix[0, 3] = x
    return matrix


def mirrored(folder: Path) -> Path:
    scene = trimesh.Scene()
    scene.add_geometry(box(), transform=np.diag([-1.0, 2.0, 1.0, 1.0]))
    return written(scene, folder / "a.glb")


def inside_out(folder: Path) -> Path:
    mesh = box()
    mesh.invert()
    return written(mesh, folder / "a.ply")


def turned_here_and_there(folder: Path) -> Path:
    mesh = trimesh.creation.icosphere(2)
    faces = np.array(mesh.faces)
    faces[::3] = faces[::3, ::-1]
    return written(
        trimesh.Trimesh(mesh.vertices, faces, process=False), folder / "a.off"
    )


def spoilt(folder: Path) -> Path:
    mesh = trimesh.creation.icosphere(2)
    vertices = np.concatenate([mesh.vertices, [[np.nan, 0, 0]], mesh.vertices[:1]])
    extra = [[0, 0, 1], [0, 1, 162], [0, 163, 5], *mesh.faces[:4], mesh.faces[5][::-1]]
    lines = [f"v {x} {y} {z}" for x, y, z in vertices]
    rows = [[int(i) + 1 for i in face] for face in [*mesh.faces, *extra]]
    lines += [f"f {a} {b} {c}" for a, b, c in rows]
    (folder / "a.obj").write_text("\n".join(lines))
    return folder / "a.obj"


def far_and_huge(folder: Path) -> Path:
    mesh = box(3e4, 1e4, 1e4)
    mesh.apply_translation([1e6, 0, -1e6])
    return written(mesh, folder / "a.stl")


def face_colours(folder: Path) -> Path:
    mesh = box()
    mesh.visual = ColorVisuals(mesh, face_colors=[[255, 0, 0, 255]] * 12)
    return written(mesh, folder / "a.ply")


def quads(folder: Path) -> Path:
    corners = [(x, y, z) for x in (0, 1) for y in (0, 1) for z in (0, 1)]
    sides = ["1 2 4 3", "5 7 8 6", "1 5 6 2", "3 4 8 7", "1 3 7 5", "2 6 8 4"]
    text = [f"v {x} {y} {z}" for x, y, z in corners] + [f"f {side}" for side in sides]
    (folder / "a.obj").write_text("mtllib nowhere.mtl\nusemtl none\n" + "\n".join(text))
    return folder / "a.obj"


def open_sheet(folder: Path) -> Path:
    mesh = trimesh.Trimesh(
        [[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]],
        [[0, 1, 2], [0, 2, 3]],
        process=False,
    )
    return written(mesh, folder / "a.glb")


def many_faces(folder: Path) -> Path:
    return written(
        painted(trimesh.creation.icosphere(4), (255, 0, 0), (0, 0, 255)),
        folder / "a.ply",
    )


HANDLED: dict[str, tuple[Callable[[Path], Path], dict[str, Any], str]] = {
    "several materials": (two_materials, {}, "New texture coordinates"),
    "negative scale": (mirrored, {}, ""),
    "inside out": (inside_out, {}, "12 face.s. were turned outside out"),
    "turned here and there": (turned_here_and_there, {}, "turned outside out"),
    "degenerate, duplicate, not finite": (spoilt, {}, "degenerate.*duplicate"),
    "far away and huge": (far_and_huge, {}, "Centred from .* scaled by"),
    "coloured faces": (face_colours, {}, ""),
    "quads, no normals, no mtl": (quads, {}, "Centred"),
    "open": (open_sheet, {}, ""),
    "too many faces": (many_faces, {"max_faces": 500}, "from 5120 to [45]\\d\\d faces"),
}


@pytest.mark.parametrize("name", HANDLED)
def test_a_hostile_mesh_is_handled(name: str, tmp_path: Path) -> None:
    make, settings, told = HANDLED[name]
    surface = load(make(tmp_path), **settings)
    for part in (surface.vertices, surface.normals, surface.uv, surface.colours):
        assert np.isfinite(part).all()
    assert np.linalg.norm(surface.normals, axis=1) == pytest.approx(1, abs=1e-4)
    assert usable(surface.uv, surface.faces, SIDE)
    assert np.linalg.norm(surface.vertices, axis=1).max() < 1.11
    notes = " ".join(surface.notes)
    assert re.search(told, notes), notes
    shape = solid(surface)
    if name != "open":
        assert shape.is_watertight
        assert shape.volume > 0.1


def cloud(folder: Path) -> Path:
    return written(trimesh.PointCloud(np.random.rand(9, 3)), folder / "a.ply")


def flat(folder: Path) -> Path:
    lines = ["v 0 0 0", "v 1 0 0", "v 2 0 0", "f 1 2 3"]
    (folder / "a.obj").write_text("\n".join(lines))
    return folder / "a.obj"


def cut_short(folder: Path) -> Path:
    (folder / "a.glb").write_bytes(box().export(file_type="glb")[:300])
    return folder / "a.glb"


def text(folder: Path) -> Path:
    (folder / "a.stl").write_text("no mesh at all")
    return folder / "a.stl"


def named(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(b"")
        return folder / name

    return make


REFUSED: dict[str, tuple[Callable[[Path], Path], dict[str, Any], str]] = {
    "missing": (
        lambda folder: folder / "a.glb",
        {},
        "There is no mesh .*write the path",
    ),
    "fbx": (named("a.fbx"), {}, "not of a format .*export it as glb"),
    "empty": (named("a.ply"), {}, "cannot be read as ply .*export it again|holds"),
    "cut short": (cut_short, {}, "is no whole glTF file: export it again"),
    "text": (text, {}, "cannot be read as stl|holds no"),
    "point cloud": (cloud, {}, "points or lines, but no triangles: export a mesh"),
    "without area": (flat, {}, "All 1 faces .* degenerate .*export it again"),
    "Draco": (
        lambda f: gltf_with(
            f / "a.glb", extensionsRequired=["KHR_draco_mesh_compression"]
        ),
        {},
        "Draco-compressed .*export it without compression",
    ),
    "lying": (
        lambda f: written(box(), f / "a.glb"),
        {"mesh_up": "+y", "mesh_front": "-y"},
        "write two axes, as `system.geometry.mesh_up=",
    ),
    "no coordinates to keep": (
        lambda f: written(box(), f / "a.glb"),
        {"uv": "keep"},
        "cannot be kept .*write `system.geometry.uv=make`",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_mesh_that_cannot_be_used_is_refused_in_a_sentence(
    name: str, tmp_path: Path
) -> None:
    make, settings, told = REFUSED[name]
    with pytest.raises(MeshError, match=told) as caught:
        load(make(tmp_path), **settings)
    assert str(caught.value).count("\n") == 0


def colour_at(surface: Surface, point: list[float]) -> np.ndarray:
    """The colour of the covered texel nearest to a point, in bytes."""
    face = surface.texels.face[surface.texels.inside]
    corners = surface.vertices[surface.faces[face]]
    points = (corners * surface.texels.weights[..., None]).sum(1)
    nearest = np.linalg.norm(points - point, axis=1).argmin()
    return (surface.colours[surface.texels.inside][nearest] * 255).round()


def test_colours_of_each_material_stay_where_they_are(tmp_path: Path) -> None:
    surface = load(two_materials(tmp_path), mesh_scale="keep")
    # In the file x; its front, +z, is the scene's +x, and its +x the scene's +y.
    assert colour_at(surface, [0.3, -0.4, 0]).tolist() == [255, 0, 0]
    assert colour_at(surface, [0.3, 0.4, 0]).tolist() == [0, 0, 255]


def test_factors_are_linear_light_and_textures_are_not(tmp_path: Path) -> None:
    """A factor of one half darkens 255 to 188, as glTF says."""
    path = written(textured(box(), "#ff8000", 0.5), tmp_path / "a.glb")
    wanted = [188, 92, 0]  # of (1, to_linear(128 / 255), 0) / 2
    assert 0.5 * to_linear(np.array([128 / 255]))[0] == pytest.approx(0.1079, abs=1e-4)
    assert colour_at(load(path), [0.5, 0, 0]) == pytest.approx(wanted, abs=1)


@pytest.mark.parametrize("kind", ["glb", "obj"])
def test_what_is_written_here_comes_back_as_it_was(kind: str, tmp_path: Path) -> None:
    """Axes, size and colours; the two files have different axes and colour spaces."""
    mesh = painted(box(1.2, 0.5, 0.9).subdivide(), (128, 64, 5), (10, 200, 90))
    save_mesh(mesh, tmp_path)
    source = load_source(MeshConfig(str(tmp_path / f"mesh.{kind}")))
    assert source.notes == ()
    assert np.ptp(source.vertices, 0) == pytest.approx([1.2, 0.5, 0.9], abs=1e-5)
    corners = np.eye(3)[None].repeat(len(source.faces), 0)
    face = np.arange(len(source.faces)).repeat(3)
    points = source.points(face, corners.reshape(-1, 3))
    wanted = np.where(points[:, :1] < 0, (128, 64, 5), (10, 200, 90))
    found = source.colour(face, corners.reshape(-1, 3)) * 255
    assert np.abs(found - wanted).max() < 1


def test_up_and_front_are_the_files_or_those_asked_for(tmp_path: Path) -> None:
    tall = box(0.4, 0.6, 1.6)  # x, y, z
    cases: list[tuple[str, dict[str, Any], list[float]]] = [
        ("a.glb", {}, [1.6, 0.4, 0.6]),  # y is up, z the front
        ("a.ply", {}, [0.4, 0.6, 1.6]),
        ("a.ply", {"mesh_up": "-x", "mesh_front": "+y"}, [0.6, 1.6, 0.4]),
    ]
    for name, settings, wanted in cases:
        source = load_source(
            MeshConfig(str(written(tall, tmp_path / name)), **settings)
        )
        assert np.ptp(source.vertices, 0) == pytest.approx(wanted, abs=1e-4)


def test_good_texture_coordinates_are_kept_and_overlapping_ones_are_not(
    tmp_path: Path,
) -> None:
    origin, faces, uv = unwrap(np.asarray(box().vertices), np.asarray(box().faces), 64)
    again = unwrap(np.asarray(box().vertices), np.asarray(box().faces), 64)
    assert all((a == b).all() for a, b in zip((origin, faces, uv), again, strict=True))
    assert (origin[faces] == box().faces).all()  # the same faces, in their order
    mesh = trimesh.Trimesh(box().vertices[origin], faces, process=False)
    image = Image.new("RGB", (8, 8), "white")
    mesh.visual = TextureVisuals(uv=uv, material=PBRMaterial(baseColorTexture=image))
    surface = load(written(mesh, tmp_path / "a.glb"))
    found = surface.uv[surface.faces].reshape(-1, 2)
    assert np.sort(found, 0) == pytest.approx(np.sort(uv[faces].reshape(-1, 2), 0))
    mesh.visual.uv = uv * 0 + np.asarray(mesh.vertices)[:, :2] * 0.4 + 0.5
    other = load(written(mesh, tmp_path / "b.glb"))
    assert "New texture coordinates were made." in other.notes


def test_texels_between_charts_take_the_nearest_colour() -> None:
    uv = np.array([[0.1, 0.1], [0.5, 0.1], [0.1, 0.5]])
    texels = Texels.of(uv, np.array([[0, 1, 2]]), 16)
    image = texels.image(np.tile([[0.2, 0.4, 0.6]], (int(texels.inside.sum()), 1)))
    assert texels.inside.mean() == pytest.approx(0.08, abs=0.03)
    assert (image == [0.2, 0.4, 0.6]).all()


def test_decimation_keeps_the_shape() -> None:
    ball = trimesh.creation.icosphere(4)
    vertices, faces = decimate(np.asarray(ball.vertices), np.asarray(ball.faces), 800)
    fewer = trimesh.Trimesh(vertices, faces, process=False)
    assert len(faces) <= 800
    assert fewer.volume == pytest.approx(ball.volume, rel=0.02)


def test_charts_too_small_for_the_map_are_reported_with_what_helps(
    tmp_path: Path,
) -> None:
    ball = trimesh.creation.icosphere(4)
    ball.vertices *= 1 + 0.2 * np.sin(25 * ball.vertices).mean(1, keepdims=True)
    file = tmp_path / "rough.ply"
    ball.export(file)
    found = load_surface(MeshConfig(str(file), texture_resolution=32))
    (note,) = [note for note in found.notes if "charts share" in note]
    (larger,) = re.findall(r"texture_resolution=(\d+)`", note)
    settings = {"mesh": str(file), "texture_resolution": int(larger)}
    better = load_surface(MeshConfig(**settings))
    assert not [note for note in better.notes if "charts share" in note]
