"""Volume rendering against closed forms, and the occupancy grid's memory."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dreampropeller import StepRandom
from systems.scene.backgrounds import Random, RandomConfig, Solid, SolidConfig
from systems.scene.cameras import Cameras, RandomCameras, Views
from systems.scene.fields import VoxelGrid
from systems.scene.fields.density import DensityConfig, DensityField
from systems.scene.fields.voxel_grid import VoxelGridConfig
from systems.scene.materials import Albedo, AlbedoConfig, PointLight, PointLightConfig
from systems.scene.renderers import volume
from systems.scene.renderers.occupancy import Occupancy, OccupancyConfig
from systems.scene.renderers.volume import VolumeConfig, VolumeRenderer

DICE = StepRandom(0)
WHITE = Solid(SolidConfig())


class Ball(DensityField):
    """Density `inside` within radius 0.5, red."""

    def __init__(self, inside: float) -> None:
        super().__init__(DensityConfig(density_bias=0.0, density_activation="none"))
        self.inside = inside

    def raw(self, points: Tensor, step: int | None) -> tuple[Tensor, Tensor]:
        del step
        distance = points.norm(dim=-1)
        red = torch.tensor([9.0, -9.0, -9.0]).expand(len(points), 3)
        return self.inside * (distance < 0.5).float(), red


def views(count: int = 2, size: int = 9) -> Views:
    one = torch.ones(count)
    cameras = Cameras(torch.arange(count) * 70.0, 20 * one, 2.0 * one, 40.0 * one)
    return Views(cameras, cameras.axes()[0], size, size)


def renderer(**settings: Any) -> VolumeRenderer:
    return VolumeRenderer(VolumeConfig(num_samples_per_ray=1200, **settings))


def test_opacity_of_a_ball_is_exponential_in_its_chord() -> None:
    seen = renderer(grid_prune=False)(
        Ball(3.0), Albedo(AlbedoConfig()), WHITE, views(), None, DICE
    )
    _, directions = views().cameras.rays(9)
    position = views().cameras.axes()[0][:, None, None]
    near = (position * directions).sum(-1)
    chord = 2 * (0.25 - (4 - near.square())).clamp(min=0).sqrt()
    expected = 1 - torch.exp(-3.0 * chord)
    assert (seen.opacity[..., 0] - expected).abs().max() < 0.02
    middle = seen.rgb[0, 4, 4]
    through = math.exp(-3.0)
    assert torch.allclose(middle, torch.tensor([1.0, through, through]), atol=0.01)


def test_pruned_rendering_equals_the_full_one() -> None:
    full, pruned = renderer(grid_prune=False), renderer()
    field = VoxelGrid(VoxelGridConfig(resolution=4))
    pruned.occupancy.refresh(0, lambda p: field.density(p, 0), 0.1, DICE)
    assert 0 < pruned.occupancy.occupied().float().mean() < 0.5
    images = [
        r(field, Albedo(AlbedoConfig()), WHITE, views(), None, DICE).rgb
        for r in (full, pruned)
    ]
    assert (images[0] - images[1]).abs().max() < 0.03


def test_rendering_in_pieces_is_the_same() -> None:
    whole, pieces = (
        renderer(grid_prune=False),
        renderer(grid_prune=False, eval_chunk_size=50),
    )
    arguments = (Ball(3.0), Albedo(AlbedoConfig()), WHITE, views(), None, DICE)
    a, b = whole(*arguments), pieces(*arguments)
    assert torch.equal(a.rgb, b.rgb)
    assert torch.equal(a.opacity, b.opacity)


def test_empty_space_shows_the_background() -> None:
    seen = renderer()(Ball(0.0), Albedo(AlbedoConfig()), WHITE, views(), 0, DICE)
    assert torch.equal(seen.rgb, torch.ones_like(seen.rgb))
    assert seen.opacity.sum() == 0


def test_gradient_reaches_the_field() -> None:
    field = VoxelGrid(VoxelGridConfig(resolution=6))
    small = VolumeRenderer(VolumeConfig(num_samples_per_ray=24))
    seen = small(field, Albedo(AlbedoConfig()), WHITE, views(), 0, DICE)
    (seen.rgb.sum() + seen.opacity.sum()).backward()
    assert field.grid.grad is not None
    assert (field.grid.grad != 0).float().mean() > 0.2


def test_ball_lit_from_the_camera_is_brightest_in_the_middle() -> None:
    material = PointLight(PointLightConfig(ambient_light_color=(0.0, 0.0, 0.0)))
    field = VoxelGrid(
        VoxelGridConfig(
            density_bias="blob_magic3d", density_blob_scale=60.0, resolution=4
        )
    )
    seen = renderer(grid_prune=False)(field, material, WHITE, views(1, 33), None, DICE)
    lit = seen.foreground[0, :, :, 0]
    solid = seen.opacity[0, :, :, 0] > 0.9
    assert lit[16, 16] == lit[solid].max()
    assert lit[16, 16] > 1.5 * lit[solid].min()
    facing = views(1, 33).cameras.axes()[0][0] / 2
    assert (seen.normal[0, 16, 16] - facing).abs().max() < 0.1


def test_samples_background_and_shading_belong_to_the_step() -> None:
    material = PointLight(PointLightConfig(ambient_only_steps=0))
    behind = Random(RandomConfig(grey=False))
    field = VoxelGrid(VoxelGridConfig(resolution=6))

    def image(step: int, seed: int = 0) -> Tensor:
        fresh = VolumeRenderer(VolumeConfig(num_samples_per_ray=24))
        return fresh(field, material, behind, views(), step, StepRandom(seed)).rgb

    first = image(3)
    assert not torch.equal(first, image(4))
    assert not torch.equal(first, image(3, seed=1))
    assert torch.equal(first, image(3))
    shown = {material.shading(step, DICE) for step in range(60)}
    assert shown == {"albedo", "diffuse", "textureless"}
    assert PointLight(PointLightConfig()).shading(999, DICE) == "albedo"


def test_occupancy_remembers_decays_and_looks_again() -> None:
    grid = Occupancy(OccupancyConfig(resolution=4, warmup_steps=32), radius=1.0)
    seen: list[int] = []

    def density(points: Tensor) -> Tensor:
        seen.append(len(points))
        return (points[:, 0] > 0).float()

    assert grid.occupied().all()  # nothing is known yet
    grid.refresh(0, density, 2.0, DICE)
    assert seen == [64]
    assert torch.equal(grid.value.reshape(4, 4, 4)[2:], torch.full((2, 4, 4), 2.0))
    assert grid.occupied().sum() == 32
    grid.refresh(1, density, 2.0, DICE)
    assert seen == [64]  # not due
    grid.refresh(16, lambda points: 0 * density(points), 2.0, DICE)
    assert grid.value.max().item() == pytest.approx(1.9)
    grid.refresh(32, density, 2.0, DICE)  # after the warm-up: occupied and a quarter
    assert 32 <= seen[-1] < 56
    inside = grid.contains(torch.tensor([[0.9, 0.0, 0.0], [-0.9, 0.0, 0.0]]))
    assert inside.tolist() == [True, False]


def test_cameras_may_stand_inside_the_ball() -> None:
    room = RandomCameras(height=8, width=8, camera_distance_range=(0.1, 0.2))
    field = VoxelGrid(VoxelGridConfig(resolution=4))
    seen = renderer()(
        field, Albedo(AlbedoConfig()), WHITE, room.views(0, DICE), 0, DICE
    )
    assert torch.isfinite(seen.rgb).all()
    assert (seen.opacity > 0.9).all()


@pytest.mark.parametrize(
    ("backend", "reason", "said"),
    [
        (None, "`nerfacc.cuda._backend` is not used: no ninja", "no ninja"),
        (SimpleNamespace(_C=None), "", "needs `nvcc`"),
        (SimpleNamespace(_C=object()), "", None),
    ],
)
def test_marching_without_nerfaccs_cuda_code_says_why_once(
    backend: Any,
    reason: str,
    said: str | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(volume, "probe", lambda name: (backend, reason))
    volume._can_march.cache_clear()
    assert [volume._can_march(), volume._can_march()] == [said is None] * 2
    volume._can_march.cache_clear()
    assert len(caplog.messages) == (said is not None)
    assert all(str(said) in message for message in caplog.messages)
