r"""Cuts an object from a plain background.

The background colour :math:`B(x, y)` is a quadratic polynomial per channel, fitted
robustly to the border of the image and then to everything that it explains. Background
are the pixels :math:`|C - B| < \tau` that are connected to the border, where
:math:`\tau` follows the noise. Along the edge the alpha is that of a mixture
:math:`C = \alpha F + (1 - \alpha) B` with the colour :math:`F` of the object next to it
(the compositing equation), and the colour is unmixed.

What this cannot know: whether an area that has the colour of the background belongs to
the object, and what is a shadow. Both are said.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

LEAST, MOST = 0.04, 0.16
"""Bounds of τ, as distances between colours from 0 to 1."""
NOISES = 5.0
"""τ in standard deviations of the noise."""
PLAIN, SURE = 0.6, 0.97
"""Fractions of the border that must, and should, have the colour of the background."""
SMALLEST, LARGEST = 5e-4, 0.97
"""Fractions of the image that an object may cover."""
RINGING = 0.1
"""τ is at least this fraction of the object's median contrast."""
PIECE = 0.02
"""Size of a piece that is kept, as a fraction of the largest one."""


class NotPlain(ValueError):
    """The object cannot be cut out; the message is the reason, without a full stop."""


@dataclass(frozen=True)
class Background:
    """The colour of the background.

    Attributes:
        colour: Fitted colour of every pixel, shape ``(height, width, 3)``.
        distance: Distance of every pixel from it, shape ``(height, width)``.
        tau: Distance from which a pixel belongs to the object.
        noise: Mean distance of the background's own pixels.
        share: Fraction of the border that is nearer than `tau`.
    """

    colour: np.ndarray
    distance: np.ndarray
    tau: float
    noise: float
    share: float


def cut_plain(rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Cut the object from a plain background.

    Args:
        rgb: Display colours from 0 to 1, shape ``(height, width, 3)``.

    Returns:
        Straight colours, alpha ``(height, width)``, and sentences about what is unsure.

    Raises:
        NotPlain: The background is not plain, or there is no object.
    """
    background = fit_background(rgb)
    doubts = []
    if background.share < SURE:
        doubts.append(
            f"only {background.share:.0%} of the image's border looks like background"
        )
    solid, said = _object(background)
    doubts += said
    colours, alpha = _soft(rgb, background, solid)
    if (faint := _faint(background, solid)) > 0.05:
        doubts.append(f"{faint:.0%} of the object's edge hardly differs from it")
    if 0.1 < (shadow := _shadow(rgb, background, solid)) < 0.6:
        doubts.append(f"{shadow:.0%} of what was kept may be a shadow")
    return colours, alpha, doubts


def fit_background(rgb: np.ndarray) -> Background:
    """Fit the colour of the background.

    Raises:
        NotPlain: Too few pixels of the border have it.
    """
    height, width, _ = rgb.shape
    depth = max(1, round(0.02 * min(height, width)))
    border = np.ones((height, width), bool)
    border[depth:-depth, depth:-depth] = False
    rows, columns = np.nonzero(border)
    terms = _polynomial(rows, columns, height, width)
    target = rgb[border].astype(np.float64)
    # The median is the safest beginning; a few reweighted fits then follow a gradient.
    coefficients = np.zeros((terms.shape[1], 3))
    coefficients[0] = np.median(target, axis=0)
    for _ in range(12):
        errors = np.linalg.norm(target - terms @ coefficients, axis=1)
        scale = max(float(np.median(errors)), 0.01)
        root = 1 / np.sqrt(1 + (errors / (2 * scale)) ** 4)
        coefficients = np.linalg.lstsq(
            terms * root[:, None], target * root[:, None], rcond=None
        )[0]
    errors = np.linalg.norm(target - terms @ coefficients, axis=1)
    tau = float(np.clip(NOISES * np.median(errors), LEAST, MOST))
    share = float((errors < tau).mean())
    if share < PLAIN:
        raise NotPlain(
            f"the background is not plain (one colour explains {share:.0%} of the "
            "image's border)"
        )
    colour, distance = rgb, np.empty(0)
    for _ in range(2):  # from the border to all that it explains
        colour = _evaluate(coefficients, height, width)
        distance = np.linalg.norm(rgb - colour, axis=2)
        near = np.argwhere(_connected(distance < tau))
        near = near[:: max(1, len(near) // 50_000)]
        if len(near) < 100:
            break
        terms = _polynomial(near[:, 0], near[:, 1], height, width)
        target = rgb[near[:, 0], near[:, 1]].astype(np.float64)
        coefficients = np.linalg.lstsq(terms, target, rcond=None)[0]
    outside = distance[_connected(distance < tau)]
    noise = float(outside.mean()) if outside.size else tau
    return Background(colour, distance, tau, noise, share)


def _polynomial(
    rows: np.ndarray, columns: np.ndarray, height: int, width: int
) -> np.ndarray:
    """The terms 1, x, y, x², xy, y² at pixels, with x and y from −1 to 1."""
    y, x = 2 * rows / max(1, height - 1) - 1, 2 * columns / max(1, width - 1) - 1
    return np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], -1)


def _evaluate(coefficients: np.ndarray, height: int, width: int) -> np.ndarray:
    """The polynomial at every pixel, row by row."""
    columns = np.arange(width)
    lines = [
        _polynomial(np.full(width, row), columns, height, width) @ coefficients
        for row in range(height)
    ]
    return np.stack(lines).clip(0, 1).astype(np.float32)


def _connected(region: np.ndarray) -> np.ndarray:
    """The parts of a region that reach the border of the image."""
    from scipy import ndimage

    found: Any = ndimage.label(region)
    labels, count = found
    edge = np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])
    reached = np.zeros(count + 1, bool)
    reached[edge] = True
    reached[0] = False
    return reached[labels]


def _object(background: Background) -> tuple[np.ndarray, list[str]]:
    """The pixels of the object, and doubts about them."""
    from scipy import ndimage

    distance, tau = background.distance, background.tau
    # Lossy files ring beside edges, by a fraction of the contrast.
    standing = distance[~_connected(distance < tau)]
    if standing.size:
        tau = max(tau, RINGING * float(np.median(standing)))
    like = distance < tau
    outside, doubts = _connected(like), []
    solid = ~outside
    found: Any = ndimage.label(solid & like)
    holes, count = found
    if count:  # enclosed areas with the colour of the background
        index = np.arange(1, count + 1)
        area = np.asarray(ndimage.sum_labels(holes > 0, holes, index))
        middle = np.asarray(ndimage.median(distance, holes, index))
        large = area >= max(16, 1e-3 * solid.sum())
        through = large & (middle <= max(2 * background.noise, tau / 2))
        solid &= ~np.isin(holes, index[through])
        if through.any():
            doubts.append(
                f"{through.sum()} area(s) inside the object have the colour of the "
                "background and were cut out as holes"
            )
    smooth: Any = ndimage.binary_opening(solid, iterations=1)
    pieces: Any = ndimage.label(smooth, np.ones((3, 3)))
    labels, count = pieces
    sizes = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    if not count or sizes.max() < SMALLEST * solid.size:
        raise NotPlain("nothing stands out from the background")
    kept = np.flatnonzero(sizes >= PIECE * sizes.max()) + 1
    if len(kept) > 1:
        doubts.append(f"{len(kept)} separate pieces were kept")
    # What the opening took off thin parts comes back where it is joined to a piece.
    near: Any = ndimage.binary_propagation(np.isin(labels, kept), mask=solid)
    if near.mean() > LARGEST:
        raise NotPlain("the object covers the whole image")
    return near, doubts


def _soft(
    rgb: np.ndarray, background: Background, solid: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Colours and alpha of the object, unmixed along its edge."""
    from scipy import ndimage

    grown: Any = ndimage.binary_dilation(solid, np.ones((3, 3)), iterations=1)
    inner: Any = ndimage.binary_erosion(
        solid, np.ones((3, 3)), iterations=2, border_value=1
    )
    band = grown & ~inner
    shown = np.where(solid, background.distance, 0)
    # Pixels that are as far from the background as any near them are not mixed.
    core = solid & (shown >= 0.95 * ndimage.maximum_filter(shown, 5))
    found: Any = ndimage.distance_transform_edt(
        ~core, return_distances=False, return_indices=True
    )
    rows, columns = (axis[band] for axis in found)
    difference = rgb[rows, columns] - background.colour[band]
    contrast = np.maximum((difference**2).sum(1), 1e-6)
    seen = ((rgb[band] - background.colour[band]) * difference).sum(1) / contrast
    alpha = solid.astype(np.float32)
    alpha[band] = seen.clip(0, 1)
    alpha[alpha < 0.05] = 0
    a = alpha[band][:, None]
    unmixed = (rgb[band] - (1 - a) * background.colour[band]) / np.maximum(a, 0.05)
    colours = rgb.copy()
    colours[band] = np.where(a > 0.3, unmixed, rgb[rows, columns]).clip(0, 1)
    return colours, alpha


def _faint(background: Background, solid: np.ndarray) -> float:
    """Fraction of the object's edge whose contrast is near the threshold."""
    from scipy import ndimage

    inner: Any = ndimage.binary_erosion(solid, iterations=1, border_value=1)
    edge = solid & ~inner
    if not edge.any():
        return 0.0
    strongest = ndimage.maximum_filter(np.where(solid, background.distance, 0), 7)
    return float((strongest[edge] < 2 * background.tau).mean())


def _shadow(rgb: np.ndarray, background: Background, solid: np.ndarray) -> float:
    """Fraction of the object that looks like the background in less light."""
    colour = background.colour[solid]
    ratio = rgb[solid] / np.maximum(colour, 1e-3)
    mean = ratio.mean(1)
    alike = np.ptp(ratio, axis=1) < 0.06
    return float((alike & (mean > 0.45) & (mean < 0.97)).mean())
