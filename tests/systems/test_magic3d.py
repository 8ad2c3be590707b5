"""Tetrahedra, Magic3D, and several stages by one command."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import trimesh
import yaml

import dreampropeller as dp
import launch
from dreampropeller import StepRandom, checkpoint
from systems import build, quality
from systems.dreamfusion import DreamFusion
from systems.magic3d import Magic3D
from systems.runs import folders, stages
from systems.scene.backgrounds import Solid, SolidConfig
from systems.scene.cameras import Cameras, Views
from systems.scene.fields.tetrahedra import VoxelTetrahedra, VoxelTetrahedraConfig
from systems.scene.isosurface import EmptySurface
from systems.scene.materials import Albedo, AlbedoConfig, PointLight, PointLightConfig
from systems.scene.meshes.tetrahedra import TetrahedralGrid, march
from systems.scene.regularisers import NormalConsistency
from systems.scene.renderers.surface import SurfaceConfig, SurfaceRenderer
from systems.settings.config import load
from systems.settings.notes import note
from systems.settings.reader import ConfigError
from tests.helpers import tree_equal
from tests.systems.scenes import SMALL
from tests.systems.test_priors import deep_floyd as deep_floyd
from tests.systems.test_priors import stable_diffusion as stable_diffusion

MODELS = {"coarse-if": "deep_floyd", "refine-sd": "stable_diffusion"}
ROOT = Path(__file__).parent.parent.parent
STAGES = "configs/magic3d-toybox.yaml"
REFINE = "configs/magic3d-refine-toybox.yaml"
COMMON = (
    *(s for s in SMALL if not s.startswith(("system.ge", "system.r", "trainer"))),
    "trainer.val_check_interval=100",
    "dispatch.threads=1",
)
COARSE = (
    *(s for s in SMALL if s.startswith(("system.ge", "system.r"))),
    "trainer.max_steps=20",
)
FINE = (
    "system.geometry.isosurface_resolution=16",
    "system.geometry.resolution=8",
    "system.renderer.supersample=1",
    "trainer.max_steps=24",
    "checkpoint.every_n_train_steps=10",
)


def staged(*overrides: str) -> list[str]:
    return [
        *COMMON,
        *(f"stages.coarse.{setting}" for setting in COARSE),
        *(f"stages.refine.{setting}" for setting in FINE),
        *overrides,
    ]


def train(out: Path, *overrides: str) -> int:
    settings = staged(f"exp_root_dir={out}", *overrides)
    return launch.main(["--config", STAGES, "--train", *settings])


@pytest.fixture(autouse=True)
def _root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both stages, exactly; look at them, do not change them."""
    out = tmp_path_factory.mktemp("staged")
    exact = (
        *("solver.threshold.name=fixed", "solver.threshold.value=0"),
        "solver.window.size=3",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        assert train(out, *exact) == 0
    (folder,) = out.glob("*/*@*")
    return folder


def ball(radius: float = 0.6, **settings: Any) -> VoxelTetrahedra:
    return VoxelTetrahedra(
        VoxelTetrahedraConfig(
            isosurface_resolution=16, resolution=8, sdf_bias_params=radius, **settings
        )
    )


def views(size: int = 24) -> Views:
    one = torch.ones(2)
    cameras = Cameras(torch.tensor([10.0, 130.0]), 20 * one, 2.4 * one, 50 * one)
    return Views(cameras, cameras.axes()[0], size, size)


def test_tetrahedra_fill_the_cube_and_turn_alike() -> None:
    grid = TetrahedralGrid.of(3)
    corners = grid.vertices[grid.tetrahedra]
    volumes = torch.linalg.det(corners[:, 1:] - corners[:, :1]) / 6
    assert (volumes > 0).all()
    assert float(volumes.sum()) == pytest.approx(8)


def test_marching_gives_closed_surfaces_that_look_outwards() -> None:
    grid = TetrahedralGrid.of(12)
    dice = torch.Generator().manual_seed(0)
    centres = torch.rand(4, 3, generator=dice) - 0.5
    distance = (grid.vertices[:, None] - centres).norm(dim=-1) - 0.3
    found = march(distance.min(1).values, grid.vertices, grid.tetrahedra)
    points, faces = (part.numpy() for part in found)
    mesh: Any = trimesh.Trimesh(points, faces, process=False)
    assert mesh.is_watertight
    assert mesh.is_winding_consistent
    assert mesh.volume > 0
    sphere = march(grid.vertices.norm(dim=-1) - 0.7, grid.vertices, grid.tetrahedra)
    radii = sphere[0].norm(dim=-1)
    assert float((radii - 0.7).abs().max()) < 0.02
    nothing, faces = march(
        torch.ones(len(grid.vertices)), grid.vertices, grid.tetrahedra
    )
    assert len(nothing) == len(faces) == 0


def test_the_surface_moves_with_its_distances_and_offsets() -> None:
    """Gradients by finite differences, in double precision."""
    grid = TetrahedralGrid.of(3)
    positions = grid.vertices.double()
    values = (positions.norm(dim=-1) - 0.71).requires_grad_(True)
    moved = (0.01 * torch.randn(positions.shape, generator=torch.Generator())).double()
    moved.requires_grad_(True)

    def points(values: torch.Tensor, moved: torch.Tensor) -> torch.Tensor:
        return march(values, positions + moved, grid.tetrahedra)[0]

    assert torch.autograd.gradcheck(points, (values, moved))


def test_a_ball_is_rendered_where_it_is_and_its_outline_can_grow() -> None:
    field, renderer = ball(), SurfaceRenderer(SurfaceConfig(supersample=2))
    parts = (Albedo(AlbedoConfig()), Solid(SolidConfig((1.0, 1.0, 1.0))))
    seen = renderer(field, *parts, views(), 3, StepRandom(0))
    distance = views().cameras.axes()[0].norm(dim=-1)
    half = (0.6 / (distance.square() - 0.36).sqrt()) / math.tan(math.radians(25))
    share = math.pi * half.square() / 4
    found = seen.opacity.mean((1, 2, 3))
    assert torch.allclose(found, share, rtol=0.05)
    seen.opacity.sum().backward()
    assert field.sdf.grad is not None
    assert float(field.sdf.grad.sum()) < 0  # smaller distances, a larger ball
    turned = (seen.normal * views().cameras.axes()[0][:, None, None]).sum(-1)
    assert (turned[seen.opacity[..., 0] > 0.99] > -0.1).all()
    rough = ball()
    noise = torch.randn(rough.sdf.shape, generator=torch.Generator().manual_seed(0))
    rough.sdf.data += 0.3 * noise
    bends = [
        NormalConsistency()(renderer(f, *parts, views(), 3, StepRandom(0)))
        for f in (field, rough)
    ]
    assert bends[0].item() < bends[1].item() / 5


def test_an_empty_surface_says_what_to_do() -> None:
    field = ball()
    field.sdf.data.fill_(1.0)
    with pytest.raises(EmptySurface, match=r"is empty.*optimizer\.params\.geometry"):
        field.surface()


def test_each_stage_starts_from_the_one_before(run: Path) -> None:
    report = json.loads((run / "report.json").read_text())["stages"]
    assert list(report) == ["coarse", "refine"]
    assert [part["steps"] for part in report.values()] == [20, 24]
    coarse, fine = (build(load(run / name / "config.yaml")) for name in report)
    assert isinstance(fine, Magic3D)
    before = checkpoint.load(run / "coarse" / "ckpts").y
    start, _ = fine.trajectory().init()
    around = fine.cameras.around()
    for index in range(2):
        seen = [
            system.render(y, around.one(index))
            for system, y in ((coarse, before), (fine, start))
        ]
        rough, sharp = (part[1] > 0.5 for part in seen)
        assert (rough & sharp).sum() / (rough | sharp).sum() > 0.75
        both = (rough & sharp).expand_as(seen[0][0])
        assert (seen[0][0] - seen[1][0])[both].abs().mean() < 0.1
    mesh = fine.mesh(checkpoint.load(run / "refine" / "ckpts").y)
    assert quality.measure_mesh(mesh).bodies == 1
    assert {"mesh.glb", "turntable.mp4"} <= {f.name for f in (run / "refine").iterdir()}


def test_threshold_zero_is_sequential_across_the_stages(
    run: Path, tmp_path: Path
) -> None:
    assert train(tmp_path, "solver.name=sequential") == 0
    (plain,) = tmp_path.glob("*/*@*")
    for stage in ("coarse", "refine"):
        values = [checkpoint.load(f / stage / "ckpts").y for f in (run, plain)]
        assert tree_equal(*values)


def test_a_drift_is_a_function_of_step_and_state(run: Path) -> None:
    config = load(run / "refine" / "config.yaml")
    y = checkpoint.load(run / "refine" / "ckpts").y
    drifts = [build(config).trajectory().make_drift(torch.device("cpu")) for _ in "ab"]
    first = [drifts[0](step, y)[0] for step in (3, 9, 17)]
    again = [drifts[1](step, y)[0] for step in (17, 9, 3)][::-1]
    assert all(tree_equal(*pair) for pair in zip(first, again, strict=True))


def test_a_stopped_stage_is_resumed_and_a_finished_one_not_run_again(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "stopped"
    shutil.copytree(run, folder)
    first = (folder / "coarse" / "metrics.jsonl").read_text()
    (folder / "refine" / "report.json").unlink()
    kept = sorted((folder / "refine" / "ckpts").glob("step-*"))
    assert len(kept) > 1
    kept[-1].unlink()
    assert launch.main(["--train", f"resume={folder}"]) == 0
    assert "coarse: finished before" in capsys.readouterr().out
    assert (folder / "coarse" / "metrics.jsonl").read_text() == first
    assert folders.report(folder / "refine")["steps"] == 24
    values = [checkpoint.load(f / "refine" / "ckpts").y for f in (run, folder)]
    assert tree_equal(*values)


def test_a_finished_stage_is_not_taken_for_another(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = "system.prompt_processor.prompt=a blue mug"
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")}
    assert launch.main(["--train", f"resume={run}", other]) == 2
    assert "made another thing: `system.prompt_processor.prompt`" in (
        capsys.readouterr().err
    )
    assert before == {p: p.stat().st_mtime_ns for p in run.rglob("*.safetensors")}


def test_of_several_stages_the_last_finished_one_is_looked_at(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "whole"
    shutil.copytree(run, folder)
    note.cache_clear()
    assert launch.main(["--export", f"resume={folder}"]) == 0
    said = capsys.readouterr()
    assert "has the stages coarse, refine: taking `refine`" in said.err
    assert f"Look into {folder / 'refine'}" in said.out
    (folder / "refine" / "report.json").unlink()
    first, given = folder / "coarse", ["seed=1", f"resume={folder}"]
    options = launch.make_parser().parse_args(["--compare", str(folder), "x" * 999])
    settings, named = stages.last_stages(options, given)
    assert settings == ["seed=1", f"resume={first}"]
    assert named == options.compare == [str(first), "x" * 999]
    (first / "report.json").unlink()
    assert launch.main(["--export", f"resume={folder}"]) == 2
    assert "the folder `RUN/STAGE`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", STAGES, "--test"], "the folder `RUN/STAGE`"),
        (["--config", STAGES, "--compare", SMALL[0]], "the folder `RUN/STAGE`"),
        (["--config", STAGES, "--train", "stages.fine.seed=1"], "names no stage"),
        (
            ["--config", STAGES, "--train", "stages.coarse.tag=${stage:refine}"],
            "names a stage that does not come before it",
        ),
        (["--config", STAGES, "--train"], "The prompt is missing"),
        (["--config", STAGES, "--train", "stages.coarse.lr=1"], "no setting `lr`"),
        (
            ["--config", REFINE, "--train", SMALL[0]],
            "`system.geometry_convert_from` is missing",
        ),
        (
            [
                *("--config", REFINE, "--train", SMALL[0]),
                "system.geometry_convert_from=nowhere",
            ],
            "which holds no `config.yaml`: name the folder of a finished run",
        ),
        (
            [
                *("--config", REFINE, "--train", SMALL[0]),
                *("system.geometry_convert_from=null", "system.refinement=false"),
            ],
            "has no effect on this stage, of a field: leave it out, or write",
        ),
        (
            [
                *("--config", REFINE, "--train", SMALL[0]),
                "system.geometry_convert_from=null",
                "system.geometry_type=voxel-grid",
            ],
            "which `VoxelGrid` does not have: write",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    assert launch.main([*arguments, f"exp_root_dir={tmp_path}"]) == 2
    assert message in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


HASHED = (
    "system.geometry.pos_encoding_config.n_levels=4",
    "system.geometry.pos_encoding_config.log2_hashmap_size=10",
)


@pytest.mark.parametrize("kind", ["signed distances", "hash grid"])
def test_any_field_can_be_taken_over(kind: str, tmp_path: Path) -> None:
    """Its surface, and its colours exactly where the grids are the same."""
    hashed = kind == "hash grid"
    name = "dreamfusion-toybox-hashgrid" if hashed else "textmesh-toybox"
    shape = HASHED if hashed else ("system.geometry.resolution=8",)
    few = ("trainer.max_steps=2", "system.geometry.isosurface_resolution=24")
    sparse = ("system.renderer.num_samples_per_ray=24",)
    config = load(f"configs/{name}.yaml", [*COMMON, *shape, *few, *sparse])
    source = build(config)
    assert isinstance(source, DreamFusion)
    solution = dp.solve(source.trajectory(), dp.Sequential())
    folders.write_setup(tmp_path, config)
    checkpoint.save(tmp_path / "ckpts", solution.state)

    content = yaml.safe_load(Path(REFINE).read_text())
    radius = source.scene.geometry.config.radius
    geometry = {"radius": radius, "isosurface_resolution": 16}
    if hashed:
        own = yaml.safe_load((tmp_path / "config.yaml").read_text())
        names = ("pos_encoding_config", "mlp_network_config")
        known = own["system"]["geometry"]
        geometry |= {name: known[name] for name in names if name in known}
        content["system"]["geometry_type"] = "tetrahedra-sdf-grid"
    content["system"]["geometry"] = geometry
    path = tmp_path / "refine.yaml"
    path.write_text(yaml.safe_dump(content))
    refined = build(load(path, [*COMMON, f"system.geometry_convert_from={tmp_path}"]))
    assert isinstance(refined, Magic3D)
    y, _ = refined.trajectory().init()
    meshes: list[Any] = [source.mesh(solution.value), refined.mesh(y)]
    assert meshes[1].is_watertight
    assert meshes[1].volume == pytest.approx(meshes[0].volume, rel=0.1)
    points = 0.4 * torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    colours = [source.features(solution.value)(points), refined.features(y)(points)]
    torch.testing.assert_close(*colours, atol=0 if hashed else 0.3, rtol=0)


def test_a_run_that_cannot_be_converted_is_refused(run: Path, tmp_path: Path) -> None:
    def refined(source: Path, *settings: str) -> None:
        convert = f"system.geometry_convert_from={source}"
        build(load(REFINE, [*COMMON, *FINE, convert, *settings]))

    geometry = {"radius": 1.1, "isosurface_resolution": 8}
    hashed = {"geometry_type": "tetrahedra-sdf-grid", "geometry": geometry}
    path = tmp_path / "hashed.yaml"
    content = yaml.safe_load(Path(REFINE).read_text())
    content["system"] |= hashed
    path.write_text(yaml.safe_dump(content))
    source = f"system.geometry_convert_from={run / 'coarse'}"
    with pytest.raises(ConfigError, match="colours do not fit `tetrahedra-sdf-grid`"):
        build(load(path, [*COMMON, source]))
    more = tmp_path / "more"
    more.mkdir()
    (more / "ckpts").symlink_to(run / "coarse" / "ckpts")
    content = yaml.safe_load((run / "coarse" / "config.yaml").read_text())
    content["trainer"]["max_steps"] = 99
    (more / "config.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError, match="ended at step 20 of 99: finish it first"):
        refined(more)
    with pytest.raises(ConfigError, match=r"holds no `config\.yaml`"):
        refined(tmp_path)


def config_of(name: str, ending: str | None) -> Path:
    """A config of ours, or of a checkout of threestudio."""
    if ending is not None:
        return ROOT / "configs" / f"{name}{ending}.yaml"
    if "THREESTUDIO_ROOT" not in os.environ:
        pytest.skip("`THREESTUDIO_ROOT` does not name a checkout")
    return Path(os.environ["THREESTUDIO_ROOT"]) / "configs" / f"{name}.yaml"


@pytest.mark.parametrize("stage", MODELS)
@pytest.mark.parametrize("whose", ["ours", "theirs"])
def test_files_for_hub_models_run_two_steps(
    whose: str,
    stage: str,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    path = config_of(f"magic3d-{stage}", "" if whose == "ours" else None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = request.getfixturevalue(MODELS[stage])
    name = "pretrained_model_name_or_path"
    settings = [
        *("system.prompt_processor.prompt=a", "data.width=16", "data.height=16"),
        *(f"system.{p}.{name}={model}" for p in ("prompt_processor", "guidance")),
        "system.geometry.pos_encoding_config.n_levels=2",
        "system.geometry.pos_encoding_config.log2_hashmap_size=6",
        *("trainer.max_steps=2", "trainer.precision=32-true"),
    ]
    if "coarse" in stage:
        settings.append("system.renderer.num_samples_per_ray=12")
    else:
        settings += [
            "system.geometry_convert_from=null",
            "system.geometry.isosurface_resolution=16",
        ]
    trajectory = build(load(path, settings)).trajectory()
    start, _ = trajectory.init()
    value = dp.solve(trajectory, dp.Sequential()).value
    learned = "geometry.sdf" if "refine" in stage else "geometry.encoding.table"
    assert not torch.equal(value[learned], start[learned])
    assert all(torch.isfinite(part).all() for part in value.values())


def test_soft_shading_draws_the_lights_of_a_step() -> None:
    material = PointLight(PointLightConfig(soft_shading=True))
    dice = StepRandom(0)
    drawn = [material.at(step, dice).config for step in (3, 4, 3)]
    assert drawn[0] == drawn[2] != drawn[1]
    for config in drawn:
        sums = zip(config.ambient_light_color, config.diffuse_light_color, strict=True)
        assert all(a + b == pytest.approx(1) for a, b in sums)
    assert material.at(None, dice) is material
    plain = PointLight(PointLightConfig())
    assert plain.at(3, dice) is plain
