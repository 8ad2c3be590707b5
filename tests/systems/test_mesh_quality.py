"""Images and figures of a mesh agree with what can be worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import trimesh
from trimesh.visual import ColorVisuals

from systems.quality.mesh import enclosed, measure_mesh, surface_errors, volume_iou
from systems.runs.report.page import rows
from systems.scene.cameras import Cameras, RandomCameras, Views
from systems.scene.zbuffer import covered, render_mesh
from systems.toybox.truth import truth

SPHERE = truth("a red sphere")  # of radius 0.65


def ball(radius: float, at: tuple[float, float, float] = (0, 0, 0)) -> trimesh.Trimesh:
    mesh = trimesh.creation.icosphere(4, radius)
    mesh.apply_translation(at)
    return mesh


def chamfer(mesh: trimesh.Trimesh, samples: int) -> float:
    return surface_errors(mesh, SPHERE, samples)[0]


def turntable(count: int, size: int) -> Views:
    cameras = RandomCameras(
        eval_camera_distance=2.4,
        eval_fovy_deg=50.0,
        eval_elevation_deg=20.0,
        eval_height=size,
        eval_width=size,
    )
    return cameras.turntable(count)


def test_each_pixel_of_a_square_is_covered_once() -> None:
    """Two triangles that share the diagonal."""
    square = np.array([[0.2, 0.1], [7.3, 0.1], [7.3, 5.4], [0.2, 5.4]])
    found = list(covered(square[[[0, 1, 2], [0, 2, 3]]], 8, 10))
    seen = np.zeros((8, 10), int)
    for _, row, column, bary in found:
        np.add.at(seen, (row, column), 1)
        assert np.allclose(bary.sum(-1), 1)
    wanted = np.zeros((8, 10), int)
    wanted[:5, :7] = 1
    assert (seen == wanted).all()


def test_silhouette_of_the_ground_truth_mesh_is_its_mask() -> None:
    wanted = truth("a cyan car")
    found = wanted.mesh(64)
    mesh = trimesh.Trimesh(found.vertices.numpy(), found.faces.numpy(), process=False)
    views = turntable(4, 64)
    _, masks = render_mesh(mesh, views)
    exact = wanted.render(views.cameras, 64).mask > 0.5
    union = (masks > 0.5) | exact
    assert float(((masks > 0.5) & exact).sum() / union.sum()) > 0.95


def test_the_nearer_of_two_balls_is_seen_with_its_colour() -> None:
    near, far = ball(0.3, (0.6, 0, 0)), ball(0.4, (-0.6, 0, 0))
    for mesh, colour in ((near, [255, 0, 0]), (far, [0, 0, 255])):
        colours = np.tile(colour, (len(mesh.vertices), 1)).astype(np.uint8)
        mesh.visual = ColorVisuals(mesh, vertex_colors=colours)
    both = trimesh.util.concatenate([far, near])
    one = torch.ones(2)
    cameras = Cameras(torch.tensor([0.0, 180.0]), 0 * one, 2.4 * one, 50 * one)
    images, _ = render_mesh(both, Views(cameras, cameras.axes()[0], 33, 33))
    front, back = images[:, :, 16, 16]
    assert front[0] > 0.95  # looked at straight on: at full light
    assert front[2] == 0
    assert back[2] > 0.95
    assert back[0] == 0
    assert (images[:, :, 0, 0] == 1).all()  # white behind
    clay, _ = render_mesh(both, Views(cameras, cameras.axes()[0], 33, 33), clay=True)
    assert torch.allclose(clay[:, 0], clay[:, 2])


def test_what_is_behind_the_camera_is_not_seen() -> None:
    one = torch.ones(1)
    cameras = Cameras(0 * one, 0 * one, 2.4 * one, 50 * one)
    views = Views(cameras, cameras.axes()[0], 16, 16)
    _, masks = render_mesh(ball(0.5, (4.0, 0, 0)), views)
    assert float(masks.sum()) == 0


def test_enclosed_points_are_those_inside() -> None:
    points = (np.arange(40) + 0.5) / 20 - 1
    grid = np.stack(np.meshgrid(points, points, points, indexing="ij"), -1)
    mesh = ball(0.5, (0.2, -0.1, 0.3))
    inside = np.linalg.norm(grid - [0.2, -0.1, 0.3], axis=-1) < 0.5
    assert (enclosed(mesh, points) != inside).mean() < 2e-3
    # Bodies that overlap count once, a hollow counts as outside.
    double = trimesh.util.concatenate([mesh, ball(0.5, (0.2, -0.1, 0.3))])
    assert (enclosed(double, points) == enclosed(mesh, points)).all()
    core = ball(0.3, (0.2, -0.1, 0.3))
    core.invert()
    hollow = enclosed(trimesh.util.concatenate([mesh, core]), points)
    assert hollow.sum() < 0.85 * inside.sum()
    assert not hollow[24, 18, 26]


@pytest.mark.parametrize("radius", [0.65, 0.5, 0.8])
def test_volume_and_distance_to_the_ground_truth(radius: float) -> None:
    ratio = min(radius, 0.65) / max(radius, 0.65)
    assert volume_iou(ball(radius), SPHERE) == pytest.approx(ratio**3, abs=0.015)
    found = chamfer(ball(radius), 5_000)
    floor = 0.02  # between points drawn from equal surfaces
    assert found == pytest.approx(abs(radius - 0.65), abs=floor)


def test_distance_falls_with_more_points_towards_nought() -> None:
    few, many = (chamfer(ball(0.65), n) for n in (2_000, 32_000))
    assert many == pytest.approx(few / 4, rel=0.15)  # as one over the root of points
    assert chamfer(ball(0.65), 2_000) == few


def test_normals_are_compared_at_the_nearest_points() -> None:
    """Of a sphere, its inverse, and a cube, whose normals are off by a known angle."""
    mesh = ball(0.65)
    assert surface_errors(mesh, SPHERE, 20_000)[1] < 4
    inverse = trimesh.Trimesh(mesh.vertices, mesh.faces[:, ::-1], process=False)
    assert surface_errors(inverse, SPHERE, 20_000)[1] > 176
    cube = trimesh.creation.box((1.3, 1.3, 1.3))
    ticks = (np.arange(200) + 0.5) / 200 * 2 - 1
    u, v = np.meshgrid(ticks, ticks)
    out = np.degrees(np.arccos(1 / np.sqrt(1 + u**2 + v**2)))  # at the nearest points
    area = (1 + u**2 + v**2) ** -1.5  # of the sphere that is nearest to a point
    expected = (out.mean() + (out * area).sum() / area.sum()) / 2
    found = surface_errors(cube, SPHERE, 20_000)[1]
    assert found == pytest.approx(expected, abs=4)


def test_figures_of_a_mesh_of_two_bodies() -> None:
    balls = [ball(0.3, (0.5, 0, 0)), ball(0.2, (-0.5, 0, 0))]
    two: Any = trimesh.util.concatenate(balls)
    two.metadata["level"] = 3.25
    found = measure_mesh(two).figures()
    volume = 4 / 3 * math.pi * (0.3**3 + 0.2**3)
    assert found["volume"] == pytest.approx(volume, rel=0.01)
    assert (found["bodies"], found["watertight"], found["level"]) == (2, True, 3.25)
    assert found["faces"] == len(two.faces)
    assert "iou_3d" not in found  # there is no ground truth
    open_one = ball(0.5)
    open_one.update_faces(np.arange(len(open_one.faces)) > 5)
    assert not measure_mesh(open_one).watertight


def test_a_shifted_mesh_scores_less() -> None:
    mesh = ball(0.65, (0.2, 0, 0))
    # Two balls of radius r whose centres are d apart share this part of one's volume.
    d = 0.2 / 0.65
    shared = 1 - 0.75 * d + d**3 / 16
    assert volume_iou(mesh, SPHERE) == pytest.approx(shared / (2 - shared), abs=0.015)
    assert 0.05 < chamfer(mesh, 5_000) < 0.2


def test_page_shows_the_mesh_of_each_run() -> None:
    run = {
        "workers": 1, "steps": 4, "iterations": 2, "evaluations": 4, "seconds": 1.0,
        "device_seconds": 1.0, "quality": "not measured",
    }  # fmt: skip
    found = {"iou_3d": 0.9123, "chamfer": 0.01234, "normal_error": 7.25, "bodies": 2}
    runs = {"sequential": {**run, "mesh": found}, "accelerated": {**run, "mesh": None}}
    table = rows({"runs": runs, "deviation": {}})
    assert ["3D IoU of the mesh", "0.912", "–"] in table
    assert ["Chamfer distance", "0.0123", "–"] in table
    assert ["normal error", "7.2°", "–"] in table
    assert ["bodies", "2", "–"] in table
