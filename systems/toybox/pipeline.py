r"""The embedded priors as a text-to-image diffusers pipeline.

Sampling is DDIM with classifier-free guidance: the velocity is

$$\hat v = v(x_t, \varnothing) + s\,\bigl(v(x_t, c) - v(x_t, \varnothing)\bigr)$$

at guidance scale $s$ (J. Ho and T. Salimans, 2022, arXiv 2207.12598); 1 is the plain
conditional model. In pixel space a larger scale drives colours out of range, so the
result is rescaled to the standard deviation of the conditional velocity,

$$\hat v \leftarrow \phi\,\hat v\, \frac{\operatorname{std} v(x_t, c)}
  {\operatorname{std} \hat v} + (1 - \phi)\,\hat v$$

with $\phi = 0.7$ (S. Lin et al., 2023, arXiv 2305.08891, Eqs. 14 to 16). Images are
made in pixel space, so there is no autoencoder. The second prior can also be
conditioned on the camera and a reference image (`systems.toybox.conditions`); the
branch $\varnothing$ then has neither text nor image, and keeps the camera.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from transformers import CLIPTextModel, PreTrainedTokenizerFast

from dreampropeller.adapters.diffusers.guidance import guided
from systems.extras import dtype_argument
from systems.scene.cameras import Cameras
from systems.toybox import WEIGHTS
from systems.toybox.captions import Known
from systems.toybox.conditions import (
    Conditions,
    ask,
    fill_missing_inputs,
    takes_conditions,
    to_images,
)
from systems.toybox.model import MAX_WORDS
from systems.toybox.reader import read

GUIDANCE_RESCALE = 0.7


class ToyboxPipeline(DiffusionPipeline):
    """A text-conditioned diffusion model of small images.

    The first prior makes 32×32 pixels from words; the second one 64×64 from words, a
    camera and a reference image. Its parts are plain diffusers and transformers
    classes, so that each also loads by itself:
    ``UNet2DConditionModel.from_pretrained(WEIGHTS, subfolder="unet")``.

    Args:
        unet: U-Net that predicts the velocity.
        text_encoder: Encoder of the prompt.
        tokenizer: Tokenizer with one token per word.
        scheduler: Noise schedule and sampler.

    Example:
        >>> pipeline = ToyboxPipeline.from_pretrained(WEIGHTS)
        >>> noise = torch.Generator().manual_seed(0)
        >>> image = pipeline("a red mushroom, front view", generator=noise).images[0]
    """

    unet: UNet2DConditionModel
    text_encoder: CLIPTextModel
    tokenizer: PreTrainedTokenizerFast
    scheduler: DDIMScheduler

    def __init__(
        self,
        unet: UNet2DConditionModel,
        text_encoder: CLIPTextModel,
        tokenizer: PreTrainedTokenizerFast,
        scheduler: DDIMScheduler,
    ) -> None:
        super().__init__()
        self.register_modules(
            unet=unet,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            scheduler=scheduler,
        )
        if takes_conditions(unet):
            fill_missing_inputs(unet)

    @property
    def known(self) -> Known:
        """The vocabulary of the prior."""
        return Known.of_words(self.tokenizer.get_vocab())

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Embed prompts; the empty one is the unconditional embedding.

        Returns:
            Embeddings, shape ``(prompts, MAX_WORDS, channels)``.

        Raises:
            ValueError: A prompt cannot be read; see `systems.toybox.reader`.
        """
        known = self.known
        captions = [read(prompt, known).text for prompt in prompts]
        tokens = self.tokenizer(
            captions, padding="max_length", max_length=MAX_WORDS
        ).input_ids
        ids = torch.tensor(tokens, device=self.text_encoder.device)
        return self.text_encoder(ids).last_hidden_state

    def encode_prompt(
        self,
        prompt: str | Sequence[str],
        device: torch.device | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Embed prompts as diffusers' own pipelines do.

        Args:
            prompt: One prompt, or several.
            device: Device of the embeddings; default: that of the encoder.
            num_images_per_prompt: Number of repetitions of each embedding.
            do_classifier_free_guidance: Embed the negative prompt too.
            negative_prompt: Default: the empty one.

        Returns:
            Embeddings of the prompts and of as many negative prompts, or None for
            these.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        count = num_images_per_prompt
        words = self.encode(prompts).repeat_interleave(count, 0).to(device)
        if not do_classifier_free_guidance:
            return words, None
        blank = self.encode([negative_prompt or ""]).to(device)
        return words, blank.expand_as(words)

    @torch.no_grad()
    def velocity(
        self,
        x: Tensor,
        timestep: Tensor,
        words: Tensor,
        blank: Tensor,
        scale: float,
        rescale: float = GUIDANCE_RESCALE,
        conditions: Conditions | None = None,
    ) -> Tensor:
        r"""The guided velocity of noisy images.

        Args:
            x: Noisy images in the model's space, shape ``(batch, channels, h, w)``.
            timestep: A scalar, or one per image.
            words: prompt_embeds, shape ``(batch, MAX_WORDS, channels)``.
            blank: Embedding of the empty prompt, of the same shape or of one prompt.
            scale: Guidance scale; 1 evaluates only the conditional model.
            rescale: $\phi$ above, from 0 (off) to 1.
            conditions: Camera and image, for the second prior; default: none.
        """
        if conditions is None:
            conditions = self.conditions(len(x))
        if scale == 1:
            return ask(self.unet, x, timestep, words, conditions)
        both = torch.cat([blank.expand_as(words), words])
        t = timestep.expand(len(x)).repeat(2)
        if conditions is not None:
            conditions = conditions.without_image().beside(conditions)
        model_output = ask(self.unet, torch.cat([x, x]), t, both, conditions)
        without, given = model_output.chunk(2)
        return guided(without, given, scale, rescale)

    def conditions(
        self,
        count: int,
        camera: Cameras | None = None,
        image: Any = None,
        image_camera: Cameras | None = None,
    ) -> Conditions | None:
        """Camera and image in the U-Net's format; None for the first prior.

        Raises:
            ValueError: A camera or an image is given to the first prior.
        """
        if takes_conditions(self.unet):
            if image is not None:
                processor = VaeImageProcessor(do_resize=False, do_normalize=False)
                image = processor.preprocess(image)
            side = self.unet.config["sample_size"]
            return Conditions.of(count, side, camera, image, image_camera)
        for name, value in (("camera", camera), ("image", image)):
            if value is not None:
                raise ValueError(
                    f"This prior takes no `{name}`: the second one does, "
                    "`systems.toybox.pipeline.load(SECOND_WEIGHTS)`."
                )
        return None

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        num_inference_steps: int = 25,
        guidance_scale: float = 3.0,
        negative_prompt: str | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        guidance_rescale: float = GUIDANCE_RESCALE,
        camera: Cameras | None = None,
        image: Any = None,
        image_camera: Cameras | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        r"""Sample an image of each prompt.

        Args:
            prompt: One prompt, or several.
            num_inference_steps: Number of denoising steps.
            guidance_scale: Guidance scale; 1: only the conditional model; 3 is a good
                value.
            negative_prompt: Description of what to avoid; default: the empty prompt.
            num_images_per_prompt: Images per prompt.
            eta: Noise of DDIM, from 0 (none) to 1 (as much as DDPM).
            generator: Source of the noise: one for all images, or one per image.
            latents: Initial noise, in the model's space: shape ``(images, 3,
                32, 32)`` for the first prior, ``(images, 12, 32, 32)`` for the second.
            output_type: "pil", "np" (``(images, size, size, 3)``, 0 to 1), "pt"
                (``(images, 3, size, size)``, 0 to 1) or "latent" (the model's space, −1
                to 1).
            return_dict: Return an object with `images`, or a tuple.
            guidance_rescale: $\phi$ above, from 0 (off) to 1.
            camera: The second prior's cameras, one or one per image.
            image: Reference images for the second prior, one or one per image.
            image_camera: The cameras of the reference images; `camera` is then taken
                relative to them. Without it `camera` is in world coordinates.

        Raises:
            ValueError: A prompt cannot be read, or the prior takes no such condition.
        """
        words, blank = self.encode_prompt(
            prompt, None, num_images_per_prompt, True, negative_prompt
        )
        assert blank is not None
        conditions = self.conditions(len(words), camera, image, image_camera)
        scheduler: Any = self.scheduler
        scheduler.set_timesteps(num_inference_steps)
        if latents is None:
            size = self.unet.config["sample_size"]
            shape = (len(words), self.unet.config["out_channels"], size, size)
            latents = randn_tensor(shape, generator, words.device, words.dtype)
        x = latents * scheduler.init_noise_sigma
        known = inspect.signature(scheduler.step).parameters
        extra: Any = {"eta": eta, "generator": generator}
        extra = {name: value for name, value in extra.items() if name in known}
        progress_bar: Any = self.progress_bar
        with progress_bar(total=num_inference_steps) as bar:
            for t in scheduler.timesteps:
                v = self.velocity(
                    x,
                    t.to(x.device),
                    words,
                    blank,
                    guidance_scale,
                    guidance_rescale,
                    conditions,
                )
                x = scheduler.step(v, t, x, **extra, return_dict=False)[0]
                bar.update()
        if conditions is not None and output_type != "latent":
            x = to_images(x)
        processor = VaeImageProcessor()
        images: Any = processor.postprocess(x, output_type=output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)


def draw(
    pipeline: ToyboxPipeline, prompts: Sequence[str], seed: int, **settings: Any
) -> Tensor:
    """Images of prompts from a seed, 0 to 1, shape ``(prompts, 3, size, size)``."""
    noise = torch.Generator().manual_seed(seed)
    kind = "pt"
    made = pipeline(list(prompts), generator=noise, output_type=kind, **settings)
    assert isinstance(made, ImagePipelineOutput)
    assert isinstance(made.images, Tensor)
    return made.images.float().cpu()


def load(folder: Path = WEIGHTS) -> ToyboxPipeline:
    """An embedded prior in single precision, ready on the CPU.

    Raises:
        ValueError: The folder holds no pipeline.
    """
    if not (folder / "model_index.json").exists():
        raise ValueError(
            f"`{folder}` holds no pipeline (no `model_index.json`). Make one with "
            "`python -m systems.toybox train`."
        )
    pipeline = ToyboxPipeline.from_pretrained(folder, **dtype_argument(torch.float32))
    pipeline.unet.eval()
    pipeline.text_encoder.eval()
    return pipeline
