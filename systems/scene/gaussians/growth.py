r"""Growth of splats: split, clone, prune, and the reset of opacities.

A splat whose centre has a large gradient covers too much of the image. With the mean of
the centre's gradient over the views that saw it (half images per pixel, so that the
size of the image does not matter), splats above the threshold are cloned if they are
small and split in two if they are large. Splats that are nearly transparent or very
large are pruned (B. Kerbl et al., 2023, arXiv 2308.04079, section 5).

Here a growth is a *jump* of the trajectory: it returns the row that each new row came
from, and whether it was born. Everything kept for each row follows this map.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dreampropeller.tree import State, take_rows
from systems.scene.gaussians.shapes import axes
from systems.settings.checks import at_least, one_of

SHRINK = 1.6
"""Divisor of the scales of the halves of a split."""
STRATEGIES = ("densify", "relocate", "none")


@dataclass(frozen=True)
class GrowthConfig:
    r"""How splats grow (`system.densify`); defaults are DreamGaussian's.

    Args:
        strategy: "densify" splits, clones and prunes; "relocate" moves dead splats to
            living ones (`systems.scene.gaussians.relocation`); "none".
        start: Step after which growth begins.
        end: Last step at which splats may grow.
        interval: Number of steps between two growths.
        reset_interval: For "densify": number of steps between two resets of the
            opacities; 0: no resets.
        gradient_threshold: Mean gradient of a centre above which a splat grows.
        percent_dense: Fraction of `extent` up to which a splat counts as small.
        extent: Extent of the scene.
        min_opacity: Opacity below which a splat is pruned, or counts as dead.
        reset_opacity: Largest opacity after a reset.
        max_scale: Fraction of `extent` above which a splat is pruned.
        max_screen_size: Fraction of the image above which a splat is pruned; null: no
            limit. (DreamGaussian's code clears the sizes just before comparing them.)
        rate: For "relocate": factor of the number of splats per growth.
        noise: For "relocate": noise on the means, in units of their learning rate.
    """

    strategy: str = "densify"
    start: int = 0
    end: int = 3000
    interval: int = 50
    reset_interval: int = 700
    gradient_threshold: float = 0.01
    percent_dense: float = 0.01
    extent: float = 4.0
    min_opacity: float = 0.01
    reset_opacity: float = 0.01
    max_scale: float = 0.1
    max_screen_size: float | None = None
    rate: float = 1.05
    noise: float = 5e5

    def __post_init__(self) -> None:
        one_of("strategy", self.strategy, STRATEGIES)
        at_least("interval", self.interval, 1)
        for name in (
            *("start", "end", "reset_interval", "gradient_threshold", "percent_dense"),
            *("extent", "max_scale", "noise"),
        ):
            at_least(name, getattr(self, name), 0)
        at_least("rate", self.rate, 1)
        for name in ("min_opacity", "reset_opacity"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(
                    f"`{name}` is {getattr(self, name)}: write a number between 0 and "
                    "1."
                )
        if self.max_screen_size is not None:
            at_least("max_screen_size", self.max_screen_size, 0)

    def grows(self, step: int) -> bool:
        """Whether rows change before this step."""
        if self.strategy == "none" or step <= 0:
            return False
        return self.start < step <= self.end and step % self.interval == 0

    def resets(self, step: int) -> bool:
        """Whether opacities are reset before this step."""
        if self.strategy != "densify" or step <= 0 or not self.reset_interval:
            return False
        return self.start < step <= self.end and step % self.reset_interval == 0


@dataclass(frozen=True)
class Rows:
    """The origin of the rows of a jump.

    Attributes:
        parents: Old row of each new row, int64.
        born: Whether the row is new, so that it does not inherit the optimizer's memory
            of its parent.
    """

    parents: Int[Tensor, " rows"]
    born: Bool[Tensor, " rows"]

    def take(self, value: Float[Tensor, "old ..."]) -> Float[Tensor, "rows ..."]:
        """Map values kept per row; those of born rows are zero."""
        return take_rows(value, self.parents.masked_fill(self.born, -1))


def nothing_seen(splats: int, like: Tensor) -> State:
    """Empty statistics for a number of splats."""
    return {
        name: torch.zeros(splats, dtype=like.dtype, device=like.device)
        for name in ("gradient", "count", "size")
    }


def seen(
    gradient: Float[Tensor, "views splats 2"],
    radii: Int[Tensor, "views splats 2"],
    height: int,
    width: int,
    total: int | None = None,
) -> State:
    """The statistics of one step, or of some of its views.

    Args:
        gradient: Gradient of the loss, a mean over the views, with respect to the
            centres in pixels.
        radii: Half sides of the boxes in pixels, 0 for splats that are not seen.
        height: Height of the images in pixels.
        width: Width of the images in pixels.
        total: Number of views of the step; default: those that are here.

    Returns:
        The sum over views of the gradient's norm, the number of views that saw the
        splat, and its largest size as a share of the image.
    """
    visible = (radii > 0).all(-1)
    scale = gradient.new_tensor([width / 2, height / 2]) * (total or len(gradient))
    norms = (gradient * scale).norm(dim=-1)
    sizes = radii.amax(-1).to(gradient) / max(height, width)
    return {
        "gradient": torch.where(visible, norms, 0).sum(0),
        "count": visible.sum(0).to(gradient),
        "size": torch.where(visible, sizes, 0).amax(0),
    }


def counted(statistics: State, new: State) -> State:
    """Add the statistics of one more step."""
    return {
        "gradient": statistics["gradient"] + new["gradient"],
        "count": statistics["count"] + new["count"],
        "size": torch.maximum(statistics["size"], new["size"]),
    }


def densify(
    splats: State,
    statistics: State,
    config: GrowthConfig,
    max_splats: int,
    generator: torch.Generator,
) -> tuple[State, Rows]:
    """Clone, split and prune.

    Args:
        splats: The parameters by name.
        statistics: Statistics since the last growth.
        config: Settings of the growth.
        max_splats: Limit of the number of splats; near it only those with the largest
            gradients grow.
        generator: Source of the positions of the halves, on the CPU.

    Returns:
        The new parameters, and the origin of their rows: those that stayed, the clones,
        first and second halves.
    """
    mean = statistics["gradient"] / statistics["count"].clamp(min=1)
    size = splats["scales"].exp().amax(-1)
    chosen = mean >= config.gradient_threshold
    spare = max(0, max_splats - len(mean))
    if int(chosen.sum()) > spare:
        best = torch.where(chosen, mean, -1).argsort(descending=True, stable=True)
        chosen = torch.zeros_like(chosen)
        chosen[best[:spare]] = True
    small = size <= config.percent_dense * config.extent
    clone = (chosen & small).nonzero()[:, 0]
    split = (chosen & ~small).nonzero()[:, 0]
    stay = (~(chosen & ~small)).nonzero()[:, 0]
    parents = torch.cat([stay, clone, split, split])
    grown = {name: value[parents] for name, value in splats.items()}
    halves = slice(len(parents) - 2 * len(split), len(parents))
    drawn = torch.randn(2, len(split), 3, generator=generator).to(size)
    half = axes(splats["scales"][split], splats["quats"][split])
    places = torch.einsum("nij,bnj->bni", half, drawn).flatten(0, 1)
    grown["means"][halves] += places
    grown["scales"][halves] -= math.log(SHRINK)
    born = torch.arange(len(parents), device=size.device) >= len(stay)
    keep = ~_hopeless(grown, statistics["size"][parents], config)
    return (
        {name: value[keep] for name, value in grown.items()},
        Rows(parents[keep], born[keep]),
    )


def _hopeless(splats: State, sizes: Tensor, config: GrowthConfig) -> Tensor:
    """Which splats are pruned; never the most opaque one."""
    gone = splats["opacities"].sigmoid() < config.min_opacity
    gone |= splats["scales"].exp().amax(-1) > config.max_scale * config.extent
    if config.max_screen_size is not None:
        gone |= sizes > config.max_screen_size
    gone[splats["opacities"].argmax()] = False
    return gone


def reset_opacities(splats: State, config: GrowthConfig) -> State:
    """Lower the opacities, so that unneeded splats can be pruned."""
    most = math.log(config.reset_opacity / (1 - config.reset_opacity))
    return {**splats, "opacities": splats["opacities"].clamp(max=most)}
