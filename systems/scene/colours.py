r"""Display colours (sRGB, IEC 61966-2-1) and linear light.

$$c_{lin} = \begin{cases} c / 12.92 & c \le 0.04045 \\
  ((c + 0.055) / 1.055)^{2.4} & \text{otherwise} \end{cases}$$
"""

from __future__ import annotations

import numpy as np


def to_linear(srgb: np.ndarray) -> np.ndarray:
    """Display colours from 0 to 1 as linear light."""
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def to_srgb(linear: np.ndarray) -> np.ndarray:
    """Linear light from 0 to 1 as display colours; the inverse of `to_linear`."""
    low = linear <= 0.0031308
    return np.where(low, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)
