r"""Growth of splats: split, clone, prune, and the reset of opacities.

Where the image keeps pulling a splat's centre around, it does too much for one splat.
With the mean of the centre's gradient over the times it was seen (half images per
pixel, so that the size of the image does not matter), splats above the threshold are
cloned if they are small and split in two if they are large; splats that are nearly
transparent or very large go (B. Kerbl et al., 2023, arXiv 2308.04079, section 5).

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
"""The halves of a split have its scales divided by this."""
STRATEGIES = ("densify", "relocate", "none")


@dataclass(frozen=True)
class GrowthConfig:
    r"""How splats grow (`system.densify`); defaults are DreamGaussian's.

    Args:
        strategy: "densify" splits, clones and prunes; "relocate" moves dead splats to
            living ones (`systems.scene.gaussians.relocation`); "none".
        start: Growth begins after this step.
        end: The last step at which it may happen.
        interval: Steps between two growths.
        reset_interval: Of "densify": steps between two resets of the opacities; 0:
            none.
        gradient_threshold: Mean gradient of a centre from which a splat grows.
        percent_dense: Share of `extent` up to which a splat counts as small.
        extent: Of the scene.
        min_opacity: Splats below are pruned, or dead.
        reset_opacity: What a reset leaves at most.
        max_scale: Share of `extent` above which a splat is pruned.
        max_screen_size: Share of the image above which a splat is pruned; null: none
            is. (DreamGaussian's code forgets the sizes just before it compares them.)
        rate: Of "relocate": by what factor the number of splats grows each time.
        noise: Of "relocate": of the noise on the means, in units of their learning
            rate.
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
    """Where the rows of a jump came from.

    Attributes:
        parents: The old row of each new one, int64.
        born: Whether it is new: what optimizers remember of its parent is not its own.
    """

    parents: Int[Tensor, " rows"]
    born: Bool[Tensor, " rows"]

    def take(self, value: Float[Tensor, "old ..."]) -> Float[Tensor, "rows ..."]:
        """What is kept for each row; that of the born is zero."""
        return take_rows(value, self.parents.masked_fill(self.born, -1))


def nothing_seen(splats: int, like: Tensor) -> State:
    """Statistics that count nothing yet, for so many splats."""
    return {
        name: torch.zeros(splats, dtype=like.dtype, device=like.device)
        for name in ("gradient", "count", "size")
    }


def seen(
    gradient: Float[Tensor, "views splats 2"],
    radii: Int[Tensor, "views splats 2"],
    height: int,
    width: int,
) -> State:
    """The statistics of one step.

    Args:
        gradient: Of the loss with respect to the centres in pixels, which is the mean
            over the views.
        radii: Half sides of the boxes in pixels, 0 for splats that are not seen.
        height: Of the images.
        width: Of the images.

    Returns:
        The sum over views of the gradient's norm, the number of views that saw the
        splat, and its largest size as a share of the image.
    """
    visible = (radii > 0).all(-1)
    scale = gradient.new_tensor([width / 2, height / 2]) * len(gradient)
    norms = (gradient * scale).norm(dim=-1)
    sizes = radii.amax(-1).to(gradient) / max(height, width)
    return {
        "gradient": torch.where(visible, norms, 0).sum(0),
        "count": visible.sum(0).to(gradient),
        "size": torch.where(visible, sizes, 0).amax(0),
    }


def counted(statistics: State, new: State) -> State:
    """Statistics with those of one more step."""
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
        statistics: What was seen since the last growth.
        config: The rules.
        max_splats: With more, those with the largest gradients alone grow.
        generator: Of the places of the halves, on the CPU.

    Returns:
        The new parameters, and where their rows came from: the ones that stayed, the
        clones, first and second halves.
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
    """Lower the opacities, so that splats have to prove themselves again."""
    most = math.log(config.reset_opacity / (1 - config.reset_opacity))
    return {**splats, "opacities": splats["opacities"].clamp(max=most)}
