"""Zero-1-to-3 models as noise predictors."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from systems.guidance.pipeline_files import UNREADABLE, no_progress_bars, reason
from systems.guidance.priors import ModelError, Prior
from systems.guidance.zero123_checkpoint import SUFFIXES, load_checkpoint
from systems.guidance.zero123_conditions import Zero123Conditions, camera_numbers
from systems.guidance.zero123_pipeline import PARTS, Zero123Pipeline
from systems.scene.cameras import Cameras

KINDS = ("zero123", "stable-zero123")
FILES: Mapping[str, str] = {
    "105000.ckpt": "cvlab/zero123-weights",
    "zero123-xl.ckpt": "cvlab/zero123-weights",
    "stable_zero123.ckpt": "stabilityai/stable-zero123",
}
"""Published checkpoints, and the repositories of the hub that hold them."""
_LAYOUT = ", ".join(f"`{part}/`" for part in (*PARTS, "scheduler"))
_KEPT = 8
"""Encodings that are kept; a run has one reference image, or one per given camera."""

Encoding: TypeAlias = tuple[Tensor, Tensor]
"""CLIP embeddings and latents of images."""


class Zero123Prior(Prior):
    """A frozen model of the views of an object, given images of it.

    Args:
        pipeline: The model.
        device: Device of the model; its weights keep their precision.
        kind: "zero123", or "stable-zero123", whose fourth camera number is the polar
            angle of the reference image instead of the difference of the distances.
    """

    def __init__(
        self, pipeline: Zero123Pipeline, device: torch.device, kind: str = "zero123"
    ) -> None:
        if kind not in KINDS:
            raise ValueError(
                f"There is no kind `{kind}` of Zero-1-to-3: write one of "
                f"{', '.join(f'`{name}`' for name in KINDS)}."
            )
        super().__init__(pipeline, device)
        for part in (pipeline.image_encoder, pipeline.clip_camera_projection):
            part.to(device).eval().requires_grad_(False)
        self.kind, self.pipeline = kind, pipeline
        self._kept: dict[str, Encoding] = {}
        self._shown: tuple[Encoding, Cameras] | None = None

    def show(
        self, images: Float[Tensor, "images colours height width"], cameras: Cameras
    ) -> None:
        """Set the reference images that `conditions` uses by default.

        Args:
            images: Square images in [0, 1], on white or with an alpha channel.
            cameras: Their cameras, one per image.
        """
        if len(images) != len(cameras):
            raise ValueError(
                f"{len(cameras)} cameras are given for {len(images)} reference images: "
                "give one for each."
            )
        self._shown = self._encode_once(images), cameras

    def conditions(
        self,
        cameras: Cameras,
        image: Float[Tensor, "images colours height width"] | None = None,
        image_camera: Cameras | None = None,
    ) -> Any:
        """Relative cameras and reference image, as `Zero123Conditions`.

        Args:
            cameras: Cameras of the views.
            image: Reference images in [0, 1]: one, or one per view. Without it, each
                view takes that of the images in `show` whose camera is nearest in
                angle.
            image_camera: Cameras of the reference images: one, or one per view.
        """
        count = len(cameras)
        if image is None and image_camera is None:
            if self._shown is None:
                raise ValueError(
                    "Zero-1-to-3 needs a reference image: give `image` and "
                    "`image_camera`, or set them by `show` first."
                )
            encoding, reference = self._shown
            chosen = nearest(cameras, reference)
        elif image is None or image_camera is None:
            raise ValueError(
                "Zero-1-to-3 takes cameras relative to that of the reference image: "
                "give both `image` and `image_camera`."
            )
        else:
            for name, value in (("image", image), ("image_camera", image_camera)):
                if len(value) not in (1, count):
                    raise ValueError(
                        f"`{name}` holds {len(value)} views for {count} images: give "
                        "one, or one for each."
                    )
            encoding, reference = self._encode_once(image), image_camera
            chosen = torch.arange(count)
        embeds, latents = (_rows(part, chosen) for part in encoding)
        numbers = self.camera_numbers(cameras, reference, chosen)
        return self.pipeline.conditions(embeds, latents, numbers.to(self.device))

    def camera_numbers(
        self, cameras: Cameras, reference: Cameras, chosen: Int[Tensor, " views"]
    ) -> Float[Tensor, "views 4"]:
        """The four numbers that the model takes of each view's camera.

        Args:
            cameras: Cameras of the views.
            reference: Cameras of the reference images.
            chosen: Index of each view's reference image; one camera is that of all.
        """
        elevation = _rows(reference.elevation, chosen)
        if self.kind == "stable-zero123":
            fourth = (90 - elevation).deg2rad()
        else:
            fourth = cameras.distance - _rows(reference.distance, chosen)
        return camera_numbers(
            elevation - cameras.elevation,  # the polar angle is 90° − elevation
            cameras.azimuth - _rows(reference.azimuth, chosen),
            fourth,
        )

    @torch.no_grad()
    def noise(
        self,
        noisy: Float[Tensor, "views channels rows columns"],
        t: Int[Tensor, " views"],
        words: Tensor | None = None,
        without: Tensor | None = None,
        guidance_scale: float = 1.0,
        guidance_rescale: float = 0.0,
        conditions: Any = None,
    ) -> Float[Tensor, "views channels rows columns"]:
        """See `Prior.noise`; there are no prompts, so `words` and `without` are unused.

        Args:
            noisy: $x_t$.
            t: Timesteps.
            words: Unused.
            without: Unused.
            guidance_scale: As published, in the equation of `Prior.noise`.
            guidance_rescale: From 0 (off) to 1.
            conditions: `Zero123Conditions`; None: the unconditional model.
        """
        del words, without
        if conditions is None:
            conditions, guidance_scale = self._blank(noisy), 1.0
        model_output = self.pipeline.guided_output(
            noisy, t, conditions, guidance_scale, guidance_rescale
        )
        return self.to_noise(model_output, noisy, t)

    def output(
        self,
        noisy: Tensor,
        t: Tensor,
        words: Tensor | None = None,
        conditions: Any = None,
    ) -> Float[Tensor, "views channels rows columns"]:
        """See `Prior.output`; `words` is unused."""
        del words
        given = self._blank(noisy) if conditions is None else conditions
        return self.pipeline.output(noisy, t, given)

    def _blank(self, noisy: Tensor) -> Zero123Conditions:
        width = self.unet.config["cross_attention_dim"]
        zeros = torch.zeros(len(noisy), 1, width, device=self.device, dtype=self.dtype)
        return Zero123Conditions(zeros, torch.zeros_like(noisy, dtype=self.dtype))

    def _encode_once(self, images: Tensor) -> Encoding:
        """The encoding of images, kept by their content: a drift does not repeat it."""
        data = images.detach().float().cpu().contiguous()
        key = hashlib.sha256(f"{tuple(data.shape)}".encode())
        key.update(data.numpy().tobytes())
        name = key.hexdigest()
        if name not in self._kept:
            while len(self._kept) >= _KEPT:
                self._kept.pop(next(iter(self._kept)))
            self._kept[name] = self.pipeline.encode_reference(images)
        return self._kept[name]


def _rows(values: Tensor, chosen: Tensor) -> Tensor:
    """The chosen rows; a single one is that of all."""
    index = torch.zeros_like(chosen) if len(values) == 1 else chosen
    return values[index.to(values.device)]


def nearest(cameras: Cameras, reference: Cameras) -> Int[Tensor, " views"]:
    """Index of the reference camera nearest in angle to each camera."""

    def directions(some: Cameras) -> Tensor:
        around, above = some.azimuth.deg2rad(), some.elevation.deg2rad()
        flat = above.cos()
        return torch.stack([flat * around.cos(), flat * around.sin(), above.sin()], -1)

    return (directions(cameras) @ directions(reference).T).argmax(-1)


def load_zero123(
    name: str, device: torch.device, half: bool = True, kind: str | None = None
) -> Zero123Prior:
    """Load a Zero-1-to-3 model.

    Args:
        name: A folder in diffusers' layout, a checkpoint file (``.safetensors`` or
            ``.ckpt``), or a model on the hub in diffusers' layout.
        device: Device of the model.
        half: Use half precision on a GPU; the CPU always uses single precision.
        kind: See `Zero123Prior`; default: "stable-zero123" if the name holds "stable".

    Raises:
        ModelError: The model is unavailable.
    """
    dtype = torch.float16 if half and device.type == "cuda" else torch.float32
    if kind is None:
        kind = KINDS["stable" in Path(name).name.lower()]
    path = Path(name).expanduser()
    if path.is_file():
        return Zero123Prior(load_checkpoint(path, dtype), device, kind)
    if not path.is_dir():
        _check_name(name)
    elif missing := [
        part for part in (*PARTS, "scheduler") if not (path / part).is_dir()
    ]:
        raise ModelError(
            f"`{name}` has no folder `{missing[0]}/`: a Zero-1-to-3 model in "
            f"diffusers' layout has {_LAYOUT}. Write the path of one, of a checkpoint "
            f"file ({', '.join(SUFFIXES)}), or `ashawkey/zero123-xl-diffusers`."
        )
    source = str(path) if path.is_dir() else name
    quiet = no_progress_bars() if path.is_dir() else contextlib.nullcontext()
    try:
        with quiet:
            pipeline = Zero123Pipeline.from_pretrained(source, dtype)
            return Zero123Prior(pipeline, device, kind)
    except ModelError:
        raise
    except UNREADABLE as error:
        raise ModelError(
            f"The model `{name}` cannot be loaded: {reason(error)} A Zero-1-to-3 model "
            f"in diffusers' layout has {_LAYOUT}; write the path of such a folder or "
            "of a checkpoint file, or check name, network and licence on the hub."
        ) from error


def _check_name(name: str) -> None:
    """Refuse a name that is neither there nor one of the hub."""
    file = Path(name).name
    if Path(name).suffix in SUFFIXES or name.startswith((".", "/", "~")):
        home = FILES.get(file)
        get = (
            f" `{home}` on the hub has it: `hf download {home} {file}`." if home else ""
        )
        raise ModelError(
            f"There is no `{name}`.{get} Write the path of a Zero-1-to-3 checkpoint or "
            "folder, or a model on the hub such as `ashawkey/zero123-xl-diffusers`."
        )
    if name.count("/") != 1:
        raise ModelError(
            f"There is no folder `{name}`. Write the path of a Zero-1-to-3 checkpoint "
            "or folder, or a model on the hub such as `ashawkey/zero123-xl-diffusers`."
        )
    if name in FILES.values():
        files = " or ".join(f"`{key}`" for key, home in FILES.items() if home == name)
        raise ModelError(
            f"`{name}` holds checkpoint files, no folder in diffusers' layout: "
            f"download one (`hf download {name} <file>`; {files}) and write its path."
        )
