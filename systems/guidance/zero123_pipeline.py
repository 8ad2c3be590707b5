r"""Zero-1-to-3 as a diffusers pipeline: a new view of the object in one image.

A Stable Diffusion whose U-Net sees the reference image twice: the mode of its latent,
unscaled, as four more input channels, and its CLIP embedding $e$ as the only token of
cross-attention, after a linear map of it and of the relative camera (R. Liu et al.,
2023, arXiv 2303.11328):

$$c = W\,[e,\ \Delta\theta,\ \sin\Delta\phi,\ \cos\Delta\phi,\ r] + b$$

with four numbers of the camera; see `camera_numbers`. The unconditional branch sees
zeros in both places.

Folders have the layout of the converted models on the hub, such as
``ashawkey/zero123-xl-diffusers``. diffusers has no such class, and those repositories
name a module that is not installed, so each part is loaded by its own class.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.utils.torch_utils import randn_tensor
from jaxtyping import Float
from torch import Tensor
from transformers import CLIPVisionModelWithProjection

from dreampropeller.adapters.diffusers.guidance import guided
from systems.extras import dtype_argument
from systems.guidance.pipeline_files import check_schedule
from systems.guidance.priors import ModelError
from systems.guidance.zero123_conditions import (
    CAMERA_NUMBERS,
    Zero123Conditions,
    camera_numbers,
    clip_input,
    fit,
)


class CLIPCameraProjection(ModelMixin, ConfigMixin):
    """The linear map of CLIP embedding and camera; the names are those of the hub.

    Args:
        embedding_dim: Width of the embedding, and of the result.
        additional_embeddings: Number of camera numbers.
    """

    @register_to_config
    def __init__(
        self, embedding_dim: int = 768, additional_embeddings: int = CAMERA_NUMBERS
    ) -> None:
        super().__init__()
        self.proj = torch.nn.Linear(
            embedding_dim + additional_embeddings, embedding_dim
        )

    def forward(self, embedding: Tensor) -> Tensor:
        """Map embeddings followed by camera numbers, in the last dimension."""
        return self.proj(embedding)


PARTS: Mapping[str, Any] = {
    "vae": AutoencoderKL,
    "image_encoder": CLIPVisionModelWithProjection,
    "unet": UNet2DConditionModel,
    "clip_camera_projection": CLIPCameraProjection,
}
"""The parts with weights, by the names of their folders."""


class Zero123Pipeline(DiffusionPipeline):
    """A diffusion model of views of an object, given one image of it.

    Args:
        vae: Autoencoder of the latents.
        image_encoder: CLIP's image encoder.
        unet: U-Net whose input is the noisy latent, then that of the reference image.
        scheduler: Noise schedule and sampler.
        clip_camera_projection: The linear map of embedding and camera.

    Raises:
        ModelError: The parts do not fit each other.

    Example:
        >>> pipeline = Zero123Pipeline.from_pretrained("ashawkey/zero123-xl-diffusers")
        >>> image = pipeline(open_image(Path("mug.png")), azimuth=90.0).images[0]
    """

    vae: Any
    image_encoder: Any
    unet: Any
    scheduler: Any
    clip_camera_projection: Any

    def __init__(
        self,
        vae: AutoencoderKL,
        image_encoder: CLIPVisionModelWithProjection,
        unet: UNet2DConditionModel,
        scheduler: DDIMScheduler,
        clip_camera_projection: CLIPCameraProjection,
    ) -> None:
        super().__init__()
        latent = vae.config["latent_channels"]
        width = clip_camera_projection.config["embedding_dim"]
        numbers = clip_camera_projection.config["additional_embeddings"]
        wanted = {
            "input channels of the U-Net": (unet.config["in_channels"], 2 * latent),
            "output channels of the U-Net": (unet.config["out_channels"], latent),
            "width of the U-Net's cross-attention": (
                unet.config["cross_attention_dim"],
                width,
            ),
            "width of CLIP's embedding": (image_encoder.config.projection_dim, width),
            "number of camera numbers": (numbers, CAMERA_NUMBERS),
        }
        for name, (found, needed) in wanted.items():
            if found != needed:
                raise ModelError(
                    f"This is no Zero-1-to-3 model: the {name} is {found} where "
                    f"{needed} is needed. Write the folder of a Zero-1-to-3 model, or "
                    "`ashawkey/zero123-xl-diffusers`."
                )
        self.register_modules(
            vae=vae,
            image_encoder=image_encoder,
            unet=unet,
            scheduler=scheduler,
            clip_camera_projection=clip_camera_projection,
        )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> Zero123Pipeline:
        """Load the parts from a folder or the hub.

        Pickled weights are read with torch's `weights_only`.

        Args:
            pretrained_model_name_or_path: A folder, or a name on the hub.
            dtype: Type of the weights.
            options: Further options of each part, such as `local_files_only`.

        Raises:
            OSError: A part is missing or unreadable.
            ModelError: A part lacks weights, or the parts do not fit each other.
            ValueError: The schedule cannot be used.
        """
        source = str(pretrained_model_name_or_path)
        parts: dict[str, Any] = {}
        for name, kind in PARTS.items():
            precision = dtype_argument(dtype) if issubclass(kind, ModelMixin) else {}
            loaded: Any = kind.from_pretrained(
                source,
                subfolder=name,
                output_loading_info=True,
                **precision,
                **options,
            )
            part, info = loaded
            missing = sorted(info["missing_keys"])
            if missing:
                raise ModelError(
                    f"`{name}` lacks {len(missing)} of its weights, `{missing[0]}` "
                    "among them: download the model again."
                )
            parts[name] = part if precision else part.to(dtype)
        config: Any = DDIMScheduler.load_config(
            source, subfolder="scheduler", **options
        )
        check_schedule(config)
        parts["scheduler"] = DDIMScheduler.from_pretrained(
            source, subfolder="scheduler", **options
        )
        return cls(**parts)

    @property
    def side(self) -> int:
        """Width and height of the images in pixels."""
        levels = len(self.vae.config["block_out_channels"])
        return self.unet.config["sample_size"] * 2 ** (levels - 1)

    @torch.no_grad()
    def encode_reference(
        self, images: Float[Tensor, "images colours height width"]
    ) -> tuple[Tensor, Tensor]:
        """CLIP embeddings and latents of reference images.

        Args:
            images: Images in [0, 1]; see `fit`.

        Returns:
            Embeddings, shape ``(images, width)``, and unscaled modes of the latents,
            shape ``(images, channels, rows, columns)``.
        """
        x = fit(images.float(), self.side).to(self.unet.device)
        seen = clip_input(x, self.image_encoder.config.image_size)
        embeds = self.image_encoder(seen.to(self.unet.dtype)).image_embeds
        latents = self.vae.encode((2 * x - 1).to(self.unet.dtype)).latent_dist.mode()
        return embeds, latents

    @torch.no_grad()
    def conditions(
        self,
        embeds: Float[Tensor, "views width"],
        latents: Float[Tensor, "views channels rows columns"],
        camera: Float[Tensor, "views 4"],
    ) -> Zero123Conditions:
        """Conditions of views; see `encode_reference` and `camera_numbers`."""
        both = torch.cat([embeds, camera.to(embeds)], -1)
        return Zero123Conditions(self.clip_camera_projection(both[:, None]), latents)

    def output(
        self, noisy: Tensor, t: Tensor, conditions: Zero123Conditions
    ) -> Float[Tensor, "views channels rows columns"]:
        """The U-Net's output for noisy latents, differentiable."""
        x = torch.cat([noisy.to(self.unet.dtype), conditions.latents], 1)
        return self.unet(x, t, encoder_hidden_states=conditions.embeds).sample.to(noisy)

    @torch.no_grad()
    def guided_output(
        self,
        noisy: Float[Tensor, "views channels rows columns"],
        t: Tensor,
        conditions: Zero123Conditions,
        scale: float,
        rescale: float = 0.0,
    ) -> Float[Tensor, "views channels rows columns"]:
        """The output with classifier-free guidance; see `guided`.

        Args:
            noisy: Noisy latents.
            t: Timesteps, one per view.
            conditions: Conditions of the views.
            scale: Guidance scale; 1 evaluates only the conditional model.
            rescale: From 0 (off) to 1.
        """
        if scale == 1:
            return self.output(noisy, t, conditions)
        both = conditions.without_image().beside(conditions)
        result = self.output(torch.cat([noisy, noisy]), torch.cat([t, t]), both)
        plain, given = result.chunk(2)
        return guided(plain, given, scale, rescale)

    @torch.no_grad()
    def __call__(
        self,
        image: Any,
        polar: float = 0.0,
        azimuth: float = 0.0,
        distance: float = 0.0,
        num_inference_steps: int = 50,
        guidance_scale: float = 3.0,
        eta: float = 1.0,
        generator: torch.Generator | None = None,
        output_type: str = "pil",
    ) -> ImagePipelineOutput:
        """Sample new views of an object with DDIM.

        Args:
            image: One square image of the object or several, as Pillow images (with or
                without alpha) or as a tensor from 0 to 1.
            polar: Polar angle of the new view minus that of the image, degrees; 30
                looks from 30° further down.
            azimuth: Azimuth of the new view minus that of the image, degrees.
            distance: Difference of the distances; for Stable Zero123 the polar angle of
                the image in radians.
            num_inference_steps: Number of steps.
            guidance_scale: Scale of classifier-free guidance; 1: none.
            eta: From 0 (deterministic) to 1.
            generator: Source of the noise.
            output_type: "pil", "np" or "pt".
        """
        processor = VaeImageProcessor(do_resize=False, do_normalize=False)
        embeds, latents = self.encode_reference(processor.preprocess(image))
        one = embeds.new_ones(len(embeds), dtype=torch.float32)
        camera = camera_numbers(polar * one, azimuth * one, distance * one)
        conditions = self.conditions(embeds, latents, camera)
        self.scheduler.set_timesteps(num_inference_steps, device=latents.device)
        x = randn_tensor(
            latents.shape, generator, device=latents.device, dtype=torch.float32
        )
        x = x * self.scheduler.init_noise_sigma
        progress: Any = self.progress_bar
        for t in progress(self.scheduler.timesteps):
            found = self.guided_output(x, t.expand(len(x)), conditions, guidance_scale)
            x = self.scheduler.step(found, t, x, eta=eta, generator=generator)[0]
        x = (x / self.vae.config["scaling_factor"]).to(self.vae.dtype)
        decoded = self.vae.decode(x).sample.float()
        result: Any = VaeImageProcessor().postprocess(decoded, output_type=output_type)
        return ImagePipelineOutput(images=result)
