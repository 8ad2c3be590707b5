r"""What Zero-1-to-3 is given: a reference image and a relative camera.

The image is of 256×256 pixels, on white. The camera is

$$(\Delta\theta,\ \sin\Delta\phi,\ \cos\Delta\phi,\ r)$$

with the difference of the polar angles $\Delta\theta$ in radians (the polar angle is
90° minus the elevation), that of the azimuths $\Delta\phi$, and a fourth number: the
difference of the distances, or, for Stable Zero123, the polar angle of the reference
image in radians.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import interpolate

CAMERA_NUMBERS = 4
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""Mean and standard deviation of CLIP's input, per colour."""


@dataclass(frozen=True)
class Zero123Conditions:
    """Camera and reference image of views, in the U-Net's format.

    Attributes:
        embeds: The mapped CLIP embedding and camera, shape ``(views, 1, width)``.
        latents: The unscaled latent of the reference image, shape ``(views, channels,
            rows, columns)``.
    """

    embeds: Float[Tensor, "views one width"]
    latents: Float[Tensor, "views channels rows columns"]

    def without_image(self) -> Zero123Conditions:
        """The conditions of the unconditional branch: zeros."""
        return Zero123Conditions(
            torch.zeros_like(self.embeds), torch.zeros_like(self.latents)
        )

    def beside(self, other: Zero123Conditions) -> Zero123Conditions:
        """These views, then others."""
        return Zero123Conditions(
            torch.cat([self.embeds, other.embeds]),
            torch.cat([self.latents, other.latents]),
        )


def camera_numbers(
    polar: Float[Tensor, " views"],
    azimuth: Float[Tensor, " views"],
    fourth: Float[Tensor, " views"],
) -> Float[Tensor, "views 4"]:
    """The relative camera as published.

    Args:
        polar: Differences of the polar angles, degrees.
        azimuth: Differences of the azimuths, degrees.
        fourth: Differences of the distances; for Stable Zero123 the polar angle of the
            reference image in radians.
    """
    around = azimuth.deg2rad()
    return torch.stack([polar.deg2rad(), around.sin(), around.cos(), fourth], -1)


def fit(
    images: Float[Tensor, "images colours height width"], side: int
) -> Float[Tensor, "images 3 side side"]:
    """Reference images at the model's size, on white where they have an alpha channel.

    Larger images are averaged over the area of each pixel.

    Args:
        images: Square images in [0, 1] with 1 (grey), 3 or 4 (with alpha) channels.
        side: Width and height of the result.

    Raises:
        ValueError: The images are not square, or have another number of channels.
    """
    _, colours, height, width = images.shape
    if height != width or colours not in (1, 3, 4):
        raise ValueError(
            f"A reference image has {colours} channels and {height}×{width} pixels: "
            "give a square one with 1, 3 or 4 channels, the object in its middle."
        )
    if colours == 4:  # before resizing: hidden colours must not bleed in
        alpha = images[:, 3:]
        images = images[:, :3] * alpha + (1 - alpha)
    if height > side:
        edges = torch.arange(side + 1, device=images.device) * (height / side)
        begin = torch.arange(height, device=images.device)
        end = edges[1:, None].minimum(begin + 1)
        share = (end - edges[:-1, None].maximum(begin)).clamp(min=0) * (side / height)
        images = share @ images @ share.T
    elif height < side:
        images = interpolate(images, (side, side), mode="bilinear")
    return images.expand(-1, 3, -1, -1)


def clip_input(
    images: Float[Tensor, "images 3 height width"], side: int
) -> Float[Tensor, "images 3 side side"]:
    """Images in [0, 1] as CLIP sees them; bicubic from corner to corner, as published.

    The published model does not filter before it samples, and neither does this.
    """
    x = interpolate(images, (side, side), mode="bicubic", align_corners=True)
    mean, std = x.new_tensor(MEAN), x.new_tensor(STD)
    return (x - mean[:, None, None]) / std[:, None, None]
