"""Parallel sampling equals the pipelines' own loops: tiny real ones and the toybox."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.deepfloyd_if.pipeline_if import IFPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import (
    StableDiffusionPipeline,
)
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import (
    DPMSolverMultistepScheduler,
)
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler

import dreampropeller as dp
from dreampropeller import checkpoint
from dreampropeller.adapters.diffusers import (
    Denoiser,
    SamplingTrajectory,
    measure,
    sample,
    worst_image,
)
from systems.toybox import pipeline as toybox
from tests.helpers import tree_equal
from tests.systems.test_priors import deep_floyd as deep_floyd
from tests.systems.test_priors import stable_diffusion as stable_diffusion

# Of diffusers' own multistep scheduler under numpy 2, not of ours.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")
STEPS = 6
SCHEDULERS: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "ddpm": (DDPMScheduler, {}, {}),
    "ddim": (DDIMScheduler, {}, {}),
    "ddim-noisy": (DDIMScheduler, {}, {"eta": 0.7}),
    "dpm++": (DPMSolverMultistepScheduler, {}, {}),
    "dpm++3": (DPMSolverMultistepScheduler, {"solver_order": 3}, {}),
    "sde-dpm++": (
        DPMSolverMultistepScheduler,
        {"algorithm_type": "sde-dpmsolver++"},
        {},
    ),
}


def noise(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def sd(request: pytest.FixtureRequest) -> Callable[[str], tuple[Any, dict[str, Any]]]:
    """Makes a tiny Stable Diffusion with a scheduler, and what to call it with."""
    folder: Path = request.getfixturevalue("stable_diffusion")

    def make(name: str) -> tuple[Any, dict[str, Any]]:
        whole: Any = quiet(
            StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
        )
        kind, settings, arguments = SCHEDULERS[name]
        whole.scheduler = kind.from_config(whole.scheduler.config, **settings)
        return whole, {"num_inference_steps": STEPS, "output_type": "np", **arguments}

    return make


def check(whole: Any, prompt: Any, arguments: dict[str, Any]) -> None:
    """The pipeline's own images, at tolerance 0 and at window 1."""
    generator = noise()
    own = whole(prompt, generator=generator, **arguments)
    after = generator.get_state()
    for settings in (
        {"window": 4, "tolerance": 0},
        {"window": 4, "tolerance": 0, "acceleration": dp.Anderson(order=2)},
        {"window": 1, "tolerance": 9.0},
    ):
        generator = noise()
        made = sample(whole, prompt, generator=generator, **settings, **arguments)
        assert type(made) is type(own)
        assert torch.equal(torch.as_tensor(made.images), torch.as_tensor(own.images))
        assert torch.equal(generator.get_state(), after)
        assert len(whole.scheduler.timesteps) == arguments["num_inference_steps"]
        assert "forward" not in vars(whole.unet)
        assert "step" not in vars(whole.scheduler)


@pytest.mark.parametrize(
    "name",
    ["ddpm", "ddim-noisy", "dpm++3"]
    + [pytest.param(n, marks=pytest.mark.long) for n in ("ddim", "dpm++", "sde-dpm++")],
)
def test_stable_diffusion_bit_by_bit(sd: Any, name: str) -> None:
    whole, arguments = sd(name)
    check(whole, ["a", "b"], arguments)


def test_guidance_is_rescaled_as_the_pipeline_does(sd: Any) -> None:
    whole, arguments = sd("ddim")
    check(whole, "a", {**arguments, "guidance_rescale": 0.7, "negative_prompt": "b"})
    check(whole, "a", {**arguments, "guidance_scale": 1.0})


def test_a_generator_a_picture_and_none_at_all(sd: Any) -> None:
    whole, arguments = sd("ddpm")
    own = whole(["a", "b"], generator=[noise(1), noise(2)], **arguments).images
    arguments |= {"window": 3, "tolerance": 0}
    made = sample(whole, ["a", "b"], generator=[noise(1), noise(2)], **arguments)
    assert (made.images == own).all()
    one = sample(whole, "b", generator=noise(2), **arguments).images
    assert abs(one[0] - own[1]).max() < 1e-4  # the batch size picks other kernels
    for name in ("window", "tolerance"):
        arguments.pop(name)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        own = whole("a", **arguments).images
        torch.manual_seed(5)
        made = sample(whole, "a", window=3, tolerance=0, **arguments).images
    assert (made == own).all()


@pytest.mark.parametrize(
    "guidance_scale", [pytest.param(1.0, marks=pytest.mark.long), 7.0]
)
def test_deep_floyd_keeps_its_learned_variance(
    request: pytest.FixtureRequest, guidance_scale: float
) -> None:
    folder = request.getfixturevalue("deep_floyd")
    whole: Any = quiet(IFPipeline.from_pretrained(folder, safety_checker=None))
    arguments: Any = {"guidance_scale": guidance_scale, "clean_caption": False}
    arguments |= {"num_inference_steps": STEPS, "output_type": "pt"}
    check(whole, ["a", "a a"], arguments)
    kind: Any = {
        "variance_type": "fixed_small"
    }  # the model's variance is then left out
    whole.scheduler = DDPMScheduler.from_config(whole.scheduler.config, **kind)
    check(whole, "a", arguments)


def test_the_toybox_bit_by_bit() -> None:
    prior = quiet(toybox.load())
    check(prior, ["a red mug"], {"num_inference_steps": 5, "output_type": "np"})


def test_a_tolerance_saves_iterations_and_stays_close() -> None:
    prior = quiet(toybox.load())
    arguments: Any = {"num_inference_steps": 25, "output_type": "np"}
    own = prior("a red mug, side view", generator=noise(), **arguments).images
    found = []
    made = sample(
        prior,
        "a red mug, side view",
        window=8,
        tolerance=0.01,
        generator=noise(),
        on_solution=found.append,
        **arguments,
    ).images
    (solution,) = found
    assert sum(solution.stats.strides) == 25
    assert solution.stats.num_iterations <= 19
    assert abs(made - own).mean() < 0.02


def test_acceleration_reaches_the_solver_and_stays_close(sd: Any) -> None:
    whole, arguments = sd("ddim")
    own = whole("a", generator=noise(), **arguments).images
    depth: list[int] = []
    made = sample(
        whole,
        "a",
        window=STEPS,
        tolerance=1e-3,
        acceleration=dp.Anderson(memory=3),
        generator=noise(),
        on_iteration=lambda state, _: depth.append(len(state.acceleration.records)),
        **arguments,
    ).images
    assert max(depth) == 3
    assert abs(made - own).max() < 1e-3


def trajectory(whole: Any, form: Any = "semi-linear", **settings: Any) -> Any:
    """A trajectory built by hand around the tiny U-Net, without words."""
    words = torch.randn(1, 12, 16, generator=noise(7))
    denoiser = Denoiser(
        whole.unet, {"encoder_hidden_states": words, "return_dict": False}
    )
    whole.scheduler.set_timesteps(8)
    latents = torch.randn(1, 4, 8, 8, generator=noise(8))
    return SamplingTrajectory(
        denoiser, whole.scheduler, latents, generator=noise(9), form=form, **settings
    )


@pytest.mark.parametrize("name", ["ddpm", "ddim-noisy"])
def test_both_forms_are_the_same_recurrence(sd: Any, name: str) -> None:
    settings = SCHEDULERS[name][2]
    whole, _ = sd(name)
    plain = dp.solve(trajectory(whole, **settings), dp.Sequential()).value
    published = trajectory(whole, "published", **settings)
    one = dp.solve(published, dp.Sequential()).value
    assert not torch.equal(one["x"], trajectory(whole).latents)
    torch.testing.assert_close(one["x"], plain["x"], atol=1e-4, rtol=1e-4)
    exact = dp.PicardSolver(dp.SlidingWindow(3), dp.FixedThreshold(0))
    assert tree_equal(dp.solve(published, exact).value, one)


@pytest.mark.parametrize(
    ("name", "acceleration"), [("ddpm", None), ("dpm++3", dp.Anderson(order=2))]
)
def test_a_resumed_solve_is_the_uninterrupted_one(
    sd: Any, name: str, acceleration: dp.Anderson | None, tmp_path: Path
) -> None:
    """History and noise survive a checkpoint."""
    whole, _ = sd(name)
    solver = dp.PicardSolver(
        dp.SlidingWindow(3),
        dp.FixedThreshold(1e-3),
        acceleration=acceleration,
    )
    straight = dp.solve(trajectory(whole), solver)
    part = dp.solve(trajectory(whole), solver, max_iterations=3, throw=False)
    checkpoint.save(tmp_path, part.state)
    rest = dp.solve(trajectory(whole), solver, state=checkpoint.load(tmp_path))
    assert tree_equal(rest.value, straight.value)
    assert rest.stats == straight.stats


def test_errors_are_in_units_of_the_posterior_variance(sd: Any) -> None:
    whole, _ = sd("ddpm")
    found = trajectory(whole)
    times = whole.scheduler.timesteps.tolist()
    for step in range(len(times) - 1):
        expected = float(whole.scheduler._get_variance(times[step]))
        assert found.error_scale(step) == pytest.approx(expected, rel=1e-4)
    assert found.error_scale(len(times)) == 0
    old = {"x": torch.zeros(2, 1, 2, 2)}
    new = {"x": torch.stack([torch.full((1, 2, 2), 0.1), torch.full((1, 2, 2), 0.3)])}
    assert float(worst_image(new, old)) == pytest.approx(0.09)


def test_a_model_seen_in_order_has_a_pure_drift(sd: Any) -> None:
    whole, _ = sd("ddpm")
    found = trajectory(whole, "published")
    drift = found.make_drift(torch.device("cpu"))
    y, _ = found.init()
    first = drift(2, y)[0]
    drift(0, y)
    assert tree_equal(drift(2, y)[0], first)
    assert tree_equal(y, found.init()[0])
    with pytest.raises(ValueError, match="cannot split a step into 2 shards"):
        found.make_shard(torch.device("cpu"), 0, 2)


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_a_batched_window_is_close(sd: Any, guidance_scale: float) -> None:
    whole, arguments = sd("ddpm")
    arguments |= {"guidance_scale": guidance_scale, "window": 4, "tolerance": 1e-3}
    one, many = (
        sample(whole, ["a", "b"], dispatcher=kind, generator=noise(), **arguments)
        for kind in (dp.InlineDispatcher, dp.BatchedDispatcher)
    )
    assert abs(one.images - many.images).max() < 1e-4


def test_deep_floyd_batched(request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue("deep_floyd")
    whole: Any = quiet(IFPipeline.from_pretrained(folder, safety_checker=None))
    arguments: Any = {"clean_caption": False, "output_type": "pt", "tolerance": 1e-3}
    arguments |= {"num_inference_steps": STEPS, "window": 4}
    one, many = (
        sample(whole, ["a", "a a"], dispatcher=kind, generator=noise(), **arguments)
        for kind in (dp.InlineDispatcher, dp.BatchedDispatcher)
    )
    torch.testing.assert_close(one.images, many.images, atol=1e-4, rtol=1e-4)


def test_a_calibration_decides_between_window_and_plain_loop(
    sd: Any, tmp_path: Path
) -> None:
    whole, arguments = sd("ddim")
    arguments |= {"window": 3}
    found = measure(whole, "a", **arguments)
    assert found.window == 3
    assert found.sequential > 0
    assert found.batched > 0
    for gain, iterations in ((2.0, 3), (0.5, STEPS)):
        record = dataclasses.replace(found, batched=found.sequential / gain)
        record.save(tmp_path / "calibration.json")
        record = dp.Calibration.load(tmp_path / "calibration.json")
        solutions = []
        arguments |= {"calibration": record, "on_solution": solutions.append}
        sample(whole, "a", tolerance=99.0, generator=noise(), **arguments)
        assert solutions[0].stats.num_iterations == iterations


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_inference_steps": 0}, r"`num_inference_steps` is 0: write 1 or more"),
        ({"window": 0}, r"`window` is 0: write 1 or more"),
        ({"tolerance": -1.0}, r"`tolerance` is -1\.0: write 0"),
        ({"tolerance": float("nan")}, r"`tolerance` is nan"),
        ({"callback_on_step_end": print}, r"Write `on_iteration`"),
        ({"eta": -1.0}, r"`eta` is -1\.0: write 0"),
        (
            {"acceleration": dp.Anderson(), "solver": dp.Sequential()},
            r"`acceleration` has no effect beside `solver`",
        ),
    ],
)
def test_bad_input_is_answered_with_what_to_write(
    sd: Any, change: dict[str, Any], message: str
) -> None:
    whole, arguments = sd("ddim")
    with pytest.raises(ValueError, match=message):
        sample(whole, "a", **{**arguments, **change})
    assert "forward" not in vars(whole.unet)


def test_what_cannot_be_sampled_is_refused(sd: Any) -> None:
    whole, arguments = sd("dpm++")
    with pytest.raises(ValueError, match=r"multistep.*Write `form=\"semi-linear\"`"):
        sample(whole, "a", form="published", **arguments)
    whole.scheduler = EulerDiscreteScheduler.from_config(whole.scheduler.config)
    with pytest.raises(ValueError, match=r"`EulerDiscreteScheduler` is no.*Known: "):
        sample(whole, "a", **arguments)
    with pytest.raises(ValueError, match=r"`object` has no `unet`"):
        sample(object(), "a", **arguments)


def asks_twice(self: Any, num_inference_steps: int, **more: Any) -> None:
    self.scheduler.set_timesteps(num_inference_steps)
    for _ in "ab":
        self.unet(torch.zeros(1, 4, 8, 8), 1, torch.zeros(1, 12, 16))


def shows_more(self: Any, num_inference_steps: int, **more: Any) -> None:
    self.scheduler.set_timesteps(num_inference_steps)
    x = torch.zeros(1, 4, 8, 8)
    answer = self.unet(x + 1, 1, torch.zeros(1, 12, 16), return_dict=False)[0]
    self.scheduler.step(answer, 1, x)


@pytest.mark.parametrize(
    ("loop", "message"),
    [(asks_twice, "asks its U-Net more than once"), (shows_more, "than the latents")],
)
def test_other_kinds_of_loops_are_refused(sd: Any, loop: Any, message: str) -> None:
    whole, arguments = sd("ddim")
    whole.__class__ = type("Other", (StableDiffusionPipeline,), {"__call__": loop})
    with pytest.raises(ValueError, match=message):
        sample(whole, "a", **arguments)
    assert "forward" not in vars(whole.unet)
