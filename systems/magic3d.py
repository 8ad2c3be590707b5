r"""Magic3D: a coarse field, then its surface, refined on a grid of tetrahedra.

The first stage is DreamFusion's. The second starts from its surface and renders the
mesh at a higher resolution:

$$\ell(t, \theta) = \lambda_{sds}\,\ell_{sds} +
  \lambda_{nc} \operatorname{mean}_{(i, j)} (1 - n_i \cdot n_j)$$

over the edges (i, j) of the mesh with its vertex normals n (C.-H. Lin et al., 2023,
arXiv 2211.10440, section 4; form and weights as in threestudio).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

import dreampropeller as dp
from systems.conversion import start_from
from systems.dreamfusion import DreamFusion, DreamFusionConfig, LossConfig
from systems.scene.cameras import RandomCameras
from systems.scene.fields import TetrahedralField
from systems.scene.meshes.finishing import without_crumbs
from systems.scene.regularisers import MESH_REGULARISERS
from systems.settings.config import Config
from systems.settings.schedules import Schedule, values_of

_SOURCE = "geometry_convert_from"


@dataclass(frozen=True)
class MeshLossConfig(LossConfig):
    """Weights of the loss (`system.loss`), numbers or schedules.

    Args:
        lambda_normal_consistency: Weight of the penalty on bent edges.
    """

    lambda_normal_consistency: Schedule = 0.0


@dataclass(frozen=True, kw_only=True)
class Magic3DConfig(DreamFusionConfig):
    """`system`: the surface, guidance, loss and optimizer, each with its own section.

    Args:
        refinement: Whether this is the second stage, of a mesh.
        geometry_convert_from: Run folder of the first stage; null: from the initial
            shape.
        loss: Weights of the loss terms.
    """

    refinement: bool = False
    geometry_convert_from: str | None = None
    loss: MeshLossConfig = field(default_factory=MeshLossConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        loss = vars(self.loss)
        idle = [
            name
            for name in ("orient", "sparsity", "opaque", "normal_consistency")
            if any(values_of(loss[f"lambda_{name}"]))
            and (name in MESH_REGULARISERS) != self.refinement
        ]
        if idle:
            stage = "mesh" if self.refinement else "field"
            raise ValueError(
                f"`loss.lambda_{idle[0]}` has no effect on a {stage}: leave it out, or "
                f"write `refinement: {str(not self.refinement).lower()}`."
            )
        if self.geometry_convert_from is not None and not self.refinement:
            raise ValueError(
                "`geometry_convert_from` starts the second stage: write `refinement: "
                "true`, or leave it out."
            )


class Magic3D(DreamFusion):
    """Text to 3D by score distillation of a field, then of its mesh."""

    section_types: ClassVar[Mapping[str, type]] = {
        "data": RandomCameras,
        "system": Magic3DConfig,
    }

    def __init__(self, config: Config, device: torch.device | None = None) -> None:
        super().__init__(config, device)
        if not self.settings.refinement:
            return
        self.regularisers = MESH_REGULARISERS
        geometry = self.scene.geometry
        if not isinstance(geometry, TetrahedralField):
            raise ValueError(
                "`refinement` is true, and `system.geometry_type` is "
                f"`{self.settings.geometry_type}`: write `tetrahedra-sdf-grid` or "
                "`voxel-tetrahedra`."
            )
        source = self.settings.geometry_convert_from
        if source is not None and config.resume is None:
            start_from(geometry, source)

    def about(self) -> dict[str, Any]:
        """See `System.about`; the run that it started from may have moved since."""
        known = super().about()
        kept = {k: v for k, v in known["system"].items() if k != _SOURCE}
        return {**known, "system": kept}

    @torch.no_grad()
    def mesh(self, y: dp.State) -> Any:
        """The surface with the albedo of its points; see `System.mesh`."""
        if not self.settings.refinement:
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
