r"""Splats as parameters, initialised as a ball or from a file.

A splat has a mean, a rotation (quaternion w, x, y, z), logarithms of three scales, the
logit of its opacity, and spherical harmonics of its colour. All are rows of tensors,
which growth adds and removes.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dreampropeller.tree import State
from systems.scene.gaussians import ply
from systems.scene.gaussians.harmonics import MAX_DEGREE, num_coefficients
from systems.settings.checks import at_least, one_of

NAMES = ("means", "scales", "quats", "opacities", "sh0", "shN")
"""The parameters, by gsplat's names; `shN` is there for degrees above 0 only."""
NEIGHBOURS = 3
"""Number of neighbours whose mean distance is the size of a new splat."""
COPIES = 12
"""What a run keeps of each splat at least: parameters, moments, a window's states."""


@dataclass(frozen=True)
class GaussianConfig:
    """Splats (``gaussian-splatting``).

    Args:
        initial: Ply file of the initial splats, in the layout of 3DGS; null: a ball of
            new splats.
        num_splats: Number of splats in the ball.
        radius: Radius of the ball.
        sh_degree: Degree of the colour's harmonics, from 0 (the same from all
            directions) to 3; null: the file's, or 0.
        opacity: Opacity of new splats.
        max_splats: Largest number of splats; a file with more is refused.
        isosurface_threshold: Density at the surface of the mesh; "auto" chooses it by
            the silhouettes of the splats. (DreamGaussian's is 1.)
        isosurface_resolution: Grid points per side of the mesh's cube.
        max_faces: Number of faces that the mesh is simplified to; 0: no
            simplification.
    """

    initial: str | None = None
    num_splats: int = 5000
    radius: float = 0.5
    sh_degree: int | None = None
    opacity: float = 0.1
    max_splats: int = 1_000_000
    isosurface_threshold: float | str = "auto"
    isosurface_resolution: int = 128
    max_faces: int = 100_000

    def __post_init__(self) -> None:
        at_least("num_splats", self.num_splats, NEIGHBOURS + 1)
        at_least("max_splats", self.max_splats, 1)
        at_least("isosurface_resolution", self.isosurface_resolution, 8)
        at_least("max_faces", self.max_faces, 0)
        if isinstance(self.isosurface_threshold, str):
            one_of(
                "isosurface_threshold", self.isosurface_threshold, ("auto", "a number")
            )
        if not self.radius > 0:
            raise ValueError(f"`radius` is {self.radius}: write a number above 0.")
        if not 0 < self.opacity < 1:
            raise ValueError(
                f"`opacity` is {self.opacity}: write a number between 0 and 1."
            )
        if self.sh_degree is not None and not 0 <= self.sh_degree <= MAX_DEGREE:
            raise ValueError(
                f"`sh_degree` is {self.sh_degree}: write 0, 1, 2 or 3, or null for the "
                "file's."
            )
        if self.initial is None and self.num_splats > self.max_splats:
            raise ValueError(
                f"`num_splats` is {self.num_splats} and `max_splats` "
                f"{self.max_splats}: write `num_splats={self.max_splats}`, or raise "
                "`max_splats`."
            )


class Gaussians(nn.Module):
    """The parameters of splats.

    Args:
        config: Initial splats. A ball is drawn from torch's global generator.

    Raises:
        ValueError: The file cannot be used, or the splats do not fit into memory.
    """

    Config = GaussianConfig

    means: nn.Parameter
    scales: nn.Parameter
    quats: nn.Parameter
    opacities: nn.Parameter
    sh0: nn.Parameter

    def __init__(self, config: GaussianConfig) -> None:
        super().__init__()
        self.config = config
        if config.initial is None:
            check_memory(config.num_splats, config.sh_degree or 0)
            made = ball(
                config.num_splats, config.radius, config.opacity, config.sh_degree or 0
            )
        else:
            made = _of_file(Path(config.initial), config)
        for name, value in made.items():
            self.register_parameter(name, nn.Parameter(value))

    @property
    def harmonics(self) -> Float[Tensor, "splats coefficients 3"]:
        """All coefficients of the colours."""
        more = getattr(self, "shN", None)
        return self.sh0 if more is None else torch.cat([self.sh0, more], 1)


def ball(
    count: int, radius: float, opacity: float, degree: int
) -> dict[str, Float[Tensor, "splats ..."]]:
    """Grey splats, uniform in a ball, sized by the distance of their neighbours.

    Args:
        count: Number of splats.
        radius: Radius of the ball.
        opacity: Opacity of each splat.
        degree: Degree of the harmonics.
    """
    directions = torch.nn.functional.normalize(torch.randn(count, 3), dim=-1)
    means = directions * radius * torch.rand(count, 1) ** (1 / 3)
    spacing = neighbour_distance(means).clamp(min=1e-7**0.5)
    quats = torch.zeros(count, 4)
    quats[:, 0] = 1
    made = {
        "means": means,
        "scales": spacing.log()[:, None].repeat(1, 3),
        "quats": quats,
        "opacities": torch.full((count,), math.log(opacity / (1 - opacity))),
        "sh0": torch.rand(count, 1, 3) / 255,
    }
    if degree > 0:
        made["shN"] = torch.zeros(count, num_coefficients(degree) - 1, 3)
    return made


def neighbour_distance(means: Float[Tensor, "splats 3"]) -> Float[Tensor, " splats"]:
    """Root-mean-square distance to the nearest other splats."""
    found = [
        torch.cdist(part, means).topk(NEIGHBOURS + 1, largest=False).values[:, 1:]
        for part in means.split(1024)
    ]
    return torch.cat(found).square().mean(-1).sqrt()


def _of_file(path: Path, config: GaussianConfig) -> dict[str, Tensor]:
    count, degree = ply.describe(path)
    if count > config.max_splats:
        raise ValueError(
            f"`{path}` holds {count:,} splats and `system.geometry.max_splats` is "
            f"{config.max_splats:,}: raise it, if there is memory for them."
        )
    wanted = degree if config.sh_degree is None else config.sh_degree
    if wanted < degree:
        raise ValueError(
            f"`{path}` holds harmonics of degree {degree} and "
            f"`system.geometry.sh_degree` is {wanted}: write "
            f"`system.geometry.sh_degree={degree}`, or null, which takes the file's."
        )
    check_memory(count, wanted)
    made = ply.load(path)
    if wanted > degree:
        more = torch.zeros(count, num_coefficients(wanted) - 1, 3)
        if "shN" in made:
            more[:, : made["shN"].shape[1]] = made["shN"]
        made["shN"] = more
    return made


def check_memory(count: int, degree: int) -> None:
    """Refuse more splats than this machine can optimise.

    Raises:
        ValueError: The message says how many splats fit.
    """
    each = 4 * COPIES * (11 + 3 * num_coefficients(degree))
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # unknown on this system
        return
    if count * each > memory:
        raise ValueError(
            f"{count:,} splats of degree {degree} need {count * each / 2**30:,.1f} GiB "
            f"(parameters, moments and a window of states) and this machine has "
            f"{memory / 2**30:,.1f}: at most {memory // each:,} fit. Thin the file "
            "out, or write a smaller `system.geometry.num_splats`."
        )


def of_state(y: State, prefix: str = "geometry.") -> State:
    """The splats of a scene's state, by their own names."""
    return {name: y[prefix + name].detach() for name in NAMES if prefix + name in y}
