"""What every system offers: a trajectory to solve, and ways to look at a state."""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn

import dreampropeller as dp
from dreampropeller.dispatch.process_group import local_device
from dreampropeller.precision import LOSS_SCALE
from systems.scene.cameras import RandomCameras, Views
from systems.settings.config import Config
from systems.settings.reader import ConfigError, read

if TYPE_CHECKING:
    import trimesh


class System(abc.ABC):
    """A way to make a 3D object.

    A system is built from its config alone, the same on every rank; what is optimised
    is a state that it renders and exports but does not keep.

    Args:
        config: The run.
        device: Where it works; default: this process's GPU, or the CPU.

    """

    def __init__(self, config: Config, device: torch.device | None = None) -> None:
        self.config = config
        self.device = device or local_device()
        self.random = dp.StepRandom(config.seed)
        self.cameras = read(RandomCameras, config.data, "data")

    @property
    @abc.abstractmethod
    def prompt(self) -> str:
        """What is wanted."""

    @property
    @abc.abstractmethod
    def scene(self) -> nn.Module:
        """Renders views; its parameters and buffers are the state."""

    @abc.abstractmethod
    def trajectory(self) -> dp.OptimizationTrajectory:
        """The optimisation. Loads the pretrained model."""

    @abc.abstractmethod
    def render(
        self, y: dp.State, views: Views, grey: float | None = None
    ) -> tuple[Float[Tensor, "views 3 height width"], Float[Tensor, "views 1 h w"]]:
        """Final-look pictures and opacity of a state, on the CPU.

        Args:
            y: The state.
            views: From where.
            grey: Put the object over this grey instead of its own background.
        """

    @abc.abstractmethod
    def mesh(self, y: dp.State) -> trimesh.Trimesh:
        """The surface of a state, with vertex colours.

        Raises:
            EmptySurface: There is none.
        """

    def solver(self) -> dp.Solver:
        """The solver the config asks for."""
        return self.config.solver.build()

    def turntable(
        self, y: dp.State, count: int | None = None
    ) -> Iterator[Float[Tensor, "3 height width"]]:
        """Pictures from all around.

        Args:
            y: The state.
            count: How many; default: `data.n_test_views`.
        """
        views = self.cameras.turntable(count)
        for number in range(len(views.cameras)):
            yield self.render(y, views.one(number))[0][0]

    def check_state(self, y: dp.State, where: str | Path) -> None:
        """Refuse a state of another system; its precision may be another.

        Raises:
            ConfigError: Names the first difference.
        """
        own = dict(self.scene.named_buffers())
        own |= {n: p for n, p in self.scene.named_parameters() if p.requires_grad}

        def shape(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...] | str:
            return tuple(tensors[name].shape) if name in tensors else "nothing"

        for name in [*y, *own]:
            if name != LOSS_SCALE and shape(y, name) != shape(own, name):
                raise ConfigError(
                    f"The checkpoint `{where}` does not fit this config: its `{name}` "
                    f"has shape {shape(y, name)}, the config makes {shape(own, name)}. "
                    "Use the `config.yaml` of the run it came from."
                )
