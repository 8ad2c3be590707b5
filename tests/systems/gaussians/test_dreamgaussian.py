"""DreamGaussian: growing under guidance, files in and out, the mesh, bad settings."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

import dreampropeller as dp
import launch
from systems import build
from systems.dreamgaussian import DecayConfig, DreamGaussian, simplified
from systems.quality.truth import fixed_views
from systems.scene.gaussians import ply
from systems.scene.gaussians.density import Density
from systems.scene.gaussians.shapes import covariances
from systems.settings.config import load
from systems.settings.reader import ConfigError
from systems.settings.schedules import value_at
from tests.helpers import tree_equal
from tests.systems.gaussians.test_ply import some

TOYBOX = "configs/dreamgaussian-toybox.yaml"
SMALL = (
    "system.prompt_processor.prompt=a red mushroom",
    "trainer.max_steps=14",
    "data.batch_size=1",
    "data.width=16",
    "data.height=16",
    "data.eval_width=16",
    "data.eval_height=16",
    "data.n_test_views=3",
    "system.geometry.num_splats=40",
    "system.geometry.isosurface_resolution=24",
    "system.geometry.isosurface_threshold=0.2",
    "system.densify.interval=5",
)
DECAY = ("system.position_decay.factor=0.5", "system.position_decay.steps=9")


def small(*overrides: str) -> DreamGaussian:
    system = build(load(TOYBOX, [*SMALL, *overrides]))
    assert isinstance(system, DreamGaussian)
    return system


def test_threshold_zero_is_sequential_under_guidance() -> None:
    system = small(*DECAY)
    wanted = dp.solve(system.trajectory(), dp.Sequential())
    assert len(wanted.value["geometry.means"]) > 40
    exact = dp.PicardSolver(
        dp.SlidingWindow(3), dp.FixedThreshold(0), "auto", acceleration=dp.Secant()
    )
    found = dp.solve(small(*DECAY).trajectory(), exact)
    assert tree_equal(found.value, wanted.value)
    assert tree_equal(found.carry, wanted.carry)


def test_only_the_means_learning_rate_decays() -> None:
    decay = DecayConfig(factor=0.02, steps=300)
    # DreamGaussian's from 0.01 to 0.0002, at its steps 1, 150 and 400.
    assert math.isclose(decay.at(149), 0.02**0.5)
    assert decay.at(0) == 0.02 ** (1 / 300)
    assert decay.at(399) == 0.02
    trajectory = small(*DECAY).trajectory()
    _, carry = trajectory.init()
    groups = carry["optimizers"][0]["groups"]
    rates = sorted(group["lr"] for group in groups)
    assert rates == pytest.approx([0.005, 0.01 * 0.5 ** (1 / 9), 0.02, 0.05])


def test_training_leaves_splats_a_mesh_and_a_film(tmp_path: Path) -> None:
    setup = [*SMALL, f"exp_root_dir={tmp_path}", "solver.window.size=3"]
    assert launch.main(["--config", TOYBOX, "--train", *setup]) == 0
    (folder,) = (tmp_path / "dreamgaussian-toybox").iterdir()
    report = json.loads((folder / "report.json").read_text())
    written = {path.name for path in folder.iterdir()}
    assert {
        "splats.ply",
        "splats.html",
        "mesh.glb",
        "mesh.obj",
        "turntable.mp4",
    } <= written
    assert report["num_splats"] == ply.describe(folder / "splats.ply")[0] > 40
    before = (folder / "splats.ply").read_bytes()
    (folder / "splats.ply").unlink()
    assert launch.main(["--export", f"resume={folder}"]) == 0
    assert (folder / "splats.ply").read_bytes() == before
    # What was exported is where another run begins.
    again = small(f"system.geometry.initial={folder / 'splats.ply'}")
    state, _ = again.trajectory().init()
    assert len(state["geometry.means"]) == report["num_splats"]


def test_exported_splats_render_as_before(tmp_path: Path) -> None:
    system = small()
    trajectory = system.trajectory()
    y, carry = trajectory.init()
    drift = trajectory.make_drift(torch.device("cpu"))
    for step in range(3):
        y, carry = trajectory.update(step, y, carry, drift(step, y)[0])
    system.exports(tmp_path, y)["splats"]()
    loaded = small(f"system.geometry.initial={tmp_path / 'splats.ply'}")
    views = fixed_views(24)
    for index in (0, 5):
        both = [
            one.render(state, views.one(index), grey=0.0)[0]
            for one, state in ((system, y), (loaded, loaded.trajectory().init()[0]))
        ]
        assert float(both[0].max()) > 0.1
        assert torch.equal(both[0], both[1])


def test_density_is_the_sum_over_all_splats() -> None:
    splats = some(0, 50)
    splats["scales"] = splats["scales"] * 0.3 - 1.5
    points = torch.randn(300, 3, generator=torch.Generator().manual_seed(0))
    found, colours = Density(splats)(points)
    opacities = splats["opacities"].sigmoid()
    away = points[:, None] - splats["means"]
    precision = covariances(splats["scales"], splats["quats"]).inverse()
    power = torch.einsum("pni,nij,pnj->pn", away, precision, away) / 2
    weights = opacities * (-power).exp()
    # Farther than 3.33 standard deviations a splat may be left out.
    torch.testing.assert_close(found, weights.sum(1), atol=0.02, rtol=0)
    tint = (0.28209479177387814 * splats["sh0"][:, 0] + 0.5).clamp(0, 1)
    wanted = weights @ tint / weights.sum(1, keepdim=True)
    dense = found > 0.3
    assert int(dense.sum()) > 20
    torch.testing.assert_close(colours[dense], wanted[dense], atol=0.03, rtol=0)


def test_the_mesh_has_the_splats_shape_and_colour() -> None:
    system = small(
        "system.geometry.num_splats=400",
        "system.geometry.opacity=0.9",
        "system.geometry.isosurface_resolution=40",
        "system.geometry.isosurface_threshold=2.0",
    )
    y = system.trajectory().init()[0]
    y["geometry.sh0"][:, 0] = torch.tensor([1.7, -1.7, 0.0])
    mesh = system.mesh(y)
    radii = (mesh.vertices**2).sum(-1) ** 0.5
    assert 0.5 < radii.mean() < 0.8  # the ball has radius 0.6
    assert abs(mesh.visual.vertex_colors[:, :3] - [250, 5, 127]).max() < 8
    fewer = simplified(mesh, 300)
    assert len(fewer.faces) <= 300 < len(mesh.faces)
    assert abs(fewer.volume / mesh.volume - 1) < 0.1
    assert abs(fewer.visual.vertex_colors[:, :3] - [250, 5, 127]).max() < 8


def test_images_grow_at_milestones() -> None:
    system = small("system.resolutions=[24, 32]", "system.resolution_milestones=[3, 6]")
    sizes = [system.views(step).height for step in range(8)]
    assert sizes == [16, 16, 16, 24, 24, 24, 32, 32]
    assert torch.equal(
        system.views(4).cameras.azimuth, small().views(4).cameras.azimuth
    )


def test_a_checkpoint_of_other_splats_is_refused() -> None:
    system = small()
    y = system.trajectory().init()[0]
    system.check_state({n: v[:7] for n, v in y.items()}, "here")
    with pytest.raises(ConfigError, match=r"`geometry.shN` has shape"):
        small("system.geometry.sh_degree=1").check_state(y, "here")


def test_published_config_builds_with_the_published_numbers() -> None:
    config = load(
        "configs/dreamgaussian-sd.yaml",
        ["system.prompt_processor.prompt=a cup", "system.geometry.num_splats=30"],
    )
    system = build(config)
    assert isinstance(system, DreamGaussian)
    assert [system.views(step).height for step in (0, 149, 299)] == [128, 256, 512]
    # t = (1 − step / 500) · 1000, counted from one, within 20 and 980.
    schedule = config.system["guidance"]["min_step_percent"]
    for step in (0, 9, 100, 249, 489, 499):
        published = min(max(1 - (step + 1) / 500, 0.02), 0.98)
        assert math.isclose(value_at(schedule, step), published, abs_tol=1e-9)
    behind = system.scene.background
    directions = torch.zeros(400, 1, 1, 3)
    seen = behind(directions, 3, system.random).unique(dim=0).flatten(1)
    assert seen.tolist() == [[0.0] * 3, [1.0] * 3]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("system.densify.interval=-50", "`interval` is -50: write 1 or more"),
        ("system.renderer.rasterizer=gsplat", "`gsplat` is not used: .*rasterizer=to"),
        ("system.renderer.rasterizer=nerf", "write auto or torch or gsplat"),
        ("system.geometry.initial=none.ply", "There is no file `none.ply`"),
        ("system.geometry.sh_degree=4", "write 0, 1, 2 or 3"),
        ("system.geometry.num_splats=2", "`num_splats` is 2: write 4 or more"),
        ("system.geometry.num_splats=900000000", "raise `max_splats`"),
        ("system.geometry.opacity=1", "`opacity` is 1.0: write a number between"),
        ("system.resolutions=[64]", "as many rising steps as there are sides"),
        ("system.position_decay.factor=0", "`factor` is 0.0: write a number above 0"),
        ("system.optimizer.params={geometry.mean: {lr: 1}}", "no setting .*geometry.m"),
        ("system.loss.lambda_orient=1.0", "no setting `system.loss.lambda_orient`"),
    ],
)
def test_bad_settings_are_a_sentence(setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small(setting)


def test_a_loss_scale_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Write `trainer\.precision=32-true`"):
        small("trainer.precision=16-mixed").trajectory()
