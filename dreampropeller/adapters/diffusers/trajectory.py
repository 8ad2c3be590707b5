r"""Diffusion sampling as a trajectory (ParaDiGMS, and its semi-linear form).

A sampler of `diffusers` turns noise $x_0$ into an image $x_T$ by

$$x_{t+1} = \Phi_t(x_t, c_t, m(x_t, t)) + \sigma_t z_t,$$

where the model output $m$ is expensive and the scheduler's step $\Phi$ is not; the
carry $c$ is a multistep scheduler's history. Two forms of it are trajectories:

| form | drift | update |
|---|---|---|
| semi-linear | $m(x_t, t)$, guided | the scheduler's own `step` |
| published | $\Phi_t(x_t, m(x_t, t)) + \sigma_t z_t - x_t$ | $x_t + \mathrm{drift}$ |

In the semi-linear form only the model output depends on the guess; the terms linear in
$x$ and the history are exact, so that fewer iterations are needed. A step's noise is
drawn once, from the caller's generator in step order, as a pipeline draws it.

References:
    Shih et al. 2023, arXiv 2305.16317, Algorithm 1 (the published form).
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from dreampropeller.adapters.diffusers.guidance import guided, repeated
from dreampropeller.count_check import refuse_counting
from dreampropeller.identity import Fingerprint, plain, shape_of
from dreampropeller.trajectory import Drift, Trajectory
from dreampropeller.tree import Aux, Nest, State
from dreampropeller.verification import Checked

Form = Literal["semi-linear", "published"]
Generators: TypeAlias = "torch.Generator | list[torch.Generator] | None"

HISTORY: Mapping[str, tuple[str, ...]] = {
    "DDPMScheduler": (),
    "DDPMParallelScheduler": (),
    "DDIMScheduler": (),
    "DDIMParallelScheduler": (),
    "DPMSolverMultistepScheduler": ("model_outputs", "lower_order_nums", "_step_index"),
}
"""Attributes that the `step` of each known scheduler changes: the carry."""


def check_scheduler(scheduler: Any, form: str = "semi-linear") -> None:
    """Refuse a scheduler or a form that cannot be a trajectory.

    Raises:
        ValueError: The scheduler is unknown, or its increments depend on history and
            the form is "published".
    """
    name = type(scheduler).__name__
    if form not in ("semi-linear", "published"):
        raise ValueError(
            f"`form` is {form!r}: write `semi-linear` (the model's output is the "
            "drift) or `published` (the increment is)."
        )
    if name not in HISTORY:
        raise ValueError(
            f"`{name}` is no scheduler that can be sampled in parallel. Known: "
            f"{', '.join(f'`{known}`' for known in HISTORY)}. Write, for example, "
            "`pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler."
            "config)`."
        )
    if HISTORY[name] and form == "published":
        raise ValueError(
            f"`{name}` is a multistep method: its increment reads the outputs of "
            "earlier steps, so it is no function of step and state. Write "
            '`form="semi-linear"`, which keeps that history in the carry.'
        )


@dataclass(frozen=True)
class Denoiser:
    r"""A U-Net with its conditions and guidance: the model output for noisy images.

    With guidance the U-Net evaluates both branches at once, the unconditional first,
    and $m = m_\varnothing + s\,(m_c - m_\varnothing)$, rescaled to the standard
    deviation of $m_c$ by the fraction $\phi$. A learned variance, the channels beyond
    those of the image, is that of $m_c$.

    Args:
        unet: Called as ``unet(x, timestep, **conditions)``; returns a tuple.
        conditions: Keyword arguments. Tensors whose first axis is the batch (images, or
            twice as many with guidance) are repeated for a batched window.
        guidance_scale: The scale $s$; None: the U-Net's output is used unchanged.
        guidance_rescale: The fraction $\phi$, from 0 to 1.
        keeps_variance: Pass a learned variance on to the scheduler.

    References:
        Ho and Salimans 2022, arXiv 2207.12598; Lin et al. 2023, arXiv 2305.08891,
        Eqs. 15 and 16.
    """

    unet: Callable[..., Any]
    conditions: Mapping[str, Any]
    guidance_scale: float | None = None
    guidance_rescale: float = 0.0
    keeps_variance: bool = False

    def __call__(self, x: Tensor, timestep: Tensor) -> Tensor:
        """The model output for one step.

        Args:
            x: Noisy images, shape ``(images, channels, height, width)``.
            timestep: The scheduler's timestep, a scalar.
        """
        model_output = self.unet(self._doubled(x), timestep, **self.conditions)[0]
        return self.guided(model_output, x.shape[1])

    def batch(self, xs: Sequence[Tensor], timesteps: Sequence[Tensor]) -> list[Tensor]:
        """The model outputs for several steps, from one call of the U-Net."""
        inputs = torch.cat([self._doubled(x) for x in xs])
        size = len(inputs) // len(xs)
        times = torch.stack(list(timesteps)).repeat_interleave(size).to(inputs.device)
        conditions = repeated(dict(self.conditions), size, len(xs))
        outputs = self.unet(inputs, times, **conditions)[0].chunk(len(xs))
        return [self.guided(model_output, xs[0].shape[1]) for model_output in outputs]

    def _doubled(self, x: Tensor) -> Tensor:
        return x if self.guidance_scale is None else torch.cat([x, x])

    def guided(self, model_output: Tensor, channels: int) -> Tensor:
        """The guided output, from the U-Net's output for `channels` latent channels."""
        if self.guidance_scale is not None:
            without, given = model_output.chunk(2)
            without = without[:, :channels]
            given, variance = given[:, :channels], given[:, channels:]
            model_output = guided(
                without, given, self.guidance_scale, self.guidance_rescale
            )
            if variance.shape[1]:
                model_output = torch.cat([model_output, variance], 1)
        return model_output if self.keeps_variance else model_output[:, :channels]


def worst_image(new: State, old: State) -> Tensor:
    """The published norm: the largest mean square change of an image of the batch."""
    difference = new["x"].float() - old["x"].float()
    return difference.square().flatten(1).mean(1).max()


class SamplingTrajectory(Trajectory[Nest]):
    r"""From latents to a sample; the state is ``{"x": latents}``.

    Errors are in the published unit: that of the state at step $t$ is divided by the
    variance of the posterior at its timestep,

    $$\sigma_t^2 = \frac{1 - \bar\alpha_{t+1}}{1 - \bar\alpha_t}
      \Bigl(1 - \frac{\bar\alpha_t}{\bar\alpha_{t+1}}\Bigr),$$

    whatever the sampler's own noise is, and compared with the squared tolerance:
    ``FixedThreshold(tolerance**2)`` with the norm `worst_image`.

    Args:
        denoiser: The model output as a function of x and timestep: a `Denoiser`, or a
            function (`BatchedDispatcher` also needs its ``batch``).
        scheduler: Scheduler after ``set_timesteps``; it is copied and not changed.
        latents: Initial noise, shape ``(images, channels, h, w)``.
        generator: Source of the noise of stochastic samplers, as for a pipeline. It
            ends in the state that a sequential run would leave. None: torch's global
            generator.
        eta: Noise of DDIM, from 0 (none); other samplers ignore it.
        form: Form of the drift: "semi-linear" or "published".
        timesteps: Timesteps to take; default: all of the scheduler's.
        **settings: Further arguments of the scheduler's `step`.

    Attributes:
        stepper: The scheduler's step as a function.
        draws: States of the generators before each step's draw.

    Raises:
        ValueError: `check_scheduler` refuses it, or `eta` is negative.
    """

    advice = "Run the pipeline in float32, because half precision overflows."

    def __init__(
        self,
        denoiser: Callable[[Tensor, Tensor], Tensor],
        scheduler: Any,
        latents: Tensor,
        *,
        generator: Generators = None,
        eta: float = 0.0,
        form: Form = "semi-linear",
        timesteps: Tensor | None = None,
        **settings: Any,
    ) -> None:
        check_scheduler(scheduler, form)
        if not eta >= 0:
            raise ValueError(f"`eta` is {eta}: write 0 (no noise) to 1 (as DDPM).")
        self.denoiser, self.form = denoiser, form
        self.latents = latents.detach().clone()
        self.timesteps = scheduler.timesteps if timesteps is None else timesteps
        self.num_steps = len(self.timesteps)
        self.stepper = Stepper(scheduler, self.timesteps, {"eta": eta, **settings})
        self.draws = self._record(generator)

    def fingerprint(self) -> Fingerprint:
        """Timesteps, form, scheduler with its settings, and the random draws."""
        return {
            **super().fingerprint(),
            "timesteps": self.timesteps.tolist(),
            "form": self.form,
            "scheduler": self.stepper.name,
            "settings": plain(dict(self.stepper.scheduler.config)),
            "step": plain(self.stepper.settings),
            "latents": shape_of(self.latents),
        }

    def init(self) -> tuple[State, Nest]:
        """The latents, and the history before the first step."""
        return {"x": self.latents.clone()}, self.stepper.history()

    def make_drift(self, device: torch.device) -> _Drift:
        """The model output, or the increment, of a step."""
        del device  # the model stays where the pipeline put it
        return _Drift(self)

    def update(
        self, step: int, y: State, carry: Nest, drift: State
    ) -> tuple[State, Nest]:
        """The scheduler's step, or the sum of state and increment."""
        if self.form == "published":
            return {"x": y["x"] + drift["x"]}, carry
        x, carry = self.advance(step, y["x"], carry, drift["x"])
        return {"x": x}, carry

    def advance(
        self, step: int, x: Tensor, carry: Nest, model_output: Tensor
    ) -> tuple[Tensor, Nest]:
        """The scheduler's own step, with the noise of this step."""
        return self.stepper(step, x, carry, model_output, restored(self.draws[step]))

    def check(self, step: int, y: State, carry: Nest, drift: Drift) -> Checked | None:
        """Also refuse a model that counts its calls."""
        found = super().check(step, y, carry, drift)
        if found is not None:
            refuse_counting(self.denoiser, lambda: drift(step, y))
        return found

    def error_scale(self, step: int) -> float:
        """The posterior variance at the timestep of a state; 0 at the end."""
        if step >= self.num_steps:
            return 0.0
        kept = self.stepper.scheduler.alphas_cumprod
        now = float(kept[int(self.timesteps[step])])
        last = step + 1 == self.num_steps
        after = 1.0 if last else float(kept[int(self.timesteps[step + 1])])
        # The floor is the published one: an exact state passes even where it is zero.
        return max((1 - after) / (1 - now) * (1 - now / after), 1e-20)

    def _record(self, generator: Generators) -> list[list[Draw]]:
        """The generators' states before each step's draw.

        The scheduler itself runs through all steps with empty model outputs, so that
        its draws are its own; the caller's generators advance with it.
        """
        sources = _sources(generator, self.latents.device)
        wide = self.stepper.learns_variance and not HISTORY[self.stepper.name]
        channels = self.latents.shape[1] * (2 if wide else 1)
        empty = self.latents.new_zeros(
            (len(self.latents), channels, *self.latents.shape[2:])
        )
        x, carry = self.latents, self.stepper.history()
        draws: list[list[Draw]] = []
        with torch.no_grad():
            for step in range(self.num_steps):
                now = [(source.device, source.get_state()) for source in sources]
                before = draws[-1] if draws else now
                same = all(
                    torch.equal(a, b)
                    for (_, a), (_, b) in zip(now, before, strict=True)
                )
                draws.append(before if same else now)  # one copy while nothing is drawn
                x, carry = self.stepper(step, x, carry, empty, sources)
        return draws


@dataclass(frozen=True)
class _Drift:
    trajectory: SamplingTrajectory

    def __call__(self, step: int, y: State) -> tuple[State, Aux]:
        with torch.no_grad():
            timestep = self.trajectory.timesteps[step]
            model_output = self.trajectory.denoiser(y["x"], timestep)
            return self._of(step, y, model_output), {}

    def batch(
        self, steps: Sequence[int], ys: Sequence[State]
    ) -> list[tuple[State, Aux]]:
        """Model outputs of several steps from one call of the model."""
        denoiser: Any = self.trajectory.denoiser
        if not hasattr(denoiser, "batch"):
            raise ValueError(
                "This denoiser takes one step at a time. Give it a method "
                "`batch(xs, timesteps)`, as `Denoiser` has, or use `InlineDispatcher`."
            )
        with torch.no_grad():
            timesteps = [self.trajectory.timesteps[step] for step in steps]
            outputs = denoiser.batch([y["x"] for y in ys], timesteps)
            triples = zip(steps, ys, outputs, strict=True)
            return [
                (self._of(step, y, model_output), {})
                for step, y, model_output in triples
            ]

    def _of(self, step: int, y: State, model_output: Tensor) -> State:
        if self.trajectory.form == "semi-linear":
            return {"x": model_output}
        after, _ = self.trajectory.advance(step, y["x"], {}, model_output)
        return {"x": after - y["x"]}


class Stepper:
    """A scheduler's `step` as a function: its history is an argument and a result."""

    def __init__(
        self, scheduler: Any, timesteps: Tensor, settings: dict[str, Any]
    ) -> None:
        self.name = type(scheduler).__name__
        self.scheduler = copy.copy(scheduler)  # `step` rebinds and changes no tensor
        self._fields = HISTORY[self.name]
        self._start = {name: getattr(scheduler, name) for name in self._fields}
        known = inspect.signature(scheduler.step).parameters
        self._timesteps = timesteps
        self.settings = {n: v for n, v in settings.items() if n in known}
        self.learns_variance = learns_variance(scheduler)

    def history(self) -> Nest:
        """The scheduler's history before the first step."""
        return {name: _own(value) for name, value in self._start.items()}

    def __call__(
        self,
        step: int,
        x: Tensor,
        carry: Nest,
        model_output: Tensor,
        generators: list[torch.Generator],
    ) -> tuple[Tensor, Nest]:
        """The state after a step, and the history."""
        for name in self._fields:
            setattr(self.scheduler, name, _own(carry[name]))
        after = self.scheduler.step(
            model_output,
            self._timesteps[step],
            x,
            generator=generators if len(generators) > 1 else generators[0],
            return_dict=False,
            **self.settings,
        )[0]
        return after, {name: getattr(self.scheduler, name) for name in self._fields}


def learns_variance(scheduler: Any) -> bool:
    """Whether a scheduler reads a variance from additional model channels."""
    return scheduler.config.get("variance_type") in ("learned", "learned_range")


Draw: TypeAlias = tuple[torch.device, Tensor]


def _sources(generator: Generators, device: torch.device) -> list[torch.Generator]:
    if isinstance(generator, list):
        return generator
    if generator is not None:
        return [generator]
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        return [torch.cuda.default_generators[index]]
    return [torch.default_generator]


def restored(draws: list[Draw]) -> list[torch.Generator]:
    """Private generators in the recorded states of the caller's."""
    restored = []
    for device, state in draws:
        generator = torch.Generator(device)
        generator.set_state(state)
        restored.append(generator)
    return restored


def _own(value: Any) -> Any:
    """A copied list: `step` shifts the multistep history in place."""
    return list(value) if isinstance(value, list) else value
