r"""Shapes of splats: $\Sigma = R S S^\top R^\top$ of a rotation and three scales."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def rotation_matrices(
    quats: Float[Tensor, "splats 4"],
) -> Float[Tensor, "splats 3 3"]:
    """Rotations of quaternions (w, x, y, z), which need not be of unit length."""
    w, x, y, z = torch.nn.functional.normalize(quats, dim=-1).unbind(-1)
    rows = [
        torch.stack(
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)]
        ),
        torch.stack(
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)]
        ),
        torch.stack(
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)]
        ),
    ]
    return torch.stack(rows).permute(2, 0, 1)


def axes(
    scales: Float[Tensor, "splats 3"], quats: Float[Tensor, "splats 4"]
) -> Float[Tensor, "splats 3 3"]:
    """The half axes $R S$ of splats, as columns.

    Args:
        scales: Logarithms of the standard deviations along the axes.
        quats: Rotations.
    """
    return rotation_matrices(quats) * scales.exp()[:, None]


def covariances(
    scales: Float[Tensor, "splats 3"], quats: Float[Tensor, "splats 4"]
) -> Float[Tensor, "splats 3 3"]:
    """Covariances of splats; arguments as for `axes`."""
    half = axes(scales, quats)
    return half @ half.mT
