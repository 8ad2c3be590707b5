r"""Conditions of the second prior besides the text: camera and reference image.

A camera is a vector of sines and cosines of 1, 2 and 4 times the azimuth, elevation,
distance and field of view, centred and scaled on the training range. Two such vectors
reach the U-Net as class labels: one in world coordinates, for text, and one relative to
the camera of the reference image (differences of the angles, of the distance and of the
field of view), for images. Flags tell whether each of the two, and an image, are given,
because zeros are a camera too. The reference image uses additional input channels.

A sum of embeddings hardly tells what a camera shows of an object (docs/toybox.md), so
the U-Net also sees the rays of its pixels (as in CAT3D; R. Gao et al., 2024, arXiv
2405.10314, section 3.1): for each the point nearest to the centre of the scene and the
direction, in world coordinates, or in those of the reference image's camera.

Images have 64×64 pixels; the U-Net sees 2×2 blocks of them as channels, at 32×32
(pixel-unshuffle; W. Shi et al., 2016, arXiv 1609.05158).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from systems.scene.cameras import Cameras

PATCH = 2
"""Pixels per side of a block."""
CHANNELS = 3 * PATCH**2
CAMERA = 9
LABELS = 2 * (1 + CAMERA) + 1
"""Absolute flag and camera, relative flag and camera, image flag."""
RAYS = 6
"""Point and direction of a ray."""
INPUTS = 2 * CHANNELS + RAYS
"""Noisy image, reference image, rays."""
RANGE = {"elevation": (-10.0, 80.0), "distance": (2.1, 2.7), "fov": (45.0, 55.0)}
"""Training range of the cameras; the azimuth is free. Degrees, scene units, degrees."""


def camera_vector(cameras: Cameras) -> Float[Tensor, "views 9"]:
    """A camera in world coordinates."""
    middle = {name: (low + high) / 2 for name, (low, high) in RANGE.items()}
    return _vector(
        cameras.azimuth,
        cameras.elevation - middle["elevation"],
        cameras.distance - middle["distance"],
        cameras.fov - middle["fov"],
    )


def relative_vector(cameras: Cameras, reference: Cameras) -> Float[Tensor, "views 9"]:
    """A camera as seen from the camera of the reference image."""
    return _vector(
        cameras.azimuth - reference.azimuth,
        cameras.elevation - reference.elevation,
        cameras.distance - reference.distance,
        cameras.fov - reference.fov,
    )


def _vector(
    azimuth: Tensor, elevation: Tensor, distance: Tensor, fov: Tensor
) -> Tensor:
    half = {name: (high - low) / 2 for name, (low, high) in RANGE.items()}
    angle = azimuth.deg2rad()
    turns = [f(k * angle) for k in (1, 2, 4) for f in (torch.sin, torch.cos)]
    rest = [elevation / half["elevation"], distance / half["distance"]]
    return torch.stack([*turns, *rest, fov / half["fov"]], -1)


def labels(
    count: int,
    camera: Cameras | None = None,
    relative_to: Cameras | None = None,
    image: bool = False,
) -> Float[Tensor, "views 21"]:
    """Class labels of views.

    Args:
        count: Number of views.
        camera: Cameras of the views; None leaves them open.
        relative_to: The cameras of the reference image. With an image but without them,
            `camera` is in world coordinates.
        image: Whether a reference image is given.
    """
    result = torch.zeros(count, LABELS)
    if camera is not None and relative_to is None:
        result[:, 0] = 1
        result[:, 1 : 1 + CAMERA] = camera_vector(camera)
    if camera is not None and relative_to is not None:
        result[:, 1 + CAMERA] = 1
        result[:, 2 + CAMERA : -1] = relative_vector(camera, relative_to)
    result[:, -1] = float(image)
    return result


def cameras_of(labels: Float[Tensor, "views labels"]) -> Cameras:
    """The cameras that labels hold in world coordinates."""
    vector = labels[:, 1 : 1 + CAMERA]
    azimuth = torch.atan2(vector[:, 0], vector[:, 1]).rad2deg()
    rest = []
    for column, (low, high) in zip(vector[:, 6:].T, RANGE.values(), strict=True):
        rest.append((low + high) / 2 + (high - low) / 2 * column)
    return Cameras(azimuth, *rest)


def ray_maps(
    cameras: Cameras, side: int, relative_to: Cameras | None = None
) -> Float[Tensor, "views channels side side"]:
    """Nearest point to the centre and direction of the rays through blocks of pixels.

    Args:
        cameras: Cameras of the views.
        side: Blocks per side.
        relative_to: The cameras of the reference image, in whose coordinates (right,
            up, forward) the rays are given; None: in world coordinates.
    """
    origins, directions = cameras.rays(side)
    nearest = origins - (origins * directions).sum(-1, keepdim=True) * directions
    parts = [nearest, directions]
    if relative_to is not None:
        axes = torch.stack(relative_to.axes()[1:], -1)[:, None, None]
        parts = [(part[..., None, :] @ axes)[..., 0, :] for part in parts]
    return torch.cat(parts, -1).permute(0, 3, 1, 2)


def labelled_rays(
    labels: Float[Tensor, "views labels"], side: int
) -> Float[Tensor, "views channels side side"]:
    """The rays of labels' cameras in world coordinates; zeros where there is none."""
    return labels[:, :1, None, None] * ray_maps(cameras_of(labels.float()), side)


@dataclass(frozen=True)
class Conditions:
    """Camera and reference image of views, in the U-Net's format.

    Attributes:
        labels: See `labels`, shape ``(views, LABELS)``.
        reference: The reference image in blocks, shape ``(views, CHANNELS, side,
            side)``; None for none.
        rays: See `ray_maps`, shape ``(views, RAYS, side, side)``, relative to the
            reference image; None: those of the labels' camera in world coordinates.
    """

    labels: Float[Tensor, "views labels"]
    reference: Float[Tensor, "views channels side side"] | None
    rays: Float[Tensor, "views rays side side"] | None = None

    @classmethod
    def of(
        cls,
        count: int,
        side: int,
        camera: Cameras | None = None,
        image: Float[Tensor, "images 3 height width"] | None = None,
        image_camera: Cameras | None = None,
    ) -> Conditions:
        """Conditions of views.

        Args:
            count: Number of views.
            side: Width and height of the U-Net's input.
            camera: Cameras of the views, one or one per view; None leaves them open.
            image: Reference images from 0 to 1, one or one per view.
            image_camera: Cameras of the reference images, one or one per view;
                `camera` is then expressed relative to them.

        Raises:
            ValueError: The numbers of views differ, or `image_camera` is given without
                the others.
        """
        if image_camera is not None and (image is None or camera is None):
            raise ValueError(
                "`image_camera` is the camera of the reference image, and `camera` is "
                "taken relative to it: give `image` and `camera` too."
            )
        given = {"camera": camera, "image": image, "image_camera": image_camera}
        for name, value in given.items():
            if value is not None and len(value) not in (1, count):
                raise ValueError(
                    f"`{name}` holds {len(value)} views for {count} images: give one, "
                    "or one for each."
                )
        if camera is not None:
            warn_outside(camera)
        reference = None
        if image is not None:
            images = torch.nn.functional.interpolate(
                image.float(), (PATCH * side,) * 2, mode="bilinear", antialias=True
            )
            reference = to_blocks(images * 2 - 1).expand(count, -1, -1, -1)
        shown = max(len(c) for c in (camera, image_camera, [0]) if c is not None)
        numbers = labels(shown, camera, image_camera, image is not None)
        rays = None
        if camera is not None and image_camera is not None:
            rays = ray_maps(camera, side, image_camera).expand(count, -1, -1, -1)
        return cls(numbers.expand(count, LABELS), reference, rays)

    def without_image(self) -> Conditions:
        """Neither reference image nor relative camera; an absolute camera stays.

        The unconditional branch of guidance: text guidance keeps the camera.
        """
        kept = torch.zeros_like(self.labels)
        kept[:, : 1 + CAMERA] = self.labels[:, : 1 + CAMERA]
        return Conditions(kept, None)

    def beside(self, other: Conditions) -> Conditions:
        """These views, then others; a missing image among them is zeros."""
        both = (self, other)
        reference = rays = None
        like = next((c.reference for c in both if c.reference is not None), None)
        if like is not None:
            blank = like[:1] * 0
            reference = torch.cat(
                [
                    blank.expand(len(c.labels), -1, -1, -1)
                    if c.reference is None
                    else c.reference
                    for c in both
                ]
            )
        like = next((c.rays for c in both if c.rays is not None), None)
        if like is not None:
            side = like.shape[-1]
            rays = torch.cat(
                [
                    labelled_rays(c.labels, side) if c.rays is None else c.rays
                    for c in both
                ]
            )
        return Conditions(torch.cat([c.labels for c in both]), reference, rays)

    def beneath(self, x: Float[Tensor, "views channels side side"]) -> Tensor:
        """The U-Net's input: noisy images, the reference image and the rays."""
        parts = [x]
        if self.reference is not None:
            parts.append(self.reference.to(x))
        if self.rays is not None:  # relative to a reference, so there is one
            parts.append(self.rays.to(x))
        return torch.cat(parts, 1)


def takes_conditions(unet: Any) -> bool:
    """Whether a U-Net takes these conditions, by its configuration."""
    config = unet.config
    return (
        config.get("class_embed_type") == "projection"
        and config.get("projection_class_embeddings_input_dim") == LABELS
        and config.get("in_channels") == INPUTS
    )


def ask(
    unet: Any, x: Tensor, t: Tensor, words: Tensor, conditions: Conditions | None
) -> Tensor:
    """The U-Net's prediction for x, with conditions if it takes them."""
    if conditions is None:
        return unet(x, t, encoder_hidden_states=words).sample
    x = conditions.beneath(x)
    given = conditions.labels.to(x)
    return unet(x, t, encoder_hidden_states=words, class_labels=given).sample


def fill_missing_inputs(unet: Any) -> None:
    """Allow calls of a U-Net without the channels of reference image or rays.

    A missing reference is zeros; missing rays are those of the labels' camera in world
    coordinates. Samplers that record a U-Net's input, such as the parallel ones, see
    only the noisy image.
    """
    given: dict[str, Tensor | None] = {}

    def remember(module: Any, inputs: Any, named: dict[str, Any]) -> None:
        del module, inputs
        given["labels"] = named.get("class_labels")

    def fill(module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        del module
        x = inputs[0]
        if x.shape[1] < 2 * CHANNELS:
            x = torch.cat([x, torch.zeros_like(x)], 1)
        if x.shape[1] < INPUTS:
            labels = given["labels"]
            labels = x.new_zeros(len(x), LABELS) if labels is None else labels
            x = torch.cat([x, labelled_rays(labels, x.shape[-1]).to(x)], 1)
        return (x,)

    unet.register_forward_pre_hook(remember, with_kwargs=True)
    unet.conv_in.register_forward_pre_hook(fill)


def warn_outside(cameras: Cameras) -> None:
    """Warn about cameras outside the training range, naming the first violation."""
    for name, (low, high) in RANGE.items():
        values = getattr(cameras, name)
        least, most = float(values.min()), float(values.max())
        if least < low - 1e-3 or most > high + 1e-3:
            warnings.warn(
                f"The embedded prior was trained with cameras of {name} {low:g} to "
                f"{high:g}, and is asked for {least:g} to {most:g}: expect worse "
                "images there.",
                stacklevel=3,
            )
            return


def to_blocks(images: Tensor) -> Tensor:
    """Images ``(n, 3, 64, 64)`` as the U-Net's channels ``(n, 12, 32, 32)``."""
    return torch.nn.functional.pixel_unshuffle(images, PATCH)


def to_images(blocks: Tensor) -> Tensor:
    """The inverse of `to_blocks`."""
    return torch.nn.functional.pixel_shuffle(blocks, PATCH)
