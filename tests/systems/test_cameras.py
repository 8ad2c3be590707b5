"""Cameras: geometry by hand, distributions within bounds, steps that replay."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dreampropeller import StepRandom
from systems.scene.cameras import Cameras, RandomCameras

ROOM = RandomCameras(batch_size=6, height=4, width=8)


def one(azimuth: float, elevation: float, **more: torch.Tensor) -> Cameras:
    values = [torch.tensor([v]) for v in (azimuth, elevation, 2.0, 90.0)]
    return Cameras(*values, **more)


def test_side_camera_by_hand() -> None:
    position, right, up, forward = one(90.0, 0.0).axes()
    expected = ([0, 2, 0], [-1, 0, 0], [0, 0, 1], [0, -1, 0])
    for axis, value in zip((position, right, up, forward), expected, strict=True):
        assert torch.allclose(axis, torch.tensor([value]).float(), atol=1e-6)


def test_rays_of_a_wide_picture_by_hand() -> None:
    """At 90° the top edge is as high as it is far; the corner twice as wide."""
    _, directions = one(0.0, 0.0).rays(2, 4)
    assert directions.shape == (1, 2, 4, 3)
    corner = torch.tensor([-1.0, -1.5, 0.5])  # forward −x, left is −y, up is z
    assert torch.allclose(directions[0, 0, 0], corner / corner.norm(), atol=1e-6)


@pytest.mark.parametrize("elevation", [-80.0, 0.0, 35.0, 90.0])
def test_perturbations_of_nought_change_nothing(elevation: float) -> None:
    zero = torch.zeros(1, 3)
    plain = one(33.0, elevation).axes()
    moved = one(33.0, elevation, shift=zero, centre=zero, tilt=zero).axes()
    for a, b in zip(plain, moved, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_views_replay_and_differ_from_step_to_step() -> None:
    again = [ROOM.views(step, StepRandom(3)) for step in (5, 9, 5)]
    for f in dataclasses.fields(Cameras):
        first, other, same = (getattr(views.cameras, f.name) for views in again)
        assert torch.equal(first, same)
        assert torch.equal(first, other) == (f.name == "aspect")
    assert torch.equal(again[0].light, again[2].light)


def test_the_shape_of_the_images_stays_with_their_cameras() -> None:
    wide = ROOM.views(0, StepRandom(0)).cameras
    both = Cameras.joined([one(0.0, 0.0), wide.chosen(slice(0, 2))])
    assert both.aspect is not None
    assert both.aspect.tolist() == [1.0, 2.0, 2.0]


@pytest.mark.parametrize("strategy", ["dreamfusion", "magic3d"])
def test_views_stay_in_their_ranges(strategy: str) -> None:
    room = dataclasses.replace(
        ROOM, light_sample_strategy=strategy, light_distance_range=(0.8, 1.5)
    )
    for step in range(40):
        views = room.views(step, StepRandom(0))
        cameras = views.cameras
        for values, (low, high) in (
            (cameras.elevation, room.elevation_range),
            (cameras.azimuth, room.azimuth_range),
            (cameras.distance, room.camera_distance_range),
            (cameras.fov, room.fovy_range),
            (views.light.norm(dim=-1), room.light_distance_range),
        ):
            assert (values >= low - 1e-4).all()
            assert (values <= high + 1e-4).all()
        turn = cameras.azimuth.sort().values.diff()
        assert (turn < 2 * 360 / len(cameras)).all()  # spread all around


def test_turntable_goes_round_once() -> None:
    views = ROOM.turntable(8)
    assert views.cameras.azimuth.tolist() == [45.0 * i for i in range(8)]
    assert (views.height, views.width) == (512, 512)
    third = views.one(3)
    assert third.cameras.azimuth.tolist() == [135.0]
    assert len(third.light) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "`batch_size` is 0: write 1 or more"),
        ({"elevation_range": (10.0, -10.0)}, "`elevation_range`"),
        ({"camera_distance_range": (-1.0, 2.0)}, "`camera_distance_range`"),
        ({"fovy_range": (40.0, 190.0)}, "`fovy_range`"),
        ({"light_sample_strategy": "sun"}, "write dreamfusion or magic3d"),
        ({"up_perturb": -0.1}, "`up_perturb` is -0.1"),
    ],
)
def test_impossible_cameras_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(ROOM, **change)


def test_resolution_and_batch_change_at_the_milestones() -> None:
    cameras = RandomCameras(
        batch_size=[3, 1, 2],
        height=[8, 16, 24],
        width=6,
        resolution_milestones=[10, 20],
    )
    for step, shape in ((0, (3, 8, 6)), (9, (3, 8, 6)), (10, (1, 16, 6))):
        views = cameras.views(step, StepRandom(0))
        assert (len(views.cameras), views.height, views.width) == shape
    assert cameras.shape(99) == (2, 24, 6)
    with pytest.raises(ValueError, match=r"`height` is \[8, 16\].*one more for each"):
        RandomCameras(height=[8, 16])
    with pytest.raises(ValueError, match="nothing changes there"):
        RandomCameras(resolution_milestones=[5])
