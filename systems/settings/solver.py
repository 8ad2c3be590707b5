"""`solver`: the section that chooses how a trajectory is solved."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import dreampropeller as dp
from dreampropeller.predictor import PREDICTORS
from systems.settings.checks import at_least, one_of
from systems.settings.reader import ConfigError, named


@dataclass(frozen=True)
class AutoWindow:
    """`solver.window.name=auto`: one step per worker, up to four where they pay.

    `load` replaces it by an `AdaptiveWindow`, so that a resumed run keeps the window
    that it started with.
    """

    def resolved(self, num_workers: int) -> dp.AdaptiveWindow:
        """The window for this number of workers."""
        return dp.AdaptiveWindow(num_workers, 4 * num_workers, num_workers)


@dataclass(frozen=True)
class CleanImageGuesses:
    """`solver.predictor.name=clean_image`: `CleanImage`, for `--sample` alone.

    Args:
        sequential_steps: Number of first steps that are taken one after another, before
            there is a good estimate.
    """

    sequential_steps: int = 0

    def __post_init__(self) -> None:
        at_least("sequential_steps", self.sequential_steps, 0)


WINDOWS = {
    "sliding": dp.SlidingWindow,
    "adaptive": dp.AdaptiveWindow,
    "auto": AutoWindow,
}
THRESHOLDS = {
    "drift": dp.DriftThreshold,
    "ema": dp.EMAThreshold,
    "fixed": dp.FixedThreshold,
}
SAMPLERS = ("piadm-ode", "piadm-sde", "speculative")
"""Solvers that only sample images."""
_PICARD = ("threshold", "predictor", "non_finite", "acceleration", "growth")
IDLE = {
    "picard": ("depth",),
    "sequential": ("depth",),
    "piadm-ode": _PICARD,
    "piadm-sde": _PICARD,
    "speculative": ("depth", *_PICARD),
}
"""Settings without effect, by solver: a file may hold them for another solver."""
ACCELERATIONS = {"none": type(None), "secant": dp.Secant, "anderson": dp.Anderson}


@dataclass(frozen=True)
class SolverConfig:
    """`solver`: the solver of the trajectory and its components.

    A section holds a `name` and the arguments of the core's class of that name.

    Args:
        name: "picard", or "sequential" for one step after another. With `--sample`
            also "piadm-ode" (with DDIM) and "piadm-sde" (with DDPM): blocks of
            `window.size` steps, each iterated `depth` times; and "speculative" (with
            DDPM): another sample of exactly the same law. Threshold, predictor,
            acceleration and `non_finite` then have no effect, and the window is
            "sliding".
        depth: Number of iterations per block, for PIADM.
        window: Number of steps evaluated per iteration: "sliding", "adaptive" or
            "auto".
        threshold: Error up to which a step counts as converged: "drift", "ema" or
            "fixed".
        predictor: Initial guess of a new step: "momentum", "repeat_last", or "auto",
            which extrapolates along the momentum direction, by a fraction fitted to
            recent iterations; with `--sample` also "clean_image", which holds the
            last estimate of the clean image.
        non_finite: "raise", or "skip" steps whose gradient is not finite.
        acceleration: Acceleration of the fixed-point iteration from past iterations:
            "none", "secant" or "anderson".
        growth: Whether to measure if the run amplifies or forgets errors; it costs no
            evaluation.
    """

    name: str = "picard"
    depth: int = 4
    window: dp.Window[Any] | AutoWindow = field(
        default=dp.SlidingWindow(8), metadata=named(WINDOWS)
    )
    threshold: dp.Threshold[Any] = field(
        default=dp.DriftThreshold(), metadata=named(THRESHOLDS)
    )
    predictor: dp.Predictor[Any] | CleanImageGuesses = field(
        default=dp.Momentum(),
        metadata=named({**PREDICTORS, "clean_image": CleanImageGuesses}),
    )
    non_finite: str = "raise"
    acceleration: dp.Acceleration[Any] | None = field(
        default=None, metadata=named(ACCELERATIONS)
    )
    growth: bool = True

    def __post_init__(self) -> None:
        one_of("name", self.name, ("picard", "sequential", *SAMPLERS))
        at_least("depth", self.depth, 1)
        if self.depth != SolverConfig.depth and "depth" in IDLE[self.name]:
            raise ValueError(_without_effect("depth", self.name))
        one_of("non_finite", self.non_finite, ("raise", "skip"))
        if self.name in SAMPLERS:
            self._check_sampler()
        self.resolved(1).build()  # refuses components that do not fit together

    def resolved(self, num_workers: int) -> SolverConfig:
        """The same section, with "auto" replaced by a window for `num_workers`."""
        if not isinstance(self.window, AutoWindow):
            return self
        return replace(self, window=self.window.resolved(num_workers))

    def _check_sampler(self) -> None:
        """Refuse what the solvers of samplers do not read."""
        if not isinstance(self.window, dp.SlidingWindow):
            raise ValueError(
                f"`window.name` is not `sliding`, and `{self.name}` takes a fixed "
                "number of steps at once: write `window.name=sliding window.size=10`."
            )
        if self.non_finite != "raise":
            raise ValueError(_without_effect("non_finite", self.name))

    def build(self) -> dp.Solver:
        """The solver that the section describes."""
        non_finite: Any = self.non_finite
        if self.name == "sequential":
            return dp.Sequential(non_finite=non_finite)
        assert isinstance(self.window, dp.Window), "`load` resolves `auto`"
        size = self.window.length(self.window.init(), 0, sys.maxsize)
        if self.name == "speculative":
            from dreampropeller.adapters.diffusers.speculative import Speculative

            return Speculative(size)
        if self.name in SAMPLERS:
            return dp.PicardSolver(
                dp.BlockWindow(size, self.depth), dp.FixedThreshold(0)
            )
        window, predictor = self.window, self.predictor
        if isinstance(predictor, CleanImageGuesses):
            from dreampropeller.adapters.diffusers.clean_image import CleanImage

            window = dp.SequentialStart(window, predictor.sequential_steps)
            predictor = CleanImage()
        return dp.PicardSolver(
            window,
            self.threshold,
            predictor=predictor,
            non_finite=non_finite,
            acceleration=self.acceleration,
            growth=self.growth,
        )


def refuse_samplers(solver: SolverConfig) -> None:
    """Refuse what only samples images.

    Raises:
        ConfigError: Names it.
    """
    if solver.name in SAMPLERS:
        raise ConfigError(
            f"`solver.name` is `{solver.name}`, which samples images: write `picard` "
            "or `sequential`, or `--sample` with `configs/sample-toybox.yaml`."
        )
    if isinstance(solver.predictor, CleanImageGuesses):
        raise ConfigError(
            "`solver.predictor` is `clean_image`, which guesses noisy images: write "
            "`auto`, or `--sample` with `configs/sample-toybox.yaml`."
        )


def refuse_idle(solver: SolverConfig, overrides: Sequence[str]) -> None:
    """Refuse a setting of the command line that the solver does not read.

    A file may hold it, because a finished run's `config.yaml` holds all settings.

    Args:
        solver: The section as read.
        overrides: Dotted settings, such as ``"solver.depth=4"``.

    Raises:
        ConfigError: Names the setting, and the solver that reads it.
    """
    for override in overrides:
        section, *rest = re.split(r"[.=\[]", override)
        if section == "solver" and rest[0] in IDLE[solver.name]:
            raise ConfigError(f"In `solver`: {_without_effect(rest[0], solver.name)}")


def _without_effect(setting: str, name: str) -> str:
    other = "piadm-ode" if setting == "depth" else "picard"
    return (
        f"`{setting}` has no effect on `{name}`: leave it out, or write `name={other}`."
    )
