"""The base of every 3D system: a trajectory to solve, and views of a state."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

import dreampropeller as dp
from dreampropeller.precision import LOSS_SCALE
from systems import artefacts
from systems.problem import Problem
from systems.scene.cameras import RandomCameras, Views
from systems.scene.isosurface import Silhouettes
from systems.settings.config import Config
from systems.settings.reader import ConfigError, read, to_section

if TYPE_CHECKING:
    import trimesh

PREVIEW_VIEWS = 4
LOOKS = ("eval_", "n_test_views", "n_val_views", "isosurface_", "max_faces")
"""Prefixes of settings that affect only the output; a resumed run may differ."""


def _kept(section: Any) -> Any:
    """A section without settings that affect only the output."""
    if not isinstance(section, dict):
        return section
    return {k: _kept(v) for k, v in section.items() if not str(k).startswith(LOOKS)}


class System(Problem):
    """A method of 3D generation.

    The optimised state is passed in to be rendered or exported; a system does not keep
    it.

    Args:
        config: Config of the run.
        device: Device to work on; default: this process's GPU, or the CPU.
    """

    sections = frozenset(
        {
            "system",
            "data",
            "data_type",
            "resume",
            "viewer",
            "viewer_port",
            "trainer",
            "checkpoint",
            "quality",
            "export",
        }
    )

    data_type: ClassVar[str | None] = "random-camera-datamodule"

    def __init__(self, config: Config, device: torch.device | None = None) -> None:
        super().__init__(config, device)
        self.cameras = self.read_cameras()
        if config.quality.truth is not None:
            from systems.toybox.truth import truth  # which loads the objects

            truth(config.quality.truth)  # refuses what is no object

    def read_cameras(self) -> RandomCameras:
        """The random cameras of training and those of the turntable."""
        return read(RandomCameras, self.config.data, "data")

    @property
    def truth_prompt(self) -> str | None:
        """The prompt whose toybox object is the ground truth; None: there is none."""
        return self.config.quality.truth or self.title

    def about(self) -> dict[str, Any]:
        """Seed, system and cameras, without settings that affect only the output."""
        config = self.config
        sections = {"system": _kept(config.system), "data": _kept(config.data)}
        return {"system_type": config.system_type, "seed": config.seed, **sections}

    def resolve(self, about: dict[str, Any]) -> dict[str, Any]:
        """See `Problem.resolve`."""
        sections = {
            name: _kept(to_section(read(kind, about.get(name), name)))
            for name, kind in self.section_types.items()
        }
        return {**about, **sections}

    @property
    def num_steps(self) -> int:
        """`trainer.max_steps`."""
        return self.config.trainer.max_steps

    @property
    @abc.abstractmethod
    def scene(self) -> nn.Module:
        """The module that is rendered."""

    @property
    def module(self) -> nn.Module:
        """The module that is optimised: its parameters and buffers are the state.

        It holds more than the scene if guidance is trained too (variational score
        distillation).
        """
        return self.scene

    @abc.abstractmethod
    def render(
        self, y: dp.State, views: Views, grey: float | None = None
    ) -> tuple[Float[Tensor, "views 3 height width"], Float[Tensor, "views 1 h w"]]:
        """Images and opacity of a state as in evaluation, on the CPU.

        Args:
            y: The state.
            views: Views to render.
            grey: Grey level of the background, instead of the scene's own.
        """

    @abc.abstractmethod
    def mesh(self, y: dp.State) -> trimesh.Trimesh:
        """The surface of a state, with vertex colours.

        Raises:
            EmptySurface: There is no surface.
        """

    def paint(
        self,
        y: dp.State,
        mesh: trimesh.Trimesh,
        points: Float[Tensor, "points 3"],
        normals: Float[Tensor, "points 3"],
    ) -> Float[Tensor, "points 3"]:
        """Display colours of points of the surface; default: from images all around.

        Args:
            y: The state.
            mesh: The surface.
            points: Points on it.
            normals: Their unit normals.
        """
        from systems import exports  # which loads all renderers

        return exports.from_views(self, y, mesh, points, normals)

    def turntable(
        self, y: dp.State, count: int | None = None
    ) -> Iterator[Float[Tensor, "3 height width"]]:
        """Images from all around.

        Args:
            y: The state.
            count: Number of images; default: `data.n_test_views`.
        """
        views = self.cameras.turntable(count)
        for index in range(len(views.cameras)):
            yield self.render(y, views.one(index))[0][0]

    def so_far(self, y: dp.State) -> str:
        """See `Problem.so_far`; PSNR, if the prompt has a ground truth."""
        from systems import quality  # which loads the classifier's package

        psnr = quality.psnr_so_far(self, y)
        return "" if psnr is None else f"PSNR {psnr:.1f} dB"

    def preview(self, y: dp.State) -> Float[Tensor, "images 3 height width"]:
        """A few images from all around."""
        return torch.stack(list(self.turntable(y, PREVIEW_VIEWS)))

    def write(self, folder: Path, y: dp.State) -> dict[str, Any]:
        """Write turntable, quality and mesh; see `systems.artefacts`."""
        return artefacts.write(folder, self, y)

    def silhouettes(self, y: dp.State) -> Silhouettes:
        """Opacity of a state along the rays of a few views all around."""
        views = self.cameras.around()
        origins, directions = views.cameras.rays(views.height, views.width)
        seen = [self.render(y, views.one(i))[1] for i in range(len(views.cameras))]
        return Silhouettes(
            origins.expand_as(directions).reshape(-1, 3),
            directions.reshape(-1, 3),
            torch.cat(seen).flatten(),
        )

    def exports(self, folder: Path, y: dp.State) -> dict[str, Callable[[], Any]]:
        """Further exports of a state besides its mesh, by name; default: none.

        Returns:
            Functions that write a file and return its entry in the report.
        """
        del folder, y
        return {}

    def summary(self, report: dict[str, Any]) -> list[str]:
        """Quality and mesh, for the terminal."""
        return artefacts.summary(report)

    def rows_vary(self, name: str) -> bool:
        """Whether a tensor of the state may change its number of rows; default: no."""
        del name
        return False

    def check_state(self, y: dp.State, where: str | Path) -> None:
        """Refuse a state of another system; its precision may differ.

        Tensors are compared by name and shape. The number of rows is ignored where
        `rows_vary`.

        Raises:
            ConfigError: Names the first difference.
        """
        own = dict(self.module.named_buffers())
        own |= {n: p for n, p in self.module.named_parameters() if p.requires_grad}

        def shape(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...] | str:
            if name not in tensors:
                return "nothing"
            return tuple(tensors[name].shape)[self.rows_vary(name) :]

        for name in [*y, *own]:
            if name != LOSS_SCALE and shape(y, name) != shape(own, name):
                raise ConfigError(
                    f"The checkpoint `{where}` does not fit this config: its `{name}` "
                    f"has shape {shape(y, name)}, the config makes {shape(own, name)}. "
                    "Use the `config.yaml` of the run it came from."
                )
