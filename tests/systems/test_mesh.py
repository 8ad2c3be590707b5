"""The mesh: its surface, level and colours are right, and so are its files."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trimesh
from torch import Tensor
from trimesh.visual import ColorVisuals

from systems.scene.cameras import RandomCameras
from systems.scene.isosurface import (
    EmptySurface,
    Silhouettes,
    extract_mesh,
    largest_along,
    sample,
)
from systems.scene.mesh_files import load_glb, save_mesh, to_linear, to_srgb
from systems.settings.reader import ConfigError
from tests.systems.scenes import small

ORANGE = torch.tensor([1.0, 0.5, 0.0])


def orange(points: Tensor) -> Tensor:
    return ORANGE.expand(len(points), 3)


def ball(points: Tensor) -> Tensor:
    """10 in the centre, falling to nought at radius 1."""
    return 10 * (1 - points.norm(dim=-1)).clamp(min=0)


def blob(points: Tensor, centre: tuple[float, float, float], radius: float) -> Tensor:
    """8 in a ball with an edge 0.1 wide."""
    distance = (points - points.new_tensor(centre)).norm(dim=-1)
    return 8 * ((radius - distance) / 0.1 + 0.5).clamp(0, 1)


def seen(reach: float, size: int = 48) -> Silhouettes:
    """What cameras all around see of an opaque ball."""
    cameras = RandomCameras(eval_camera_distance=2.4, eval_fovy_deg=60.0)
    origins, directions = cameras.around(6, size).cameras.rays(size)
    origins = origins.expand_as(directions).reshape(-1, 3)
    directions = directions.reshape(-1, 3)
    passes = torch.linalg.cross(origins, directions, dim=-1).norm(dim=-1)
    return Silhouettes(origins, directions, (passes < reach).float())


def test_mesh_of_a_ball_is_round_closed_and_outside_out(tmp_path: Path) -> None:
    mesh = extract_mesh(ball, orange, radius=1.0, resolution=48, threshold=4.0)
    assert np.allclose(np.linalg.norm(mesh.vertices, axis=1), 0.6, atol=0.01)
    assert mesh.is_watertight
    assert mesh.volume == pytest.approx(4 / 3 * math.pi * 0.6**3, rel=0.02)
    assert mesh.vertices.mean(0) == pytest.approx(np.zeros(3), abs=1e-3)
    glb, obj = save_mesh(mesh, tmp_path)
    read: list[Any] = [load_glb(glb), trimesh.load(obj, force="mesh")]
    for again in read:
        assert len(again.faces) == len(mesh.faces)
        assert again.volume == pytest.approx(mesh.volume, rel=1e-4)
        assert (again.visual.vertex_colors[:, :3] == [255, 128, 0]).all()


def test_mesh_stands_upright_in_both_files(tmp_path: Path) -> None:
    """A cone-like body, wider below: z is up in the obj, y in the glb."""
    mesh = extract_mesh(
        lambda p: 5 - 8 * p[:, :2].norm(dim=-1) - 4 * p[:, 2].clamp(min=-0.5).abs(),
        lambda points: torch.ones(len(points), 3),
        radius=1.0,
        resolution=32,
        threshold=1.0,
    )
    mesh.apply_translation([0.0, 0.0, 2.0])
    paths = save_mesh(mesh, tmp_path)
    for path, axis in zip(paths, (1, 2), strict=True):
        again: Any = trimesh.load(path, force="mesh")
        assert again.bounds[0][axis] > 0.5
        assert again.volume == pytest.approx(mesh.volume, rel=1e-4)  # not mirrored
    assert load_glb(paths[0]).bounds == pytest.approx(mesh.bounds, abs=1e-4)


@pytest.mark.parametrize("reach", [0.3, 0.5, 0.7])
def test_level_is_where_the_silhouettes_match_the_opacity(reach: float) -> None:
    mesh = extract_mesh(ball, orange, 1.0, 64, seen(reach))
    assert mesh.metadata["level"] == pytest.approx(10 * (1 - reach), abs=0.2)
    assert np.linalg.norm(mesh.vertices, axis=1).mean() == pytest.approx(
        reach, abs=0.02
    )


def test_level_does_not_follow_the_scale_of_the_density() -> None:
    level = extract_mesh(ball, orange, 1.0, 48, seen(0.5)).metadata["level"]
    tenfold = extract_mesh(lambda p: 10 * ball(p), orange, 1.0, 48, seen(0.5))
    assert tenfold.metadata["level"] == pytest.approx(10 * level, rel=1e-4)


def test_largest_density_along_a_ray_is_that_of_its_nearest_point() -> None:
    rays = seen(0.5)
    passes = torch.linalg.cross(rays.origins, rays.directions, dim=-1).norm(dim=-1)
    found = largest_along(sample(ball, 1.0, 64), 1.0, rays.origins, rays.directions)
    assert torch.allclose(found, 10 * (1 - passes).clamp(min=0), atol=0.25)
    # Behind the camera there is nothing to see.
    away = largest_along(sample(ball, 1.0, 64), 1.0, rays.origins, -rays.directions)
    assert float(away.max()) == 0


def test_axes_of_the_level_are_those_of_the_mesh() -> None:
    """A bar along x, met from +y at its side but not beyond its ends."""

    def bar(points: Tensor) -> Tensor:
        scaled = points / points.new_tensor([0.8, 0.2, 0.1])
        return 8 * (scaled.norm(dim=-1) < 1).float()

    origins = torch.tensor([[0.6, 2.0, 0.0], [0.0, 2.0, 0.6], [2.0, 0.6, 0.0]])
    directions = torch.tensor([[0.0, -1, 0], [0, -1, 0], [-1, 0, 0]])
    found = largest_along(sample(bar, 1.0, 64), 1.0, origins, directions)
    assert found.tolist() == pytest.approx([8.0, 0.0, 0.0], abs=0.5)
    bounds = extract_mesh(bar, orange, 1.0, 64, 4.0).bounds
    assert bounds[1] == pytest.approx([0.8, 0.2, 0.1], abs=0.03)


def test_crumbs_are_dropped_and_cavities_filled() -> None:
    def density(points: Tensor) -> Tensor:
        hollow = blob(points, (0, 0, 0), 0.6) - blob(points, (0, 0, 0), 0.3)
        return hollow + blob(points, (0.85, 0, 0), 0.1)

    def make(share: float) -> trimesh.Trimesh:
        return extract_mesh(density, orange, 1.1, 64, 4.0, crumb_share=share)

    volume = 4 / 3 * math.pi * 0.6**3
    assert make(0.01).body_count == 1
    assert make(0.01).volume == pytest.approx(volume, rel=0.03)
    both = make(0.001)  # the crumb is 0.5 % of the ball
    assert both.body_count == 2
    assert both.bounds[1][0] == pytest.approx(0.95, abs=0.02)


def test_two_large_pieces_both_stay() -> None:
    def density(points: Tensor) -> Tensor:
        return blob(points, (0.5, 0, 0), 0.4) + blob(points, (-0.5, 0, 0), 0.2)

    assert extract_mesh(density, orange, 1.1, 64, 4.0).body_count == 2


def test_colours_are_those_that_a_ray_meets() -> None:
    """Grey fog shows little, the red shell under it all, its blue core nothing."""

    def colour(points: Tensor) -> Tensor:
        radius = points.norm(dim=-1, keepdim=True)
        fog, shell, core = torch.tensor(
            [[0.5, 0.5, 0.5], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]
        )
        return torch.where(radius > 0.6, fog, torch.where(radius > 0.4, shell, core))

    def density(points: Tensor) -> Tensor:
        radius = points.norm(dim=-1)
        return torch.where(radius < 0.6, 40.0, (0.8 - radius).clamp(min=0) * 5)

    at_vertices = extract_mesh(density, colour, 1.0, 64, 0.5).visual.vertex_colors
    met = extract_mesh(density, colour, 1.0, 64, 0.5, step_size=0.03)
    assert np.allclose(at_vertices[:, :3], 128, atol=1)
    red = met.visual.vertex_colors[:, :3].mean(0)
    assert red[0] > 240
    assert red[2] < 20


def test_glb_holds_linear_colours_and_a_material_that_is_not_metal(
    tmp_path: Path,
) -> None:
    """Read by the letter of the standard, without trimesh."""
    shown = np.array([128, 64, 5], np.uint8)
    mesh = trimesh.creation.box()
    mesh.visual = ColorVisuals(mesh, vertex_colors=np.tile(shown, (8, 1)))
    raw = save_mesh(mesh, tmp_path)[0].read_bytes()
    size = struct.unpack("<I", raw[12:16])[0]
    tree, blob = json.loads(raw[20 : 20 + size]), raw[28 + size :]
    (primitive,) = tree["meshes"][0]["primitives"]
    accessor = tree["accessors"][primitive["attributes"]["COLOR_0"]]
    view = tree["bufferViews"][accessor["bufferView"]]
    assert (accessor["componentType"], accessor["type"]) == (5126, "VEC3")
    first = np.frombuffer(blob, np.float32, 3, view["byteOffset"])
    right = [((c / 255 + 0.055) / 1.055) ** 2.4 for c in (128, 64)] + [5 / 255 / 12.92]
    assert first == pytest.approx(right, abs=1e-6)
    surface = tree["materials"][primitive["material"]]["pbrMetallicRoughness"]
    assert surface["metallicFactor"] == 0
    assert "NORMAL" in primitive["attributes"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mesh.glb", "mesh.obj"]


def test_linear_light_and_display_colours_are_inverse() -> None:
    values = np.arange(256) / 255
    assert np.allclose(to_srgb(to_linear(values)), values, atol=1e-7)
    assert to_linear(np.array([0.5])) == pytest.approx(0.21404, abs=1e-5)


def test_empty_surface_gives_advice() -> None:
    system = small("system.geometry.isosurface_threshold=1000000")
    start = system.trajectory().init()[0]
    with pytest.raises(EmptySurface, match=r"isosurface_threshold=.*more steps"):
        system.mesh(start)
    nothing = {**start, "geometry.grid": start["geometry.grid"] - 10}
    with pytest.raises(EmptySurface, match=r"nowhere opaque .*more steps"):
        small().mesh(nothing)


def test_level_is_auto_or_a_number() -> None:
    with pytest.raises(ConfigError, match=r"`best`: write auto or a number"):
        small("system.geometry.isosurface_threshold=best")


def test_mesh_of_a_state_is_the_same_each_time() -> None:
    system = small()
    y, _ = system.trajectory().init()
    one, two = system.mesh(y), system.mesh(y)
    assert (one.vertices == two.vertices).all()
    assert (one.visual.vertex_colors == two.visual.vertex_colors).all()
