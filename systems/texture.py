r"""Texture: the look of a given mesh, optimised by score distillation.

$$\ell(t, \theta) = \lambda_{sds}\,\ell_{sds}(x_\theta) \quad\text{or}\quad
  \lambda_{vsd}\,\ell_{vsd}(\theta; \phi) + \lambda_{lora}\,\ell_\phi(\phi; \theta)$$

where θ are maps of albedo and, if learned, of roughness and metalness. Shape and
texture coordinates are fixed, so a texel's gradient depends on little but itself: the
drift is nearly diagonal. With `refine-guidance` this is the second stage of
DreamGaussian (`systems.guidance.refine`), on any mesh that has colours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

import dreampropeller as dp
from systems.guidance.priors import check
from systems.guidance.prompts import PROMPT_PROCESSORS, PromptConfig
from systems.guidance.vsd import ALL_GUIDANCES
from systems.optimizer import OptimizerConfig
from systems.scene.cameras import RandomCameras, Views
from systems.scene.renderers import Rendering
from systems.scene.textured import TexturedScene, TexturedSceneConfig
from systems.settings.config import Config, ExportConfig
from systems.settings.reader import ConfigError, part, read
from systems.settings.schedules import Schedule, check_schedule
from systems.variational import Variational, check_rate, check_weights, scene_of


@dataclass(frozen=True)
class TextureLossConfig:
    """Weights of the loss (`system.loss`), numbers or schedules.

    Args:
        lambda_sds: Weight of score distillation.
        lambda_vsd: Weight of variational score distillation, with such a guidance.
        lambda_lora: Weight of the LoRA's own loss, likewise.
    """

    lambda_sds: Schedule = 1.0
    lambda_vsd: Schedule = 1.0
    lambda_lora: Schedule = 1.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            check_schedule(name, value, 0)


@dataclass(frozen=True, kw_only=True)
class TextureConfig(TexturedSceneConfig):
    """`system`: the mesh, guidance, loss and optimizer.

    Args:
        prompt_processor: Prompt and view-dependent prompting.
        guidance: Settings of the guidance.
        optimizer: The optimizer, with a learning rate for each part. The parts are
            `geometry.albedo`, `geometry.roughness`, `geometry.metallic`, `background`
            and, with variational guidance, `guidance`.
        prompt_processor_type: Any of threestudio's prompt processors.
        guidance_type: Guidance; a key of `systems.guidance.table.GUIDANCES` or of
            `systems.guidance.vsd.VSD_GUIDANCES`.
        loss: Weights of the loss terms.
    """

    prompt_processor: PromptConfig = field(metadata=part(PROMPT_PROCESSORS))
    guidance: Any = field(metadata=part(ALL_GUIDANCES))
    optimizer: OptimizerConfig
    prompt_processor_type: str = "diffusers-prompt-processor"
    guidance_type: str = "diffusers-guidance"
    loss: TextureLossConfig = field(default_factory=TextureLossConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_weights(self.loss, self.guidance_type)
        check_rate(self.optimizer, self.guidance_type)


class Texture(Variational):
    """Text to the texture of a mesh by score distillation."""

    section_types: ClassVar[Mapping[str, type]] = {
        "data": RandomCameras,
        "system": TextureConfig,
    }

    def __init__(self, config: Config, device: torch.device | None = None) -> None:
        super().__init__(config, device)
        self.settings = read(TextureConfig, config.system, "system")
        if config.export != ExportConfig():
            raise ConfigError(
                "`export` has no effect on `texture-system`: write "
                "`system.geometry.texture_resolution` and `system.geometry.max_faces`."
            )
        check(self.settings.guidance.pretrained_model_name_or_path, [self.title])
        self.check_lora()
        with self.random.scope(0, "scene"):
            scene = TexturedScene(self.settings, self.device)
            self._scene = scene.to(self.device)
        self.settings.optimizer.check(self.parts())
        self.regularisers = {}  # the shape is fixed

    @property
    def title(self) -> str:
        """The prompt."""
        return self.settings.prompt_processor.prompt

    @property
    def scene(self) -> TexturedScene:
        """The mesh, its maps, its material and the background."""
        return self._scene

    def about(self) -> dict[str, Any]:
        """See `System.about`; a state belongs to one shape and its texels."""
        return {**super().about(), "mesh": self.scene.geometry.digest}

    def rendering(
        self, module: nn.Module, views: Views, step: int, with_normals: bool
    ) -> Rendering:
        """See `Distillation.rendering`."""
        del with_normals
        return module(views, step, self.random)

    @torch.no_grad()
    def render(
        self, y: dp.State, views: Views, grey: float | None = None
    ) -> tuple[Float[Tensor, "views 3 height width"], Float[Tensor, "views 1 h w"]]:
        """Images and opacity of a state as in evaluation; see `System.render`."""
        own = scene_of(y)
        seen = torch.func.functional_call(self.scene, own, (views, None, self.random))
        return seen.shown(grey)

    @torch.no_grad()
    def mesh(self, y: dp.State) -> Any:
        """The mesh with the maps of a state."""
        caller = _Mesh(self.scene)
        named = {f"scene.{name}": tensor for name, tensor in scene_of(y).items()}
        return torch.func.functional_call(caller, named, ())

    def write(self, folder: Path, y: dp.State) -> dict[str, Any]:
        """See `System.write`; notes what was changed in the mesh."""
        report = super().write(folder, y)
        notes = [f"Mesh: {note}" for note in self.scene.geometry.surface.notes]
        return {**report, "notes": [*report.get("notes", []), *notes]}


class _Mesh(nn.Module):
    """Makes `TexturedScene.mesh` a `forward`, so that tensors can be swapped."""

    def __init__(self, scene: TexturedScene) -> None:
        super().__init__()
        self.scene = scene

    def forward(self) -> Any:
        return self.scene.mesh()
