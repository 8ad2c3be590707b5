r"""Score distillation: the gradient of a diffusion model on rendered images.

An image $x$ is noised to $x_t = \alpha_t x + \sigma_t \epsilon$; the gradient

$$g = w(t)\,\bigl(\hat\epsilon(x_t, t, c) - \epsilon\bigr)$$

moves it towards images that are likely under the prompt $c$ (SDS; B. Poole et al.,
2022, arXiv 2209.14988, Eq. 3). Timestep and noise are functions of the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from dreampropeller import StepRandom
from systems.guidance import perpendicular
from systems.guidance.base import Guidance, Log, Shown
from systems.guidance.priors import Prior, Words, load
from systems.guidance.prompts import VIEWS, PromptConfig
from systems.scene.cameras import Cameras
from systems.settings.checks import at_least, between, one_of
from systems.settings.schedules import (
    Schedule,
    check_order,
    check_schedule,
    value_at,
)


@dataclass(frozen=True)
class GuidanceConfig:
    r"""Score distillation from a diffusers pipeline (`system.guidance` in a config).

    Args:
        pretrained_model_name_or_path: Diffusion model: "toybox" (the first embedded
            prior), "toybox2" (the second, which is conditioned on the camera), a hub
            model, or a local folder.
        guidance_scale: Scale of classifier-free guidance; 1: no guidance.
        guidance_rescale: Rescaling of the guided prediction, from 0 (off) to 1.
        weighting_strategy: Weight w(t): "sds" is $1 - \bar\alpha_t$, "uniform" is 1,
            "fantasia3d" is $\sqrt{\bar\alpha_t}\,(1 - \bar\alpha_t)$.
        min_step_percent: Smallest timestep, as a fraction of all timesteps, from 0 to 1
            (the name is threestudio's); a number or a schedule.
        max_step_percent: Largest timestep, likewise; never below the smallest.
        grad_clip: Largest absolute value of an entry of the gradient; a number, a
            schedule or null.
        half_precision_weights: Run the model in half precision on a GPU.
        enable_memory_efficient_attention: Use torch's fused attention; false uses the
            plain implementation.
    """

    pretrained_model_name_or_path: str
    guidance_scale: float = 100.0
    guidance_rescale: float = 0.0
    weighting_strategy: str = "sds"
    min_step_percent: Schedule = 0.02
    max_step_percent: Schedule = 0.98
    grad_clip: Schedule = None
    half_precision_weights: bool = True
    enable_memory_efficient_attention: bool = True

    def __post_init__(self) -> None:
        one_of(
            "weighting_strategy",
            self.weighting_strategy,
            ("sds", "uniform", "fantasia3d"),
        )
        between("guidance_rescale", self.guidance_rescale, 0, 1)
        low, high = "min_step_percent", "max_step_percent"
        check_schedule(low, self.min_step_percent, 0, 1)
        check_schedule(high, self.max_step_percent, 0, 1)
        check_order(low, self.min_step_percent, high, self.max_step_percent)
        at_least("guidance_scale", self.guidance_scale, 0)
        if self.grad_clip is not None:
            check_schedule("grad_clip", self.grad_clip, 0)

    @property
    def scale(self) -> float:
        """Guidance scale s; 1 evaluates only the conditional model."""
        return self.guidance_scale


@dataclass(frozen=True)
class StableDiffusionConfig(GuidanceConfig):
    """The same in threestudio's convention: `guidance_scale` is s − 1; 0: none."""

    pretrained_model_name_or_path: str = "runwayml/stable-diffusion-v1-5"

    @property
    def scale(self) -> float:
        """Guidance scale s."""
        return self.guidance_scale + 1


@dataclass(frozen=True)
class DeepFloydConfig(StableDiffusionConfig):
    """threestudio's convention and its defaults for DeepFloyd IF."""

    pretrained_model_name_or_path: str = "DeepFloyd/IF-I-XL-v1.0"
    guidance_scale: float = 20.0


class ScoreDistillation(Guidance):
    """The SDS loss of images.

    Args:
        config: Settings of the guidance.
        prior: The diffusion model.
        words: Embeddings of `prompts.texts()`.
        prompts: The prompts, and the choice among them by view.
    """

    Config = GuidanceConfig

    @classmethod
    def load(
        cls, config: GuidanceConfig, prompts: PromptConfig, device: torch.device
    ) -> ScoreDistillation:
        """See `Guidance.load`."""
        prior, words = load(
            config.pretrained_model_name_or_path,
            prompts.texts(),
            prompts.negative_prompt,
            device,
            config.half_precision_weights,
        )
        return cls(config, prior, words, prompts)

    def __init__(
        self, config: GuidanceConfig, prior: Prior, words: Words, prompts: PromptConfig
    ) -> None:
        self.config = config
        self.prior = prior
        self.words = words
        self.prompts = prompts
        if not config.enable_memory_efficient_attention:
            prior.unet.set_default_attn_processor()

    def __call__(
        self,
        images: Float[Tensor, "views 3 height width"],
        cameras: Cameras,
        step: int,
        random: StepRandom,
    ) -> tuple[Float[Tensor, ""], Log]:
        """A loss whose gradient in the model's space is g over the number of views.

        Args:
            images: Rendered images in [0, 1].
            cameras: Cameras of the images.
            step: The step on the trajectory.
            random: Source of the timestep and the noise.

        Returns:
            The loss, half the sum of g² over the number of views, and scalars to log.
        """
        return self.several([Shown(images, cameras, step)], random)[0]

    def several(
        self, shown: Sequence[Shown], random: StepRandom
    ) -> list[tuple[Float[Tensor, ""], Log]]:
        """See `Guidance.several`: the model is called once for all views."""
        xs = self.prior.encode(
            [one.images for one in shown],
            [random.draws(one.step, "latent") for one in shown],
        )
        pairs = list(zip(xs, shown, strict=True))
        t = [self.timestep(x, one.step, random) for x, one in pairs]
        noise = [self.noise(x, one.step, random) for x, one in pairs]
        cameras = Cameras.joined([one.cameras for one in shown])
        with torch.no_grad():
            x = torch.cat(xs).detach()
            found = self.direction(x, cameras, torch.cat(t), torch.cat(noise))
        parts = found.split([len(x) for x in xs])
        return [
            self.loss(x, gradient, one, random)
            for (x, one), gradient in zip(pairs, parts, strict=True)
        ]

    def loss(
        self,
        x: Float[Tensor, "views channels rows columns"],
        gradient: Float[Tensor, "views channels rows columns"],
        shown: Shown,
        random: StepRandom,
    ) -> tuple[Float[Tensor, ""], Log]:
        """The loss of a step, and scalars to log.

        Args:
            x: Images in the model's space.
            gradient: The step's part of `direction`.
            shown: What the guidance is shown of the step.
            random: Source of further random numbers of the step.
        """
        del random
        with torch.no_grad():
            if self.config.grad_clip is not None:
                bound = value_at(self.config.grad_clip, shown.step)
                gradient = gradient.clamp(-bound, bound)
            target = x - gradient
        loss = 0.5 * (x - target).square().sum() / len(x)
        high = float(self.timesteps(shown.step)[1])
        return loss, {"grad_norm": gradient.norm(), "max_timestep": high}

    def direction(
        self, x: Tensor, cameras: Cameras, t: Tensor, noise: Tensor
    ) -> Float[Tensor, "views channels rows columns"]:
        """The gradient g in the model's space; what the relatives of SDS replace.

        Each view is treated by itself: views may be of several steps.

        Args:
            x: Images in the model's space.
            cameras: Cameras of the images.
            t: Timesteps, of shape ``(views,)``.
            noise: Noise, of the shape of x.
        """
        noisy = self.prior.add_noise(x, noise, t)
        return self.weight(t) * (self.predict(noisy, t, cameras) - noise)

    def predict(
        self, noisy: Tensor, t: Tensor, cameras: Cameras, scale: float | None = None
    ) -> Float[Tensor, "views channels rows columns"]:
        """The noise that the guided model predicts under the views' prompts.

        Args:
            noisy: $x_t$.
            t: Timesteps.
            cameras: Cameras of the images.
            scale: Guidance scale; default: the config's.
        """
        if self.prompts.use_perp_neg:
            return self._against_other_views(noisy, t, cameras, scale)
        return self.prior.noise(
            noisy,
            t,
            self.words.prompt_embeds[self.prompts.numbers(cameras)],
            self.words.negative_prompt_embeds,
            self.config.scale if scale is None else scale,
            self.config.guidance_rescale,
            self.prior.conditions(cameras),
        )

    def _against_other_views(
        self, noisy: Tensor, t: Tensor, cameras: Cameras, scale: float | None
    ) -> Float[Tensor, "views channels rows columns"]:
        """See `systems.guidance.perpendicular`.

        The scale is here the same in threestudio's convention and in diffusers'.
        """
        without = self.words.negative_prompt_embeds
        conditions = self.prior.conditions(cameras)

        def noise(words: Tensor) -> Tensor:
            return self.prior.noise(noisy, t, words, without, 1.0, 0.0, conditions)

        return perpendicular.guided(
            noise,
            self.words.prompt_embeds[: len(VIEWS)],
            self.blank(noisy, t, cameras),
            self.prompts,
            cameras,
            self.config.guidance_scale if scale is None else scale,
        )

    def blank(
        self, noisy: Tensor, t: Tensor, cameras: Cameras
    ) -> Float[Tensor, "views channels rows columns"]:
        """The noise predicted under the negative prompt, which is usually empty."""
        without = self.words.negative_prompt_embeds.expand(len(noisy), -1, -1)
        conditions = self.prior.conditions(cameras)
        return self.prior.noise(noisy, t, without, without, 1.0, 0.0, conditions)

    def timestep(self, x: Tensor, step: int, random: StepRandom) -> Tensor:
        """The timesteps of a step, one per view."""
        low, high = self.timesteps(step)
        drawn = random.draws(step, "timestep").randint(low, high + 1, len(x))
        return drawn.to(x.device)

    def noise(self, x: Tensor, step: int, random: StepRandom) -> Tensor:
        """The noise of a step."""
        return random.draws(step, "noise").randn(*x.shape).to(x)

    def timesteps(self, step: int) -> tuple[int, int]:
        """Smallest and largest timestep at a step."""
        count = self.prior.num_timesteps
        low, high = (
            min(int(value_at(share, step) * count), count - 1)
            for share in (self.config.min_step_percent, self.config.max_step_percent)
        )
        return max(0, min(low, high)), high

    def weight(self, t: Tensor) -> Tensor:
        """w(t), of shape ``(views, 1, 1, 1)``."""
        alpha, sigma = self.prior.scales(t)
        if self.config.weighting_strategy == "uniform":
            return torch.ones_like(alpha)
        weight = sigma.square()
        return (
            weight * alpha if self.config.weighting_strategy == "fantasia3d" else weight
        )


class StableDiffusionGuidance(ScoreDistillation):
    """SDS with threestudio's convention and defaults for Stable Diffusion."""

    Config = StableDiffusionConfig


class PerpendicularNegatives(ScoreDistillation):
    """SDS with `use_perp_neg`."""

    def __init__(
        self, config: GuidanceConfig, prior: Prior, words: Words, prompts: PromptConfig
    ) -> None:
        super().__init__(config, prior, words, replace(prompts, use_perp_neg=True))


class DeepFloydGuidance(ScoreDistillation):
    """SDS with threestudio's convention and defaults for DeepFloyd IF."""

    Config = DeepFloydConfig
