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
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

import dreampropeller as dp
from systems.dreamfusion import DreamFusion, DreamFusionConfig
from systems.guidance.base import Guidance
from systems.guidance.priors import check
from systems.guidance.vsd import VSD_GUIDANCES
from systems.scene.cameras import RandomCameras, Views
from systems.scene.renderers import Rendering
from systems.scene.scene import Scene
from systems.settings.config import Config
from systems.settings.reader import part
from systems.settings.schedules import Schedule, check_schedule, value_at, values_of

LORA = "guidance."
"""Prefix of the LoRA's tensors in a state; its part in `optimizer.params`."""


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


class ProlificDreamer(DreamFusion):
    """Text to 3D by variational score distillation of a field."""

    section_types: ClassVar[Mapping[str, type]] = {
        "data": RandomCameras,
        "system": ProlificDreamerConfig,
    }

    def __init__(self, config: Config, device: torch.device | None = None) -> None:
        super().__init__(config, device)
        adapted = self.settings.guidance.pretrained_model_name_or_path_lora
        if adapted is not None:
            check(adapted, [])
        self._module: nn.Module = self.scene

    @property
    def is_reproducible(self) -> bool:
        """Not with `lora: local`: a worker's LoRA depends on what it evaluated."""
        return self.settings.guidance.lora != "local"

    def parts(self) -> nn.Module:
        """See `DreamFusion.parts`: those of the scene, and `guidance`."""
        return _SceneAndLora(self.scene, nn.Linear(1, 1))

    @property
    def module(self) -> nn.Module:
        """See `System.module`: scene and LoRA, once `trajectory` has loaded the model.

        With `lora: local` the scene alone.
        """
        return self._module

    def load_guidance(self) -> Guidance:
        """See `Distillation.load_guidance`."""
        settings = self.settings
        kind, loss = VSD_GUIDANCES[settings.guidance_type], settings.loss
        guidance = kind.load(settings.guidance, settings.prompt_processor, self.device)
        guidance.lora.reset(self.random)
        guidance.weights = lambda step: (
            value_at(loss.lambda_vsd, step),
            value_at(loss.lambda_lora, step),
        )
        if settings.guidance.lora == "local":
            named = {LORA + n: p for n, p in guidance.parameters().items()}
            guidance.private = self.optimizer(named)
        else:
            self._module = _SceneAndLora(self.scene, guidance.lora)
        return guidance

    def weights(self, step: int) -> Mapping[str, float]:
        """See `Distillation.weights`; the guidance weights its own two losses."""
        return {**super().weights(step), "sds": 1.0}

    def loss(
        self, step: int, module: nn.Module, guidance: Guidance
    ) -> tuple[Tensor, dict[str, Any]]:
        """See `Distillation.loss`."""
        total, log = super().loss(step, module, guidance)
        del log["loss_sds"]  # the sum of `loss_vsd` and `loss_lora`
        return total, log

    def render(
        self, y: dp.State, views: Views, grey: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `System.render`; the LoRA is not needed."""
        return super().render(_scene_of(y), views, grey)

    def check_state(self, y: dp.State, where: str | Path) -> None:
        """See `System.check_state`; the LoRA's shapes are known once it is loaded."""
        super().check_state(_scene_of(y) if self._module is self.scene else y, where)


def _scene_of(y: dp.State) -> dp.State:
    return {name: tensor for name, tensor in y.items() if not name.startswith(LORA)}


class _SceneAndLora(nn.Module):
    """The parts of a scene and a LoRA beside them, under the names of threestudio."""

    def __init__(self, scene: Scene, lora: nn.Module) -> None:
        super().__init__()
        for name, child in scene.named_children():
            self.add_module(name, child)
        self.guidance = lora
        self._scene = (scene,)  # not a child: its parts are

    def forward(self, *arguments: Any, **options: Any) -> Rendering:
        return self._scene[0](*arguments, **options)
