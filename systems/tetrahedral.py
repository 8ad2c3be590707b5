"""Systems whose later stages optimise a surface on tetrahedra.

The first stage optimises a field. A later one takes over the surface and the colours of
a finished run (`systems.conversion`) and renders the mesh that they give.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

import dreampropeller as dp
from systems.conversion import start_from
from systems.dreamfusion import DreamFusion, DreamFusionConfig
from systems.scene.fields import TetrahedralField
from systems.scene.meshes.finishing import without_crumbs
from systems.scene.regularisers import MESH_REGULARISERS, REGULARISERS
from systems.settings.config import Config
from systems.settings.schedules import values_of

_SOURCE = "geometry_convert_from"


@dataclass(frozen=True, kw_only=True)
class TetrahedralConfig(DreamFusionConfig):
    """`system`: the surface, guidance, loss and optimizer, each with its own section.

    Args:
        geometry_convert_from: Run folder of the stage before; null: from the initial
            shape.
        geometry_convert_inherit_texture: Take over its colours too, if it has any; as
            in threestudio, not by default.
    """

    surface_setting: ClassVar[str]
    """The setting that makes this a stage of a surface, as one would write it."""

    geometry_convert_from: str | None = None
    geometry_convert_inherit_texture: bool = False

    @property
    @abc.abstractmethod
    def on_surface(self) -> bool:
        """Whether this is a stage of a surface."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.geometry_convert_from is not None and not self.on_surface:
            raise ValueError(
                "`geometry_convert_from` starts a stage of a surface: write "
                f"{self.surface_setting}, or leave it out."
            )

    def check_terms(self, used: Iterable[str]) -> None:
        """Refuse regularisers that this stage does not have.

        Args:
            used: Names of those that it has.

        Raises:
            ValueError: Names the first.
        """
        loss, known = vars(self.loss), set(used)
        for name in {**REGULARISERS, **MESH_REGULARISERS}:
            if name not in known and any(values_of(loss[f"lambda_{name}"])):
                stage = "mesh" if self.on_surface else "field"
                way = "" if self.on_surface else f", or write {self.surface_setting}"
                raise ValueError(
                    f"`loss.lambda_{name}` has no effect on this stage, of a {stage}: "
                    f"leave it out{way}."
                )


class Tetrahedral(DreamFusion):
    """A system that goes on from a field to its surface."""

    def __init__(self, config: Config, device: torch.device | None = None) -> None:
        super().__init__(config, device)
        settings = self.settings
        if not settings.on_surface:
            return
        geometry = self.scene.geometry
        if not isinstance(geometry, TetrahedralField):
            raise ValueError(
                f"This is a stage of a surface ({settings.surface_setting}), and "
                f"`system.geometry_type` is `{settings.geometry_type}`: write "
                "`tetrahedra-sdf-grid` or `voxel-tetrahedra`."
            )
        source = settings.geometry_convert_from
        if source is not None and config.resume is None:
            with_colours = settings.geometry_convert_inherit_texture
            start_from(geometry, source, with_colours)

    def about(self) -> dict[str, Any]:
        """See `System.about`; the run that it started from may have moved since."""
        known = super().about()
        kept = {k: v for k, v in known["system"].items() if k != _SOURCE}
        return {**known, "system": kept}

    @torch.no_grad()
    def mesh(self, y: dp.State) -> Any:
        """The surface with the albedo of its points; see `System.mesh`."""
        if not self.settings.on_surface:
            return super().mesh(y)
        import trimesh

        caller = _Surface(self.scene)
        named = {f"scene.{name}": tensor for name, tensor in y.items()}
        vertices, faces, colours = torch.func.functional_call(caller, named, ())
        mesh: Any = trimesh.Trimesh(
            vertices.cpu().double().numpy(), faces.cpu().numpy(), process=False
        )
        shown = (colours.clamp(0, 1) * 255).round().byte().cpu().numpy()
        mesh.visual.vertex_colors = shown
        mesh.metadata["level"] = 0.0
        return without_crumbs(mesh)


class _Surface(nn.Module):
    """The surface of a scene as a `forward`, so that tensors can be swapped."""

    def __init__(self, scene: Any) -> None:
        super().__init__()
        self.scene = scene

    def forward(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        vertices, faces = self.scene.geometry.surface()
        features = self.scene.geometry.features(vertices, None)
        return vertices, faces, self.scene.material.albedo(features)
