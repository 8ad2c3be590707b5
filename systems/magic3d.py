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
from typing import ClassVar

import torch

from systems.dreamfusion import LossConfig
from systems.scene.cameras import RandomCameras
from systems.scene.regularisers import MESH_REGULARISERS, REGULARISERS
from systems.settings.config import Config
from systems.settings.schedules import Schedule
from systems.tetrahedral import Tetrahedral, TetrahedralConfig


@dataclass(frozen=True)
class MeshLossConfig(LossConfig):
    """Weights of the loss (`system.loss`), numbers or schedules.

    Args:
        lambda_normal_consistency: Weight of the penalty on bent edges.
        lambda_laplacian_smoothness: Weight of the penalty on vertices away from the
            mean of their neighbours.
    """

    lambda_normal_consistency: Schedule = 0.0
    lambda_laplacian_smoothness: Schedule = 0.0


@dataclass(frozen=True, kw_only=True)
class Magic3DConfig(TetrahedralConfig):
    """`system`: the surface, guidance, loss and optimizer, each with its own section.

    Args:
        refinement: Whether this is the second stage, of a mesh.
        loss: Weights of the loss terms.
    """

    surface_setting: ClassVar[str] = "`refinement: true`"

    refinement: bool = False
    loss: MeshLossConfig = field(default_factory=MeshLossConfig)

    @property
    def on_surface(self) -> bool:
        """See `TetrahedralConfig.on_surface`."""
        return self.refinement

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_terms(MESH_REGULARISERS if self.refinement else REGULARISERS)


class Magic3D(Tetrahedral):
    """Text to 3D by score distillation of a field, then of its mesh."""

    section_types: ClassVar[Mapping[str, type]] = {
        "data": RandomCameras,
        "system": Magic3DConfig,
    }

    def __init__(self, config: Config, device: torch.device | None = None) -> None:
        super().__init__(config, device)
        if self.settings.on_surface:
            self.regularisers = MESH_REGULARISERS
