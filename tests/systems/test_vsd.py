"""Variational score distillation: threestudio's gradients, and values by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from safetensors.torch import load_file
from torch import Tensor

from dreampropeller import StepRandom
from systems.guidance.lora import Lora, camera_to_world, to_clip_space
from systems.guidance.priors import Prior, Words
from systems.guidance.prompts import PromptConfig
from systems.guidance.vsd import VariationalScoreDistillation, VSDConfig
from systems.scene.cameras import Cameras
from systems.toybox.conditions import CAMERA, LABELS, fill_missing_inputs
from systems.toybox.model import make_scheduler, make_unet
from tests.golden import vsd_oracle as oracle
from tests.systems.gaussian import SPREAD, prior

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def threestudio() -> dict[str, Tensor]:
    return load_file(oracle.FILE)


def pretrained(salt: str, kind: str) -> Prior:
    unet: Any = UNet2DConditionModel(**oracle.UNET)
    vae: Any = AutoencoderKL(**oracle.VAE)
    oracle.fill(unet, salt)
    oracle.fill(vae, "vae ")
    scheduler = DDPMScheduler(**oracle.scheduler(kind))
    parts = {"unet": unet.double(), "vae": vae.double(), "scheduler": scheduler}
    return Prior(SimpleNamespace(**parts), CPU)


def guidance(case: str) -> VariationalScoreDistillation:
    embedded = torch.cat([oracle.words("view"), oracle.words("plain")])
    base = pretrained("base ", "epsilon")
    two = case == "two models"
    made = VariationalScoreDistillation(
        VSDConfig("", **oracle.CASES[case]),
        base,
        Words(embedded, oracle.words("negative")),
        PromptConfig("a", view_dependent=False),
        pretrained("other ", "v_prediction") if two else None,
    )
    made.lora.double()
    oracle.fill(made.lora.unet.class_embedding.network, "camera ")
    with torch.no_grad():
        for name, tensor in made.parameters().items():
            if "lora_" in name:
                key = f"lora {upstream_name(name)}"
                tensor.copy_(oracle.values(key, tensor.shape, 0.3))
    return made


def upstream_name(name: str) -> str:
    """The name in the oracle of a trained parameter."""
    name = name.removeprefix("unet.").removesuffix(".default.weight")
    name = name.replace("class_embedding.network", "camera")
    return name.replace("lora_A", "down").replace("lora_B", "up")


def views(found: dict[str, Tensor]) -> Cameras:
    names = ("azimuth", "elevation", "camera_distances", "fovy")
    azimuth, elevation, distance, fov = (found[name] for name in names)
    aspect = torch.full_like(fov, oracle.WIDE["width"] / oracle.WIDE["height"])
    return Cameras(azimuth, elevation, distance, fov.rad2deg(), aspect=aspect)


@pytest.mark.parametrize("case", oracle.CASES)
def test_gradients_are_threestudios(case: str, threestudio: dict[str, Tensor]) -> None:
    """Of images (through the autoencoder), LoRA and camera embedding, to 1e-5.

    The other side is the unmodified `StableDiffusionVSDGuidance` of threestudio
    (28d9d80) with diffusers 0.19.3 and its own LoRA layers. `golden/vsd_oracle.py`
    made the file: it says how, and holds the weights and random numbers that both
    sides share.
    """
    made, cameras = guidance(case), views(threestudio)
    matrix = camera_to_world(cameras)
    assert torch.allclose(matrix, threestudio["c2w"], atol=1e-6)
    clip = to_clip_space(cameras)
    assert torch.allclose(clip, threestudio["mvp_mtx"], atol=1e-6)
    images, named = oracle.images().double().requires_grad_(True), made.parameters()
    loss, log = made(images, cameras, oracle.STEP, StepRandom(oracle.SEED))
    image, *learned = torch.autograd.grad(loss, [images, *named.values()])
    names = map(upstream_name, named)
    found = {
        "image": image,
        "learned": oracle.probes(dict(zip(names, learned, strict=True))),
        **{name: torch.as_tensor(log[name]) for name in ("loss_vsd", "loss_lora")},
    }
    for name, value in found.items():
        wanted = threestudio[f"{case}/{name}"]
        # A row of `learned` begins with the norm of a gradient.
        size = wanted[:, :1] if name == "learned" else wanted.norm()
        assert ((value - wanted) / size).norm() <= 1e-5, name
    assert len(found["learned"]) > 30


def test_perpendicular_negatives_are_threestudios(
    threestudio: dict[str, Tensor],
) -> None:
    """Of the pretrained model's noise, from its own prompts of the views."""
    prompts = PromptConfig("a", use_perp_neg=True)
    texts = [*prompts.texts(), prompts.prompt]
    made = VariationalScoreDistillation(
        VSDConfig("", guidance_scale=oracle.SCALE),
        pretrained("base ", "epsilon"),
        Words(torch.cat(list(map(oracle.words, texts))), oracle.words("")),
        prompts,
    )
    azimuth, elevation = map(torch.tensor, oracle.ANGLES.values())
    one = torch.ones(3)
    with torch.no_grad():
        found = made.predict(
            oracle.latents(),
            torch.tensor(oracle.TIMESTEPS),
            Cameras(azimuth, elevation, 2 * one, 50 * one),
        )
    wanted = threestudio["perp neg/noise"]
    assert ((found - wanted).norm() / wanted.norm()) <= 1e-5


GIVEN, WITHOUT = 0.6, -0.2
ONE = torch.ones(2)
CAMERAS = Cameras(90 * ONE, 20 * ONE, 2.4 * ONE, 50 * ONE)


def gaussian(**settings: Any) -> VariationalScoreDistillation:
    config = {"camera_condition_type": "none", "lora_targets": ["mean"], **settings}
    words = Words(torch.full((2, 1, 1), GIVEN), torch.full((1, 1, 1), WITHOUT))
    made = VariationalScoreDistillation(
        VSDConfig("", **config),
        prior(1),
        words,
        PromptConfig("a", view_dependent=False),
    )
    made.lora.reset(StepRandom(0))
    return made


def test_the_value_on_a_gaussian_prior_by_hand() -> None:
    r"""With means $m_\phi$ and $m$, both of spread s, both scores are linear.

    $$g = w\,\alpha\sigma\,(m_\phi - m) / (\alpha^2 s^2 + \sigma^2).$$

    The noise cancels, which is what makes variational score distillation smooth.
    """
    made = gaussian(guidance_scale=7.5, lora_rank=2, lora_alpha=4.0)
    lora = made.lora.unet.mean
    with torch.no_grad():
        lora.lora_A.default.weight.copy_(torch.tensor([[0.5], [-1.0]]))
        lora.lora_B.default.weight.copy_(torch.tensor([[0.4, 0.3]]))
    learned = GIVEN * (1 + 4 / 2 * (0.4 * 0.5 - 0.3 * 1.0))
    guided = WITHOUT + 7.5 * (GIVEN - WITHOUT)
    images = torch.rand(2, 3, 4, 4, requires_grad=True)
    random = StepRandom(5)
    made.weights = lambda step: (1.0, 0.0)
    loss, _ = made(images, CAMERAS, 3, random)
    (gradient,) = torch.autograd.grad(loss, images)
    t = made.timestep(images, 3, random)
    kept = DDPMScheduler().alphas_cumprod[t][:, None, None, None]
    alpha, sigma = kept.sqrt(), (1 - kept).sqrt()
    variance = kept * SPREAD**2 + 1 - kept
    wanted = sigma**2 * alpha * sigma * (learned - guided) / variance
    # Two views; an image in [0, 1] is half as wide as the model's.
    assert torch.allclose(gradient, (wanted / 2 * 2).expand_as(gradient), atol=1e-5)


def test_the_loras_loss_by_hand_and_its_target() -> None:
    made = gaussian(lora_rank=1)
    x, random = torch.randn(2, 3, 4, 4), StepRandom(5)
    loss = made.lora_loss(x, CAMERAS, 3, random)
    low, high = made.timesteps(3)
    t = torch.randint(0, 1000, (2,), generator=random.generator(3, "lora-timestep"))
    noise = torch.randn(x.shape, generator=random.generator(3, "lora-noise"))
    kept = DDPMScheduler().alphas_cumprod[t][:, None, None, None]
    alpha, sigma = kept.sqrt(), (1 - kept).sqrt()
    variance = kept * SPREAD**2 + 1 - kept
    predicted = sigma * (alpha * x + sigma * noise - alpha * GIVEN) / variance
    assert loss.item() == pytest.approx(float((predicted - noise).square().mean()))
    assert (low, high) == (20, 980)  # its own range is all timesteps
    adapted = made.lora.prior
    for kind, wanted in (("v_prediction", alpha * noise - sigma * x), ("sample", x)):
        adapted.prediction_type = kind
        assert torch.equal(made.lora.target(x, noise, t), wanted)
        found = adapted.to_noise(wanted, alpha * x + sigma * noise, t)
        assert torch.allclose(found, noise, atol=1e-4)


def test_an_untrained_lora_is_the_pretrained_model_and_shares_its_weights() -> None:
    unet = make_unet((8, 16, 16))
    fill_missing_inputs(unet)  # as its pipeline does
    model = Prior(SimpleNamespace(unet=unet, scheduler=make_scheduler()), CPU)
    names = [name for name, _ in unet.named_parameters()]
    lora = Lora(model, 2, 2.0, ["to_q", "conv1"])
    assert [name for name, _ in unet.named_parameters()] == names
    own = [p for p in lora.parameters() if not p.requires_grad]
    assert {id(p) for p in own} == {id(p) for p in unet.parameters()}
    # The second embedded prior takes the camera in its own format.
    assert not any("class" in n for n, p in lora.named_parameters() if p.requires_grad)
    x, t, words = (
        torch.randn(2, 12, 32, 32),
        torch.tensor([5, 900]),
        torch.randn(2, 16, 96),
    )
    for known in (True, False):
        conditions = lora.conditions(CAMERAS, known)
        assert conditions is not None
        assert conditions.labels.shape == (2, LABELS)
        assert bool(conditions.labels[:, : 1 + CAMERA].any()) == known
        with torch.no_grad():
            plain = model.output(x, t, words, conditions)
            assert torch.equal(lora.output(x, t, words, conditions), plain)


def test_a_model_without_a_free_class_embedding_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`Gaussian`.*camera_condition_type=none"):
        gaussian(camera_condition_type="extrinsics")
    taken: Any = UNet2DConditionModel(**oracle.UNET, class_embed_type="timestep")
    model = Prior(SimpleNamespace(unet=taken, scheduler=DDPMScheduler()), CPU)
    with pytest.raises(ValueError, match="no class embedding that is free for it"):
        Lora(model, 2, 2.0, ["to_q"])


def test_the_camera_is_hidden_in_a_tenth_of_the_steps() -> None:
    unet: Any = UNet2DConditionModel(**{**oracle.UNET, "time_embedding_dim": 32})
    pipeline = SimpleNamespace(unet=unet, scheduler=DDPMScheduler())
    kind = "mvp"  # that of the extrinsics is compared with threestudio's gradients
    made = VariationalScoreDistillation(
        VSDConfig("", lora_n_timestamp_samples=2, camera_condition_type=kind),
        Prior(pipeline, CPU),
        Words(torch.zeros(2, 1, oracle.WIDTH), torch.zeros(1, 1, oracle.WIDTH)),
        PromptConfig("a", view_dependent=False),
    )
    seen: list[Tensor] = []
    made.lora.output = lambda x, t, words, conditions: (  # pyright: ignore
        seen.append(conditions.labels),  # pyright: ignore
        x,
    )[1]
    for step in range(400):
        made.lora_loss(torch.zeros(2, 4, 2, 2), CAMERAS, step, StepRandom(0))
    matrix = to_clip_space(CAMERAS).flatten(1).repeat(2, 1)
    hidden = [not labels.any() for labels in seen]
    assert all(h or torch.equal(m, matrix) for h, m in zip(hidden, seen, strict=True))
    assert 20 <= sum(hidden) <= 60
