"""What the reference views of a step are compared with."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from systems.references.depth import correlation, depth_error
from systems.references.reference import Reference
from systems.scene.renderers import Rendering


class Goal:
    """Reference images, and a depth map of the first of them.

    Args:
        images: The images.
        depth: The depth map, from 0 to 1; None: there is none.
        device: Device of the renderings.
    """

    def __init__(
        self,
        images: Sequence[Reference],
        depth: Float[Tensor, "height width"] | None,
        device: torch.device,
    ) -> None:
        self._images = images
        self._depth = depth
        self._device = device
        self._sized: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    @property
    def digest(self) -> str:
        """A mark of all pixels, wherever their files are."""
        mark = hashlib.sha256()
        for image in self._images:
            mark.update(image.rgb.numpy().tobytes())
            mark.update(image.alpha.numpy().tobytes())
        if self._depth is not None:
            mark.update(self._depth.numpy().tobytes())
        return mark.hexdigest()

    def terms(
        self, seen: Rendering, behind: Float[Tensor, "views height width 3"]
    ) -> dict[str, Float[Tensor, ""]]:
        """The terms of the loss by the names of their weights.

        "depth" and "depth_rel" are left out without a depth map, and where the object
        covers less than two pixels.

        Args:
            seen: The reference views, without light.
            behind: Colours behind their pixels.
        """
        height, width = seen.opacity.shape[1:3]
        rgb, alpha = self._at(height, width)
        # Both over the scene's background: what is left of it cancels.
        error = seen.foreground - alpha * rgb + (alpha - seen.opacity) * behind
        found = {
            "rgb": error.square().mean(),
            "mask": (seen.opacity - alpha).square().mean(),
        }
        inside = alpha[:1] > 0.5
        if self._depth is None or inside.sum() < 2:
            return found
        assert seen.depth is not None, "refused for renderers without depth"
        sized = torch.nn.functional.interpolate(
            self._depth[None, None], (height, width), mode="area"
        )
        given = sized.permute(0, 2, 3, 1).to(self._device)[inside]
        depth = seen.depth[:1][inside]
        found["depth"] = depth_error(depth, given)
        found["depth_rel"] = 1 - correlation(depth, given)
        return found

    def _at(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Colours and masks of the images, ``(views, height, width, channels)``."""
        if (height, width) not in self._sized:
            sized = [image.resized(height, width) for image in self._images]
            rgb = torch.stack([one.rgb for one in sized]).permute(0, 2, 3, 1)
            alpha = torch.stack([one.alpha for one in sized]).permute(0, 2, 3, 1)
            self._sized[height, width] = rgb.to(self._device), alpha.to(self._device)
        return self._sized[height, width]
