"""Zero-1-to-3 models of the hub: their files, their conditions and their noise."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from dreampropeller.rng import Draws
from systems.guidance import zero123_checkpoint, zero123_prior
from systems.guidance.priors import ModelError, Prior
from systems.guidance.zero123 import check_takes_images
from systems.guidance.zero123_checkpoint import load_checkpoint
from systems.guidance.zero123_conditions import clip_input, fit
from systems.guidance.zero123_pipeline import CLIPCameraProjection, Zero123Pipeline
from systems.guidance.zero123_prior import Zero123Prior, load_zero123
from systems.scene.cameras import Cameras
from tests.golden import zero123_oracle as oracle
from tests.systems.zero123_models import (
    CLIP,
    LATENT,
    SIDE,
    UNET,
    VAE,
    WIDTH,
    original,
    tiny,
)

CPU = torch.device("cpu")


def cameras(*views: tuple[float, float, float]) -> Cameras:
    """Cameras of (elevation, azimuth, distance)."""
    elevation, azimuth, distance = torch.tensor(views).unbind(-1)
    return Cameras(azimuth, elevation, distance, torch.full_like(azimuth, 20.0))


VIEWS = cameras((30.0, 170.0, 3.0), (-10.0, -45.0, 4.5))
FRONT = cameras((5.0, -170.0, 3.8))


def random(name: str, *shape: int) -> Tensor:
    seed = int.from_bytes(name.encode(), "little") % 2**31
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


IMAGE = random("mug", 1, 3, SIDE, SIDE)


@pytest.fixture(autouse=True)
def _small_latents(monkeypatch: pytest.MonkeyPatch) -> None:
    """A single file does not tell its images' size."""
    assert zero123_checkpoint.LATENT_SIDE == 32
    monkeypatch.setattr(zero123_checkpoint, "LATENT_SIDE", LATENT)


@pytest.fixture(scope="module")
def pipeline() -> Zero123Pipeline:
    return tiny()


@pytest.fixture
def prior(pipeline: Zero123Pipeline) -> Zero123Prior:
    return Zero123Prior(pipeline, CPU)


@pytest.fixture(scope="module")
def folder(pipeline: Zero123Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hub") / "zero123-xl-diffusers"
    pipeline.save_pretrained(path)
    return path


def outputs(pipeline: Zero123Pipeline) -> list[Tensor]:
    """What all parts make of fixed inputs."""
    embeds, latents = pipeline.encode_reference(IMAGE)
    camera = random("camera", 1, 4)
    conditions = pipeline.conditions(embeds, latents, camera)
    noisy, t = random("noisy", 1, 4, LATENT, LATENT), torch.tensor([321])
    with torch.no_grad():
        decoded = pipeline.vae.decode(latents).sample
        found = pipeline.output(noisy, t, conditions)
    return [embeds, latents, conditions.embeds, found, decoded]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@torch.no_grad()
def published(
    pipeline: Zero123Pipeline,
    noisy: Tensor,
    t: Tensor,
    views: list[tuple[float, float, float]],
    reference: tuple[float, float, float],
    scale: float,
    stable: bool = False,
) -> Tensor:
    """The guided noise as threestudio computes it, from the parts."""
    x = IMAGE * 2 - 1
    seen = torch.nn.functional.interpolate(
        x, (28, 28), mode="bicubic", align_corners=True
    )
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    clip = pipeline.image_encoder(((seen + 1) / 2 - mean) / std).image_embeds
    concat = pipeline.vae.encode(x).latent_dist.mode()
    rows = []
    for elevation, azimuth, distance in views:
        around = math.radians(azimuth - reference[1])
        last = distance - reference[2]
        rows.append(
            [
                math.radians((90 - elevation) - (90 - reference[0])),
                math.sin(around),
                math.cos(around),
                math.radians(90 - reference[0]) if stable else last,
            ]
        )
    camera = torch.tensor(rows)[:, None]
    joined = torch.cat([clip[:, None].repeat(len(views), 1, 1), camera], -1)
    cross = pipeline.clip_camera_projection.proj(joined)
    concat = concat.repeat(len(views), 1, 1, 1)
    x_in = torch.cat(
        [torch.cat([noisy] * 2), torch.cat([torch.zeros_like(concat), concat])], 1
    )
    both = torch.cat([torch.zeros_like(cross), cross])
    found = pipeline.unet(x_in, torch.cat([t] * 2), encoder_hidden_states=both).sample
    without, given = found.chunk(2)
    return without + scale * (given - without)


@pytest.mark.parametrize("kind", ["zero123", "stable-zero123"])
def test_the_noise_is_that_of_threestudios_formulas(
    pipeline: Zero123Pipeline, kind: str
) -> None:
    prior = Zero123Prior(pipeline, CPU, kind)
    noisy, t = random("noisy", 2, 4, LATENT, LATENT), torch.tensor([20, 900])
    conditions = prior.conditions(VIEWS, IMAGE, FRONT)
    words = torch.zeros(2, 1, 3)  # of no use
    found = prior.noise(noisy, t, words, words[:1], 3.0, conditions=conditions)
    views = [(30.0, 170.0, 3.0), (-10.0, -45.0, 4.5)]
    stable = kind == "stable-zero123"
    expected = published(
        pipeline, noisy, t, views, (5.0, -170.0, 3.8), 3.0, stable=stable
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    other = published(
        pipeline, noisy, t, views, (5.0, -170.0, 3.8), 3.0, stable=not stable
    )
    assert (other - expected).abs().max() > 1e-3


def test_camera_numbers_by_hand(pipeline: Zero123Pipeline) -> None:
    prior = Zero123Prior(pipeline, CPU)
    every = torch.arange(2)
    found = prior.camera_numbers(VIEWS, FRONT, every)
    # 170° and −170° are 20° apart across the seam: the view is at −20°.
    seam = math.radians(-20)
    expected = [
        [math.radians(-25), math.sin(seam), math.cos(seam), -0.8],
        [
            math.radians(15),
            math.sin(math.radians(125)),
            math.cos(math.radians(125)),
            0.7,
        ],
    ]
    torch.testing.assert_close(found, torch.tensor(expected))
    turned = cameras((30.0, 170.0 - 360.0, 3.0), (-10.0, -45.0 + 360.0, 4.5))
    torch.testing.assert_close(prior.camera_numbers(turned, FRONT, every), found)
    stable = Zero123Prior(pipeline, CPU, "stable-zero123")
    found = stable.camera_numbers(VIEWS, FRONT, every)
    torch.testing.assert_close(found[:, 3], torch.tensor([math.radians(85)] * 2))
    same = prior.camera_numbers(FRONT, FRONT, torch.arange(1))
    torch.testing.assert_close(same, torch.tensor([[0.0, 0.0, 1.0, 0.0]]))
    with pytest.raises(ValueError, match="no kind `xl` of Zero-1-to-3: write one"):
        Zero123Prior(pipeline, CPU, "xl")


def test_the_unconditional_branch_sees_zeros(prior: Zero123Prior) -> None:
    noisy, t = random("noisy", 2, 4, LATENT, LATENT), torch.tensor([20, 900])
    conditions = prior.conditions(VIEWS, IMAGE, FRONT)
    words = torch.zeros(2, 1, 3)

    def at(scale: float, given: Any = conditions) -> Tensor:
        return prior.noise(noisy, t, words, words[:1], scale, conditions=given)

    x = torch.cat([noisy, torch.zeros_like(noisy)], 1)
    zeros = torch.zeros(2, 1, WIDTH)
    with torch.no_grad():
        blank = prior.unet(x, t, encoder_hidden_states=zeros).sample
    torch.testing.assert_close(at(0.0), blank, rtol=1e-4, atol=1e-5)
    assert torch.equal(at(7.0, None), blank)  # without conditions
    assert (at(1.0) - blank).abs().max() > 1e-3
    linear = blank + 5 * (at(1.0) - blank)
    torch.testing.assert_close(at(5.0), linear, rtol=1e-4, atol=1e-5)


def test_each_view_takes_its_own_reference_image(prior: Zero123Prior) -> None:
    images = torch.cat([IMAGE, random("back", 1, 3, SIDE, SIDE)])
    around = cameras((5.0, 0.0, 3.8), (5.0, 180.0, 3.8))
    pairs = prior.conditions(VIEWS, images, around)
    for i in range(2):
        view = Cameras(*(v[i : i + 1] for v in vars(VIEWS).values() if v is not None))
        own = Cameras(*(v[i : i + 1] for v in vars(around).values() if v is not None))
        one = prior.conditions(view, images[i : i + 1], own)
        torch.testing.assert_close(pairs.embeds[i], one.embeds[0])
        torch.testing.assert_close(pairs.latents[i], one.latents[0])
    # Shown images are chosen by angle: −200° is nearer to 180° than to 0°.
    prior.show(images, around)
    chosen = prior.conditions(cameras((0.0, -200.0, 3.0), (60.0, 350.0, 3.0)))
    expected = prior.pipeline.encode_reference(images)[1].flip(0)
    torch.testing.assert_close(chosen.latents, expected)


def test_a_reference_image_is_encoded_once(
    prior: Zero123Prior, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    encode = prior.pipeline.encode_reference

    def counted(images: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(len(images))
        return encode(images)

    monkeypatch.setattr(prior.pipeline, "encode_reference", counted)
    prior.show(IMAGE, FRONT)
    shown = prior.conditions(VIEWS)
    given = prior.conditions(VIEWS, IMAGE.clone(), FRONT)
    assert calls == [1]
    assert torch.equal(shown.embeds, given.embeds)
    prior.conditions(VIEWS, 1 - IMAGE, FRONT)
    assert calls == [1, 1]


def test_images_are_encoded_as_scaled_latents_of_the_models_size(
    prior: Zero123Prior,
) -> None:
    images = random("render", 2, 3, 40, 40)
    (found,) = Prior.encode(prior, [images], [Draws(torch.Generator().manual_seed(1))])
    large = torch.nn.functional.interpolate(images, (SIDE, SIDE), mode="bilinear")
    latent = prior.pipeline.vae.encode(large * 2 - 1).latent_dist
    noise = torch.randn(
        2, 4, LATENT, LATENT, generator=torch.Generator().manual_seed(1)
    )
    expected = 0.18215 * (latent.mean + latent.std * noise)
    torch.testing.assert_close(found, expected)
    # The reference image's latent is the mode, without that factor.
    reference = prior.conditions(VIEWS, large[:1], FRONT).latents
    torch.testing.assert_close(reference[0], latent.mean[0], rtol=1e-4, atol=1e-5)


def test_reference_images_are_averaged_onto_white() -> None:
    image = torch.zeros(1, 4, 6, 6)
    image[:, 0], image[:, 3, :, :3] = 1.0, 1.0  # red in the left half, hidden right
    found = fit(image, 4)
    # Columns of 1.5 pixels: red, red, white, white.
    assert torch.equal(found[0, 0], torch.ones(4, 4))
    torch.testing.assert_close(found[0, 1, 2], torch.tensor([0.0, 0.0, 1.0, 1.0]))
    ramp = torch.arange(6.0).expand(1, 1, 6, 6)
    expected = torch.tensor([1 / 3, (0.5 * 1 + 2) / 1.5, 11 / 3 - 0.3333333, 14 / 3])
    torch.testing.assert_close(fit(ramp, 4)[0, 2, 0], expected)
    assert fit(image, 12).shape == (1, 3, 12, 12)
    for shape in ((1, 3, 6, 5), (1, 2, 6, 6)):
        with pytest.raises(ValueError, match="give a square one with 1, 3 or 4"):
            fit(torch.zeros(shape), 4)


def test_clip_sees_the_corners() -> None:
    image = random("corner", 1, 3, 256, 256)
    mean, std = torch.tensor([0.48145466, 0.26862954])
    found = clip_input(image, 224)[0, 0] * std + mean
    for row in (0, -1):
        for column in (0, -1):
            corner = image[0, 0, row, column]
            torch.testing.assert_close(found[row, column], corner)


def test_a_folder_holds_the_model(pipeline: Zero123Pipeline, folder: Path) -> None:
    found = Zero123Pipeline.from_pretrained(folder)
    assert same(outputs(found), outputs(pipeline))
    prior = load_zero123(str(folder), CPU)
    assert prior.kind == "zero123"
    assert same(outputs(prior.pipeline), outputs(pipeline))


def test_the_layout_of_the_hub_loads(
    pipeline: Zero123Pipeline, folder: Path, tmp_path: Path
) -> None:
    """Pickled weights, a module that is not installed, and parts of no use here."""
    copy = tmp_path / "stable-zero123-diffusers"
    shutil.copytree(folder, copy)
    index = json.loads((copy / "model_index.json").read_text())
    index["clip_camera_projection"] = ["zero123", "CLIPCameraProjection"]
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["requires_safety_checker"] = True
    (copy / "model_index.json").write_text(json.dumps(index))
    part = copy / "clip_camera_projection"
    shutil.rmtree(part)
    part.mkdir()
    torch.save(
        pipeline.clip_camera_projection.state_dict(),
        part / "diffusion_pytorch_model.bin",
    )
    numbers = {"embedding_dim": WIDTH, "additional_embeddings": 4}
    config = {"_class_name": "CLIPCameraProjection", **numbers}
    (part / "config.json").write_text(json.dumps(config))
    prior = load_zero123(str(copy), CPU)
    assert prior.kind == "stable-zero123"
    assert same(outputs(prior.pipeline), outputs(pipeline))


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_a_single_file_holds_the_model(
    pipeline: Zero123Pipeline, tmp_path: Path, suffix: str
) -> None:
    path = tmp_path / f"zero123-xl{suffix}"
    weights = original(pipeline)
    if suffix == ".ckpt":
        torch.save({"state_dict": weights, "global_step": 105000}, path)
    else:
        save_file(weights, path)
    prior = load_zero123(str(path), CPU)
    assert same(outputs(prior.pipeline), outputs(pipeline))
    schedules = [one.scheduler.config for one in (prior.pipeline, pipeline)]
    public = [{k: v for k, v in c.items() if k[0] != "_"} for c in schedules]
    assert public[0] == public[1]
    prior.pipeline.save_pretrained(tmp_path / "again")
    again = Zero123Pipeline.from_pretrained(tmp_path / "again")
    assert same(outputs(again), outputs(pipeline))


def test_half_precision_stays_close(
    pipeline: Zero123Pipeline, folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "zero123.safetensors"
    save_file(original(pipeline), path)
    noisy, t = random("noisy", 2, 4, LATENT, LATENT), torch.tensor([20, 900])
    words = torch.zeros(2, 1, 1)

    def noise(one: Zero123Pipeline) -> Tensor:
        prior = Zero123Prior(one, CPU)
        conditions = prior.conditions(VIEWS, IMAGE, FRONT)
        return prior.noise(noisy, t, words, words, 3.0, conditions=conditions)

    expected = noise(pipeline)
    for half in (
        load_checkpoint(path, torch.float16),
        Zero123Pipeline.from_pretrained(folder, torch.float16),
    ):
        parts = [m for m in half.components.values() if isinstance(m, torch.nn.Module)]
        types = {p.dtype for part in parts for p in part.parameters()}
        assert types == {torch.float16}
        found = noise(half)
        torch.testing.assert_close(found, expected, rtol=0, atol=0.02)
        assert not torch.equal(found, expected)


def test_moving_averages_are_used(pipeline: Zero123Pipeline, tmp_path: Path) -> None:
    path = tmp_path / "zero123.safetensors"
    weights = original(pipeline)
    for name in [name for name in weights if name.startswith("model.")]:
        flat = name.removeprefix("model.").replace(".", "")
        weights[f"model_ema.{flat}"] = weights[name]
        weights[name] = torch.zeros_like(weights[name])
    weights["model_ema.decay"] = torch.tensor(0.9999)
    save_file(weights, path)
    assert same(outputs(load_checkpoint(path)), outputs(pipeline))


class _Code:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_pickle_with_code_is_refused(folder: Path, tmp_path: Path) -> None:
    trace, path = tmp_path / "trace", tmp_path / "zero123-xl.ckpt"
    torch.save({"state_dict": {}, "callbacks": _Code(trace)}, path)
    with pytest.raises(ModelError, match=r"could run code .* is refused\.") as caught:
        load_zero123(str(path), CPU)
    assert "zero123-xl.safetensors" in str(caught.value)
    copy = tmp_path / "folder"
    shutil.copytree(folder, copy)
    (copy / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(_Code(trace), copy / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(ModelError, match="Unable to load weights"):
        load_zero123(str(copy), CPU)
    assert not trace.exists()


def test_the_command_of_the_refusal_converts(
    pipeline: Zero123Pipeline, tmp_path: Path
) -> None:
    path = tmp_path / "zero123-xl.ckpt"
    torch.save({"state_dict": original(pipeline), "x": _Code(tmp_path / "t")}, path)
    with pytest.raises(ModelError) as caught:
        load_checkpoint(path)
    code = str(caught.value).split('python -c "')[1].removesuffix('"')
    exec(code, {})
    converted = load_checkpoint(path.with_suffix(".safetensors"))
    assert same(outputs(converted), outputs(pipeline))


def test_what_is_missing_is_named(pipeline: Zero123Pipeline, tmp_path: Path) -> None:
    weights = original(pipeline)
    path = tmp_path / "zero123.safetensors"

    def without(start: str) -> str:
        save_file({k: v for k, v in weights.items() if not k.startswith(start)}, path)
        with pytest.raises(ModelError) as caught:
            load_zero123(str(path), CPU)
        return str(caught.value)

    for start, part in {
        "model.diffusion_model.": "U-Net",
        "first_stage_model.": "autoencoder",
        "cond_stage_model.model.visual.": "CLIP image encoder",
        "cc_projection.": "camera projection",
    }.items():
        message = without(start)
        assert f"no weights `{start}…` (the {part})" in message
        assert "`cc_projection.…`. Write the path of one" in message
    assert "lacks the weights `bias`" not in without("cc_projection.weight")
    assert "lacks the weights" in without("model.diffusion_model.out.2.weight")
    message = without("model.diffusion_model.out.0.weight")
    assert "no complete Zero-1-to-3 checkpoint" in message
    assert "conv_norm_out.weight" in message
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ModelError, match=r"cannot be read as a checkpoint .* again"):
        load_zero123(str(path), CPU)
    text = path.with_suffix(".ckpt")
    text.write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ModelError, match=r"cannot be read as a checkpoint .* again"):
        load_zero123(str(text), CPU)


def test_what_a_folder_lacks_is_named(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "folder"
    shutil.copytree(folder, copy)
    file = copy / "clip_camera_projection" / "diffusion_pytorch_model.safetensors"
    save_file({"proj.weight": torch.zeros(WIDTH, WIDTH + 4)}, file)
    with pytest.raises(ModelError, match=r"lacks 1 of its weights, `proj\.bias`"):
        load_zero123(str(copy), CPU)
    shutil.rmtree(copy / "clip_camera_projection")
    with pytest.raises(
        ModelError, match=r"no folder `clip_camera_projection/`: .*vae/"
    ):
        load_zero123(str(copy), CPU)


def test_a_damaged_folder_is_refused_in_a_sentence(
    folder: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "folder"
    shutil.copytree(folder, copy)
    schedule = copy / "scheduler" / "scheduler_config.json"
    whole = json.loads(schedule.read_text())
    schedule.write_text(json.dumps({**whole, "num_train_timesteps": 10**12}))
    with pytest.raises(ModelError, match="`num_train_timesteps` of its scheduler"):
        load_zero123(str(copy), CPU)
    weights = copy / "image_encoder" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match="is cut short or damaged"):
        load_zero123(str(copy), CPU)
    (copy / "unet" / "config.json").write_text("[" * 100_000)
    with pytest.raises(ModelError, match=r"`unet/config\.json` cannot be read"):
        check_takes_images(str(copy))


def test_parts_that_do_not_fit_are_refused(pipeline: Zero123Pipeline) -> None:
    parts = dict(pipeline.components)
    wide = {**parts, "clip_camera_projection": CLIPCameraProjection(WIDTH + 1)}
    with pytest.raises(ValueError, match=r"cross-attention is 16 where 17 is needed"):
        Zero123Pipeline(**wide)
    more = {**parts, "clip_camera_projection": CLIPCameraProjection(WIDTH, 5)}
    with pytest.raises(ValueError, match="number of camera numbers is 5 where 4"):
        Zero123Pipeline(**more)


def test_names_that_lead_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = {
        "./load/zero123/zero123-xl.ckpt": "`cvlab/zero123-weights` on the hub has it",
        "load/mine.safetensors": r"There is no `load/mine\.safetensors`\. Write the",
        "zero123": "There is no folder `zero123`",
        "stabilityai/stable-zero123": r"holds checkpoint files.*`stable_zero123\.ckpt`",
    }
    for name, message in cases.items():
        with pytest.raises(ModelError, match=message):
            load_zero123(name, CPU)

    def offline(*_: Any, **__: Any) -> None:
        raise OSError("We could not connect to the hub.\nAnd more lines.")

    monkeypatch.setattr(
        zero123_prior.Zero123Pipeline, "from_pretrained", staticmethod(offline)
    )
    with pytest.raises(ModelError, match="could not connect to the hub") as caught:
        load_zero123("ashawkey/zero123-xl-diffusers", CPU)
    assert "\n" not in str(caught.value)
    assert "`clip_camera_projection/`" in str(caught.value)


def test_wrong_numbers_of_images_are_refused(prior: Zero123Prior) -> None:
    with pytest.raises(ValueError, match="needs a reference image: give"):
        prior.conditions(VIEWS)
    with pytest.raises(ValueError, match="give both `image` and `image_camera`"):
        prior.conditions(VIEWS, IMAGE)
    three = IMAGE.expand(3, -1, -1, -1)
    with pytest.raises(ValueError, match="`image` holds 3 views for 2 images"):
        prior.conditions(VIEWS, three, FRONT)
    with pytest.raises(ValueError, match="1 cameras are given for 3 reference"):
        prior.show(three, FRONT)


def test_the_pipeline_samples_a_new_view(pipeline: Zero123Pipeline) -> None:
    image = Image.fromarray((IMAGE[0].permute(1, 2, 0) * 255).byte().numpy())
    image.putalpha(200)

    def sample(**options: Any) -> Any:
        generator = torch.Generator().manual_seed(0)
        more = {"num_inference_steps": 2, "output_type": "pt", **options}
        return pipeline(image, generator=generator, **more).images

    found = sample(polar=10.0, azimuth=90.0)
    assert found.shape == (1, 3, SIDE, SIDE)
    assert torch.equal(found, sample(polar=10.0, azimuth=450.0 - 360.0))
    assert not torch.equal(found, sample(polar=10.0, azimuth=-90.0))
    picture: Any = pipeline(image, num_inference_steps=1).images[0]
    assert picture.size == (SIDE, SIDE)
    # One step by hand, deterministic: x₀ from the guided noise at the first timestep.
    one = sample(num_inference_steps=1, eta=0.0)
    noise = torch.randn(
        1, 4, LATENT, LATENT, generator=torch.Generator().manual_seed(0)
    )
    rgba = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
    conditions = pipeline.conditions(
        *pipeline.encode_reference(rgba), torch.tensor([[0.0, 0.0, 1.0, 0.0]])
    )
    t = torch.tensor([1])  # of one step, with an offset of one
    guess = pipeline.guided_output(noise, t, conditions, 3.0)
    alphas = pipeline.scheduler.alphas_cumprod
    kept, last = alphas[1], alphas[0]
    clean = (noise - (1 - kept).sqrt() * guess) / kept.sqrt()
    x = last.sqrt() * clean + (1 - last).sqrt() * guess
    with torch.no_grad():
        expected = pipeline.vae.decode(x / 0.18215).sample / 2 + 0.5
    torch.testing.assert_close(one, expected.clamp(0, 1), rtol=1e-3, atol=1e-4)


def published_file(path: Path) -> None:
    """Write the checkpoint that threestudio read for the golden file."""
    vae = {
        "block_out_channels": (32, 32, 32, 64),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
    }
    clip = {"intermediate_size": 256, "image_size": 224, "patch_size": 56}
    weights = original(tiny(UNET, {**VAE, **vae}, {**CLIP, **clip}))
    assert torch.equal(oracle.digest(weights), load_file(oracle.FILE)["weights"])
    for name in list(weights):
        value = oracle.weight(name, weights[name].shape)
        if name.startswith("model."):
            flat = "model_ema." + name.removeprefix("model.").replace(".", "")
            weights[name], weights[flat] = torch.zeros_like(value), value
        else:
            weights[name] = value
    torch.save({"state_dict": weights}, path)


def agree(found: dict[str, Tensor], kind: str) -> None:
    golden = load_file(oracle.FILE)
    for name, value in found.items():
        expected = golden[f"{kind}/{name}"]
        bound = 1e-4 * float(expected.abs().max())
        torch.testing.assert_close(value, expected, rtol=0, atol=bound, msg=name)


def test_threestudios_own_guidance_agrees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same file, image and cameras in threestudio's code: `zero123_oracle`."""
    monkeypatch.setattr(zero123_checkpoint, "LATENT_SIDE", 32)
    published_file(tmp_path / "105000.ckpt")
    prior = load_zero123(str(tmp_path / "105000.ckpt"), CPU)
    elevation, azimuth, distance = oracle.REFERENCE.values()
    reference = cameras((elevation, azimuth, distance))
    image = oracle.picture().permute(2, 0, 1)[None] / 255
    views = cameras(
        *zip(oracle.ELEVATION, oracle.AZIMUTH, oracle.DISTANCE, strict=True)
    )
    prior.show(image, reference)
    conditions = prior.conditions(views)
    rendered = oracle.images().requires_grad_(True)
    (latents,) = prior.encode([rendered], [Draws(oracle.posterior())])
    t = torch.tensor(oracle.TIMESTEPS)
    noisy = prior.add_noise(latents.detach(), oracle.noise(), t)
    words = torch.zeros(2, 1, 1)
    noise = prior.noise(noisy, t, words, words, oracle.SCALE, conditions=conditions)
    _, sigma = prior.scales(t)
    latents.backward(sigma.square() * (noise - oracle.noise()) / 2)
    assert rendered.grad is not None
    found = {
        "image": oracle.probe("image", fit(image, 256)),
        "embeds": conditions.embeds[:, 0],
        "latent": oracle.probe("latent", conditions.latents[:1]),
        "noise": oracle.probe("noise", noise),
        "gradient": oracle.probe("gradient", rendered.grad),
    }
    agree(found, "zero123")
    stable = Zero123Prior(prior.pipeline, CPU, "stable-zero123")
    conditions = stable.conditions(views, image, reference)
    noise = stable.noise(noisy, t, words, words, oracle.SCALE, conditions=conditions)
    found = {
        "embeds": conditions.embeds[:, 0],
        "noise": oracle.probe("noise", noise),
    }
    agree(found, "stable-zero123")
