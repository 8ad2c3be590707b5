r"""A sampler's steps as draws from Gaussians, $x_{t+1} \sim N(\mu_t, \sigma_t^2)$."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from dreampropeller.adapters.diffusers.trajectory import SamplingTrajectory, restored
from dreampropeller.rng import StepRandom


class Estimates:
    r"""The estimates of the clean image that model outputs stand for.

    With $x_t = \alpha_t x_0 + \varsigma_t \epsilon$ an output, whether it predicts ε,
    $v = \alpha_t \epsilon - \varsigma_t x_0$ or $x_0$, stands for an estimate of $x_0$.

    Args:
        trajectory: The trajectory.

    Raises:
        ValueError: The form is "published".
    """

    def __init__(self, trajectory: SamplingTrajectory) -> None:
        if trajectory.form != "semi-linear":
            raise ValueError(
                "In the published form a drift is an increment, which stands for no "
                'image: write `form="semi-linear"`.'
            )
        self._trajectory = trajectory
        self._prediction: str = trajectory.stepper.scheduler.config.prediction_type

    def clean(self, step: int, x: Tensor, model_output: Tensor) -> Tensor:
        """The estimate of the clean images, shape as x."""
        alpha, sigma = self._scales(step)
        if self._prediction == "epsilon":
            return (x - sigma * model_output) / alpha
        if self._prediction == "v_prediction":
            return alpha * x - sigma * model_output
        return model_output

    def output_of(self, step: int, x: Tensor, clean: Tensor) -> Tensor:
        """The model output whose estimate of the clean images is `clean`."""
        alpha, sigma = self._scales(step)
        if self._prediction == "epsilon":
            return (x - alpha * clean) / sigma
        if self._prediction == "v_prediction":
            return (alpha * x - clean) / sigma
        return clean

    def _scales(self, step: int) -> tuple[float, float]:
        kept = self._trajectory.stepper.scheduler.alphas_cumprod
        now = float(kept[int(self._trajectory.timesteps[step])])
        return math.sqrt(now), math.sqrt(1 - now)


class Transitions(Estimates):
    """The Gaussian transitions of an ancestral sampler.

    Args:
        trajectory: The trajectory.

    Raises:
        ValueError: The sampler keeps history or draws nothing, or the model learns the
            variance.
    """

    def __init__(self, trajectory: SamplingTrajectory) -> None:
        super().__init__(trajectory)
        stepper = trajectory.stepper
        drawn = stepper.name.startswith("DDPM") or stepper.settings.get("eta", 0) > 0
        if stepper.history() or not drawn:
            raise ValueError(
                f"`{stepper.name}` draws no step from a Gaussian: write "
                "`DDPMScheduler`, or `DDIMScheduler` and `eta=1`."
            )
        if stepper.learns_variance:
            raise ValueError(
                "The model learns the variance, which a draft does not know: write "
                '`DDPMScheduler.from_config(config, variance_type="fixed_small")`.'
            )

    def advance(self, step: int, x: Tensor, model_output: Tensor) -> Tensor:
        """The next state, with the noise of the step."""
        return self._trajectory.advance(step, x, {}, model_output)[0]

    def noise(self, step: int) -> tuple[float, Tensor]:
        r"""The standard deviation σ of a step's noise, and its standard normal ξ."""
        like = self._trajectory.latents
        generators = restored(self._trajectory.draws[step])
        shape = (len(like) // len(generators), *like.shape[1:])
        drawn = [  # a generator for all images, or one for each
            torch.randn(shape, generator=one, device=one.device, dtype=like.dtype)
            for one in generators
        ]
        noise = torch.cat(drawn).to(like.device)
        empty = torch.zeros_like(like)  # its step is the noise alone
        scaled, _ = self._trajectory.advance(step, empty, {}, empty)
        return float(scaled.double().norm() / noise.double().norm()), noise

    def uniforms(self, step: int) -> Tensor:
        """A uniform number per image, independent of all noise, shape ``(images,)``."""
        states = [state for _, state in self._trajectory.draws[step]]
        text = b"".join(state.cpu().numpy().tobytes() for state in states)
        key = int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "little")
        generator = StepRandom(key).generator(step, "acceptance")
        return torch.rand(len(self._trajectory.latents), generator=generator).double()
