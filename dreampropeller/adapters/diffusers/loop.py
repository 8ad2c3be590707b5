"""A pipeline's denoising loop, taken over for one call.

The loop runs over all its timesteps, but its U-Net and its scheduler's `step` are stubs
that record their arguments (`recording`); the last `step` solves the trajectory and
returns its final state. A loop that does more per step than one call of each is
refused: the stubs return random numbers, which must come back unchanged.
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

from dreampropeller.adapters.diffusers.recording import (
    LoopBar,
    RecordedStep,
    UNetCall,
    same,
)
from dreampropeller.adapters.diffusers.trajectory import (
    Denoiser,
    Form,
    SamplingTrajectory,
    learns_variance,
)


class Loop:
    """A pipeline whose loop is taken over for one call.

    Args:
        pipeline: The pipeline, restored after the call.
        arguments: Arguments of the call.
        form: Form of the trajectory.
        run: Function that solves a trajectory, given a function that advances the
            progress bar.
    """

    def __init__(
        self,
        pipeline: Any,
        arguments: dict[str, Any],
        form: Form,
        run: Callable[[SamplingTrajectory, Callable[[int], Any]], Tensor],
    ) -> None:
        self.pipeline, self.run = pipeline, run
        self.name = f"`{type(pipeline).__name__}`"
        self.form: Form = form
        self.unet, self.scheduler = pipeline.unet, pipeline.scheduler
        defaults = inspect.signature(type(pipeline).__call__).parameters
        self.guidance = {
            name: arguments.get(name, defaults[name].default)
            for name in ("guidance_scale", "guidance_rescale")
            if name in defaults
        }
        self.steps: list[RecordedStep] = []
        self.asked: UNetCall | None = None
        self.handed: Tensor | None = None
        self.bar: LoopBar | None = None
        self.solving = self.done = False

    @contextlib.contextmanager
    def taken_over(self) -> Iterator[None]:
        """Replace the pipeline's parts inside the block.

        Raises:
            ValueError: The pipeline did not make the steps that it announced.
        """
        with (
            _replaced(self.unet, "_compiled_call_impl", None),
            _replaced(self.unet, "forward", self._ask),
            _replaced(self.scheduler, "step", self._step),
            _replaced(self.pipeline, "progress_bar", self._show),
        ):
            try:
                yield
            except (AttributeError, KeyError, TypeError, RuntimeError) as error:
                if self.solving or not (self.steps or self.asked):
                    raise
                raise ValueError(
                    f"{self.name} reads more of its U-Net than its output while it "
                    f"loops ({type(error).__name__}: {error}), so its loop cannot be "
                    "taken over. Call the pipeline itself."
                ) from error
        if not self.done:
            raise ValueError(
                f"{self.name} made {len(self.steps)} calls of `unet` followed by "
                f"`scheduler.step`, where {self._announced()} were expected, so its "
                "loop was not taken over. Call the pipeline itself."
            )

    def _announced(self) -> int:
        if self.bar is not None and self.bar.total is not None:
            return self.bar.total
        return len(self.scheduler.timesteps)

    def _show(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.bar = LoopBar(original(*args, **kwargs))
        return self.bar

    def _ask(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.asked is not None:
            raise ValueError(
                f"{self.name} asks its U-Net more than once per step; only one call of "
                "it can be sampled in parallel."
            )
        del original
        self.asked = UNetCall.of(self.unet, args, kwargs)
        return self.asked.answer()

    def _step(
        self,
        original: Callable[..., Any],
        output: Tensor,
        timestep: Any,
        x: Tensor,
        generator: Any = None,
        eta: float = 0.0,
        return_dict: bool = True,
        **settings: Any,
    ) -> Any:
        del original
        asked, self.asked = self.asked, None
        if asked is None or self.done:
            raise ValueError(
                f"{self.name} calls `scheduler.step` more often than its U-Net, so a "
                "step is not one call of each. Call the pipeline itself."
            )
        step = RecordedStep(asked, x, timestep, generator, {"eta": eta, **settings})
        self._check(step, output)
        self.steps.append(step)
        if len(self.steps) == self._announced():
            made = self._solve()
            self.done = True
        else:
            made = torch.randn(x.shape, generator=_MARKS).to(x)
        self.handed = made
        return (made,) if not return_dict else SimpleNamespace(prev_sample=made)

    def _check(self, step: RecordedStep, output: Tensor) -> None:
        """Refuse a loop that a denoiser and a scheduler's step do not reproduce."""
        if self.handed is not None and not same(step.x, self.handed):
            raise ValueError(
                f"{self.name} changes the latents between two steps (inpainting by "
                "pasting, for example), which parallel sampling would leave out. Call "
                "the pipeline itself."
            )
        expected = self._denoiser(step).guided(step.call.output, step.x.shape[1])
        if not same(output, expected):
            raise ValueError(
                f"{self.name} makes of its U-Net's output something else than "
                "classifier-free guidance with a constant scale. Call the pipeline "
                "itself."
            )
        changed = step.difference(self.steps[0]) if self.steps else ""
        if changed:
            raise ValueError(
                f"{self.name} changes {changed} from step to step, perhaps with the "
                "latents (as ControlNet does), so its model is no function of them and "
                "the timestep. Call the pipeline itself."
            )

    def _solve(self) -> Tensor:
        first = self.steps[0]
        with (
            _restored(self.unet, "forward"),
            _restored(self.unet, "_compiled_call_impl"),
            _restored(self.scheduler, "step"),
        ):
            trajectory = SamplingTrajectory(
                self._denoiser(first),
                self.scheduler,
                first.x,
                generator=first.generator,
                form=self.form,
                timesteps=torch.stack(
                    [torch.as_tensor(step.timestep) for step in self.steps]
                ),
                **first.settings,
            )
            self.solving = True
            return self.run(trajectory, self.bar.advance if self.bar else _ignore)

    def _denoiser(self, step: RecordedStep) -> Denoiser:
        inputs, x = step.call.inputs, step.x
        guided = len(inputs) == 2 * len(x)
        if not same(inputs, torch.cat([x, x]) if guided else x):
            raise ValueError(
                f"{self.name} shows its U-Net more than the latents (a mask, an "
                "image), so its output is no function of them alone. Text-to-image "
                "pipelines can be sampled in parallel."
            )
        return Denoiser(
            self.unet,
            {**step.call.conditions, "return_dict": False},
            guidance_scale=self.guidance["guidance_scale"] if guided else None,
            guidance_rescale=self.guidance.get("guidance_rescale") or 0.0,
            keeps_variance=learns_variance(self.scheduler),
        )


_MARKS = torch.Generator().manual_seed(0)
"""Of the states that a recorded step hands on: no pipeline makes them by accident."""


def _ignore(count: int) -> None:
    del count


@contextlib.contextmanager
def _replaced(
    owner: Any, name: str, stand_in: Callable[..., Any] | None
) -> Iterator[None]:
    """Call `stand_in(original, …)` instead of a method, inside the block.

    None replaces it by None: a module compiled by its `compile()` otherwise never uses
    its `forward`.
    """
    if not hasattr(owner, name):
        yield
        return
    _OWN[id(owner), name] = owner.__dict__.get(name)
    owner.__dict__[name] = stand_in and _calling(stand_in, getattr(owner, name))
    try:
        yield
    finally:
        _put_back(owner, name, _OWN.pop((id(owner), name)))


def _calling(stand_in: Callable[..., Any], original: Any) -> Callable[..., Any]:
    @functools.wraps(original)  # pipelines inspect the signature
    def method(*args: Any, **kwargs: Any) -> Any:
        return stand_in(original, *args, **kwargs)

    return method


_OWN: dict[tuple[int, str], Any] = {}
"""The attribute of the object itself while it is replaced."""


def _put_back(owner: Any, name: str, own: Any) -> None:
    if own is None:
        owner.__dict__.pop(name, None)
    else:  # as accelerate replaces a forward, for example
        owner.__dict__[name] = own


@contextlib.contextmanager
def _restored(owner: Any, name: str) -> Iterator[None]:
    """The method as it was before `_replaced`, inside the block."""
    if (id(owner), name) not in _OWN:
        yield
        return
    replacement = owner.__dict__[name]
    _put_back(owner, name, _OWN[id(owner), name])
    try:
        yield
    finally:
        owner.__dict__[name] = replacement
