r"""ProlificDreamer: a field, its surface and its texture, one stage after the other.

The first and the last stage are optimised by variational score distillation,

$$\ell(t, \theta, \phi) = \lambda_{vsd}\,\ell_{vsd}(\theta; \phi) +
  \lambda_{lora}\,\ell_\phi(\phi; \theta) + \sum_r \lambda_r R_r(\theta)$$

(Z. Wang et al., 2023, arXiv 2305.16213; weights and form as in threestudio). The state
is {scene θ, LoRA φ}: the gradient of θ reads φ, that of φ reads the images of θ, and
one optimizer moves both, each with its own learning rate. `stage` chooses:

- `coarse`: a field; the resolution rises at `data.resolution_milestones`;
- `geometry`: its surface on tetrahedra, by score distillation of its normal maps,
  $\lambda_{sds}\,\ell_{sds}(n_\theta) + \sum_r \lambda_r R_r(\theta)$;
- `texture`: the colours of the fixed surface.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

import dreampropeller as dp
from systems.guidance.prompts import PromptConfig
from systems.guidance.vsd import ALL_GUIDANCES
from systems.scene.cameras import Cameras, RandomCameras, Views
from systems.scene.regularisers import MESH_REGULARISERS, REGULARISERS, Regulariser
from systems.scene.renderers import Rendering
from systems.settings.config import Config
from systems.settings.reader import part
from systems.settings.schedules import Schedule, check_schedule
from systems.tetrahedral import Tetrahedral, TetrahedralConfig
from systems.variational import LORA, Variational, check_rate, check_weights, scene_of

__all__ = ["LORA", "ProlificDreamer", "ProlificDreamerConfig", "VSDLossConfig"]

Stage = Literal["coarse", "geometry", "texture"]
TERMS: Mapping[Stage, Mapping[str, Regulariser]] = {
    "coarse": REGULARISERS,
    "geometry": MESH_REGULARISERS,
    "texture": {},
}
"""The regularisers of each stage."""


@dataclass(frozen=True)
class VSDLossConfig:
    """Weights of the loss (`system.loss`), numbers or schedules.

    Args:
        lambda_vsd: Weight of variational score distillation.
        lambda_lora: Weight of the LoRA's own loss.
        lambda_sds: Weight of another guidance, such as that of the geometry stage.
        lambda_orient: Weight of the penalty on normals that face away from the camera.
        lambda_sparsity: Weight of the penalty on opacity.
        lambda_opaque: Weight of the penalty on half-transparent pixels.
        lambda_normal_consistency: Weight of the penalty on bent edges of a mesh.
        lambda_laplacian_smoothness: Weight of the penalty on vertices away from the
            mean of their neighbours.
    """

    lambda_vsd: Schedule = 1.0
    lambda_lora: Schedule = 1.0
    lambda_sds: Schedule = 1.0
    lambda_orient: Schedule = 0.0
    lambda_sparsity: Schedule = 0.0
    lambda_opaque: Schedule = 0.0
    lambda_normal_consistency: Schedule = 0.0
    lambda_laplacian_smoothness: Schedule = 0.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            check_schedule(name, value, 0)


@dataclass(frozen=True)
class NormalMapConfig:
    """What the geometry stage shows its guidance (`system.normal_maps`).

    Args:
        space: Coordinates of the normals: "world", as in threestudio, or "camera"
            (right, up, towards the camera).
        over_background: Show them over the scene's background; false: over black.
        prefix: Words put before the prompt, such as "normal map of ".
    """

    space: Literal["world", "camera"] = "world"
    over_background: bool = False
    prefix: str = ""


@dataclass(frozen=True, kw_only=True)
class ProlificDreamerConfig(TetrahedralConfig):
    """`system`: the scene, guidance with its LoRA, loss and optimizer.

    Args:
        stage: Stage of the method: "coarse", "geometry" or "texture".
        guidance_type: Guidance; a key of `systems.guidance.table.GUIDANCES` or of
            `systems.guidance.vsd.VSD_GUIDANCES`.
        guidance: Settings of the guidance.
        loss: Weights of the loss terms.
        normal_maps: The images of the geometry stage.
    """

    surface_setting: ClassVar[str] = "`stage: geometry` or `stage: texture`"

    stage: Stage = "coarse"
    guidance: Any = field(metadata=part(ALL_GUIDANCES))
    guidance_type: str = "vsd-guidance"
    loss: VSDLossConfig = field(default_factory=VSDLossConfig)  # pyright: ignore[reportIncompatibleVariableOverride]
    normal_maps: NormalMapConfig = field(default_factory=NormalMapConfig)

    @property
    def on_surface(self) -> bool:
        """See `TetrahedralConfig.on_surface`."""
        return self.stage != "coarse"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_terms(TERMS[self.stage])
        check_weights(self.loss, self.guidance_type)
        check_rate(self.optimizer, self.guidance_type)
        if self.stage != "geometry" and self.normal_maps != NormalMapConfig():
            raise ValueError(
                f"`normal_maps` has no effect on `stage: {self.stage}`, whose guidance "
                "sees colours: leave it out."
            )
        fixed = bool(getattr(self.geometry, "fix_geometry", False))
        if self.on_surface and fixed != (self.stage == "texture"):
            raise ValueError(
                f"`stage: {self.stage}` "
                + ("moves the surface" if fixed else "keeps the surface")
                + f": write `geometry.fix_geometry: {str(not fixed).lower()}`."
            )


class ProlificDreamer(Variational, Tetrahedral):
    """Text to 3D by variational score distillation."""

    section_types: ClassVar[Mapping[str, type]] = {
        "data": RandomCameras,
        "system": ProlificDreamerConfig,
    }

    def __init__(self, config: Config, device: torch.device | None = None) -> None:
        super().__init__(config, device)
        self.check_lora()
        self.regularisers = TERMS[self.settings.stage]

    @property
    def prompts(self) -> PromptConfig:
        """See `Distillation.prompts`."""
        prompts = super().prompts
        prefix = self.settings.normal_maps.prefix
        return replace(prompts, prompt=prefix + prompts.prompt)

    def images(
        self, seen: Rendering, views: Views
    ) -> Float[Tensor, "views 3 height width"]:
        """See `Distillation.images`; in the geometry stage, normal maps."""
        if self.settings.stage != "geometry":
            return super().images(seen, views)
        return normal_maps(seen, views.cameras, self.settings.normal_maps)

    def render(
        self, y: dp.State, views: Views, grey: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `System.render`; the LoRA is not needed."""
        return super().render(scene_of(y), views, grey)

    def mesh(self, y: dp.State) -> Any:
        """See `System.mesh`; the LoRA is not needed."""
        return super().mesh(scene_of(y))


def normal_maps(
    seen: Rendering, cameras: Cameras, config: NormalMapConfig
) -> Float[Tensor, "views 3 height width"]:
    """Normals of a rendering as images, from −1…1 to 0…1."""
    normal = seen.normal
    if config.space == "camera":
        _, right, up, forward = cameras.axes()
        to_camera = torch.stack([right, up, -forward], -2).to(normal)
        normal = torch.einsum("vij,vhwj->vhwi", to_camera, normal)
    image = (normal + seen.opacity) / 2
    if config.over_background:
        image = image + (seen.rgb - seen.foreground)
    return image.permute(0, 3, 1, 2)
