r"""Growth by relocation: dead splats are moved to the positions of living ones.

When a splat of opacity o becomes n splats at one place, the light along a ray stays
about the same with

$$o' = 1 - (1 - o)^{1 / n}, \qquad
  \Sigma' = \Bigl(\frac{o}{\sum_{i = 1}^{n} \sum_{k = 0}^{i - 1} \binom{i - 1}{k}
    \frac{(-1)^k o'^{k + 1}}{\sqrt{k + 1}}}\Bigr)^2 \Sigma ,$$

and splats explore by noise on their means, larger the more transparent they are
(S. Kheradmand et al., 2024, arXiv 2404.09591, Eqs. 9 and 10).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dreampropeller.tree import State
from systems.scene.gaussians.growth import GrowthConfig, Rows
from systems.scene.gaussians.shapes import covariances

MOST = 51
"""Largest number of splats counted at one position."""
SHARPNESS, TRANSPARENT = 100.0, 0.995
"""Of the logistic curve from opaque splats, which do not move, to transparent ones."""


def shared(
    opacities: Float[Tensor, " splats"], count: Int[Tensor, " splats"]
) -> tuple[Float[Tensor, " splats"], Float[Tensor, " splats"]]:
    """Opacity and change of scale of each of several splats that replace one.

    Args:
        opacities: Opacities of the replaced splats, from 0 to 1.
        count: Number of splats that replace each.

    Returns:
        The opacities, and factors of the scales.
    """
    count = count.clamp(1, MOST)
    old = opacities.double()
    new = 1 - (1 - old) ** (1 / count.double())
    total = torch.zeros_like(old)
    # Σ_i C(i − 1, k) over i = 1 … n is C(n, k + 1), which leaves one sum.
    for k in range(int(count.max()) if len(count) else 0):
        ways = [float(math.comb(n, k + 1)) for n in count.tolist()]
        term = new ** (k + 1) * (-1) ** k / math.sqrt(k + 1)
        total += term * torch.tensor(ways, dtype=torch.float64).to(total)
    return new.to(opacities), (old / total).to(opacities)


def relocate(
    splats: State,
    config: GrowthConfig,
    max_splats: int,
    generator: torch.Generator,
) -> tuple[State, Rows]:
    """Move dead splats, and add a fraction of new ones.

    Args:
        splats: The parameters by name.
        config: Settings of the growth.
        max_splats: Limit of the number of splats.
        generator: Source of the choice of target splats, drawn by opacity; on the CPU.

    Returns:
        The new parameters, and the origin of their rows. All rows that share a
        position, the original one included, count as born, because their moments are
        those of another splat.
    """
    opacities = splats["opacities"].sigmoid()
    count = len(opacities)
    dead = opacities <= config.min_opacity
    dead[opacities.argmax()] = False
    alive = (~dead).nonzero()[:, 0]
    added = max(0, min(max_splats, int(config.rate * count)) - count)
    wanted = int(dead.sum()) + added
    parents = torch.arange(count + added, device=opacities.device)
    born = torch.zeros_like(parents, dtype=torch.bool)
    grown = {name: value[parents % count] for name, value in splats.items()}
    if wanted == 0:
        return grown, Rows(parents, born)
    odds = opacities[alive].cpu()
    drawn = torch.multinomial(odds, wanted, replacement=True, generator=generator)
    joined = alive[drawn.to(alive.device)]
    places = torch.cat([dead.nonzero()[:, 0], parents[count:]])
    parents[places] = joined
    born[places] = born[joined] = True
    sharing = torch.bincount(joined, minlength=count) + 1
    hosts = sharing.gt(1).nonzero()[:, 0]
    low, eps = config.min_opacity, torch.finfo(opacities.dtype).eps
    new, factor = shared(opacities[hosts], sharing[hosts])
    splats = {**splats, "opacities": splats["opacities"].clone()}
    splats["scales"] = splats["scales"].clone()
    splats["opacities"][hosts] = new.clamp(low, 1 - eps).logit()
    splats["scales"][hosts] += factor.log()[:, None]
    grown = {name: value[parents] for name, value in splats.items()}
    return grown, Rows(parents, born)


def explored(
    splats: State, amount: float, generator: torch.Generator
) -> Float[Tensor, "splats 3"]:
    """The means after a step of noise.

    Args:
        splats: The parameters by name.
        amount: Standard deviation of the noise before it is shaped like the splat.
        generator: On the CPU.
    """
    means, opacities = splats["means"], splats["opacities"].sigmoid()
    drawn = torch.randn(means.shape, generator=generator).to(means)
    loose = torch.sigmoid(SHARPNESS * (1 - opacities - TRANSPARENT))
    shape = covariances(splats["scales"], splats["quats"])
    moved = shape @ (amount * loose[:, None] * drawn)[..., None]
    return means + moved[..., 0]
