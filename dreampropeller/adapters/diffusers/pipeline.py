"""Parallel sampling with a diffusers pipeline: `sample` instead of calling it.

The pipeline runs its own code before and after its loop (prompts, latents, decoding,
safety checker); the loop is taken over (`loop`). Every argument of the pipeline that
reaches its U-Net works here too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from dreampropeller.acceleration.base import Acceleration
from dreampropeller.adapters.diffusers.loop import Loop
from dreampropeller.adapters.diffusers.trajectory import (
    Form,
    SamplingTrajectory,
    check_scheduler,
    worst_image,
)
from dreampropeller.calibration import Calibration, calibrate, choose_solver
from dreampropeller.dispatch.base import Dispatcher, InlineDispatcher
from dreampropeller.picard import PicardSolver
from dreampropeller.predictor import Momentum, Predictor
from dreampropeller.solution import Iteration, Solution, SolverState
from dreampropeller.solver import Listener, Solver, solve
from dreampropeller.threshold import FixedThreshold
from dreampropeller.trajectory import Trajectory
from dreampropeller.window import SlidingWindow


def sample(
    pipeline: Any,
    prompt: str | list[str] | None = None,
    *,
    num_inference_steps: int,
    window: int = 10,
    tolerance: float = 0.1,
    form: Form = "semi-linear",
    acceleration: Acceleration[Any] | None = None,
    predictor: Predictor[Any] | None = None,
    dispatcher: Callable[[Trajectory[Any]], Dispatcher] = InlineDispatcher,
    calibration: Calibration | None = None,
    solver: Solver | None = None,
    on_iteration: Listener | None = None,
    on_solution: Callable[[Solution[Any]], None] | None = None,
    check: bool = True,
    **arguments: Any,
) -> Any:
    """Sample with a pipeline, many steps at a time.

    With tolerance 0, or window 1, the result is the pipeline's own bit for bit (on
    CPU, semi-linear form, drifts evaluated one by one: `test_diffusers.py`).

    Args:
        pipeline: Stable Diffusion, DeepFloyd IF, the toybox, or another pipeline that
            calls its U-Net once per step; with a scheduler of `trajectory.HISTORY`.
        prompt: As for the pipeline.
        num_inference_steps: As for the pipeline.
        window: Number of steps evaluated at once.
        tolerance: Largest change of a state between two iterations that passes,
            relative to the standard deviation of the noise at its timestep; published:
            0.1.
        form: Form of the drift: "semi-linear", or "published" for comparison.
        acceleration: `Anderson()` needs fewer iterations if windows are wide and
            tolerances small (`docs/sampling.md`).
        predictor: Guesses of new slots; `CleanImage()` needs fewer iterations with
            many steps of DDPM (`docs/sampling.md`). Default: see `solver_for`.
        dispatcher: Evaluation of the model: `InlineDispatcher` (one step after
            another), `BatchedDispatcher` (a window in one call, close but not bitwise)
            or `DistributedDispatcher` (a window spread over devices).
        calibration: Result of `measure`, instead of `dispatcher`: a batched window if
            that pays on this device, the sequential run otherwise.
        solver: Another solver, instead of `window`, `tolerance`, `acceleration` and
            `predictor`; its threshold is the squared tolerance.
        on_iteration: As for `solve`; it cannot stop the solve.
        on_solution: Called with the solution: iterations, evaluations, strides.
        check: As for `solve`; it costs five evaluations of the model, nine
            with a batched window.
        **arguments: Further arguments of the pipeline.

    Returns:
        The return value of the pipeline.

    Raises:
        ValueError: A number is out of range, the pipeline or its scheduler cannot be
            sampled in parallel, a callback of the pipeline's loop is given, or an
            acceleration or predictor beside a solver.

    Example:
        >>> images = sample(pipeline, "a red mug", num_inference_steps=100).images
    """
    _check(pipeline, num_inference_steps, window, tolerance, form, arguments)
    for name, value in (("acceleration", acceleration), ("predictor", predictor)):
        if solver is not None and value is not None:
            raise ValueError(
                f"`{name}` has no effect beside `solver`: write `solver=PicardSolver("
                f"…, {name}={type(value).__name__}())`."
            )
    wanted = solver or solver_for(window, tolerance, form, acceleration, predictor)

    def run(trajectory: SamplingTrajectory, advanced: Callable[[int], Any]) -> Tensor:
        def watch(state: SolverState[Any], iteration: Iteration) -> None:
            advanced(iteration.stride)
            if on_iteration is not None:
                on_iteration(state, iteration)

        how, where = wanted, dispatcher
        if calibration is not None and isinstance(wanted, PicardSolver):
            choice = choose_solver(wanted, calibration, trajectory.latents.device)
            how, where = choice.solver, choice.dispatcher
        solution = solve(trajectory, how, where, on_iteration=watch, check=check)
        if on_solution is not None:
            on_solution(solution)
        return solution.value["x"]

    if prompt is not None:
        arguments["prompt"] = prompt
    with Loop(pipeline, arguments, form, run).taken_over():
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

    Arguments are those of `sample`; record the result with its ``save``.
    """
    _check(pipeline, num_inference_steps, window, tolerance, form, arguments)
    found: list[Calibration] = []

    def run(trajectory: SamplingTrajectory, advanced: Callable[[int], Any]) -> Tensor:
        del advanced
        found.append(calibrate(trajectory, solver_for(window, tolerance, form)))
        return trajectory.latents

    if prompt is not None:
        arguments["prompt"] = prompt
    with Loop(pipeline, arguments, form, run).taken_over():
        pipeline(num_inference_steps=num_inference_steps, **arguments)
    return found[0]


def solver_for(
    window: int,
    tolerance: float,
    form: Form = "semi-linear",
    acceleration: Acceleration[Any] | None = None,
    predictor: Predictor[Any] | None = None,
) -> PicardSolver:
    """The solver of `sample`, for a trajectory of your own.

    By default, new slots are guessed by stepping the scheduler with the last model
    output in the semi-linear form, and repeat the last state in the published one.
    """
    return PicardSolver(
        SlidingWindow(window),
        FixedThreshold(tolerance**2),
        predictor=predictor
        or (Momentum(0.0) if form == "semi-linear" else "repeat_last"),
        norm=worst_image,
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
