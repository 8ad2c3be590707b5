r"""Perpendicular negative prompts: a view word pushes the other views away.

The prompt c of a view at azimuth φ is interpolated between front, side and back, and
with $\delta_c = \hat\epsilon(x_t, t, c) - \hat\epsilon(x_t, t, \varnothing)$

$$\hat\epsilon = \hat\epsilon(\varnothing) + s\,\Bigl(\delta_c -
  \sum_i w_i(\varphi)\, \delta_i^{\perp c}\Bigr), \qquad
  \delta_i^{\perp c} = \delta_i -
  \frac{\langle \delta_i, \delta_c \rangle}{\lVert \delta_c \rVert^2}\, \delta_c,$$

so that the prompts i of other views take away only what the wanted one does not say (M.
Armandpour et al., 2023, arXiv 2304.04968; weights $w_i = a e^{-b r} + c$
of the share r of the way between two views as in threestudio).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from systems.guidance.prompts import VIEWS, Decay, PromptConfig
from systems.scene.cameras import Cameras

FRONT, SIDE, BACK, OVERHEAD = range(len(VIEWS))


def guided(
    noise: Callable[[Tensor], Tensor],
    embeds: Float[Tensor, "prompts tokens width"],
    blank: Float[Tensor, "views channels rows columns"],
    prompts: PromptConfig,
    cameras: Cameras,
    scale: float,
) -> Float[Tensor, "views channels rows columns"]:
    """The guided prediction of the noise.

    Args:
        noise: The noise predicted under embedded prompts ``(views, tokens, width)``.
        embeds: The prompts of `VIEWS`.
        blank: The noise predicted under the negative prompt.
        prompts: The prompts' settings.
        cameras: Cameras of the views.
        scale: Guidance scale s.
    """
    mixed = blended(prompts, cameras).to(embeds)
    wanted = noise(torch.einsum("vp,ptc->vtc", mixed, embeds)) - blank
    total = wanted
    numbers, weights = negatives(prompts, cameras)
    for slot in range(numbers.shape[1]):
        other = noise(embeds[numbers[:, slot]]) - blank
        weight = weights[:, slot, None, None, None].to(wanted)
        total = total - weight * perpendicular(other, wanted)
    return blank + scale * total


def blended(prompts: PromptConfig, cameras: Cameras) -> Float[Tensor, "views prompts"]:
    """The share of each view's prompt in that of a camera."""
    shares = torch.zeros(len(cameras), len(VIEWS))
    for view, (azimuth, elevation) in enumerate(_angles(cameras)):
        first, second, r = _between(prompts, azimuth, elevation)
        shares[view, first] += r
        shares[view, second] += 1 - r
    return shares


def negatives(prompts: PromptConfig, cameras: Cameras) -> tuple[Tensor, Tensor]:
    """Indices of the two negative prompts of each camera, and their weights."""
    numbers, weights = [], []
    for azimuth, elevation in _angles(cameras):
        first, _, r = _between(prompts, azimuth, elevation)
        if first == OVERHEAD:
            numbers.append([FRONT, SIDE])
            weights.append([0.0, 0.0])
        elif first == FRONT:
            numbers.append([FRONT, SIDE])
            forms = (
                _decay(prompts.perp_neg_f_fs, r),
                _decay(prompts.perp_neg_f_sf, 1 - r),
            )
            weights.append(list(forms))
        else:
            numbers.append([SIDE, FRONT])
            forms = _decay(prompts.perp_neg_f_sb, r), _decay(prompts.perp_neg_f_fsb, r)
            weights.append(list(forms))
    return torch.tensor(numbers), torch.tensor(weights)


def perpendicular(
    x: Float[Tensor, "views channels rows columns"],
    y: Float[Tensor, "views channels rows columns"],
) -> Float[Tensor, "views channels rows columns"]:
    """The component of x that is perpendicular to y, for each view."""
    along = (x * y).flatten(1).sum(1) / y.square().flatten(1).sum(1).clamp(min=1e-6)
    return x - along[:, None, None, None] * y


def _between(
    prompts: PromptConfig, azimuth: float, elevation: float
) -> tuple[int, int, float]:
    """Two views, and the share of the first."""
    if elevation > prompts.overhead_threshold:
        return OVERHEAD, OVERHEAD, 1.0
    around = abs((azimuth + 180) % 360 - 180) / 90
    if around < 1:
        return FRONT, SIDE, 1 - around
    return SIDE, BACK, 2 - around


def _decay(form: Decay, r: float) -> float:
    a, b, c = form
    return a * math.exp(-b * r) + c


def _angles(cameras: Cameras) -> list[tuple[float, float]]:
    angles = cameras.azimuth.tolist(), cameras.elevation.tolist()
    return list(zip(*angles, strict=True))
