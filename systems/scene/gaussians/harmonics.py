r"""Colour that depends on the direction of view: real spherical harmonics.

$$c(d) = \max\bigl(0,\; \tfrac12 + \sum_{k < (n + 1)^2} Y_k(d)\, h_k\bigr)$$

with degree n from 0 to 3, in the order and with the signs of the 3DGS files (B. Kerbl
et al., 2023, arXiv 2308.04079).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

MAX_DEGREE = 3
Y0 = 0.28209479177387814
"""$Y_0$, the constant one."""


def num_coefficients(degree: int) -> int:
    """Number of coefficients per channel of a degree."""
    return (degree + 1) ** 2


def basis(
    degree: int, directions: Float[Tensor, "*batch 3"]
) -> Float[Tensor, "*batch coefficients"]:
    """The functions $Y_k$ at unit directions.

    Args:
        degree: From 0 to 3.
        directions: Unit vectors.
    """
    x, y, z = directions.unbind(-1)
    found = [torch.full_like(x, Y0)]
    if degree > 0:
        a = 0.4886025119029199
        found += [-a * y, a * z, -a * x]
    if degree > 1:
        a, b, c = 1.0925484305920792, 0.31539156525252005, 0.5462742152960396
        found += [
            a * x * y,
            -a * y * z,
            b * (3 * z * z - 1),
            -a * x * z,
            c * (x * x - y * y),
        ]
    if degree > 2:
        a, b = 0.5900435899266435, 2.890611442640554
        c, d = 0.4570457994644658, 0.3731763325901154
        found += [
            -a * y * (3 * x * x - y * y),
            b * x * y * z,
            -c * y * (5 * z * z - 1),
            d * z * (5 * z * z - 3),
            -c * x * (5 * z * z - 1),
            b / 2 * z * (x * x - y * y),
            -a * x * (x * x - 3 * y * y),
        ]
    return torch.stack(found, -1)


def colours(
    harmonics: Float[Tensor, "splats coefficients 3"],
    directions: Float[Tensor, "views splats 3"],
) -> Float[Tensor, "views splats 3"]:
    """Colours of splats seen along directions, at least 0.

    Args:
        harmonics: One, four, nine or sixteen coefficients.
        directions: From the camera to the splat, of any length.
    """
    if harmonics.shape[1] == 1:  # independent of the direction
        seen = (Y0 * harmonics[:, 0])[None].expand(*directions.shape[:-1], 3)
    else:
        degree = round(harmonics.shape[1] ** 0.5) - 1
        unit = torch.nn.functional.normalize(directions, dim=-1)
        seen = torch.einsum("vnk,nkc->vnc", basis(degree, unit), harmonics)
    return (seen + 0.5).clamp(min=0)
