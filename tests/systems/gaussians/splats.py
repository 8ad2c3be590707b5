"""Random splats and cameras that several tests look at."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from systems.scene.cameras import Cameras, Views
from systems.scene.renderers.splats import Pinhole, rasterize


@dataclass(frozen=True)
class Splats:
    means: Tensor
    scales: Tensor
    quats: Tensor
    logits: Tensor
    colours: Tensor
    camera: Pinhole

    def render(self, *leaves: Tensor) -> tuple[Tensor, Tensor]:
        """Images and opacity, of other leaves if there are any."""
        means, scales, quats, logits, colours = leaves or self.leaves
        return rasterize(means, scales, quats, logits.sigmoid(), colours, self.camera)[
            :2
        ]

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return self.means, self.scales, self.quats, self.logits, self.colours


def around(count: int, height: int, width: int) -> Views:
    number = torch.arange(count)
    cameras = Cameras(
        azimuth=number * 360 / count + 10,
        elevation=20.0 + 7 * number,
        distance=2.4 - 0.2 * number,
        fov=50.0 - 3 * number,
    )
    return Views(cameras, cameras.axes()[0], height, width)


def random_splats(
    count: int,
    height: int = 40,
    width: int = 24,
    views: int = 2,
    dtype: torch.dtype = torch.float64,
    size: float = -2.2,
) -> Splats:
    """Splats in a ball: opaque and faint, round and long, near the margin too."""
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    means = 0.4 * normal(count, 3)
    return Splats(
        means=means,
        scales=size + 0.6 * normal(count, 3),
        quats=normal(count, 4),
        logits=2 * normal(count),
        colours=torch.rand(views, count, 3, generator=generator, dtype=dtype),
        camera=Pinhole.of(around(views, height, width), means),
    )
