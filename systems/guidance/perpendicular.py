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
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from systems.guidance.priors import Words
from systems.guidance.prompts import VIEWS, PromptConfig
from systems.guidance.sds import GuidanceConfig, ScoreDistillation
from systems.scene.cameras import Cameras

FRONT, SIDE, BACK, OVERHEAD = range(len(VIEWS))
FRONT_SIDE = (4.0, 0.5, -2.426)
"""a, b, c of front against a view between front and side, and of side against it."""
SIDE_BACK = (1.0, 0.5, -0.606)
"""The same of side against a view between side and back."""
FRONT_BACK = (1.0, 0.5, 0.967)
"""The same of front against it."""


class PerpendicularNegatives(ScoreDistillation):
    """SDS with perpendicular negative prompts; needs view-dependent prompts.

    `guidance_rescale` has no effect.
    """

    def __init__(
        self, config: GuidanceConfig, prior: Any, words: Words, prompts: PromptConfig
    ) -> None:
        if not prompts.view_dependent:
            raise ValueError(
                "`perp-neg-guidance` sets views against each other, and the prompt "
                "names none: write `system.prompt_processor.view_dependent=true`, or "
                "`guidance_type=diffusers-guidance`."
            )
        super().__init__(config, prior, words, prompts)

    def predict(
        self, noisy: Tensor, t: Tensor, cameras: Cameras, scale: float | None = None
    ) -> Float[Tensor, "views channels rows columns"]:
        """See `ScoreDistillation.predict`."""
        mixed = self.mixed(cameras)
        words = torch.einsum(
            "vp,ptc->vtc", mixed.to(self.words.prompt_embeds), self.words.prompt_embeds
        )
        conditions = self.prior.conditions(cameras)

        def noise(words: Tensor) -> Tensor:
            without = self.words.negative_prompt_embeds
            return self.prior.noise(noisy, t, words, without, 1.0, 0.0, conditions)

        blank = self.blank(noisy, t, cameras)
        wanted = noise(words) - blank
        total = wanted
        numbers, weights = self.negatives(cameras)
        for slot in range(numbers.shape[1]):
            other = noise(self.words.prompt_embeds[numbers[:, slot]]) - blank
            weight = weights[:, slot, None, None, None].to(wanted)
            total = total - weight * perpendicular(other, wanted)
        return blank + (self.config.scale if scale is None else scale) * total

    def mixed(self, cameras: Cameras) -> Float[Tensor, "views prompts"]:
        """The share of each view's prompt in that of a camera."""
        shares = torch.zeros(len(cameras), len(VIEWS))
        for view, (first, second, r) in enumerate(
            map(self._between, *_angles(cameras))
        ):
            shares[view, first] += r
            shares[view, second] += 1 - r
        return shares

    def negatives(self, cameras: Cameras) -> tuple[Tensor, Tensor]:
        """Indices of the two negative prompts of each camera, and their weights."""
        numbers, weights = [], []
        for azimuth, elevation in zip(*_angles(cameras), strict=True):
            first, _, r = self._between(azimuth, elevation)
            if first == OVERHEAD:
                numbers.append([FRONT, SIDE])
                weights.append([0.0, 0.0])
            elif first == FRONT:
                numbers.append([FRONT, SIDE])
                weights.append([_decay(FRONT_SIDE, r), _decay(FRONT_SIDE, 1 - r)])
            else:
                numbers.append([SIDE, FRONT])
                weights.append([_decay(SIDE_BACK, r), _decay(FRONT_BACK, r)])
        return torch.tensor(numbers), torch.tensor(weights)

    def _between(self, azimuth: float, elevation: float) -> tuple[int, int, float]:
        """Two views, and the share of the first."""
        if elevation > self.prompts.overhead_threshold:
            return OVERHEAD, OVERHEAD, 1.0
        around = abs((azimuth + 180) % 360 - 180) / 90
        if around < 1:
            return FRONT, SIDE, 1 - around
        return SIDE, BACK, 2 - around


def perpendicular(
    x: Float[Tensor, "views channels rows columns"],
    y: Float[Tensor, "views channels rows columns"],
) -> Float[Tensor, "views channels rows columns"]:
    """The component of x that is perpendicular to y, for each view."""
    along = (x * y).flatten(1).sum(1) / y.square().flatten(1).sum(1).clamp(min=1e-6)
    return x - along[:, None, None, None] * y


def _decay(form: tuple[float, float, float], r: float) -> float:
    a, b, c = form
    return a * math.exp(-b * r) + c


def _angles(cameras: Cameras) -> tuple[list[float], list[float]]:
    return cameras.azimuth.tolist(), cameras.elevation.tolist()
