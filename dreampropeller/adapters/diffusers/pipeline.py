"""Parallel sampling with a diffusers pipeline: `sample` in place of calling it.

The pipeline runs its own code before and after its loop (prompts, latents, decoding,
safety checker); only the loop is taken over. For that the pipeline sees, for the time
of the call, a scheduler of a single step: its U-Net call is where the conditions are
read, and its scheduler's step is where the whole trajectory is solved. So every
argument of the pipeline that reaches its U-Net works here too.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from dreampropeller.acceleration.anderson import Anderson
from dreampropeller.adapters.diffusers.trajectory import (
    Denoiser,
    Form,
    SamplingTrajectory,
    check_scheduler,
    learns_variance,
    worst_picture,
)
from dreampropeller.calibration import Calibration, calibrate, choose
from dreampropeller.dispatch.base import Dispatcher, InlineDispatcher
from dreampropeller.picard import PicardSolver
from dreampropeller.predictor import Momentum
from dreampropeller.solution import Iteration, Solution
from dreampropeller.solver import Solver, SolverState, solve
from dreampropeller.threshold import FixedThreshold
from dreampropeller.trajectory import Trajectory
from dreampropeller.window import SlidingWindow

OnIteration = Callable[[SolverState[Any], Iteration], bool | None]


def sample(
    pipeline: Any,
    prompt: str | list[str] | None = None,
    *,
    num_inference_steps: int,
    window: int = 10,
    tolerance: float = 0.1,
    form: Form = "semi-linear",
    acceleration: Anderson | None = None,
    dispatcher: Callable[[Trajectory[Any]], Dispatcher] = InlineDispatcher,
    calibration: Calibration | None = None,
    solver: Solver | None = None,
    on_iteration: OnIteration | None = None,
    on_solution: Callable[[Solution[Any]], None] | None = None,
    **arguments: Any,
) -> Any:
    """Sample with a pipeline, many steps at a time.

    With tolerance 0, or window 1, the result is the pipeline's own bit for bit (on
    CPU, semi-linear form, drifts evaluated one by one: `test_diffusers.py`).

    Args:
        pipeline: Stable Diffusion, DeepFloyd IF, the toybox, or another pipeline whose
            U-Net is asked once a step; with a scheduler of `sampling.HISTORY`.
        prompt: As for the pipeline.
        num_inference_steps: As for the pipeline.
        window: Steps tried at once.
        tolerance: Largest change of a state between two iterations that passes, as a
            share of the noise's standard deviation at its timestep; published: 0.1.
        form: "semi-linear", or "published" for comparison.
        acceleration: `Anderson()` takes fewer iterations where windows are wide and
            tolerances small (`docs/sampling.md`).
        dispatcher: Where the model runs: `InlineDispatcher` (one step after the
            other), `BatchedDispatcher` (a window in one call, close but not bitwise) or
            `DistributedDispatcher` (a window spread over devices).
        calibration: What `measure` found: a batched window if that pays on this device,
            else the plain loop; in place of `dispatcher`.
        solver: Another solver, in place of `window`, `tolerance` and `acceleration`;
            its threshold is the squared tolerance.
        on_iteration: As for `solve`; it cannot stop the solve.
        on_solution: Called with the solution: iterations, evaluations, strides.
        **arguments: Everything else the pipeline takes.

    Returns:
        What the pipeline returns.

    Raises:
        ValueError: A number is out of range, the pipeline or its scheduler cannot be
            sampled in parallel, a callback of the pipeline's loop is given, or an
            acceleration beside a solver.

    Example:
        >>> images = sample(pipeline, "a red mug", num_inference_steps=100).images
    """
    _check(pipeline, num_inference_steps, window, tolerance, form, arguments)
    if solver is not None and acceleration is not None:
        raise ValueError(
            "`acceleration` has no effect beside `solver`: write `solver=PicardSolver("
            "…, acceleration=Anderson())`."
        )
    wanted = solver or solver_for(window, tolerance, form, acceleration)

    def run(trajectory: SamplingTrajectory, advanced: Callable[[int], Any]) -> Tensor:
        def watch(state: SolverState[Any], iteration: Iteration) -> None:
            advanced(iteration.stride)
            if on_iteration is not None:
                on_iteration(state, iteration)

        how, where = wanted, dispatcher
        if calibration is not None and isinstance(wanted, PicardSolver):
            choice = choose(wanted, calibration, trajectory.latents.device)
            how, where = choice.solver, choice.dispatcher
        solution = solve(trajectory, how, where, on_iteration=watch)
        if on_solution is not None:
            on_solution(solution)
        return solution.value["x"]

    if prompt is not None:
        arguments["prompt"] = prompt
    with _Loop(pipeline, arguments, form, run).taken_over():
        return pipeline(num_inference_steps=num_inference_steps, **arguments)


def measure(
    pipeline: Any,
    prompt: str | list[str] | None = None,
    *,
    num_inference_steps: int,
    window: int = 10,
    tolerance: float = 0.1,
    form: Form = "semi-linear",
    **arguments: Any,
) -> Calibration:
    """Whether a batched window pays for this pipeline on this device.

    Arguments are those of `sample`; record the answer with its ``save``.
    """
    _check(pipeline, num_inference_steps, window, tolerance, form, arguments)
    found: list[Calibration] = []

    def run(trajectory: SamplingTrajectory, advanced: Callable[[int], Any]) -> Tensor:
        del advanced
        found.append(calibrate(trajectory, solver_for(window, tolerance, form)))
        return trajectory.latents

    if prompt is not None:
        arguments["prompt"] = prompt
    with _Loop(pipeline, arguments, form, run).taken_over():
        pipeline(num_inference_steps=num_inference_steps, **arguments)
    return found[0]


def solver_for(
    window: int,
    tolerance: float,
    form: Form = "semi-linear",
    acceleration: Anderson | None = None,
) -> PicardSolver:
    """The solver of `sample`, for a trajectory of your own.

    In the semi-linear form new slots are guessed by rolling the scheduler on with the
    last answer; in the published one they repeat the last state.
    """
    return PicardSolver(
        SlidingWindow(window),
        FixedThreshold(tolerance**2),
        predictor=Momentum(0.0) if form == "semi-linear" else "repeat_last",
        norm=worst_picture,
        acceleration=acceleration,
    )


def _check(
    pipeline: Any,
    num_inference_steps: int,
    window: int,
    tolerance: float,
    form: Form,
    arguments: dict[str, Any],
) -> None:
    for name in ("unet", "scheduler"):
        if getattr(pipeline, name, None) is None:
            raise ValueError(
                f"`{type(pipeline).__name__}` has no `{name}`. Pipelines with a U-Net "
                "and a scheduler can be sampled in parallel, such as "
                "`StableDiffusionPipeline` or `IFPipeline`."
            )
    check_scheduler(pipeline.scheduler, form)
    for name, value in (
        ("num_inference_steps", num_inference_steps),
        ("window", window),
    ):
        if value < 1:
            raise ValueError(f"`{name}` is {value}: write 1 or more.")
    if not 0 <= tolerance < float("inf"):
        raise ValueError(
            f"`tolerance` is {tolerance}: write 0 (the sequential result) or more; "
            "0.1 is the published value."
        )
    for name in ("callback", "callback_on_step_end"):
        if arguments.get(name) is not None:
            raise ValueError(
                f"`{name}` belongs to the loop that is replaced. Write `on_iteration`, "
                "which is called after each iteration with the solver's state."
            )


class _Loop:
    """A pipeline whose loop is taken over for the time of one call."""

    def __init__(
        self,
        pipeline: Any,
        arguments: dict[str, Any],
        form: Form,
        run: Callable[[SamplingTrajectory, Callable[[int], Any]], Tensor],
    ) -> None:
        self.pipeline, self.run = pipeline, run
        self.form: Form = form
        self.unet, self.scheduler = pipeline.unet, pipeline.scheduler
        defaults = inspect.signature(type(pipeline).__call__).parameters
        self.guidance = {
            name: arguments.get(name, defaults[name].default)
            for name in ("guidance_scale", "guidance_rescale")
            if name in defaults
        }
        self.inputs: Tensor | None = None
        self.conditions: dict[str, Any] = {}
        self.timesteps: Tensor | None = None
        self.bar: Any = None
        self.done = False

    @contextlib.contextmanager
    def taken_over(self) -> Iterator[None]:
        """Stand between the pipeline and its parts inside the block."""
        with (
            _replaced(self.unet, "forward", self._asked),
            _replaced(self.scheduler, "set_timesteps", self._timed),
            _replaced(self.scheduler, "step", self._stepped),
            _replaced(self.pipeline, "progress_bar", self._shown),
        ):
            try:
                yield
            finally:
                if self.timesteps is not None:
                    self.scheduler.timesteps = self.timesteps

    def _timed(self, original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        self.timesteps = self.scheduler.timesteps
        self.scheduler.timesteps = self.scheduler.timesteps[:1]

    def _shown(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.bar = original(*args, **kwargs)
        return self.bar

    def _asked(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.done or self.inputs is not None:
            raise ValueError(
                f"`{type(self.pipeline).__name__}` asks its U-Net more than once a "
                "step; only one call of it can be sampled in parallel."
            )
        bound = inspect.signature(original).bind(*args, **kwargs).arguments
        bound = {**bound, **bound.pop("kwargs", {})}
        wants_dict = bound.pop("return_dict", True)
        (_, self.inputs), _, *conditions = bound.items()
        self.conditions = dict(conditions)
        assert self.inputs is not None
        shape = (len(self.inputs), self.unet.config["out_channels"])
        empty = self.inputs.new_zeros((*shape, *self.inputs.shape[2:]))
        return SimpleNamespace(sample=empty) if wants_dict else (empty,)

    def _stepped(
        self,
        original: Callable[..., Any],
        answer: Tensor,
        timestep: Any,
        x: Tensor,
        generator: Any = None,
        eta: float = 0.0,
        return_dict: bool = True,
        **others: Any,
    ) -> Any:
        del original, answer, timestep
        if others:
            raise ValueError(
                f"`{type(self.pipeline).__name__}` gives its scheduler "
                f"{', '.join(f'`{name}`' for name in others)}, which parallel sampling "
                "does not know."
            )
        denoiser = self._denoiser(x)
        with (
            _restored(self.unet, "forward"),
            _restored(self.scheduler, "step"),
            _restored(self.scheduler, "set_timesteps"),
        ):
            self.scheduler.timesteps = self.timesteps
            trajectory = SamplingTrajectory(
                denoiser,
                self.scheduler,
                x,
                generator=generator,
                eta=eta,
                form=self.form,
            )
            bar: Any = self.bar
            if bar is not None and bar.total == trajectory.num_steps:
                bar.n -= 1  # the pipeline counts the one step it sees
                made = self.run(trajectory, bar.update)
            else:
                made = self.run(trajectory, lambda _: None)
        self.done = True
        return (made,) if not return_dict else SimpleNamespace(prev_sample=made)

    def _denoiser(self, x: Tensor) -> Denoiser:
        assert self.inputs is not None, "the U-Net is asked before the scheduler"
        guided = len(self.inputs) == 2 * len(x)
        expected = torch.cat([x, x]) if guided else x
        if not torch.equal(self.inputs, expected):
            raise ValueError(
                f"`{type(self.pipeline).__name__}` shows its U-Net more than the "
                "latents (a mask, a picture), so its answer is no function of them "
                "alone. Text-to-image pipelines can be sampled in parallel."
            )
        return Denoiser(
            self.unet,
            {**self.conditions, "return_dict": False},
            guidance_scale=self.guidance["guidance_scale"] if guided else None,
            guidance_rescale=self.guidance.get("guidance_rescale") or 0.0,
            keeps_variance=learns_variance(self.scheduler),
        )


@contextlib.contextmanager
def _replaced(owner: Any, name: str, stand_in: Callable[..., Any]) -> Iterator[None]:
    """Call `stand_in(original, …)` in place of a method, inside the block."""
    if not hasattr(owner, name):
        yield
        return
    original = getattr(owner, name)

    @functools.wraps(original)  # pipelines look at the signature
    def method(*args: Any, **kwargs: Any) -> Any:
        return stand_in(original, *args, **kwargs)

    own = owner.__dict__.get(name)
    method.__dict__["own"] = own
    owner.__dict__[name] = method
    try:
        yield
    finally:
        if own is None:
            owner.__dict__.pop(name, None)
        else:
            owner.__dict__[name] = own


@contextlib.contextmanager
def _restored(owner: Any, name: str) -> Iterator[None]:
    """The method as it was before `_replaced`, inside the block."""
    method = owner.__dict__.pop(name)
    if method.own is not None:  # as accelerate replaces a forward, for example
        owner.__dict__[name] = method.own
    try:
        yield
    finally:
        owner.__dict__[name] = method
