"""Signed distances, their renderer, and TextMesh."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import dreampropeller as dp
from dreampropeller import StepRandom
from systems import build, quality
from systems.scene.backgrounds import Solid, SolidConfig
from systems.scene.cameras import Cameras, Views
from systems.scene.fields.sdf import (
    CENTRAL,
    ImplicitSDF,
    ImplicitSDFConfig,
    SDFField,
    VoxelSDF,
    VoxelSDFConfig,
)
from systems.scene.materials import Albedo, AlbedoConfig
from systems.scene.regularisers import Curvature, Eikonal
from systems.scene.renderers.neus import NeuSConfig, NeuSRenderer
from systems.scene.renderers.volume import VolumeConfig, VolumeRenderer
from systems.settings.config import load
from systems.textmesh import TextMesh
from tests.helpers import tree_equal
from tests.systems.scenes import SMALL, TOYBOX, small
from tests.systems.test_priors import deep_floyd as deep_floyd

TEXTMESH = "configs/textmesh-toybox.yaml"
POINTS = torch.rand(50, 3, generator=torch.Generator().manual_seed(0)) - 0.5
ROOT = Path(__file__).parent.parent.parent


def sphere(**settings: Any) -> VoxelSDF:
    return VoxelSDF(VoxelSDFConfig(resolution=65, **settings))


@pytest.mark.parametrize("kind", ["finite_difference", CENTRAL])
def test_a_sphere_has_its_distance_gradient_and_curvature(kind: str) -> None:
    field = sphere(normal_type=kind, finite_difference_normal_eps=1e-2)
    distance = field.distance(POINTS, None)
    assert torch.allclose(distance, POINTS.norm(dim=-1) - 0.5, atol=1e-6)
    slope, laplacian = field.gradient(POINTS, None, distance)
    outward = torch.nn.functional.normalize(POINTS, dim=-1)
    far = POINTS.norm(dim=-1) > 0.3  # near the centre a difference is coarse
    assert (slope - outward)[far].abs().max() < (0.03 if kind != CENTRAL else 1e-3)
    assert torch.allclose(field.normals(POINTS, None)[far], outward[far], atol=0.03)
    assert (laplacian is None) == (kind != CENTRAL)
    if laplacian is not None:
        expected = 2 / POINTS.norm(dim=-1)
        assert torch.allclose(laplacian[far], expected[far], rtol=0.05)


def test_a_step_is_a_cell_of_the_finest_active_level() -> None:
    settings = {
        "otype": "ProgressiveBandHashGrid",
        **{"n_levels": 4, "start_level": 2, "start_step": 10, "update_steps": 5},
        **{"base_resolution": 8, "per_level_scale": 2.0, "log2_hashmap_size": 8},
    }
    from systems.scene.fields.hash_grid import HashGridConfig

    field = ImplicitSDF(
        ImplicitSDFConfig(
            pos_encoding_config=HashGridConfig(**settings),
            finite_difference_normal_eps="progressive",
        )
    )
    cells = [2 / (8 * 2**level) for level in (1, 2, 3)]
    assert [field.eps(step) for step in (0, 15, 99)] == pytest.approx(cells)
    assert field.eps(None) == pytest.approx(cells[-1])


def views(size: int = 15) -> Views:
    one = torch.ones(2)
    cameras = Cameras(torch.arange(2) * 70.0, 20 * one, 2.0 * one, 40.0 * one)
    return Views(cameras, cameras.axes()[0], size, size)


def rendered(field: SDFField, **settings: Any) -> Any:
    renderer = NeuSRenderer(NeuSConfig(num_samples_per_ray=600, **settings))
    white, albedo = Solid(SolidConfig()), Albedo(AlbedoConfig())
    return renderer(field, albedo, white, views(), None, StepRandom(0), True)


@pytest.mark.parametrize("volsdf", [False, True])
def test_a_sharp_sphere_is_a_disc(volsdf: bool) -> None:
    seen = rendered(
        sphere(normal_type=CENTRAL),
        use_volsdf=volsdf,
        learned_variance_init=math.log(80) / 10,
        grid_prune=False,
    )
    position, (_, directions) = views().cameras.axes()[0], views().cameras.rays(15)
    along = -(position[:, None, None] * directions).sum(-1)
    off = (4 - along.square()).clamp(min=0).sqrt()  # how far a ray passes the centre
    opacity = seen.opacity[..., 0]
    assert (opacity[off < 0.42] > 0.99).all()
    assert (opacity[off > 0.6] < 0.03).all()
    # Normals at the disc's centre face the camera.
    facing = (seen.normal * -directions).sum(-1)
    assert (facing[off < 0.1] > 0.9).all()
    assert float(Eikonal()(seen).detach()) < 1e-2
    assert float(Curvature()(seen).detach()) > 1


def test_opacity_is_that_of_neus() -> None:
    """Against the formula written out for one sample; rates by hand."""
    renderer = NeuSRenderer(NeuSConfig(learned_variance_init=0.2))
    sharpness = math.exp(2)
    for distance, rate, length in ((0.1, 0.8, 0.05), (-0.2, 0.3, 0.1), (0.01, 1, 1)):
        before, after = (
            1 / (1 + math.exp(-sharpness * (distance + sign * rate * length / 2)))
            for sign in (1, -1)
        )
        wanted = (before - after + 1e-5) / (before + 1e-5)
        numbers = (torch.tensor([float(x)]) for x in (distance, rate, length))
        found = renderer._opacity(*numbers)
        assert float(found.detach()) == pytest.approx(min(max(wanted, 0), 1), rel=1e-5)


def tiny(*overrides: str) -> TextMesh:
    few = [s for s in SMALL if "max_steps" not in s]
    system = small(
        *few, "trainer.max_steps=24", *overrides, config=str(ROOT / TEXTMESH)
    )
    assert isinstance(system, TextMesh)
    return system


def test_threshold_zero_is_sequential_and_drifts_are_pure() -> None:
    """The cosine anneals, and the occupancy grid is refreshed on the way."""
    settings = (
        "system.renderer.cos_anneal_end_steps=12",
        "system.loss.lambda_curvature=0.01",
        f"system.geometry.normal_type={CENTRAL}",
    )
    expected = dp.solve(tiny(*settings).trajectory(), dp.Sequential())
    exact = dp.PicardSolver(dp.SlidingWindow(3), dp.FixedThreshold(0), "momentum")
    found = dp.solve(tiny(*settings).trajectory(), exact)
    assert tree_equal(found.value, expected.value)
    assert tree_equal(found.carry, expected.carry)
    start, _ = tiny(*settings).trajectory().init()
    for name in ("geometry.grid", "renderer.variance", "renderer.occupancy.value"):
        assert not torch.equal(found.value[name], start[name]), name
    drift = tiny(*settings).trajectory().make_drift(torch.device("cpu"))
    first = [drift(step, found.value) for step in (3, 12, 20)]
    again = [drift(step, found.value) for step in (20, 12, 3)][::-1]
    assert all(tree_equal(a[0], b[0]) for a, b in zip(first, again, strict=True))


def test_the_mesh_of_a_sphere_is_that_sphere() -> None:
    system = tiny("system.geometry.resolution=33")
    y = dict(system.module.state_dict())
    mesh = system.mesh(y)
    radii = torch.from_numpy(mesh.vertices).norm(dim=-1)
    assert torch.allclose(radii, torch.full_like(radii, 0.6), atol=0.01)
    found = quality.measure_mesh(mesh)
    assert found.bodies == 1
    assert mesh.is_watertight
    assert mesh.volume == pytest.approx(4 / 3 * math.pi * 0.6**3, rel=0.05)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["system.geometry.normal_type=finite_difference"], "needs the Laplacian"),
        (["system.geometry.sdf_bias_params=[1,2,3]"], "write a radius for a `sphere`"),
        (["system.geometry.normal_type=null"], "rendered by its normals"),
        (["system.geometry.normal_type=analytic"], "voxels do not have"),
        (["system.geometry.finite_difference_normal_eps=fine"], "write a number"),
    ],
)
def test_what_does_not_fit_is_refused(settings: list[str], message: str) -> None:
    prompt = "system.prompt_processor.prompt=a red mug"
    with pytest.raises(ValueError, match=message):
        build(load(str(ROOT / TEXTMESH), [prompt, *settings]))
    neus = "system.renderer_type=neus-volume-renderer"
    with pytest.raises(ValueError, match="`VoxelGrid` is not: write"):
        build(load(str(ROOT / TOYBOX), [prompt, neus]))
    with pytest.raises(ValueError, match="renderer_type: neus-volume-renderer"):
        VolumeRenderer(VolumeConfig()).check(sphere())


@pytest.mark.parametrize("theirs", [False, True], ids=["ours", "theirs"])
def test_two_steps_with_a_model_of_pixels(
    theirs: bool, deep_floyd: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = ROOT / "configs" / "textmesh-if.yaml"
    if theirs:
        if "THREESTUDIO_ROOT" not in os.environ:
            pytest.skip("`THREESTUDIO_ROOT` does not name a checkout")
        path = Path(os.environ["THREESTUDIO_ROOT"]) / "configs" / "textmesh-if.yaml"
    name = "pretrained_model_name_or_path"
    settings = (
        *("system.prompt_processor.prompt=a", "data.width=8", "data.height=8"),
        *(f"system.{p}.{name}={deep_floyd}" for p in ("prompt_processor", "guidance")),
        "system.geometry.pos_encoding_config.n_levels=2",
        "system.geometry.pos_encoding_config.start_level=1",
        "system.geometry.pos_encoding_config.log2_hashmap_size=6",
        *("system.renderer.num_samples_per_ray=12", "trainer.max_steps=2"),
        "trainer.precision=32-true",
    )
    trajectory = build(load(path, settings)).trajectory()
    start, _ = trajectory.init()
    value = dp.solve(trajectory, dp.Sequential()).value
    assert not torch.equal(
        value["geometry.encoding.table"], start["geometry.encoding.table"]
    )
    assert all(torch.isfinite(v).all() for v in value.values())
