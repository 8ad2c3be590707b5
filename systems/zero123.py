"""Zero-1-to-3: an image becomes a field, or growing splats.

See `systems.image_to_3d` for the loss (R. Liu et al., 2023, arXiv 2303.11328; as in
threestudio's `zero123-system`; on splats, the image mode of DreamGaussian, J. Tang et
al., 2023, arXiv 2309.16653).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import nn

from systems.dreamfusion import DreamFusion
from systems.dreamgaussian import DreamGaussian, DreamGaussianConfig
from systems.image_settings import ImageGuidedConfig, ImageLossConfig
from systems.image_to_3d import ImageTo3D
from systems.optimizer import OptimizerConfig
from systems.references.views import SingleImageConfig
from systems.scene.cameras import Views
from systems.scene.gaussians.scene import SplatRendering
from systems.scene.materials import PointLightConfig, Unlit
from systems.scene.regularisers import REGULARISERS, SMOOTH_REGULARISERS
from systems.scene.renderers import Rendering
from systems.scene.scene import SceneConfig
from systems.settings.checks import between
from systems.settings.config import Config
from systems.settings.schedules import Schedule, values_of

_SMOOTH = SMOOTH_REGULARISERS.keys() - REGULARISERS.keys()


@dataclass(frozen=True)
class FieldLossConfig(ImageLossConfig):
    """Weights of the loss of a field (`system.loss`), numbers or schedules.

    Args:
        lambda_depth: Weight of the reference view's depth, after a linear fit.
        lambda_depth_rel: Weight of its correlation.
        lambda_orient: Weight of the penalty on normals that face away from the camera.
        lambda_normal_smooth: Weight of the penalty on changes of the normal map.
        lambda_3d_normal_smooth: Weight of the penalty on changes of the normals in
            space.
    """

    lambda_depth: Schedule = 0.0
    lambda_depth_rel: Schedule = 0.0
    lambda_orient: Schedule = 0.0
    lambda_normal_smooth: Schedule = 0.0
    lambda_3d_normal_smooth: Schedule = 0.0


@dataclass(frozen=True, kw_only=True)
class Zero123SystemConfig(ImageGuidedConfig, SceneConfig):
    """`system`: the scene, guidance, loss and optimizer, each with its own section.

    Args:
        loss: Weights of the loss terms.
        optimizer: The optimizer, with a learning rate for each part.
        ambient_ratio_min: Least share of ambient light in a shaded random view.
    """

    optimizer: OptimizerConfig
    loss: FieldLossConfig = field(default_factory=FieldLossConfig)
    ambient_ratio_min: float = 0.5

    def __post_init__(self) -> None:
        between("ambient_ratio_min", self.ambient_ratio_min, 0, 1)
        lit = isinstance(self.material, PointLightConfig)
        if lit and (
            self.material.soft_shading or self.material.ambient_ratio_min is not None
        ):
            raise ValueError(
                "`material.soft_shading` and `material.ambient_ratio_min` have no "
                "effect here: write `system.ambient_ratio_min`."
            )
        if not lit and self.ambient_ratio_min != Zero123SystemConfig.ambient_ratio_min:
            raise ValueError(
                "`ambient_ratio_min` has no effect on a material without light: leave "
                "it out."
            )
        perturbs = getattr(self.renderer, "return_normal_perturb", None)
        if any(values_of(self.loss.lambda_3d_normal_smooth)) and not perturbs:
            raise ValueError(
                "`loss.lambda_3d_normal_smooth` compares normals with those beside: "
                "write `renderer.return_normal_perturb: true`."
            )


class Zero123(ImageTo3D, DreamFusion):
    """An image becomes a field."""

    section_types: ClassVar[Mapping[str, type]] = {
        "data": SingleImageConfig,
        "system": Zero123SystemConfig,
    }

    def __init__(self, config: Config, device: torch.device | None = None) -> None:
        super().__init__(config, device)
        loss = vars(self.settings.loss)
        self.regularisers = {
            name: term
            for name, term in SMOOTH_REGULARISERS.items()
            if name not in _SMOOTH or any(values_of(loss[f"lambda_{name}"]))
        }
        material = self.scene.material
        if isinstance(material.config, PointLightConfig):
            least = self.settings.ambient_ratio_min
            never_lit = material.config.ambient_only_steps >= self.num_steps
            material.config = replace(
                material.config,
                ambient_ratio_min=least,
                ambient_only_on_test=material.config.ambient_only_on_test or never_lit,
            )

    def prepare(self, module: Any, step: int) -> None:
        """See `ImageTo3D.prepare`."""
        module.renderer.prepare(module.geometry, step, self.random)

    def reference_rendering(
        self, module: Any, views: Views, step: int, with_normals: bool
    ) -> Rendering:
        """See `ImageTo3D.reference_rendering`."""
        return module.renderer(
            module.geometry,
            Unlit(module.material),
            module.background,
            views,
            step,
            self.whole_random,
            with_normals,
        )


@dataclass(frozen=True, kw_only=True)
class GaussianImageConfig(ImageGuidedConfig, DreamGaussianConfig):
    """`system`: splats, guidance by an image, loss, optimizer and growth.

    Args:
        loss: Weights of the loss terms.
    """

    loss: ImageLossConfig = field(default_factory=ImageLossConfig)  # pyright: ignore[reportIncompatibleVariableOverride]


class Zero123Gaussians(ImageTo3D, DreamGaussian):
    """An image becomes growing splats."""

    section_types: ClassVar[Mapping[str, type]] = {
        "data": SingleImageConfig,
        "system": GaussianImageConfig,
    }

    def prepare(self, module: nn.Module, step: int) -> None:
        """See `ImageTo3D.prepare`; splats have no buffers."""
        del module, step

    def reference_rendering(
        self, module: nn.Module, views: Views, step: int, with_normals: bool
    ) -> SplatRendering:
        """See `ImageTo3D.reference_rendering`."""
        del with_normals
        return module(views, step, self.whole_random)
