r"""TextMesh: a surface optimised by score distillation.

$$\ell(t, \theta) = \lambda_{sds}\,\ell_{sds} + \lambda_{eikonal}
  \operatorname{mean} (\|\nabla f\| - 1)^2 + \lambda_{curvature}
  \operatorname{mean} |\Delta f| + \sum_r \lambda_r R_r$$

with a signed distance f (C. Tsalicoglou et al., 2023, arXiv 2304.12439; weights and
form as in threestudio, which has no curvature term). This is the first stage.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from systems.dreamfusion import DreamFusion, DreamFusionConfig, LossConfig
from systems.scene.cameras import RandomCameras
from systems.scene.fields import SDFField
from systems.scene.fields.sdf import CENTRAL
from systems.scene.regularisers import SURFACE_REGULARISERS
from systems.settings.config import Config
from systems.settings.schedules import Schedule, values_of


@dataclass(frozen=True)
class SurfaceLossConfig(LossConfig):
    """Weights of the loss (`system.loss`), numbers or schedules.

    Args:
        lambda_eikonal: Weight of the penalty on gradients whose norm is not 1.
        lambda_curvature: Weight of the penalty on the Laplacian.
    """

    lambda_eikonal: Schedule = 0.0
    lambda_curvature: Schedule = 0.0


@dataclass(frozen=True, kw_only=True)
class TextMeshConfig(DreamFusionConfig):
    """`system`: the surface, guidance, loss and optimizer, each with its own section.

    Args:
        geometry_type: Geometry; a signed distance.
        renderer_type: Renderer; one of signed distances.
        loss: Weights of the loss terms.
    """

    geometry_type: str = "implicit-sdf"
    renderer_type: str = "neus-volume-renderer"
    loss: SurfaceLossConfig = field(default_factory=SurfaceLossConfig)


class TextMesh(DreamFusion):
    """Text to 3D by score distillation of a surface."""

    section_types: ClassVar[Mapping[str, type]] = {
        "data": RandomCameras,
        "system": TextMeshConfig,
    }
    regularisers = SURFACE_REGULARISERS

    def __init__(self, config: Config, device: torch.device | None = None) -> None:
        super().__init__(config, device)
        geometry = self.scene.geometry
        if not isinstance(geometry, SDFField):
            raise ValueError(
                "A `textmesh-system` makes a surface, and `system.geometry_type` is "
                f"`{self.settings.geometry_type}`: write `implicit-sdf` or `voxel-sdf`."
            )
        rough = any(values_of(self.settings.loss.lambda_curvature))
        if rough and geometry.config.normal_type != CENTRAL:
            raise ValueError(
                "`lambda_curvature` needs the Laplacian: write "
                f"`system.geometry.normal_type: {CENTRAL}`."
            )
