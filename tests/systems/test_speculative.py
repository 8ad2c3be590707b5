"""Drafts verified by coupled Gaussians: the law of the sequential sampler."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import Tensor

from dreampropeller import (
    FixedThreshold,
    NotConverged,
    PicardSolver,
    Sequential,
    SlidingWindow,
    checkpoint,
    solve,
)
from dreampropeller.adapters.diffusers import (
    CleanImage,
    SamplingTrajectory,
    Speculative,
    sample,
    solver_for,
)
from dreampropeller.adapters.diffusers.transitions import Transitions
from systems.toybox import pipeline as toybox
from tests.helpers import TOYS

MEANS = torch.tensor([[-0.8, 0.3], [0.7, 0.5], [0.1, -0.9]])
WEIGHTS = torch.tensor([0.5, 0.3, 0.2])
VARIANCE = 0.03
ZERO = FixedThreshold(0)
STEPS = 12


def scheduler(kind: Any = DDPMScheduler, prediction: str = "epsilon") -> Any:
    made = kind(
        beta_schedule="squaredcos_cap_v2",
        clip_sample=False,
        prediction_type=prediction,
    )
    made.set_timesteps(STEPS)
    return made


def output_of_mixture(made: Any) -> Any:
    """The exact model output for data from a mixture of three Gaussians."""

    def output(x: Tensor, t: Tensor) -> Tensor:
        kept = float(made.alphas_cumprod[int(t)])
        alpha, variance = math.sqrt(kept), kept * VARIANCE + 1 - kept
        apart = x.flatten(1)[:, None] - alpha * MEANS
        weights = (WEIGHTS.log() - apart.square().sum(-1) / (2 * variance)).softmax(-1)
        score = -(weights[..., None] * apart).sum(1).reshape(x.shape) / variance
        noise = -math.sqrt(1 - kept) * score
        if made.config.prediction_type == "epsilon":
            return noise
        clean = (x - math.sqrt(1 - kept) * noise) / alpha
        if made.config.prediction_type == "sample":
            return clean
        return alpha * noise - math.sqrt(1 - kept) * clean

    return output


def trajectory(made: Any, count: int, seed: int, **settings: Any) -> SamplingTrajectory:
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(count, 1, 1, 2, generator=generator)
    return SamplingTrajectory(
        output_of_mixture(made), made, latents, generator=generator, **settings
    )


def energy_distance(a: Tensor, b: Tensor) -> float:
    """2 E|A − B| − E|A − A'| − E|B − B'|, zero for equal laws."""
    return 2 * mean_distance(a, b) - mean_distance(a, a) - mean_distance(b, b)


def mean_distance(a: Tensor, b: Tensor) -> float:
    rows = [torch.cdist(part, b).double().sum() for part in a.split(1000)]
    return float(torch.stack(rows).sum() / len(a) / len(b))


def drawn(runs: int, count: int, solver: Any) -> tuple[Tensor, float]:
    """Samples, and the mean stride."""
    made = scheduler()
    found = [solve(trajectory(made, count, seed), solver) for seed in range(runs)]
    strides = [stride for one in found for stride in one.stats.strides]
    samples = torch.cat([one.value["x"].flatten(1) for one in found])
    return samples, sum(strides) / len(strides)


def test_the_law_is_that_of_the_sequential_sampler(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """3,000 samples of a mixture; without the verification the law is another."""
    expected, _ = drawn(1, 5_000, Sequential())
    other = drawn(2, 5_000, Sequential())[0][5_000:]
    found, stride = drawn(60, 50, Speculative(6))
    assert stride > 1.05  # drafts pass, although all of 50 have to
    chance = energy_distance(other, expected)
    assert energy_distance(found, expected) < 3 * chance + 4e-4
    zeros = lambda self, step: torch.zeros(50, dtype=torch.double)  # noqa: E731
    monkeypatch.setattr(Transitions, "uniforms", zeros)  # ln 0: every draft passes
    wrong, _ = drawn(20, 50, Speculative(6))
    assert energy_distance(wrong, expected) > 0.02


@pytest.mark.long
def test_ten_thousand_samples_have_the_law() -> None:
    """The figure of `docs/sampling.md`, beside that of another sequential sample."""
    expected, other = drawn(1, 20_000, Sequential())[0].split(10_000)
    found, stride = drawn(200, 50, Speculative(6))
    chance = energy_distance(other, expected)
    distance = energy_distance(found, expected)
    print(
        f"energy distance {distance:.1e}, {chance:.1e} by chance, stride {stride:.2f}"
    )
    assert stride > 1.05
    assert distance < 3 * chance + 1e-4


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_a_window_of_one_is_sequential_bit_for_bit(prediction: str) -> None:
    made = scheduler(prediction=prediction)
    found, expected = (
        solve(trajectory(made, 3, 0), solver)
        for solver in (Speculative(1), Sequential())
    )
    assert torch.equal(found.value["x"], expected.value["x"])
    parts = Transitions(trajectory(made, 3, 0))
    x, clean = torch.randn(3, 1, 1, 2), torch.randn(3, 1, 1, 2)
    again = parts.clean(4, x, parts.output_of(4, x, clean))
    assert torch.allclose(again, clean, atol=1e-5)


@pytest.mark.parametrize("eta", [0.4, 1.0])
def test_noise_is_that_of_the_scheduler(eta: float) -> None:
    made = scheduler(DDIMScheduler)
    whole = trajectory(made, 2, 3, eta=eta)
    sigma, noise = Transitions(whole).noise(5)
    kept = [float(made.alphas_cumprod[int(whole.timesteps[n])]) for n in (5, 6)]
    variance = (1 - kept[1]) / (1 - kept[0]) * (1 - kept[0] / kept[1])
    assert sigma == pytest.approx(eta * math.sqrt(variance), rel=1e-5)
    x, output = torch.randn(2, 1, 1, 2), torch.randn(2, 1, 1, 2)
    quiet = trajectory(made, 2, 3, eta=0).advance(5, x, {}, output)[0]
    loud = whole.advance(5, x, {}, output)[0]
    if eta == 1.0:  # else the direction to x shrinks as well
        clean = (x - math.sqrt(1 - kept[0]) * output) / math.sqrt(kept[0])
        rest = math.sqrt(1 - kept[1] - sigma**2)
        mean = math.sqrt(kept[1]) * clean + rest * output
        assert torch.allclose(loud, mean + sigma * noise, atol=1e-5)
    assert not torch.allclose(quiet, loud)


def test_guesses_from_the_clean_image_take_fewer_iterations() -> None:
    made = scheduler()
    found = {}
    for name, predictor in (("clean", CleanImage()), ("last", None)):
        solver = solver_for(6, 0.1, predictor=predictor)
        found[name] = solve(trajectory(made, 1, 1), solver).stats.num_iterations
        exact = solve(trajectory(made, 2, 3), replace(solver, threshold=ZERO))
        expected = solve(trajectory(made, 2, 3), Sequential())
        assert torch.equal(exact.value["x"], expected.value["x"])
    assert found["clean"] <= found["last"]
    with pytest.raises(TypeError, match=r"write `Momentum\(\)`"):
        solve(TOYS["sde"].make(), PicardSolver(SlidingWindow(4), ZERO, CleanImage()))


def test_a_run_can_be_resumed(tmp_path: Path) -> None:
    made = scheduler()
    whole = solve(trajectory(made, 1, 1), Speculative(6))
    half = solve(
        trajectory(made, 1, 1), Speculative(6), max_iterations=2, throw=False
    ).state
    checkpoint.save(tmp_path, half)
    state = checkpoint.load(tmp_path)
    again = solve(trajectory(made, 1, 1), Speculative(6), state=state)
    assert torch.equal(again.value["x"], whole.value["x"])
    assert whole.stats.num_iterations < STEPS


def test_an_output_that_is_not_finite_ends_the_run_before_it() -> None:
    made = scheduler()
    broken = trajectory(made, 1, 1)
    exact, last = broken.denoiser, broken.timesteps[-1]
    broken.denoiser = lambda x, t: exact(x, t) * (math.nan if t == last else 1.0)
    with pytest.raises(NotConverged, match=f"Step {STEPS - 1}: not finite") as error:
        solve(broken, Speculative(6))
    assert error.value.solution.value["x"].isfinite().all()


def test_the_toybox_takes_it() -> None:
    prior: Any = toybox.load()
    prior.set_progress_bar_config(disable=True)
    prior.scheduler = DDPMScheduler.from_config(prior.scheduler.config)
    found: list[Any] = []
    images = sample(
        prior,
        "a red mug",
        num_inference_steps=12,
        solver=Speculative(4),
        generator=torch.Generator().manual_seed(0),
        on_solution=found.append,
        output_type="np",
    ).images
    assert images.shape == (1, 32, 32, 3)
    assert found[0].stats.num_iterations <= 12


def test_what_draws_no_gaussian_is_refused() -> None:
    for made, settings, complaint in (
        (scheduler(DDIMScheduler), {}, "draws no step from a Gaussian"),
        (scheduler(), {"form": "published"}, "stands for no image"),
    ):
        with pytest.raises(ValueError, match=complaint):
            solve(trajectory(made, 1, 0, **settings), Speculative(4))
    learned = DDPMScheduler(variance_type="learned")
    learned.set_timesteps(STEPS)
    with pytest.raises(ValueError, match="learns the variance"):
        Transitions(trajectory(learned, 1, 0))
    with pytest.raises(ValueError, match="at least 1"):
        Speculative(0)
    with pytest.raises(TypeError, match="is no `SamplingTrajectory`"):
        solve(TOYS["sde"].make(), Speculative(4))
    state = solve(
        trajectory(scheduler(), 1, 0),
        PicardSolver(SlidingWindow(4)),
        max_iterations=2,
        throw=False,
    ).state
    again = solve(trajectory(scheduler(), 1, 0), Speculative(4), state=state)
    assert again.state.step == STEPS  # another solver's guesses are left out
