r"""DreamFusion: a field optimised by score distillation.

$$\ell(t, \theta) = \lambda_{sds}\,\ell_{sds} + \lambda_{orient}\,\ell_{orient} +
  \lambda_{sparsity} \operatorname{mean} \sqrt{o^2 + 0.01} +
  \lambda_{opaque} H(o)$$

with opacity o and binary entropy H (B. Poole et al., 2022, arXiv 2209.14988; weights
and form as in threestudio). Each weight is a number or a schedule.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

import dreampropeller as dp
from systems.distillation import Distillation
from systems.guidance.priors import check
from systems.guidance.prompts import PROMPT_PROCESSORS, PromptConfig
from systems.guidance.table import GUIDANCES
from systems.optimizer import OptimizerConfig
from systems.scene.cameras import RandomCameras, Views
from systems.scene.isosurface import Values, colours_along, extract_mesh
from systems.scene.renderers.volume import Rendering
from systems.scene.scene import Scene, SceneConfig
from systems.settings.config import Config
from systems.settings.reader import part, read
from systems.settings.schedules import Schedule, check_schedule


@dataclass(frozen=True)
class LossConfig:
    """Weights of the loss (`system.loss`), numbers or schedules.

    Args:
        lambda_sds: Weight of score distillation.
        lambda_orient: Weight of the penalty on normals that face away from the camera.
        lambda_sparsity: Weight of the penalty on opacity.
        lambda_opaque: Weight of the penalty on half-transparent pixels.
    """

    lambda_sds: Schedule = 1.0
    lambda_orient: Schedule = 0.0
    lambda_sparsity: Schedule = 0.0
    lambda_opaque: Schedule = 0.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            check_schedule(name, value, 0)


@dataclass(frozen=True, kw_only=True)
class DreamFusionConfig(SceneConfig):
    """`system`: the scene, guidance, loss and optimizer, each with its own section.

    Args:
        prompt_processor_type: Any of threestudio's prompt processors.
        prompt_processor: Prompt and view-dependent prompting.
        guidance_type: Guidance; a key of `systems.guidance.table.GUIDANCES`.
        guidance: Settings of the guidance.
        loss: Weights of the loss terms.
        optimizer: The optimizer, with a learning rate for each part.
    """

    prompt_processor: PromptConfig = field(metadata=part(PROMPT_PROCESSORS))
    guidance: Any = field(metadata=part(GUIDANCES))
    optimizer: OptimizerConfig
    prompt_processor_type: str = "diffusers-prompt-processor"
    guidance_type: str = "diffusers-guidance"
    loss: LossConfig = field(default_factory=LossConfig)

    def __post_init__(self) -> None:
        if getattr(self.renderer, "return_normal_perturb", False):
            raise ValueError(
                "`renderer.return_normal_perturb` has no effect here, without "
                "`lambda_3d_normal_smooth`: leave it out."
            )
        named = self.prompt_processor.pretrained_model_name_or_path
        used = self.guidance.pretrained_model_name_or_path
        if named not in (None, used):
            raise ValueError(
                f"`prompt_processor` names the model `{named}` and `guidance` "
                f"`{used}`: the guidance's own text encoder is used. Leave the first "
                "out, or write the same."
            )


class DreamFusion(Distillation):
    """Text to 3D by score distillation of a field."""

    section_types: ClassVar[Mapping[str, type]] = {
        "data": RandomCameras,
        "system": DreamFusionConfig,
    }

    def __init__(self, config: Config, device: torch.device | None = None) -> None:
        super().__init__(config, device)
        self.settings = read(self.section_types["system"], config.system, "system")
        self.check_model()
        with self.random.scope(0, "scene"):
            self._scene = Scene(self.settings).to(self.device)
        self.settings.optimizer.check(self.parts())

    def check_model(self) -> None:
        """Refuse a model or a prompt that guidance could not use."""
        check(self.settings.guidance.pretrained_model_name_or_path, [self.title])

    def parts(self) -> nn.Module:
        """The parts whose learning rates can be set: those of the scene."""
        return self._scene

    @property
    def title(self) -> str:
        """The prompt."""
        return self.settings.prompt_processor.prompt

    @property
    def scene(self) -> Scene:
        """The field, its material, the background and the renderer."""
        return self._scene

    def rendering(
        self, module: nn.Module, views: Views, step: int, with_normals: bool
    ) -> Rendering:
        """See `Distillation.rendering`."""
        return module(views, step, self.random, with_normals=with_normals)

    @torch.no_grad()
    def render(
        self, y: dp.State, views: Views, grey: float | None = None
    ) -> tuple[Float[Tensor, "views 3 height width"], Float[Tensor, "views 1 h w"]]:
        """Images and opacity of a state as in evaluation; see `System.render`."""
        seen = torch.func.functional_call(self.scene, y, (views, None, self.random))
        return seen.shown(grey)

    @torch.no_grad()
    def mesh(self, y: dp.State) -> Any:
        """The surface at `isosurface_threshold`, with the albedo that rays meet."""
        geometry = self.scene.geometry
        return extract_mesh(
            *self._field(y),
            geometry.config.radius,
            geometry.config.isosurface_resolution,
            self.silhouettes(y) if geometry.level is None else geometry.level,
            self._depth,
        )

    @torch.no_grad()
    def paint(
        self, y: dp.State, mesh: Any, points: Tensor, normals: Tensor
    ) -> Float[Tensor, "points 3"]:
        """The albedo that rays along the normals meet; see `System.paint`."""
        del mesh
        return colours_along(*self._field(y), points, normals, self._depth)

    @property
    def _depth(self) -> float:
        """Distance between the samples of a ray below the surface; 0: none are met."""
        scene = self.scene
        return scene.renderer.config.step_size if scene.geometry.translucent else 0.0

    def values(self, y: dp.State) -> Values:
        """The field's values of a state as a function of points, on the CPU."""
        return self._functions(y)[0]

    def features(self, y: dp.State) -> Values:
        """The field's features of a state as a function of points, on the CPU."""
        return self._functions(y)[1]

    def _field(self, y: dp.State) -> tuple[Values, Values]:
        """Values and albedo of a state as functions of points, on the CPU."""
        values, features = self._functions(y)
        return values, lambda points: self.scene.material.albedo(features(points))

    def _functions(self, y: dp.State) -> tuple[Values, Values]:
        geometry = self.scene.geometry
        prefix = "geometry."
        own = {
            name.removeprefix(prefix): tensor
            for name, tensor in y.items()
            if name.startswith(prefix)
        }

        def both(points: Tensor) -> tuple[Tensor, Tensor]:
            return torch.func.functional_call(
                geometry, own, (points.to(self.device), None)
            )

        def density(points: Tensor) -> Tensor:
            inside = points.norm(dim=-1) < geometry.config.radius
            found = both(points)[0].cpu()
            return torch.where(inside, found, geometry.outside)

        def features(points: Tensor) -> Tensor:
            return both(points)[1].cpu()

        return density, features
