r"""Plain, striped and spotted: solid textures, functions of a point in space alone.

The second colour is where a pattern is true. Stripes are slabs across a slanted
direction $u$, true where $p \cdot u / s$ has a fractional part below a share; spots are
balls on a body-centred cubic lattice, turned so that no face of an object lies along
it. Both patterns leave most of a body in its first colour, so that "red with white" and
"white with red" differ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

STRIPE_PERIOD = 0.34
STRIPE_SHARE = 0.36
SPOT_SPACING = 0.42
SPOT_RADIUS = 0.14
_ACROSS = (0.48, 0.36, 0.80)
"""Direction across the stripes, of length one: mostly vertical, never along a face."""
_TURN = ((0.80, -0.36, 0.48), (0.60, 0.48, -0.64), (0.0, 0.80, 0.60))
"""A rotation: rows are the lattice's axes."""


def stripes(points: Tensor) -> Tensor:
    """Whether points ``(..., 3)`` lie in a stripe."""
    along = (points * points.new_tensor(_ACROSS)).sum(-1) / STRIPE_PERIOD
    return (along - along.floor()) < STRIPE_SHARE


def spots(points: Tensor) -> Tensor:
    """Whether points ``(..., 3)`` lie in a spot."""
    lattice = points @ points.new_tensor(_TURN).T / SPOT_SPACING
    nearest = [
        (shifted - shifted.round()).square().sum(-1)
        for shifted in (lattice, lattice + 0.5)
    ]
    return torch.minimum(*nearest) < (SPOT_RADIUS / SPOT_SPACING) ** 2


FINISHES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda points: torch.zeros_like(points[..., 0], dtype=torch.bool),
    "striped": stripes,
    "spotted": spots,
}
"""Where each finish shows the second colour. The order numbers them."""
