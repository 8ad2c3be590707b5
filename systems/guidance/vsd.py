r"""Variational score distillation: a LoRA learns the score of the rendered images.

With $x_t = \alpha_t x + \sigma_t \epsilon$, a pretrained prediction
$\hat\epsilon(x_t, t, c)$ and that of a LoRA $\epsilon_\phi(x_t, t, c, \pi)$ which also
sees the camera π, the images move along

$$g = w(t)\,\bigl(\hat\epsilon(x_t, t, c) - \epsilon_\phi(x_t, t, c, \pi)\bigr),$$

while the LoRA is trained on them,

$$\ell_\phi = \operatorname{mean}\,
  \lVert \epsilon_\phi(x_{t'}, t', c, \pi) - \epsilon' \rVert^2 ,$$

with its own timestep and noise (Z. Wang et al., 2023, arXiv 2305.16213, Eqs. 8 and 9,
with one particle; models that predict a velocity are trained on it). Scene and LoRA
move together: both are the state of one trajectory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dreampropeller import StepRandom
from systems.guidance.base import Guidance, Log, Shown
from systems.guidance.lora import Lora
from systems.guidance.priors import (
    ModelError,
    Prior,
    Words,
    check,
    load,
    open_pipeline,
    resolve,
)
from systems.guidance.prompts import PromptConfig
from systems.guidance.sds import GuidanceConfig, ScoreDistillation
from systems.guidance.table import GUIDANCES
from systems.scene.cameras import Cameras
from systems.settings.checks import at_least, one_of

Weights = Callable[[int], tuple[float, float]]
"""The weights of $\\ell_{vsd}$ and $\\ell_\\phi$ at a step."""
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
"""The layers that threestudio adapts."""
LARGEST_SCALE = 1000.0
"""Bound of α / r, and of r / α: beyond, a LoRA is without effect or overflows."""
BLIND = 0.1
"""Share of the steps that train the LoRA without the camera."""


@dataclass(frozen=True)
class VSDConfig(GuidanceConfig):
    """Variational score distillation (`system.guidance` in a config).

    Args:
        pretrained_model_name_or_path: Diffusion model; as for score distillation.
        pretrained_model_name_or_path_lora: The model that the LoRA adapts, with the
            same latent space; null: the same model.
        guidance_scale: Scale of classifier-free guidance of the pretrained model, as
            in diffusers (this one is so in threestudio too).
        guidance_scale_lora: Scale of guidance by the camera for the LoRA's prediction;
            1: no guidance.
        lora_cfg_training: Train the LoRA without the camera in a tenth of the steps,
            which guidance by the camera needs.
        lora_n_timestamp_samples: Number of timesteps per view that train the LoRA.
        camera_condition_type: Condition of the LoRA on the camera: "extrinsics" (the
            camera-to-world matrix), "mvp" (from world to clip space, which includes the
            field of view), or "none". A model that takes cameras itself, as toybox2,
            gets them in its own format.
        lora_rank: Rank of the LoRA.
        lora_alpha: Scale of the LoRA, above 0; null: the rank, which leaves it
            unscaled.
        lora_targets: Endings of the names of the adapted layers.
        lora: "shared", part of the state: the same on any number of workers, saved and
            resumed. "local" reproduces the published code for comparison: every worker
            trains its own, which is neither saved nor the same on all of them.
    """

    guidance_scale: float = 7.5
    pretrained_model_name_or_path_lora: str | None = None
    guidance_scale_lora: float = 1.0
    lora_cfg_training: bool = True
    lora_n_timestamp_samples: int = 1
    camera_condition_type: str = "extrinsics"
    lora_rank: int = 4
    lora_alpha: float | None = None
    lora_targets: list[str] = field(default_factory=lambda: list(ATTENTION))
    lora: str = "shared"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("guidance_scale_lora", self.guidance_scale_lora, 0)
        at_least("lora_n_timestamp_samples", self.lora_n_timestamp_samples, 1)
        at_least("lora_rank", self.lora_rank, 1)
        scale = 1 if self.lora_alpha is None else self.lora_alpha / self.lora_rank
        if not 1 / LARGEST_SCALE <= scale <= LARGEST_SCALE:
            raise ValueError(
                f"`lora_alpha` is {self.lora_alpha:g}, which scales the LoRA by "
                f"{scale:g} (`lora_alpha` over `lora_rank`): write a number above 0 "
                f"near the rank, such as {self.lora_rank}, or null for the rank itself."
            )
        kinds = ("extrinsics", "mvp", "none")
        one_of("camera_condition_type", self.camera_condition_type, kinds)
        one_of("lora", self.lora, ("shared", "local"))
        if self.guidance_scale_lora == 1:
            return
        scale = f"`guidance_scale_lora` is {self.guidance_scale_lora:g}"
        if self.camera_condition_type == "none":
            raise ValueError(
                f"{scale}, guidance by the camera, which `camera_condition_type: none` "
                "hides: write `guidance_scale_lora: 1`."
            )
        if not self.lora_cfg_training:
            raise ValueError(
                f"{scale}, and with `lora_cfg_training: false` the prediction without "
                "camera that it needs is never trained: write `guidance_scale_lora: 1` "
                "or `lora_cfg_training: true`."
            )


@dataclass(frozen=True)
class StableDiffusionVSDConfig(VSDConfig):
    """The same with threestudio's defaults for Stable Diffusion."""

    pretrained_model_name_or_path: str = "stabilityai/stable-diffusion-2-1-base"
    pretrained_model_name_or_path_lora: str | None = "stabilityai/stable-diffusion-2-1"


class VariationalScoreDistillation(ScoreDistillation):
    """The weighted losses of images and LoRA.

    Args:
        config: Settings of the guidance.
        prior: The pretrained model.
        words: Embeddings of `prompts.texts()`, then of the prompt without view.
        prompts: The prompts, and the choice among them by view.
        adapted: The model to adapt; default: the pretrained one.
    """

    Config = VSDConfig
    config: VSDConfig

    @classmethod
    def load(
        cls, config: Any, prompts: PromptConfig, device: torch.device
    ) -> VariationalScoreDistillation:
        """See `Guidance.load`; call `lora.reset` with the seed of the run."""
        prior, words = load(
            config.pretrained_model_name_or_path,
            [*prompts.texts(), prompts.prompt],
            prompts.negative_prompt,
            device,
            config.half_precision_weights,
        )
        adapted = None
        other = config.pretrained_model_name_or_path_lora
        if other not in (None, config.pretrained_model_name_or_path):
            assert other is not None
            check(other, [])
            pipeline = open_pipeline(resolve(other), with_text=False, dtype=prior.dtype)
            pipeline.vae = None
            adapted = Prior(pipeline, device)
            _check_space(prior, adapted, other)
        return cls(config, prior, words, prompts, adapted)

    def __init__(
        self,
        config: VSDConfig,
        prior: Prior,
        words: Words,
        prompts: PromptConfig,
        adapted: Prior | None = None,
    ) -> None:
        super().__init__(config, prior, words, prompts)
        if adapted is not None and not config.enable_memory_efficient_attention:
            adapted.unet.set_default_attn_processor()
        rank = config.lora_rank
        self.lora = Lora(
            adapted or prior,
            rank,
            rank if config.lora_alpha is None else config.lora_alpha,
            config.lora_targets,
            config.camera_condition_type,
        )
        self.weights: Weights = lambda step: (1.0, 1.0)
        self.private: torch.optim.Optimizer | None = None
        """The optimizer of a LoRA that is not part of the state (`lora: local`)."""

    def parameters(self) -> dict[str, Tensor]:
        """The LoRA's trained parameters by name."""
        named = self.lora.named_parameters()
        return {name: tensor for name, tensor in named if tensor.requires_grad}

    def loss(
        self, x: Tensor, gradient: Tensor, shown: Shown, random: StepRandom
    ) -> tuple[Float[Tensor, ""], Log]:
        """The weighted sum of both losses; see `ScoreDistillation.loss`."""
        vsd, log = super().loss(x, gradient, shown, random)
        lora = self.lora_loss(x.detach(), shown.cameras, shown.step, random)
        of_images, of_lora = self.weights(shown.step)
        log = {**log, "loss_vsd": vsd, "loss_lora": lora}
        if self.private is None:
            return of_images * vsd + of_lora * lora, log
        self._learn(self.private, of_lora * lora)
        return of_images * vsd, log

    def direction(
        self, x: Tensor, cameras: Cameras, t: Tensor, noise: Tensor
    ) -> Float[Tensor, "views channels rows columns"]:
        """The gradient g in the model's space; see `ScoreDistillation.direction`."""
        noisy = self.prior.add_noise(x, noise, t)
        difference = self.predict(noisy, t, cameras) - self.estimate(noisy, t, cameras)
        return self.weight(t) * difference

    def estimate(
        self, noisy: Tensor, t: Tensor, cameras: Cameras
    ) -> Float[Tensor, "views channels rows columns"]:
        """The LoRA's prediction under the prompt without view words, guided."""
        words, scale = self._words(len(noisy)), self.config.guidance_scale_lora
        given = self.lora(noisy, t, words, self.lora.conditions(cameras))
        if scale == 1:
            return given
        blind = self.lora(noisy, t, words, self.lora.conditions(cameras, known=False))
        return blind + scale * (given - blind)

    def lora_loss(
        self, x: Tensor, cameras: Cameras, step: int, random: StepRandom
    ) -> Float[Tensor, ""]:
        """The LoRA's loss on images in the model's space."""
        count = self.config.lora_n_timestamp_samples
        most, own = self.lora.prior.num_timesteps, x.shape
        drawn = random.draws(step, "lora-timestep").randint(
            0, most, count, len(x), axis=1
        )
        t = drawn.flatten().to(x.device)
        drawn = random.draws(step, "lora-noise").randn(count, *own, axis=1)
        noise = drawn.flatten(0, 1).to(x)
        x, words = x.repeat(count, 1, 1, 1), self._words(count * len(x))
        dice = torch.rand(1, generator=random.generator(step, "lora-camera"))
        known = not self.config.lora_cfg_training or float(dice) >= BLIND
        conditions = self.lora.conditions(cameras, known)
        if conditions is not None:
            conditions = type(conditions)(conditions.labels.repeat(count, 1), None)
        noisy = self.lora.prior.add_noise(x, noise, t)
        output = self.lora.output(noisy, t, words, conditions)
        target = self.lora.target(x, noise, t)
        return torch.nn.functional.mse_loss(output.float(), target.float())

    def _words(self, count: int) -> Tensor:
        return self.words.prompt_embeds[-1:].expand(count, -1, -1)

    def _learn(self, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        """A step of the private LoRA: the evaluation is then no function of its state.

        That is the defect of the published code which `lora: local` reproduces.
        """
        parameters = list(self.parameters().values())
        gradients = torch.autograd.grad(loss, parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        optimizer.zero_grad()


def _check_space(prior: Prior, adapted: Prior, name: str) -> None:
    """Refuse to adapt a model of other images, prompts or timesteps than the prior.

    The size of images counts in pixel space only: an autoencoder's latent may have any
    (threestudio adapts a model of 768 pixels beside one of 512).
    """
    one, other = _space(prior), _space(adapted)
    if prior.vae is not None:
        del one["width of images"]
    differ = [f"{n} ({other[n]}, not {one[n]})" for n in one if one[n] != other[n]]
    if differ:
        raise ModelError(
            f"The LoRA cannot adapt `{name}` beside this pretrained model: it "
            f"differs in {', '.join(differ)}. Leave out "
            "`pretrained_model_name_or_path_lora`, or name a model of the same kind "
            "there."
        )


def _space(prior: Prior) -> dict[str, Any]:
    """What two models that see the same noisy images have in common."""
    config = prior.unet.config
    return {
        "channels": config["in_channels"],
        "width of images": config["sample_size"],
        "width of prompts": config.get("encoder_hid_dim")
        or config["cross_attention_dim"],
        "timesteps": prior.num_timesteps,
    }


class StableDiffusionVSDGuidance(VariationalScoreDistillation):
    """VSD with threestudio's defaults for Stable Diffusion."""

    Config = StableDiffusionVSDConfig


VSD_GUIDANCES: Mapping[str, type[VariationalScoreDistillation]] = {
    "vsd-guidance": VariationalScoreDistillation,
    "stable-diffusion-vsd-guidance": StableDiffusionVSDGuidance,
}
"""Guidances that learn beside the scene; the second name is threestudio's."""

ALL_GUIDANCES: Mapping[str, type[Guidance]] = {**GUIDANCES, **VSD_GUIDANCES}
"""For systems that take both kinds."""
