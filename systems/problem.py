"""The problem that `launch.py` runs: trajectory, solver and results."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

import dreampropeller as dp
from dreampropeller.dispatch.process_group import local_device
from systems import batching
from systems.settings.config import Config
from systems.settings.reader import ConfigError
from systems.settings.solver import refuse_samplers

COMMON = frozenset(
    {"name", "tag", "exp_root_dir", "seed", "solver", "dispatch", "system_type"}
)
"""Settings that every problem reads."""


class Problem(abc.ABC):
    """A problem to solve, built from a config alone and identical on every rank.

    Args:
        config: Config of the run.
        device: Device to work on; default: this process's GPU, or the CPU.

    Attributes:
        notes: What the report says of the run besides its figures.

    Raises:
        ConfigError: The config sets something that has no effect on this problem.
    """

    option: ClassVar[str] = "--train"
    """The option of `launch.py` that runs the problem."""
    sections: ClassVar[frozenset[str]]
    """Settings of `Config` that the problem reads besides `COMMON`."""
    data_type: ClassVar[str | None] = None
    """The `data_type` that the problem reads; None: it has no views."""
    section_types: ClassVar[Mapping[str, type]]
    """The classes of those sections that `Config` leaves to the problem."""

    def __init__(self, config: Config, device: torch.device | None = None) -> None:
        self.config = config
        self.device = device or local_device()
        self.random = dp.StepRandom(config.seed)
        self.notes: list[str] = []
        self._refuse_idle_sections()

    @property
    @abc.abstractmethod
    def title(self) -> str:
        """A short title of the result."""

    @property
    @abc.abstractmethod
    def num_steps(self) -> int:
        """The number of steps."""

    def trajectory(self) -> dp.Trajectory[Any]:
        """The trajectory to solve; loads pretrained models.

        Not needed by a problem that implements `solve` because another library owns
        the loop.
        """
        raise TypeError(f"`{type(self).__name__}` has no trajectory of its own.")

    def solver(self) -> dp.Solver:
        """The solver that the config describes.

        Raises:
            ConfigError: The solver samples images.
        """
        refuse_samplers(self.config.solver)
        return self.config.solver.build()

    def solve(
        self,
        dispatcher: Callable[[dp.Trajectory[Any]], dp.Dispatcher],
        state: dp.SolverState[Any] | None,
        on_iteration: Callable[[dp.SolverState[Any], dp.Iteration], bool | None],
    ) -> dp.Solution[Any]:
        """Solve the problem; arguments as for `dreampropeller.solve`."""
        trajectory, solver = self.trajectory(), self.solver()
        if self.config.dispatch.batch != "never" and isinstance(
            solver, dp.PicardSolver
        ):
            chosen = batching.choose(self.config, trajectory, solver, self.device)
            solver, dispatcher = chosen.solver, chosen.dispatcher
            print(chosen.reason, flush=True)
            self.notes.append(chosen.reason)
        return dp.solve(
            trajectory,
            solver,
            dispatcher,
            state=state,
            on_iteration=on_iteration,
            check=self.is_reproducible,
        )

    @property
    def is_reproducible(self) -> bool:
        """Whether a step is a function of its index and state; verified if so."""
        return True

    def check_views(self, count: int) -> None:
        """Refuse to split a step's views between workers (`dispatch.views`).

        Args:
            count: The number of shards, at least 2.

        Raises:
            ConfigError: Says why, and what to write instead.
        """
        raise ConfigError(
            f"`dispatch.views` is {count}, and the steps of a "
            f"`{self.config.system_type}` have no views to split: write "
            "`dispatch.views=1`, one step per worker."
        )

    def check_state(self, y: dp.State, where: str | Path) -> None:
        """Refuse a state of another problem, read from `where`.

        Raises:
            ConfigError: Names the first difference.
        """
        del y, where

    def about(self) -> dict[str, Any]:
        """Settings that a resumed run must share; part of the fingerprint."""
        return {}

    def resolve(self, about: dict[str, Any]) -> dict[str, Any]:
        """What `about` returned, now or earlier, with the defaults it leaves out.

        Raises:
            ConfigError: It has settings that this version cannot read.
        """
        return about

    def so_far(self, y: dp.State) -> str:
        """Quality of a state in a few words, for the progress bar; default: none."""
        del y
        return ""

    def preview(self, y: dp.State) -> Float[Tensor, "images 3 height width"] | None:
        """Images of a state for the progress preview; None if there are none."""
        del y
        return None

    @abc.abstractmethod
    def write(self, folder: Path, y: dp.State) -> dict[str, Any]:
        """Write the results of the final state; returns their part of the report."""

    def summary(self, report: dict[str, Any]) -> list[str]:
        """Lines about this problem's part of a report, for the terminal."""
        del report
        return []

    def _refuse_idle_sections(self) -> None:
        known = COMMON | self.sections
        # A section that equals its default has no effect either way.
        defaults = Config(name="", system_type="", system={})
        idle = [
            field.name
            for field in fields(Config)
            if field.name not in known
            and not field.metadata.get("internal")
            and getattr(self.config, field.name) != getattr(defaults, field.name)
        ]
        if idle:
            names = ", ".join(f"`{name}`" for name in idle)
            raise ConfigError(
                f"The config sets {names}, without effect on `{self.option}` of a "
                f"`{self.config.system_type}`: leave out what belongs to another task."
            )
