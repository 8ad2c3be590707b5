"""ProlificDreamer's later stages: the surface by its normal maps, then its texture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import dreampropeller as dp
import launch
from dreampropeller import StepRandom, checkpoint
from systems import build
from systems.prolificdreamer import (
    LORA,
    NormalMapConfig,
    ProlificDreamer,
    normal_maps,
)
from systems.runs import stages
from systems.scene.backgrounds import Solid, SolidConfig
from systems.scene.materials import Albedo, AlbedoConfig
from systems.scene.regularisers import LaplacianSmoothness
from systems.scene.renderers.surface import SurfaceConfig, SurfaceRenderer
from systems.settings.config import load
from systems.settings.reader import ConfigError
from systems.settings.yaml_files import open_yaml
from tests.helpers import tree_equal
from tests.systems.test_magic3d import COARSE, COMMON, FINE, ball, config_of, views
from tests.systems.test_priors import stable_diffusion as stable_diffusion

ROOT = Path(__file__).parent.parent.parent
STAGES = ("coarse", "geometry", "texture")
FEW = ("data.batch_size=1", "trainer.max_steps=4", "checkpoint.every_n_train_steps=3")
EXACT = (
    *("solver.threshold.name=fixed", "solver.threshold.value=0"),
    "solver.window.size=2",
)


@pytest.fixture(autouse=True)
def _root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def train(out: Path, *overrides: str) -> Path:
    """All three stages; returns their folder."""
    own = {"coarse": COARSE, "geometry": FINE, "texture": FINE}
    settings = [
        *COMMON,
        *(f"stages.{name}.{s}" for name in STAGES for s in (*own[name], *FEW)),
        *(f"exp_root_dir={out}", *overrides),
    ]
    config = "configs/prolificdreamer-staged-toybox.yaml"
    assert launch.main(["--config", config, "--train", *settings]) == 0
    (folder,) = out.glob("*/*@*")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All stages, exactly; look at them, do not change them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return train(tmp_path_factory.mktemp("staged"), *EXACT)


def ends(run: Path) -> dict[str, dp.State]:
    return {name: checkpoint.load(run / name / "ckpts").y for name in STAGES}


@pytest.mark.long
def test_each_stage_learns_its_own_part(run: Path) -> None:
    found = ends(run)
    systems = {name: build(load(run / name / "config.yaml")) for name in STAGES}
    starts = {name: systems[name].trajectory().init()[0] for name in STAGES[1:]}
    fixed = {"geometry": ("grid",), "texture": ("sdf", "deformation")}
    learned = {"geometry": ("sdf", "deformation"), "texture": ("grid",)}
    for stage in STAGES[1:]:
        start, end = starts[stage], found[stage]
        for name in fixed[stage]:
            name = f"geometry.{name}"
            assert torch.equal(start[name], end[name]), (stage, name)
            if stage == "texture":
                assert torch.equal(end[name], found["geometry"][name])
        for name in learned[stage]:
            assert not torch.equal(start[f"geometry.{name}"], end[f"geometry.{name}"])
    assert not any(name.startswith(LORA) for name in found["geometry"])
    assert any(name.startswith(LORA) for name in found["texture"])
    texture = systems["texture"]
    assert isinstance(texture, ProlificDreamer)
    mesh = texture.mesh(found["texture"])
    assert mesh.visual.vertex_colors.std(0)[:3].sum() > 0
    assert {"mesh.glb", "turntable.mp4"} <= {
        f.name for f in (run / "texture").iterdir()
    }


@pytest.mark.long
def test_threshold_zero_is_sequential_across_the_stages(
    run: Path, tmp_path: Path
) -> None:
    plain = ends(train(tmp_path, "solver.name=sequential"))
    for stage, value in ends(run).items():
        assert tree_equal(value, plain[stage]), stage


def test_normal_maps_are_those_of_the_space_asked_for() -> None:
    parts = (Albedo(AlbedoConfig()), Solid(SolidConfig((1.0, 1.0, 1.0))))
    renderer = SurfaceRenderer(SurfaceConfig(supersample=2))
    seen, cameras = renderer(ball(), *parts, views(), 3, StepRandom(0)), views().cameras
    towards = torch.nn.functional.normalize(cameras.axes()[0], dim=-1)
    middle = slice(11, 13)
    for config, expected in (
        (NormalMapConfig(), towards),
        (NormalMapConfig("camera"), torch.tensor([[0.0, 0.0, 1.0]] * 2)),
    ):
        image = normal_maps(seen, cameras, config)
        found = 2 * image[..., middle, middle].mean((2, 3)) - 1
        assert torch.allclose(found, expected, atol=0.1), config
        assert (image[..., 0, 0] == 0).all()
    over = normal_maps(seen, cameras, NormalMapConfig(over_background=True))
    assert (over[..., 0, 0] == 1).all()
    # To the right of the middle, normals point to the right; above it, upwards.
    image = normal_maps(seen, cameras, NormalMapConfig("camera"))
    assert (image[:, 0, 12, 15] > image[:, 0, 12, 9] + 0.1).all()
    assert (image[:, 1, 9, 12] > image[:, 1, 15, 12] + 0.1).all()


def test_the_laplacian_is_that_of_a_slow_loop() -> None:
    field = ball()
    dice = torch.Generator().manual_seed(0)
    field.sdf.data += 0.2 * torch.randn(field.sdf.shape, generator=dice)
    parts = (Albedo(AlbedoConfig()), Solid(SolidConfig((1.0, 1.0, 1.0))))
    seen = SurfaceRenderer(SurfaceConfig())(field, *parts, views(), 3, StepRandom(0))
    vertices, faces = field.surface()
    neighbours: list[set[int]] = [set() for _ in vertices]
    for face in faces.tolist():
        for corner in face:
            neighbours[corner] |= set(face) - {corner}
    around = [vertices[sorted(n)].sum(0) for n in neighbours]
    count = torch.tensor([[float(len(n))] for n in neighbours])
    expected = (count * vertices - torch.stack(around)).norm(dim=-1).mean()
    found = LaplacianSmoothness()(seen)
    assert torch.allclose(found, expected, rtol=1e-4)
    found.backward()
    assert float(field.sdf.grad.abs().sum()) > 0  # pyright: ignore[reportOptionalMemberAccess]


@pytest.mark.parametrize(
    ("stage", "setting", "message"),
    [
        ("", "normal_maps={space: camera}", "no effect on `stage: coarse`"),
        ("", "geometry_convert_from=a", "write `stage: geometry` or `stage: texture`"),
        ("-texture", "normal_maps={space: camera}", "no effect on `stage: texture`"),
        ("-texture", "geometry.fix_geometry=false", "write `geometry.fix_geometry: tr"),
        ("-texture", "geometry.geometry_only=true", "nothing is left"),
        ("-texture", "loss.lambda_orient=1", "`loss.lambda_orient` has no effect"),
        ("-geometry", "geometry.fix_geometry=true", "fix_geometry: false`"),
        ("-geometry", "loss.lambda_vsd=2", "`loss.lambda_vsd` has no effect with"),
        ("-geometry", "loss.lambda_opaque=1", "`loss.lambda_opaque` has no effect"),
        ("-geometry", "geometry_convert_from=nowhere", "holds no `config.yaml`"),
        ("-geometry", "normal_maps={space: left}", "space"),
    ],
)
def test_what_does_not_fit_is_refused(stage: str, setting: str, message: str) -> None:
    unset = [] if not stage else ["system.geometry_convert_from=null"]
    settings = [*COMMON, *unset, f"system.{setting}"]
    with pytest.raises((ConfigError, ValueError)) as caught:
        build(load(f"configs/prolificdreamer{stage}-toybox.yaml", settings))
    assert message in str(caught.value)


@pytest.mark.long
def test_a_surface_without_colours_gives_its_shape_alone(
    run: Path, tmp_path: Path
) -> None:
    """As in threestudio, where only the surface is kept between the stages."""
    colourless = ("system.geometry.geometry_only=true", f"exp_root_dir={tmp_path}")
    source = f"system.geometry_convert_from={run / 'coarse'}"
    config = "configs/prolificdreamer-geometry-toybox.yaml"
    settings = [*COMMON, *FINE, *FEW, "trainer.max_steps=1", *colourless, source]
    assert launch.main(["--config", config, "--train", *settings]) == 0
    (folder,) = tmp_path.glob("*/*@*")
    y = checkpoint.load(folder / "ckpts").y
    assert "geometry.grid" not in y

    def textured(source: Path, *settings: str) -> dp.State:
        name = "configs/prolificdreamer-texture-toybox.yaml"
        convert = f"system.geometry_convert_from={source}"
        system = build(load(name, [*COMMON, *FINE, convert, *settings]))
        state = {**system.module.state_dict()}
        return {name: tensor.detach() for name, tensor in state.items()}

    found = textured(folder)
    assert torch.equal(found["geometry.sdf"], y["geometry.sdf"])
    assert not found["geometry.grid"].any()
    before = run / "geometry"
    assert textured(before)["geometry.grid"].any()
    new = textured(before, "system.geometry_convert_inherit_texture=false")
    assert not new["geometry.grid"].any()


@pytest.mark.parametrize("name", ["magic3d-sd", "prolificdreamer-staged-sd"])
def test_stages_for_hub_models_are_read_before_the_first_begins(name: str) -> None:
    path = ROOT / "configs" / f"{name}.yaml"
    prompt = "system.prompt_processor.prompt=a chair"
    found = list(stages.read(open_yaml(path), [prompt], path.parent))
    stages.check(found)
    assert found[0].name == "coarse"
    wrong = [prompt, f"stages.{found[-1].name}.system.loss.lambda_orient=1"]
    found = list(stages.read(open_yaml(path), wrong, path.parent))
    with pytest.raises(ConfigError, match="loss"):
        stages.check(found)


@pytest.mark.parametrize("stage", STAGES[1:])
@pytest.mark.parametrize("whose", ["ours", "theirs"])
def test_files_for_hub_models_run_two_steps(
    whose: str,
    stage: str,
    stable_diffusion: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    path = config_of(f"prolificdreamer-{stage}", "-sd" if whose == "ours" else None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    name = "pretrained_model_name_or_path"
    models = [f"system.{p}.{name}" for p in ("prompt_processor", "guidance")]
    if stage == "texture":
        models += [f"system.guidance.{name}_lora"]
    settings = [
        *("system.prompt_processor.prompt=a", "data.width=16", "data.height=16"),
        *(f"{model}={stable_diffusion}" for model in models),
        "system.geometry_convert_from=null",
        "system.geometry.isosurface_resolution=16",
        *("trainer.max_steps=2", "trainer.precision=32-true"),
    ]
    if stage == "texture":
        settings += [
            "system.geometry.pos_encoding_config.n_levels=2",
            "system.geometry.pos_encoding_config.log2_hashmap_size=6",
        ]
    trajectory = build(load(path, settings)).trajectory()
    start, _ = trajectory.init()
    value: Any = dp.solve(trajectory, dp.Sequential()).value
    learned = {"geometry": "geometry.sdf", "texture": "geometry.encoding.table"}[stage]
    assert not torch.equal(value[learned], start[learned])
    assert all(torch.isfinite(part).all() for part in value.values())
