r"""Where the object lies in the image: resampling, recentring and scaling.

Images are resampled as premultiplied colours, separably. Output pixel :math:`i` with
its centre :math:`c_i` and width :math:`s` (in pixels of the source) is the mean of the
source over :math:`[c_i - r, c_i + r]`, :math:`r = \max(1, s) / 2`: the exact mean over
its area where the image shrinks, linear interpolation where it grows, the identity
where neither. Outside the source everything is transparent.
"""

from __future__ import annotations

from typing import Any

import numpy as np

OPAQUE = 0.5
"""Alpha above which a pixel belongs to the object."""
SMALLEST_OBJECT = 8
"""Pixels along the longer side of an object that is accepted."""

Box = tuple[float, float, float, float]
"""Left, top, right and bottom edge in pixels."""


def weights(length: int, start: float, stop: float, count: int) -> Any:
    """Resampling of one axis, as a sparse matrix of shape ``(count, length)``.

    Args:
        length: Number of source pixels.
        start: Left edge of the first output pixel, in source pixels.
        stop: Right edge of the last one; both may lie outside the source.
        count: Number of output pixels.
    """
    from scipy import sparse

    s = (stop - start) / count
    r = max(1.0, s) / 2
    c = start + (np.arange(count) + 0.5) * s
    first = np.floor(c - r).astype(np.int64)
    j = first[:, None] + np.arange(int(np.ceil(2 * r)) + 1)
    overlap = np.minimum((c + r)[:, None], j + 1) - np.maximum((c - r)[:, None], j)
    overlap = np.where((j >= 0) & (j < length), overlap, 0).clip(0)
    inside = np.minimum(c + s / 2, length) - np.maximum(c - s / 2, 0)
    total = overlap.sum(1)
    scale = np.divide(inside.clip(0) / s, total, out=0 * total, where=total > 0)
    rows = np.broadcast_to(np.arange(count)[:, None], j.shape)
    used = overlap > 0
    entries = (overlap * scale[:, None])[used], (rows[used], j[used])
    return sparse.csr_matrix(entries, shape=(count, length))


def resample(values: np.ndarray, box: Box, height: int, width: int) -> np.ndarray:
    """The part of an image inside a box, at another size.

    Args:
        values: Premultiplied colours and alpha, shape ``(rows, columns, channels)``.
        box: Edges in pixels of the source; they may lie outside.
        height: Rows of the result.
        width: Columns of the result.

    Returns:
        Values in float64, shape ``(height, width, channels)``.
    """
    rows, columns, channels = values.shape
    left, top, right, bottom = box
    along = weights(rows, top, bottom, height)
    across = weights(columns, left, right, width)
    shrunk = (along @ values.reshape(rows, -1)).reshape(height, columns, channels)
    shrunk = shrunk.swapaxes(0, 1).reshape(columns, -1)
    return (across @ shrunk).reshape(width, height, channels).swapaxes(0, 1)


def straight(premultiplied: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Straight colours and alpha of premultiplied values ``(height, width, 4)``.

    Where alpha is 0, the colour is that of the nearest pixel that is not transparent
    (preferably of the object); white, if there is none.
    """
    from scipy import ndimage

    alpha = premultiplied[..., 3].clip(0, 1)
    alpha = np.where(alpha > 1e-6, alpha, 0)
    seen = alpha > 0
    rgb = premultiplied[..., :3] / np.where(seen, alpha, 1)[..., None]
    solid = alpha > OPAQUE if (alpha > OPAQUE).any() else seen
    if not solid.any():
        rgb = np.ones_like(rgb)
    elif not seen.all():
        found: Any = ndimage.distance_transform_edt(
            ~solid, return_distances=False, return_indices=True
        )
        rgb = np.where(seen[..., None], rgb, rgb[tuple(found)])
    return rgb.clip(0, 1).astype(np.float32), alpha.astype(np.float32)


def bounding_box(alpha: np.ndarray) -> tuple[int, int, int, int] | None:
    """Box of the pixels whose alpha is above `OPAQUE`; None: there are none."""
    solid = alpha > OPAQUE
    if not solid.any():
        return None
    rows, columns = np.flatnonzero(solid.any(1)), np.flatnonzero(solid.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def touched(box: Box, height: int, width: int) -> list[str]:
    """Edges of the image that a box touches, in words."""
    left, top, right, bottom = box
    edges = {
        "left": left <= 0,
        "top": top <= 0,
        "right": right >= width,
        "bottom": bottom >= height,
    }
    return [name for name, is_touched in edges.items() if is_touched]


def square_around(box: Box, fill: float) -> Box:
    """The square whose centre is a box's and of which the box fills a fraction."""
    left, top, right, bottom = box
    reach = max(right - left, bottom - top) / fill / 2
    x, y = (left + right) / 2, (top + bottom) / 2
    return x - reach, y - reach, x + reach, y + reach
