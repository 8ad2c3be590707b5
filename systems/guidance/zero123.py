r"""Score distillation under an image: Zero-1-to-3.

$$g = w(t)\,\bigl(\hat\epsilon(x_t, t, I, c) - \epsilon\bigr), \qquad
  \hat\epsilon = \epsilon(\varnothing) + s\,(\epsilon(I, c) - \epsilon(\varnothing)),$$

with the reference image I and the camera c of the view relative to that of the image
(R. Liu et al., 2023, arXiv 2303.11328). The unconditional branch has neither. With
several images, each view is guided by the one whose camera is nearest.

An embedded prior can instead be told what the toybox's classifier reads in the image,
in words and as the azimuth of its camera: it knows words and cameras far better than
images (docs/images.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from systems.guidance.pipeline_files import read_json
from systems.guidance.priors import (
    ALIASES,
    ModelError,
    Prior,
    Words,
    is_embedded,
    load,
)
from systems.guidance.prompts import PromptConfig
from systems.guidance.sds import GuidanceConfig, ScoreDistillation
from systems.guidance.zero123_prior import Zero123Prior, load_zero123, nearest
from systems.references import Reference
from systems.scene.cameras import Cameras
from systems.settings.notes import note
from systems.settings.schedules import Schedule
from systems.toybox.classifier import SECOND_FILE
from systems.toybox.classifier import load as load_classifier
from systems.toybox.conditions import to_images
from systems.toybox.recognition import Recognised, classifier_of, recognise

IMAGE_SIZE = 64
"""Pixels per side of what the second classifier reads."""


@dataclass(frozen=True)
class Zero123Config(GuidanceConfig):
    """Guidance by an image (`system.guidance` in a config).

    Args:
        pretrained_model_name_or_path: Diffusion model that takes an image and a camera:
            "toybox2", the folder of such an embedded prior, a hub model or local folder
            of the Zero-1-to-3 pipeline, or a checkpoint of the published layout.
        cond_image_path: The image; null: that of `data`. The next three likewise.
        cond_elevation_deg: Elevation of the image's camera in degrees.
        cond_azimuth_deg: Azimuth of the image's camera in degrees.
        cond_camera_distance: Distance of the image's camera from the origin.
        condition: What the model is given: "image", or "caption", what the toybox's
            classifier reads in the first image (of an embedded prior only).
    """

    guidance_scale: float = 5.0
    half_precision_weights: bool = False
    min_step_percent: Schedule = 0.02
    max_step_percent: Schedule = 0.98
    cond_image_path: str | None = None
    cond_elevation_deg: float | None = None
    cond_azimuth_deg: float | None = None
    cond_camera_distance: float | None = None
    condition: Literal["image", "caption"] = "image"


class Zero123Guidance(ScoreDistillation):
    """Score distillation from a model that is shown an image.

    Args:
        config: Settings of the guidance.
        prior: The diffusion model.
        words: Embedded prompt; empty where the image says all.
        prompts: The prompt.
        images: The reference images.
        cameras: Their cameras.
        turned: Degrees to add to the azimuth of views for the world coordinates of the
            embedded prior, if it is told a caption.
    """

    Config = Zero123Config
    config: Zero123Config
    kind: ClassVar[str] = "zero123"
    """Kind of a model of the hub; see `Zero123Prior`."""

    @classmethod
    def of_images(
        cls,
        config: Zero123Config,
        prompts: PromptConfig,
        images: list[Reference],
        cameras: Cameras,
        device: torch.device,
    ) -> Zero123Guidance:
        """Load the model; arguments as above.

        Raises:
            ModelError: The model is unavailable, or takes no image.
        """
        name = config.pretrained_model_name_or_path
        half = config.half_precision_weights
        named = config.condition == "caption"
        if not is_embedded(name):
            if named:
                raise ModelError(
                    f"`condition: caption` is for embedded priors, and `{name}` is "
                    "none: write `condition: image`."
                )
            prior: Prior = load_zero123(name, device, half, cls.kind)
            none = torch.zeros(1, 1, 1, device=device)
            return cls(config, prior, Words(none, none), prompts, images, cameras)
        turned = 0.0
        if named:
            seen = read_image(images[0], name)
            if seen.azimuth is not None:
                turned = seen.azimuth - float(cameras.azimuth[0])
            if not prompts.prompt:
                prompts = replace(prompts, prompt=seen.caption.text)
        negative = prompts.negative_prompt
        prior, words = load(name, prompts.texts(), negative, device, half)
        return cls(config, prior, words, prompts, images, cameras, turned)

    def __init__(
        self,
        config: Zero123Config,
        prior: Prior,
        words: Words,
        prompts: PromptConfig,
        images: list[Reference],
        cameras: Cameras,
        turned: float = 0.0,
    ) -> None:
        super().__init__(config, prior, words, prompts)
        sized = [image.resized(prior.side, prior.side) for image in images]
        self._rgb = torch.stack([image.rgb for image in sized])
        self._alpha = torch.stack([image.alpha for image in sized])
        self._cameras = cameras
        self._turned = turned
        if isinstance(prior, Zero123Prior):
            white = torch.stack([image.over(1.0) for image in sized])
            prior.show(white, cameras)

    def direction(
        self, x: Tensor, cameras: Cameras, t: Tensor, noise: Tensor
    ) -> Float[Tensor, "views channels rows columns"]:
        """See `ScoreDistillation.direction`."""
        predicted = self.prior.noise(
            self.prior.add_noise(x, noise, t),
            t,
            self.words.prompt_embeds.expand(len(x), -1, -1),
            self.words.negative_prompt_embeds,
            self.config.scale,
            self.config.guidance_rescale,
            self.conditions(x, cameras),
        )
        return self.weight(t) * (predicted - noise)

    def conditions(
        self, x: Float[Tensor, "views channels rows columns"], cameras: Cameras
    ) -> Any:
        """Reference image and relative camera of each view, in the model's format.

        An embedded prior was trained with the same background in both images: that of
        the reference image is the colour in the corners of the view.

        Args:
            x: The views in the model's space.
            cameras: Their cameras.
        """
        if isinstance(self.prior, Zero123Prior):
            return self.prior.conditions(cameras)
        if self.config.condition == "caption":
            turned = cameras.azimuth + self._turned
            return self.prior.conditions(replace(cameras, azimuth=turned))
        chosen = nearest(cameras, self._cameras)
        corners = to_images(x)[:, :, :: self.prior.side - 1, :: self.prior.side - 1]
        behind = (corners.flatten(2).median(-1).values.cpu() + 1) / 2
        alpha = self._alpha[chosen]
        images = alpha * self._rgb[chosen] + (1 - alpha) * behind[:, :, None, None]
        return self.prior.conditions(cameras, images, self._cameras.chosen(chosen))


def check_takes_images(name: str) -> None:
    """Refuse an embedded prior that takes no image, before it is loaded.

    Raises:
        ModelError: Says what to write instead.
    """
    file = Path(ALIASES.get(name, name)) / "unet" / "config.json"
    try:
        config = read_json(file)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"`{name}` is damaged, its `unet/config.json` cannot be read: {error}. "
            "Save the prior again, or write `toybox2`."
        ) from error
    if config.get("class_embed_type") != "projection":
        raise ModelError(
            f"`{name}` is an embedded prior that takes no image: write `toybox2`, or "
            "the folder of a model that does."
        )


def read_image(image: Reference, model: str) -> Recognised:
    """What the toybox's classifier reads in an image; printed.

    Args:
        image: The image.
        model: Name or folder of the embedded prior.

    Raises:
        ModelError: There is no classifier.
    """
    folder = Path(ALIASES.get(model, model))
    file = classifier_of(folder, SECOND_FILE)
    if file is None:
        raise ModelError(
            f"`condition: caption` needs the second classifier, and `{folder}` has no "
            "`classifier/model.safetensors`: train it with `python -m systems.toybox "
            "classifier`, or write `condition: image`."
        )
    sized = image.resized(IMAGE_SIZE, IMAGE_SIZE)
    seen = recognise(sized.rgb, sized.alpha, load_classifier(file))
    around = "" if seen.azimuth is None else f", seen from {seen.azimuth:.0f}°"
    doubt = "" if seen.sure else " (unsure: say it as `system.prompt_processor.prompt`)"
    note(f"the image is read as `{seen.caption.text}`{around}{doubt}.")
    return seen


class StableZero123Guidance(Zero123Guidance):
    """The same with a model that also sees the elevation of the image."""

    kind = "stable-zero123"


IMAGE_GUIDANCES: Mapping[str, type[Zero123Guidance]] = {
    "zero123-guidance": Zero123Guidance,
    "stable-zero123-guidance": StableZero123Guidance,
}
"""By their names in configs, which are threestudio's."""
