r"""Depth maps of reference images, and losses that compare depths without a scale.

A monocular depth is known up to a linear map. With given depths d and rendered ones z,

$$\ell_{depth} = \operatorname{mean}(z - a\,d - b)^2, \qquad
  \rho = \operatorname{cov}(z, d) / (\sigma_z \sigma_d),$$

where a and b fit z best, without a gradient (threestudio's form).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from systems.images import opened


def read_depth(path: Path) -> Float[Tensor, "height width"]:
    """A depth map from 0 to 1; grey, 8 or 16 bit.

    Raises:
        ValueError: It cannot be read; the message says where it is looked for.
    """
    try:
        with opened(path) as image:
            most = 65535.0 if image.mode.startswith("I") else 255.0
            values = np.asarray(image, dtype=np.float32)
    except OSError as error:
        raise ValueError(
            f"The depth map `{path}` cannot be read ({error.strerror}): name it as "
            "`data.depth=FILE`, or set `lambda_depth` and `lambda_depth_rel` to 0."
        ) from error
    if values.ndim == 3:
        values = values[..., 0]
    if values.shape[0] != values.shape[1]:
        raise ValueError(
            f"The depth map `{path}` has {values.shape[1]} × {values.shape[0]} pixels: "
            "write a square one, framed like its image."
        )
    return torch.from_numpy(values / most)


def depth_error(
    depth: Float[Tensor, " pixels"], given: Float[Tensor, " pixels"]
) -> Float[Tensor, ""]:
    """Mean squared error after the best linear map of the given depths.

    In closed form: LAPACK's solvers differ in the last bits between calls.
    """
    with torch.no_grad():
        a, b = given - given.mean(), depth - depth.mean()
        slope = (a * b).sum() / a.square().sum().clamp(min=1e-12)
        fitted = depth.mean() + slope * a
    return (fitted - depth).square().mean()


def correlation(
    depth: Float[Tensor, " pixels"], given: Float[Tensor, " pixels"]
) -> Float[Tensor, ""]:
    """Pearson's coefficient of correlation."""
    a, b = depth - depth.mean(), given - given.mean()
    return (a * b).sum() / (a.norm() * b.norm()).clamp(min=1e-12)
