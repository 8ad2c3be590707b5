r"""ProlificDreamer: a field optimised by variational score distillation.

$$\ell(t, \theta, \phi) = \lambda_{vsd}\,\ell_{vsd}(\theta; \phi) +
  \lambda_{lora}\,\ell_\phi(\phi; \theta) + \sum_r \lambda_r R_r(\theta)$$

(Z. Wang et al., 2023, arXiv 2305.16213; weights and form as in threestudio). The state
is {scene θ, LoRA φ}: the gradient of θ reads φ, that of φ reads the images of θ, and
one optimizer moves both, each with its own learning rate. This is the first stage;
the resolution rises at `data.resolution_milestones`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

import dreampropeller as dp
from systems.dreamfusion import DreamFusion, DreamFusionConfig
from systems.guidance.vsd import VSD_GUIDANCES
from systems.scene.cameras import RandomCameras, Views
from systems.settings.config import Config
from systems.settings.reader import part
from systems.settings.schedules import Schedule, check_schedule, values_of
from systems.variational import LORA, Variational, scene_of

__all__ = ["LORA", "ProlificDreamer", "ProlificDreamerConfig", "VSDLossConfig"]


@dataclass(frozen=True)
class VSDLossConfig:
    """Weights of the loss (`system.loss`), numbers or schedules.

    Args:
        lambda_vsd: Weight of variational score distillation.
        lambda_lora: Weight of the LoRA's own loss.
        lambda_orient: Weight of the penalty on normals that face away from the camera.
        lambda_sparsity: Weight of the penalty on opacity.
        lambda_opaque: Weight of the penalty on half-transparent pixels.
    """

    lambda_vsd: Schedule = 1.0
    lambda_lora: Schedule = 1.0
    lambda_orient: Schedule = 0.0
    lambda_sparsity: Schedule = 0.0
    lambda_opaque: Schedule = 0.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            check_schedule(name, value, 0)
        if not any(values_of(self.lambda_lora)):
            raise ValueError(
                "`lambda_lora` is 0, so the LoRA never learns and stays the pretrained "
                "model: write a positive weight, or use `dreamfusion-system` with "
                "`guidance_type: csd-guidance`, which needs no LoRA."
            )


@dataclass(frozen=True, kw_only=True)
class ProlificDreamerConfig(DreamFusionConfig):
    """`system`: the scene, guidance with its LoRA, loss and optimizer.

    Args:
        stage: Stage of the method: "coarse", the field. Geometry and texture are not
            available yet.
        guidance_type: Guidance; a key of `systems.guidance.vsd.VSD_GUIDANCES`.
        guidance: Settings of the guidance.
        loss: Weights of the loss terms.
    """

    stage: Literal["coarse"] = "coarse"
    guidance: Any = field(metadata=part(VSD_GUIDANCES))
    guidance_type: str = "vsd-guidance"
    loss: VSDLossConfig = field(default_factory=VSDLossConfig)  # pyright: ignore[reportIncompatibleVariableOverride]


class ProlificDreamer(Variational, DreamFusion):
    """Text to 3D by variational score distillation of a field."""

    section_types: ClassVar[Mapping[str, type]] = {
        "data": RandomCameras,
        "system": ProlificDreamerConfig,
    }

    def __init__(self, config: Config, device: torch.device | None = None) -> None:
        super().__init__(config, device)
        self.check_adapted()

    def render(
        self, y: dp.State, views: Views, grey: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `System.render`; the LoRA is not needed."""
        return super().render(scene_of(y), views, grey)
