"""Texturing a mesh: exact windows, maps that are learned, files that open right."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pygltflib
import pytest
import torch
import trimesh
from PIL import Image
from trimesh.visual import TextureVisuals
from trimesh.visual.material import PBRMaterial

import dreampropeller as dp
import launch
from dreampropeller import checkpoint
from systems import build, exports
from systems.quality import fixed_views, measure_mesh
from systems.scene.colours import to_linear, to_srgb
from systems.scene.mesh_files import load_glb, save_mesh
from systems.scene.reflectance import Reflectance, ReflectanceConfig
from systems.scene.textured import smoothed
from systems.scene.zbuffer import render_mesh
from systems.settings.config import load
from systems.settings.reader import ConfigError
from systems.texture import Texture
from systems.toybox.truth import truth
from systems.variational import LORA
from tests.helpers import tree_equal
from tests.systems.gaussians.test_dreamgaussian import SMALL
from tests.systems.scenes import small
from tests.systems.test_priors import stable_diffusion as stable_diffusion

CONFIG = "configs/texture-toybox.yaml"
CPU = torch.device("cpu")
STEPS = 6
SHORT, RANK, TWICE = (
    ["trainer.max_steps=3"],
    ["system.guidance.lora_rank=1"],
    ["system.guidance.refine_n_steps=2"],
)
TINY = (
    "system.prompt_processor.prompt=a red mug",
    f"trainer.max_steps={STEPS}",
    "data.batch_size=1",
    "data.width=16",
    "data.height=16",
    "data.eval_width=32",
    "data.eval_height=32",
    "data.n_test_views=4",
    "system.geometry.texture_resolution=24",
    "system.renderer.supersample=2",
)


@pytest.fixture(scope="module")
def mug(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The true mesh of a white mug, coarse."""
    found = truth("a white mug").mesh(20)
    mesh = trimesh.Trimesh(
        found.vertices.numpy(),
        found.faces.numpy(),
        vertex_colors=(found.colours.numpy() * 255).round().astype(np.uint8),
        process=False,
    )
    return save_mesh(mesh, tmp_path_factory.mktemp("mug"))[0]


def tiny(mesh: Path, *overrides: str, config: str = CONFIG) -> Texture:
    words = [*TINY, f"system.geometry.mesh={mesh}", *overrides]
    system = build(load(config, words))
    assert isinstance(system, Texture)
    return system


@pytest.mark.parametrize("kind", ["sds", "vsd", "refine"])
def test_threshold_zero_is_sequential_bit_for_bit(kind: str, mug: Path) -> None:
    settings = {
        "sds": [],
        "vsd": [*SHORT, "system.guidance_type=vsd-guidance", *RANK],
        "refine": [*SHORT, "system.guidance_type=refine-guidance", *TWICE],
    }[kind]
    exact = dp.PicardSolver(dp.SlidingWindow(3), dp.FixedThreshold(0), "momentum")
    trajectory = tiny(mug, *settings).trajectory()
    plain = dp.solve(trajectory, dp.Sequential(), check=False)
    solution = dp.solve(trajectory, exact, check=False)
    assert tree_equal(solution.value, plain.value)
    assert tree_equal(solution.carry, plain.carry)
    start, _ = trajectory.init()
    moved = (plain.value["geometry.albedo"] - start["geometry.albedo"]).abs()
    assert float(moved.max()) > 0.01
    assert any(n.startswith(LORA) for n in plain.value) == (kind == "vsd")


def test_a_drift_depends_on_step_and_state_alone(mug: Path) -> None:
    """Also in other orders, and in another process's trajectory."""
    trajectory = tiny(mug).trajectory()
    y, _ = trajectory.init()
    drift = trajectory.make_drift(CPU)
    first = {step: drift(step, y)[0] for step in (7, 3)}
    again = tiny(mug).trajectory().make_drift(CPU)
    for step in (3, 7):
        assert tree_equal(drift(step, y)[0], first[step])
    assert tree_equal(again(7, y)[0], first[7])


def test_roughness_and_metalness_are_learned_where_the_material_shows_them(
    mug: Path, tmp_path: Path
) -> None:
    learned = ("roughness", "metallic")
    both = [f"system.geometry.learn_{name}=true" for name in learned]
    with pytest.raises(ConfigError, match="shows neither roughness nor metalness"):
        tiny(mug, *both)
    kind = "pbr-with-point-light-material"
    shiny = [f"system.material_type={kind}", "system.material.diffuse_prob=1"]
    system = tiny(mug, *both, *shiny, "system.geometry.roughness=0.5", "seed=1")
    trajectory = system.trajectory()
    y, _ = trajectory.init()
    drift = trajectory.make_drift(CPU)
    total = dict.fromkeys(learned, 0.0)
    for step in range(2):
        found = drift(step, y)[0]
        for name in learned:
            gradient = found[f"geometry.{name}"]
            assert torch.isfinite(gradient).all()
            total[name] += float(gradient.abs().sum())
    assert min(total.values()) > 0
    mesh = system.mesh({**y, "geometry.metallic": y["geometry.metallic"] * 0 + 20.0})
    glb: Any = pygltflib.GLTF2().load(str(save_mesh(mesh, tmp_path)[0]))
    surface = glb.materials[0].pbrMetallicRoughness
    assert surface.metallicRoughnessTexture is not None
    levels = np.asarray(mesh.visual.material.metallicRoughnessTexture)
    assert levels[..., 1] == pytest.approx(128, abs=1)  # green: roughness
    assert (levels[..., 2] == 255).all()  # blue: metalness


def test_a_rough_surface_without_metal_is_nearly_lambertian() -> None:
    material = Reflectance(ReflectanceConfig(ambient_light_color=(0.0, 0.0, 0.0)))
    one = torch.ones(3, 1)
    albedo = torch.tensor([[0.8, 0.4, 0.1]]).expand(3, 3)
    normals = torch.tensor([[0.0, 0, 1]]).expand(3, 3)
    light = torch.tensor([[0.0, 0, 9], [9.0, 0, 9], [9.0, 0, -9]])
    eye = torch.tensor([[0.0, 9, 1]]).expand(3, 3)
    seen = material.reflect(albedo, one, 0 * one, 0 * normals, normals, light, eye)
    linear = to_linear(seen.numpy())
    lambert = 0.9 * to_linear(albedo.numpy()) * np.array([[1.0], [0.5**0.5], [0.0]])
    assert linear == pytest.approx(lambert, abs=0.05)
    assert (seen[2] == 0).all()  # lit from behind


def test_smoothing_is_a_gaussian_of_mean_one() -> None:
    image = torch.zeros(21, 21, 1)
    image[10, 10] = 1.0
    found = smoothed(image, 1.5)[..., 0]
    assert float(found.sum()) == pytest.approx(1, abs=1e-6)
    offsets = torch.arange(21.0) - 10
    variance = (found.sum(0) * offsets**2).sum()
    assert float(variance) == pytest.approx(1.5**2, rel=0.06)  # it is cut at 2.5 σ
    flat = torch.full((9, 9, 3), 0.3)
    torch.testing.assert_close(smoothed(flat, 2.0), flat)
    assert smoothed(image, 0.0) is image


@pytest.fixture(scope="module")
def run(mug: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the front door, on a map fine enough to compare images."""
    out = tmp_path_factory.mktemp("out")
    words = [*TINY, f"system.geometry.mesh={mug}", f"exp_root_dir={out}"]
    words += ["system.geometry.texture_resolution=256", "solver.window.size=4"]
    assert launch.main(["--config", CONFIG, "--train", *words]) == 0
    (folder,) = (out / "texture-toybox").iterdir()
    return folder


def test_a_run_leaves_what_other_systems_leave_and_a_texture(
    run: Path, mug: Path
) -> None:
    written = {path.name for path in run.iterdir()}
    assert written >= {"mesh.glb", "mesh.obj", "mesh.mtl", "mesh.png", "viewer.html"}
    assert written >= {"turntable.mp4", "preview.png", "report.json", "truth.png"}
    report = json.loads((run / "report.json").read_text())
    assert report["mesh"] == ["mesh.glb", "mesh.obj", "mesh.mtl", "mesh.png"]
    given = load_glb(mug)
    assert report["mesh_quality"]["watertight"]
    assert report["mesh_quality"]["volume"] == pytest.approx(given.volume, abs=1e-3)
    assert "map_Kd mesh.png" in (run / "mesh.mtl").read_text()


def seen(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """The turntable's frames before they are encoded, and where the object is."""
    system = build(load(folder / "config.yaml"))
    y = checkpoint.load(folder / "ckpts").y
    views = system.cameras.turntable(4)
    parts = [system.render(y, views.one(i)) for i in range(4)]
    images, opacity = (torch.cat(p) for p in zip(*parts, strict=True))
    return images, opacity[:, 0] > 0.999


@pytest.mark.parametrize("reader", ["trimesh glb", "trimesh obj", "pygltflib"])
def test_base_colours_read_as_the_format_says_are_those_of_the_turntable(
    reader: str, run: Path
) -> None:
    if reader == "pygltflib":
        mesh = _by_the_letter(run / "mesh.glb")
    elif reader == "trimesh glb":
        mesh = load_glb(run / "mesh.glb")
    else:
        mesh: Any = trimesh.load(run / "mesh.obj", force="mesh", process=False)
        mesh.visual.material = mesh.visual.material.to_pbr()
    images, inside = seen(run)
    system = build(load(run / "config.yaml"))
    shown, _ = render_mesh(mesh, system.cameras.turntable(4), ambient=1.0)
    difference = (shown - images).abs().permute(0, 2, 3, 1)[inside]
    assert len(difference) > 500
    assert float(difference.median()) <= 2 / 255


def _by_the_letter(path: Path) -> Any:
    """A glb through pygltflib alone, its colours decoded and encoded again."""
    tree: Any = pygltflib.GLTF2().load(str(path))
    blob = tree.binary_blob()

    def array(index: int, kind: type, columns: int) -> np.ndarray:
        accessor = tree.accessors[index]
        view = tree.bufferViews[accessor.bufferView]
        begin = (view.byteOffset or 0) + (accessor.byteOffset or 0)
        count = accessor.count * columns
        return np.frombuffer(blob, kind, count, begin).reshape(-1, columns)

    (primitive,) = tree.meshes[0].primitives
    surface = tree.materials[primitive.material].pbrMetallicRoughness
    assert (surface.metallicFactor, surface.roughnessFactor) == (0.0, 1.0)
    assert surface.baseColorFactor == [1.0, 1.0, 1.0, 1.0]
    source = tree.images[tree.textures[surface.baseColorTexture.index].source]
    view = tree.bufferViews[source.bufferView]
    file = path.with_suffix(".map.png")
    file.write_bytes(blob[view.byteOffset : view.byteOffset + view.byteLength])
    position = array(primitive.attributes.POSITION, np.float32, 3)
    uv = array(primitive.attributes.TEXCOORD_0, np.float32, 2)
    faces = array(primitive.indices, np.uint32, 1).reshape(-1, 3)
    assert np.isfinite(array(primitive.attributes.NORMAL, np.float32, 3)).all()
    with Image.open(file) as image:
        texels = np.asarray(image.convert("RGB")) / 255
    encoded = (to_srgb(to_linear(texels)) * 255).round().astype(np.uint8)
    upright = np.stack([position[:, 0], -position[:, 2], position[:, 1]], -1)
    mesh = trimesh.Trimesh(upright, faces, process=False)
    mesh.visual = TextureVisuals(
        uv=np.stack([uv[:, 0], 1 - uv[:, 1]], -1),  # v goes down in glTF
        material=PBRMaterial(baseColorTexture=Image.fromarray(encoded)),
    )
    return mesh


def test_a_resumed_run_keeps_its_mesh_and_a_state_of_another_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_mesh(trimesh.creation.icosphere(2), tmp_path)
    words = [f"resume={run}", f"system.geometry.mesh={tmp_path / 'mesh.glb'}"]
    assert launch.main(["--export", *words]) == 2
    assert "made another thing" in capsys.readouterr().err
    assert launch.main(["--export", f"resume={run}"]) == 0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["system.geometry.mesh=nowhere.glb"], "There is no mesh `nowhere.glb`: write"),
        ([], "`system.geometry.mesh` is missing: write"),
        (["system.geometry.mesh=setup.fbx"], "There is no mesh|export it as glb"),
        (["system.material.color_activation=exp"], "are read through `sigmoid`"),
        (["export.texture=64"], "`export` has no effect on `texture-system`"),
        (["system.geometry.initial=white"], "write file or a number from 0 to 1"),
    ],
)
def test_the_command_line_refuses_in_a_sentence(
    words: list[str], told: str, mug: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = any("geometry.mesh" in word for word in words) or not words
    more = [] if given else [f"system.geometry.mesh={mug}"]
    assert launch.main(["--config", CONFIG, "--train", *TINY, *more, *words]) == 2
    assert re.search(told, capsys.readouterr().err)


def test_the_configs_for_stable_diffusion_build(
    stable_diffusion: Path, mug: Path
) -> None:
    name = "system.guidance.pretrained_model_name_or_path"
    for more in (
        [],
        [
            "system.guidance_type=stable-diffusion-vsd-guidance",
            f"{name}_lora={stable_diffusion}",
        ],
    ):
        words = [f"{name}={stable_diffusion}", "system.prompt_processor.prompt=a"]
        system = tiny(mug, *words, *more, config="configs/texture-sd.yaml")
        assert system.is_variational == bool(more)
        if more:
            continue
        trajectory = system.trajectory()
        y, _ = trajectory.init()
        gradient = trajectory.make_drift(CPU)(0, y)[0]["geometry.albedo"]
        assert torch.isfinite(gradient).all()
        assert gradient.any()


def test_an_export_is_simplified_before_it_is_unwrapped(tmp_path: Path) -> None:
    """A field's texture has the colours that its vertices had."""
    system = small("export.texture=96", "export.max_faces=300")
    y, _ = system.trajectory().init()
    mesh = exports.finished(system, y)
    assert len(mesh.faces) <= 300
    assert mesh.visual.kind == "texture"
    assert mesh.visual.material.baseColorTexture.size == (96, 96)
    coloured = system.mesh(y)
    for one in (mesh, coloured):
        assert measure_mesh(one).watertight
        assert measure_mesh(one).volume > 0
    views = fixed_views(48)
    both = [render_mesh(one, views)[0] for one in (mesh, coloured)]
    assert float((both[0] - both[1]).abs().mean()) < 0.02
    assert len(save_mesh(mesh, tmp_path)) == 4
    assert len(save_mesh(coloured, tmp_path)) == 2  # nothing stays of the texture
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mesh.glb", "mesh.obj"]


def test_colours_are_baked_from_the_views_that_see_them(
    mug: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a mesh whose colours are known: its own images give them back."""
    monkeypatch.setattr(exports, "SIZE", 128)
    fine = ["system.geometry.texture_resolution=64", "system.geometry.smoothing=0"]
    system = tiny(mug, *fine)
    y, _ = system.trajectory().init()
    surface = system.scene.geometry.surface
    face = surface.texels.face[surface.texels.inside]
    corners, weights = surface.faces[face], surface.texels.weights[..., None]
    points, normals = (
        torch.from_numpy((part[corners] * weights).sum(1)).float()
        for part in (surface.vertices, surface.normals)
    )
    wave = (0.5 + 0.4 * torch.sin(3 * points)).clamp(0.02, 0.98)
    albedo = surface.texels.image(wave.double().numpy())
    y = {**y, "geometry.albedo": torch.from_numpy(albedo).float().logit()}
    mesh = system.mesh(y)
    baked = exports.from_views(system, y, mesh, points, normals)
    error = (baked - wave).abs().max(-1).values
    assert float(error.median()) < 0.02
    assert float(error.quantile(0.95)) < 0.15  # inside the mug few views see much


def test_baked_splats_are_refined_in_their_own_texture_coordinates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DreamGaussian's second stage: mesh and map of the first one are its start."""
    monkeypatch.setattr(exports, "SIZE", 64)
    words = [*SMALL, "system.geometry.num_splats=300", "system.geometry.opacity=0.9"]
    words += ["system.geometry.max_faces=200", "export.texture=64"]
    splats = build(load("configs/dreamgaussian-toybox.yaml", words))
    y, _ = splats.trajectory().init()
    y = {**y, "geometry.sh0": y["geometry.sh0"] * 0 + torch.tensor([1.0, 0.0, -1.0])}
    mesh = exports.finished(splats, y)
    glb = save_mesh(mesh, tmp_path)[0]
    same = ["system.geometry.texture_resolution=64", "system.geometry.mesh_scale=keep"]
    system = tiny(glb, *same, "system.guidance_type=refine-guidance")
    surface = system.scene.geometry.surface
    assert surface.notes == ()
    assert len(surface.faces) == len(mesh.faces) <= 200
    wanted = np.asarray(mesh.visual.material.baseColorTexture) / 255
    inside = surface.texels.inside
    # Texel centres are where they were, so the map is the same one.
    assert np.abs(surface.colours - wanted)[inside].max() < 0.02
    orange = 0.5 + 0.28209 * np.array([1.0, 0.0, -1.0])
    assert np.median(surface.colours[inside], 0) == pytest.approx(orange, abs=0.03)


def test_larger_maps_are_written_whole(mug: Path, tmp_path: Path) -> None:
    system = tiny(mug, "system.geometry.texture_resolution=1024")
    y, _ = system.trajectory().init()
    glb, _, _, png = save_mesh(system.mesh(y), tmp_path)
    with Image.open(png) as image:
        assert image.size == (1024, 1024)
    visual: Any = load_glb(glb).visual
    assert visual.material.baseColorTexture.size == (1024, 1024)
