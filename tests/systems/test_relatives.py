"""The relatives of score distillation, by hand on a prior with a known score."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import dreampropeller as dp
from dreampropeller import StepRandom
from systems import build
from systems.guidance.csd import ClassifierScoreDistillation
from systems.guidance.inversion import invert, rising
from systems.guidance.ism import IntervalScoreMatching, ISMConfig
from systems.guidance.perpendicular import blended, perpendicular
from systems.guidance.priors import Words
from systems.guidance.prompts import PromptConfig
from systems.guidance.refine import RefineConfig, Refinement
from systems.guidance.sdi import ScoreDistillationInversion, SDIConfig
from systems.guidance.sds import (
    GuidanceConfig,
    PerpendicularNegatives,
    ScoreDistillation,
    StableDiffusionConfig,
)
from systems.scene.cameras import Cameras
from systems.settings.config import load
from systems.settings.reader import ConfigError
from tests.systems.gaussian import SPREAD, prior, scales, spread
from tests.systems.scenes import SMALL, TOYBOX

GIVEN, WITHOUT, STEP = 0.6, -0.2, 7
RANDOM = StepRandom(5)
ONE = torch.ones(2)
CAMERAS = Cameras(torch.tensor([10.0, 150.0]), 20 * ONE, 2.4 * ONE, 50 * ONE)
X = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def make(kind: type[Any], config: GuidanceConfig) -> Any:
    words = Words(torch.full((1, 1, 1), GIVEN), torch.full((1, 1, 1), WITHOUT))
    return kind(config, prior(1), words, PromptConfig("a", view_dependent=False))


def direction(made: Any) -> Tensor:
    t, drawn = made.timestep(X, STEP, RANDOM), made.noise(X, STEP, RANDOM)
    return made.direction(X, CAMERAS, t, drawn)


def noise(x: Tensor, t: Tensor, mean: float | Tensor) -> Tensor:
    alpha, sigma = scales(t)
    return sigma * (x - alpha * mean) / spread(t)


def guided(x: Tensor, t: Tensor, scale: float) -> Tensor:
    without = noise(x, t, WITHOUT)
    return without + scale * (noise(x, t, GIVEN) - without)


def test_score_distillation() -> None:
    made = make(ScoreDistillation, GuidanceConfig("", 3.0))
    t = made.timestep(X, STEP, RANDOM)
    alpha, sigma = scales(t)
    drawn = made.noise(X, STEP, RANDOM)
    wanted = sigma**2 * (guided(alpha * X + sigma * drawn, t, 3.0) - drawn)
    assert torch.allclose(direction(made), wanted, atol=1e-6)


def test_classifier_score_distillation() -> None:
    r"""The noise cancels: $g = w s\\, \\alpha\\sigma (m_0 - m) / v$."""
    made = make(ClassifierScoreDistillation, GuidanceConfig("", 3.0))
    t = made.timestep(X, STEP, RANDOM)
    alpha, sigma = scales(t)
    wanted = sigma**2 * 3 * alpha * sigma * (WITHOUT - GIVEN) / spread(t)
    found = direction(made)
    assert torch.allclose(found, wanted.expand_as(X), atol=1e-6)


def test_interval_score_matching() -> None:
    made = make(
        IntervalScoreMatching,
        ISMConfig("", 3.0, min_step_percent=0.1, inversion_n_steps=1),
    )
    t = made.timestep(X, STEP, RANDOM)
    s = t - 50
    (alpha, sigma), (alpha_s, sigma_s) = scales(t), scales(s)
    first = noise(X, 0 * t, WITHOUT)
    x_s = alpha_s * X + sigma_s * first
    second = noise(x_s, s, WITHOUT)
    x_t = alpha * (x_s - sigma_s * second) / alpha_s + sigma * second
    wanted = sigma**2 * (guided(x_t, t, 3.0) - second)
    assert torch.allclose(direction(made), wanted, atol=1e-5)


def test_score_distillation_through_inversion() -> None:
    settings = {"inversion_guidance_scale": -2.0, "inversion_n_steps": 2}
    made = make(ScoreDistillationInversion, SDIConfig("", 3.0, **settings))
    t = made.timestep(X, STEP, RANDOM)
    half = t // 2
    (alpha, sigma), (alpha_h, sigma_h) = scales(t), scales(half)
    first = guided(X, 0 * t, -2.0)
    x_h = alpha_h * X + sigma_h * first
    second = guided(x_h, half, -2.0)
    x_t = alpha * (x_h - sigma_h * second) / alpha_h + sigma * second
    kappa = (x_t - alpha * X) / sigma
    wanted = sigma**2 * (guided(x_t, t, 3.0) - kappa)
    assert torch.allclose(direction(made), wanted, atol=1e-5)


def test_refinement() -> None:
    """Two DDIM steps from the noisy image to a clean one."""
    made = make(Refinement, RefineConfig("", 3.0, refine_n_steps=2, refine_weight=0.5))
    t, drawn = made.timestep(X, STEP, RANDOM), made.noise(X, STEP, RANDOM)
    (alpha, sigma), (alpha_h, sigma_h) = scales(t), scales(t // 2)
    x_t = alpha * X + sigma * drawn
    first = guided(x_t, t, 3.0)
    x_h = alpha_h * (x_t - sigma * first) / alpha + sigma_h * first
    clean = (x_h - sigma_h * guided(x_h, t // 2, 3.0)) / alpha_h
    assert torch.allclose(direction(made), 0.5 * (X - clean), atol=1e-5)


def test_inversion_follows_the_flow_of_a_gaussian() -> None:
    r"""To $\\alpha m + \\sqrt{v} (x - m) / s$, with an error of first order."""
    t = torch.tensor([400, 700])
    alpha, _ = scales(t)
    exact = alpha * GIVEN + spread(t).sqrt() * (X - GIVEN) / SPREAD

    def error(count: int) -> float:
        found = invert(prior(1), X, rising(t, count), lambda x, t: noise(x, t, GIVEN))
        return float((found - exact).norm())

    assert error(200) < error(100) / 1.7 < error(50) / 2.9
    assert error(200) < 0.05 * float(exact.norm())


WORDS = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]])[:, None]
"""Front, side, back and overhead."""


def perp_neg(scale: float = 3.0) -> PerpendicularNegatives:
    words = Words(WORDS, torch.zeros(1, 1, 3))
    prompts = PromptConfig("a")
    return PerpendicularNegatives(GuidanceConfig("", scale), prior(3), words, prompts)


def test_perpendicular_negative_prompts() -> None:
    """Between front and side at 30°, between side and back at 120°, and overhead."""
    made = perp_neg()
    angles = torch.tensor([-30.0, 120.0, 0.0])
    elevation = torch.tensor([0.0, 0.0, 80.0])
    cameras = Cameras(angles, elevation, 0 * angles + 2, 0 * angles + 50)
    mixed = torch.tensor([[2 / 3, 1 / 3, 0, 0], [0, 2 / 3, 1 / 3, 0], [0, 0, 0, 1.0]])
    assert torch.allclose(blended(made.prompts, cameras), mixed)
    t, x = torch.tensor([100, 500, 900]), torch.randn(3, 3, 4, 4)
    alpha, sigma = scales(t)
    # In units of the slope of the noise in the mean, deltas are the prompts themselves.
    slope = (-sigma * alpha / spread(t))[:, 0, 0]
    front, side, back, above = WORDS[:, 0]

    first, second = 2 / 3 * front + 1 / 3 * side, 2 / 3 * side + 1 / 3 * back

    def near(r: float) -> float:
        return 4 * math.exp(-0.5 * r) - 2.426

    def sum_of(wanted: Tensor, *others: tuple[float, Tensor]) -> Tensor:
        total = wanted
        for weight, other in others:
            total = total - weight * (
                other - (other @ wanted) / (wanted @ wanted) * wanted
            )
        return total

    deltas = [
        sum_of(first, (near(2 / 3), front), (near(1 / 3), side)),
        sum_of(
            second,
            (math.exp(-0.5 * 2 / 3) - 0.606, side),
            (math.exp(-0.5 * 2 / 3) + 0.967, front),
        ),
        above,
    ]
    blank = noise(x, t, 0.0)
    wanted = blank + 3 * (slope * torch.stack(deltas))[..., None, None]
    assert torch.allclose(made.predict(x, t, cameras), wanted, atol=1e-4)
    x, y = torch.randn(2, 2, 3, 4, 4)
    left = perpendicular(x, y)
    assert torch.allclose((left * y).flatten(1).sum(1), torch.zeros(2), atol=1e-4)


def test_a_prompts_setting_asks_every_guidance_for_them() -> None:
    """Where scales count from 0 too, as threestudio: it does not add 1 here."""
    words, plain = Words(WORDS, torch.zeros(1, 1, 3)), PromptConfig("a")
    wanted = direction(perp_neg())
    prompts = PromptConfig("a", use_perp_neg=True)
    for config in (GuidanceConfig("", 3.0), StableDiffusionConfig("", 3.0)):
        asked = ScoreDistillation(config, prior(3), words, prompts)
        assert torch.equal(direction(asked), wanted)
        other = ScoreDistillation(config, prior(3), words, plain)
        assert not torch.allclose(direction(other), wanted, atol=1e-2)
    # Weights of zero leave the interpolated prompt alone.
    names = ("perp_neg_f_fs", "perp_neg_f_sf", "perp_neg_f_sb", "perp_neg_f_fsb")
    zero: dict[str, Any] = dict.fromkeys(names, (0.0, 0.0, 0.0))
    off = PromptConfig("a", use_perp_neg=True, **zero)
    without = ScoreDistillation(GuidanceConfig("", 3.0), prior(3), words, off)
    t = torch.tensor([300, 600])
    alpha, sigma = scales(t)
    means = (blended(off, CAMERAS) @ WORDS[:, 0])[..., None, None]
    slope = -sigma * alpha / spread(t)
    found = without.predict(X, t, CAMERAS) - noise(X, t, 0.0)
    assert torch.allclose(found, (3 * slope * means).expand_as(X), atol=1e-5)


def test_perpendicular_negatives_need_view_words() -> None:
    prompts = PromptConfig("a", view_dependent=False)
    words = Words(WORDS[:1], torch.zeros(1, 1, 3))
    with pytest.raises(ValueError, match=r"view_dependent=true"):
        PerpendicularNegatives(GuidanceConfig(""), prior(3), words, prompts)


@pytest.mark.parametrize(
    "name",
    [
        *("csd", "sdi"),
        *(pytest.param(n, marks=pytest.mark.long) for n in ("ism", "perp-neg")),
    ],
)
def test_each_distils_the_embedded_prior_exactly_in_windows(name: str) -> None:
    settings = [
        *SMALL,
        f"system.guidance_type={name}-guidance",
        "system.guidance={pretrained_model_name_or_path: toybox, guidance_scale: 3}",
        "trainer.max_steps=3",
    ]
    trajectory = build(load(TOYBOX, settings)).trajectory()
    start, _ = trajectory.init()
    plain = dp.solve(trajectory, dp.Sequential()).value
    assert not torch.equal(plain["geometry.grid"], start["geometry.grid"])
    solver = dp.PicardSolver(dp.SlidingWindow(3), dp.FixedThreshold(0))
    found = dp.solve(trajectory, solver).value
    assert torch.equal(found["geometry.grid"], plain["geometry.grid"])


@pytest.mark.parametrize("name", ["ism", "sdi"])
def test_more_than_five_inversion_steps_are_refused(name: str) -> None:
    settings = [
        *SMALL,
        f"system.guidance_type={name}-guidance",
        "system.guidance={pretrained_model_name_or_path: toybox}",
        "system.guidance.inversion_n_steps=6",
    ]
    with pytest.raises(ConfigError, match="`inversion_n_steps` is 6: write a number"):
        build(load(TOYBOX, settings))
