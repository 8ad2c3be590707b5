r"""Splats as a density in space, for the mesh.

$$d(x) = \sum_i o_i\, e^{-\frac12 (x - \mu_i)^\top \Sigma_i^{-1} (x - \mu_i)}, \qquad
  c(x) = \frac1{d(x)} \sum_i o_i\, e^{\dots}\, c_i$$

(J. Tang et al., 2023, arXiv 2309.16653, section 3.3). Space is cut into blocks; a point
queries the splats whose box of 3.33 standard deviations meets its block, and in a block
the exponents are one matrix product.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from dreampropeller.tree import State
from systems.scene.gaussians.harmonics import Y0
from systems.scene.gaussians.shapes import axes

EXTENT = 3.33
FAINT = 0.005
"""Opacity below which a splat is ignored, as in DreamGaussian."""
BLOCKS = 16
"""Blocks along the longest side of the points' box."""


class Density:
    """Density and colour of splats at points, without gradients.

    Args:
        splats: The parameters by name.
    """

    @torch.no_grad()
    def __init__(self, splats: State) -> None:
        opacities = splats["opacities"].sigmoid()
        kept = opacities >= FAINT
        self._means = splats["means"][kept]
        self._opacities = opacities[kept]
        scales, quats = splats["scales"][kept], splats["quats"][kept]
        inverse = axes(-scales, quats)
        self._precisions = inverse @ inverse.mT
        half = axes(scales, quats)
        self._reach = EXTENT * half.square().sum(-1).sqrt()
        self._colours = (Y0 * splats["sh0"][kept, 0] + 0.5).clamp(0, 1)

    @property
    def box(self) -> tuple[Float[Tensor, " 3"], Float[Tensor, " 3"]]:
        """The corners of the bounding box of all visible splats."""
        if not len(self._means):
            return torch.zeros(3), torch.zeros(3)
        low = (self._means - self._reach).amin(0)
        return low, (self._means + self._reach).amax(0)

    @torch.no_grad()
    def __call__(
        self, points: Float[Tensor, "points 3"]
    ) -> tuple[Float[Tensor, " points"], Float[Tensor, "points 3"]]:
        """Density and colour; black where there is no splat."""
        found = torch.zeros(len(points), 4, device=points.device)
        if not len(points) or not len(self._means):
            return found[:, 0], found[:, 1:]
        low = points.amin(0)
        side = float((points.amax(0) - low).amax().clamp(min=1e-6)) * 1.0001 / BLOCKS
        cells = ((points - low) / side).long()
        number = (cells[:, 0] * BLOCKS + cells[:, 1]) * BLOCKS + cells[:, 2]
        order = number.argsort(stable=True)
        numbers, counts = number[order].unique_consecutive(return_counts=True)
        for chosen in order.split(counts.tolist()):
            found[chosen] = self._block(points[chosen])
        del numbers
        density = found[:, 0]
        return density, found[:, 1:] / density.clamp(min=1e-12)[:, None]

    def _block(self, points: Tensor) -> Float[Tensor, "points 4"]:
        low, high = points.amin(0), points.amax(0)
        near = (self._means + self._reach >= low) & (self._means - self._reach <= high)
        near = near.all(-1).nonzero()[:, 0]
        if not len(near):
            return points.new_zeros(len(points), 4)
        middle = (low + high) / 2
        x, y, z = (points - middle).unbind(-1)
        one = torch.ones_like(x)
        monomials = torch.stack(
            [x * x, y * y, z * z, x * y, x * z, y * z, x, y, z, one], -1
        )
        means, p = self._means[near] - middle, self._precisions[near]
        linear = (p @ means[..., None])[..., 0]
        constant = (linear * means).sum(-1)
        rows = [-p[:, i, i] / 2 for i in range(3)]
        rows += [-p[:, 0, 1], -p[:, 0, 2], -p[:, 1, 2]]
        rows += [*linear.unbind(-1), -constant / 2]
        exponents = torch.stack(rows, -1)
        painted = torch.cat([one.new_ones(len(near), 1), self._colours[near]], -1)
        painted = painted * self._opacities[near, None]
        weights = [
            # Below, exponentials are denormal, which is slow and negligible.
            (part @ exponents.T).clamp(-20, 0).exp() @ painted
            for part in monomials.split(4096)
        ]
        return torch.cat(weights)
