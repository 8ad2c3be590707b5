"""An image becomes an object: its loss, its guidance and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import dreampropeller as dp
import launch
from dreampropeller import StepRandom, checkpoint
from dreampropeller.dispatch.batched import deviation
from dreampropeller.identity import AnotherProblem
from systems import build
from systems.guidance.priors import ModelError
from systems.image_to_3d import ImageTo3D
from systems.quality import by_clip
from systems.scene.cameras import Cameras
from systems.settings.config import load
from systems.settings.notes import note
from systems.settings.reader import ConfigError
from systems.toybox.conditions import to_blocks
from systems.toybox.truth import truth
from tests.helpers import tree_equal
from tests.systems.test_priors import second as second
from tests.systems.zero123_models import tiny

ROOT = Path(__file__).parent.parent.parent
STEPS = 6
COMMON = (
    "data.height=[8,12]",
    "data.width=[8,12]",
    "data.resolution_milestones=[3]",
    "data.default_elevation_deg=20",
    "data.random_camera.batch_size=2",
    "data.random_camera.height=8",
    "data.random_camera.width=8",
    "data.random_camera.eval_height=16",
    "data.random_camera.eval_width=16",
    "data.random_camera.n_test_views=2",
    f"trainer.max_steps={STEPS}",
    "checkpoint.every_n_train_steps=3",
)
VOXELS = (
    *("system.geometry.resolution=6", "system.renderer.num_samples_per_ray=12"),
    "system.renderer.occupancy.resolution=4",
    "system.geometry.isosurface_resolution=16",
)
SPLATS = (
    *("system.geometry.num_splats=40", "system.densify.interval=2"),
    "system.geometry.isosurface_resolution=16",
)
KINDS = {
    "voxels": ("configs/zero123-toybox.yaml", VOXELS),
    "splats": ("configs/zero123-gaussian-toybox.yaml", SPLATS),
}
CAPTION = "system.guidance.condition=caption"
EXACT = dp.PicardSolver(dp.SlidingWindow(3), dp.FixedThreshold(0))


@pytest.fixture(autouse=True)
def _root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def rendered(
    path: Path, azimuth: float = 0.0, size: int = 48, prompt: str = "a red mug"
) -> Path:
    """A toybox object as a PNG with alpha, as its camera sees it."""
    angles = (azimuth, 20.0, 2.4, 50.0)
    seen = truth(prompt).render(Cameras(*(torch.tensor([a]) for a in angles)), size)
    alpha = seen.mask[0]
    rgb = seen.over(torch.zeros(3))[0] / alpha.clamp(min=1e-3)
    rgba = torch.cat([rgb.clamp(0, 1), alpha]).permute(1, 2, 0)
    Image.fromarray((rgba * 255).round().byte().numpy()).save(path)
    return path


@pytest.fixture(scope="module")
def mug(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rendered(tmp_path_factory.mktemp("images") / "mug.png")


def settings_of(kind: str, image: Path, model: Path, *more: str) -> list[str]:
    return [
        *COMMON,
        *KINDS[kind][1],
        f"data.image={image}",
        f"system.guidance.pretrained_model_name_or_path={model}",
        "system.guidance.condition=image",
        *more,
    ]


def make(kind: str, image: Path, model: Path, *more: str) -> ImageTo3D:
    settings = settings_of(kind, image, model, *more)
    system = build(load(KINDS[kind][0], settings))
    assert isinstance(system, ImageTo3D)
    return system


@pytest.mark.parametrize("kind", KINDS)
def test_threshold_0_is_the_sequential_run_across_a_milestone(
    kind: str, mug: Path, second: Path
) -> None:
    """And across growth, for splats."""
    system = make(kind, mug, second)
    sequential = dp.solve(system.trajectory(), dp.Sequential()).value
    start = system.trajectory().init()[0]
    assert not tree_equal(sequential, start)
    assert tree_equal(dp.solve(system.trajectory(), EXACT).value, sequential)


def test_the_reference_loss_by_hand(mug: Path, second: Path) -> None:
    system = make("voxels", mug, second, "system.loss.lambda_mask=7")
    module: Any = system.module
    found = system.reference_loss(4, module)
    loss, log = found.value, found.log
    views = system.data.views(12, 12)
    seen = system.reference_rendering(module, views, 4, False)
    image = system.references[0].resized(12, 12)
    behind = system.background(module, views, 4)
    alpha = image.alpha.permute(1, 2, 0)
    goal = alpha * image.rgb.permute(1, 2, 0) + (1 - alpha) * behind
    rgb = (seen.rgb - goal).square().mean()
    mask = (seen.opacity - alpha).square().mean()
    assert torch.allclose(log["loss_ref_rgb"], rgb, atol=1e-6)
    assert torch.allclose(loss, 1000 * rgb + 7 * mask, rtol=1e-4)
    # The background is that of the guided views of this step.
    assert system.data.shape(2) == (8, 8)


def test_alternating_steps_have_the_one_or_the_other(mug: Path, second: Path) -> None:
    freq = "system.freq={ref_or_zero123: alternate, ref_only_steps: 2, n_ref: 3}"
    system = make("voxels", mug, second, freq)
    guidance = system.load_guidance()
    loss = system.loss(guidance)
    found = [loss(step, system.module)[1] for step in range(5)]
    assert ["loss_ref_rgb" in log for log in found] == [True, True, False, True, False]
    assert ["loss_sds" in log for log in found] == [False, False, True, False, True]
    solved = dp.solve(system.trajectory(), EXACT).value
    assert tree_equal(solved, dp.solve(system.trajectory(), dp.Sequential()).value)


def test_each_view_is_guided_by_the_nearest_image_over_its_own_background(
    mug: Path, second: Path, tmp_path: Path
) -> None:
    back = rendered(tmp_path / "back.png", azimuth=180.0)
    more = f"data.more=[{{image: {back}, azimuth_deg: 180, elevation_deg: 20}}]"
    system = make("voxels", mug, second, more)
    guidance: Any = system.load_guidance()
    one = torch.ones(3)
    azimuth = torch.tensor([10.0, 100.0, 200.0])
    cameras = Cameras(azimuth, 20 * one, 2.4 * one, 50 * one)
    colours = torch.tensor([[0.2, 0.3, 0.4], [0.5, 0.5, 0.5], [0.9, 0.1, 0.6]])
    views = (colours[:, :, None, None] * 2 - 1).repeat(1, 1, 64, 64)
    views[:, :, 20:40, 20:40] = 0.3
    views[:, :, :9, :9] = -0.7  # the object reaches one corner
    given = guidance.conditions(to_blocks(views), cameras)
    relative = (azimuth - torch.tensor([0.0, 180.0, 180.0])).deg2rad()
    assert torch.allclose(
        given.labels[:, 11:13],
        torch.stack([relative.sin(), relative.cos()], -1),
        atol=1e-5,
    )
    front, rear = (i.resized(64, 64) for i in system.references)
    for number, image in enumerate((front, rear, rear)):
        wanted = image.over(colours[number]) * 2 - 1
        shown = torch.nn.functional.pixel_shuffle(given.reference[number], 2)
        assert torch.allclose(shown, wanted, atol=1e-5)


def test_a_run_from_the_command_line(
    mug: Path, second: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    note.cache_clear()  # other tests built the same system
    out = [f"exp_root_dir={tmp_path}", "quality.truth=a red mug"]
    config = ["--config", KINDS["voxels"][0], "--train"]
    settings = settings_of("voxels", mug, second, *out)
    assert launch.main([*config, *settings]) == 0
    said = capsys.readouterr()
    assert "taken as seen from 20° above" in said.err
    assert "At the camera of the image: PSNR" in said.out
    assert "Against the ground truth" in said.out
    (folder,) = tmp_path.glob("*/mug.png@*")
    assert (folder / "reference.png").stat().st_size > 500
    # The same picture elsewhere is the same problem, another picture is not.
    assert "`quality.truth` no toybox object" in str(
        by_clip(make("voxels", mug, second), checkpoint.load(folder / "ckpts").y)
    )
    moved = tmp_path / "copy.png"
    moved.write_bytes(mug.read_bytes())
    state = checkpoint.load(folder / "ckpts")
    again = make("voxels", moved, second)
    dp.solve(again.trajectory(), EXACT, state=state)
    other = rendered(tmp_path / "other.png", azimuth=90.0)
    with pytest.raises(AnotherProblem, match="pixels"):
        dp.solve(make("voxels", other, second).trajectory(), EXACT, state=state)


def test_depth_maps_are_compared_up_to_a_linear_map(
    mug: Path, second: Path, tmp_path: Path
) -> None:
    path = tmp_path / "depth.png"
    values = np.linspace(0, 65535, 48 * 48).reshape(48, 48).astype(np.uint16)
    Image.fromarray(values).save(path)
    weights = ("system.loss.lambda_depth=2", "system.loss.lambda_depth_rel=3")
    system = make("voxels", mug, second, *weights, f"data.depth={path}")
    with torch.no_grad():
        found = system.reference_loss(0, system.module)
    loss, log = found.value, found.log
    views = system.data.views(8, 8)
    seen = system.reference_rendering(system.module, views, 0, False)
    assert seen.depth is not None
    inside = system.references[0].resized(8, 8).alpha[0] > 0.5
    depth = seen.depth[0, ..., 0][inside].detach().numpy()
    given = values.reshape(8, 6, 8, 6).mean((1, 3))[inside.numpy()]
    slope, shift = np.polyfit(given, depth, 1)
    fitted = ((slope * given + shift - depth) ** 2).mean()
    assert float(log["loss_ref_depth"]) == pytest.approx(fitted, rel=1e-3)
    rho = np.corrcoef(given, depth)[0, 1]
    assert float(log["loss_ref_depth_rel"]) == pytest.approx(1 - rho, abs=1e-4)
    assert torch.isfinite(loss)


def test_a_model_of_the_hub_two_steps(mug: Path, tmp_path: Path) -> None:
    """With threestudio's losses: smooth normals, orientation and the rest."""
    folder = tmp_path / "model"
    tiny().save_pretrained(folder)
    small = [
        *("data.height=[8,12,16]", "data.width=[8,12,16]"),
        "data.resolution_milestones=[1,2]",
        "data.random_camera.height=[8,12,16]",
        "data.random_camera.width=[8,12,16]",
        "data.random_camera.batch_size=[2,1,1]",
        "data.random_camera.resolution_milestones=[1,2]",
        "system.geometry.pos_encoding_config.n_levels=2",
        "system.geometry.pos_encoding_config.log2_hashmap_size=6",
        "system.renderer.num_samples_per_ray=24",
        "system.renderer.occupancy.resolution=4",
        "trainer.precision=32-true",
        "trainer.max_steps=3",
    ]
    model = f"system.guidance.pretrained_model_name_or_path={folder}"
    config = load("configs/zero123.yaml", [*small, f"data.image={mug}", model])
    system: Any = build(config)
    assert {"normal_smooth", "3d_normal_smooth"} <= system.regularisers.keys()
    _, log = system.loss(system.load_guidance())(1, system.module)
    log = {name: torch.as_tensor(value).detach() for name, value in log.items()}
    for name in ("loss_3d_normal_smooth", "loss_ref_3d_normal_smooth", "loss_orient"):
        assert float(log[name]) > 0
    assert "loss_ref_sparsity" not in log
    sequential = dp.solve(system.trajectory(), dp.Sequential()).value
    assert tree_equal(dp.solve(system.trajectory(), EXACT).value, sequential)
    # Unlit as long as training is.
    y = system.trajectory().init()[0]
    view = system.data.views(8, 8)
    assert system.scene.material.shading(None, StepRandom(0)) == "albedo"
    assert system.render(y, view)[0].shape == (1, 3, 8, 8)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["data.image=no.png"], "no.png"),
        (["data.image_path=other.png"], "write one of them"),
        (["data.cut=magic"], "`cut` is `magic`: write auto"),
        (["data.fill=2"], "`fill` is 2"),
        (["data.recentre=maybe"], "`recentre`"),
        (["data.default_elevation_deg=95"], "`default_elevation_deg` is 95"),
        (["data.height=[8,9]", "data.resolution_milestones=[]"], "one more for each"),
        (["data_type=random-camera-datamodule"], "reads `single-image-datamodule`"),
        (["system.guidance.cond_elevation_deg=40"], "leave it out, or write the same"),
        (
            ["system.guidance_type=diffusers-guidance"],
            "write one of `zero123-guidance`",
        ),
        (["system.loss.lambda_3d_normal_smooth=1"], "return_normal_perturb: true"),
        (["system.loss.lambda_depth=1"], "`data.depth=FILE`"),
        (["system.freq.ref_only_steps=5"], "write `alternate`"),
        (["quality.clip=x/y"], "`quality.clip` compares with a prompt"),
        (["system.guidance.pretrained_model_name_or_path=toybox"], "takes no image"),
        (["data.more=[{image: no.png, azimuth_deg: 9, elevation_deg: 0}]"], "no.png"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_answered_in_a_sentence(
    settings: list[str],
    sentence: str,
    mug: Path,
    second: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [*settings_of("voxels", mug, second, f"exp_root_dir={tmp_path}"), *settings]
    assert launch.main(["--config", KINDS["voxels"][0], "--train", *given]) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert "Traceback" not in said


def test_an_image_that_is_not_named_is_asked_for(capsys: Any) -> None:
    assert launch.main(["--config", KINDS["voxels"][0], "--train"]) == 2
    assert "data.image" in capsys.readouterr().err


def test_a_text_system_with_an_image_says_which_data_it_reads(mug: Path) -> None:
    settings = ["data_type=single-image-datamodule", "system.prompt_processor.prompt=a"]
    with pytest.raises(ConfigError, match="reads `random-camera-datamodule`"):
        build(load("configs/dreamfusion-toybox.yaml", settings))


def test_a_caption_is_read_in_the_image_and_turns_the_cameras(
    second: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The camera's azimuth in `data` is arbitrary, that of the guidance is not."""
    note.cache_clear()
    image = rendered(tmp_path / "chair.png", 60.0, 128, "a blue chair with red stripes")
    system = make("voxels", image, second, "data.default_azimuth_deg=10", CAPTION)
    guidance: Any = system.load_guidance()
    assert "read as `a blue chair with red stripes`, seen from" in (
        capsys.readouterr().err
    )
    assert guidance.prompts.prompt == "a blue chair with red stripes"
    one = torch.ones(2)
    cameras = Cameras(torch.tensor([10.0, 100.0]), 20 * one, 2.4 * one, 50 * one)
    given = guidance.conditions(torch.zeros(2, 12, 32, 32), cameras)
    assert given.reference is None
    found = torch.atan2(given.labels[:, 1], given.labels[:, 2]).rad2deg()
    assert torch.allclose(found, torch.tensor([60.0, 150.0]), atol=15)
    # Words of one's own are not overruled, and models of the hub read none.
    words = "system.prompt_processor.prompt=a red chair"
    told: Any = make("voxels", image, second, CAPTION, words).load_guidance()
    assert told.prompts.prompt == "a red chair"
    folder = tmp_path / "model"
    tiny().save_pretrained(folder)
    with pytest.raises(ModelError, match="write `condition: image`"):
        make("voxels", image, folder, CAPTION).load_guidance()


@pytest.mark.parametrize("kind", KINDS)
def test_several_steps_are_one_call(kind: str, mug: Path, second: Path) -> None:
    """Steps with guidance, with reference views and with both, across a milestone."""
    freq = "system.freq={ref_or_zero123: alternate, ref_only_steps: 1, n_ref: 3}"
    for setting in (freq, "system.freq.n_ref=2"):
        trajectory = make(kind, mug, second, setting).trajectory()
        y, _ = trajectory.init()
        drift: Any = trajectory.make_drift(torch.device("cpu"))
        steps = [1, 2, 3]
        for step, (found, _) in zip(steps, drift.batch(steps, [y] * 3), strict=True):
            assert deviation(found, drift(step, y)[0]) < 1e-4


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["data.width=[9,12]"], "references are square"),
        (["data.depth=d.png"], "`data.depth` has no effect without"),
        (["system.prompt_processor.prompt=a mug", "{hub}"], "reads no words beside"),
        (["quality.truth=a zebra"], "zebra"),
        (["system.ambient_ratio_min=0.9"], "a material without light"),
        (["system.freq.n_ref=3"], "`ref_only_steps` and `n_ref` have no effect"),
        (
            ["system.loss.lambda_depth=1", "data.recentre=true", "data.depth=d.png"],
            "write `data.recentre=false`",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_would_go_without_effect_is_refused(
    settings: list[str], sentence: str, mug: Path, second: Path
) -> None:
    hub = "system.guidance.pretrained_model_name_or_path=some/model"
    given = [hub if word == "{hub}" else word for word in settings]
    with pytest.raises((ConfigError, ValueError), match=sentence):
        make("voxels", mug, second, *given)


def test_weights_of_zero_and_empty_masks_are_no_error(
    mug: Path, second: Path, tmp_path: Path
) -> None:
    nothing = ("system.loss.lambda_rgb=0", "system.loss.lambda_mask=0")
    system = make("voxels", mug, second, *nothing)
    assert float(system.reference_loss(0, system.module).value.detach()) == 0
    thin = np.zeros((64, 64, 4), np.uint8)
    thin[8:56, 31:32] = 255
    Image.fromarray(thin).save(tmp_path / "thin.png")
    Image.fromarray(thin[..., 3]).save(tmp_path / "depth.png")
    depth = ("system.loss.lambda_depth=1", f"data.depth={tmp_path / 'depth.png'}")
    system = make("voxels", tmp_path / "thin.png", second, *depth)
    found = system.reference_loss(0, system.module)
    assert "loss_ref_depth" not in found.log
    assert torch.isfinite(found.value)
