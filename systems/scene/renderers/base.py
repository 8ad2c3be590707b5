"""The interface of every renderer of a field, and its result."""

from __future__ import annotations

import abc
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from dreampropeller import StepRandom
from systems.scene.backgrounds import Background
from systems.scene.cameras import Views
from systems.scene.fields import Field
from systems.scene.materials import Material


@dataclass(frozen=True)
class Rendering:
    """Images of a scene, and the inputs of the regularisers.

    Attributes:
        rgb: Colours over the background, shape ``(views, height, width, 3)``.
        foreground: The object's share of them, shape as `rgb`.
        opacity: From 0 to 1, shape ``(views, height, width, 1)``.
        normal: Normals from −1 to 1 times opacity, shape as `rgb`; zeros if they
            were not requested.
        backfacing: Per ray, the sum over its samples of weight times the squared
            cosine between normal and ray where the normal faces away from the camera
            (the orientation loss of D. Verbin et al., 2021, arXiv 2112.03907), shape
            as `opacity`; zeros without normals.
        eikonal: Per ray, the sum over its samples of the squared deviation of the
            gradient's norm from 1, shape as `opacity`; None without signed distances.
        curvature: Per ray, the sum of the Laplacian's magnitude, shape as `opacity`;
            None where the Laplacian is not known.
        samples: The number of samples of each ray, shape as `opacity`; None where
            nothing else is summed over them.
        bend: Mean over the mesh's edges of 1 − cos of the angle between the normals of
            their two ends, the same for each view, shape ``(views,)``; None without a
            mesh.
        laplacian: Mean over the mesh's vertices of the length of the sum of their
            differences from their neighbours, as `bend`.
        depth: Per ray, the sum over its samples of weight times distance, shape as
            `opacity`; None without samples along rays.
        bumps: Per ray, the sum over its samples of the absolute differences between
            the normals there and at a point slightly beside, over the three axes,
            shape as `opacity`; None if they were not requested.
    """

    rgb: Float[Tensor, "views height width 3"]
    foreground: Float[Tensor, "views height width 3"]
    opacity: Float[Tensor, "views height width 1"]
    normal: Float[Tensor, "views height width 3"]
    backfacing: Float[Tensor, "views height width 1"]
    eikonal: Float[Tensor, "views height width 1"] | None = field(
        default=None, kw_only=True
    )
    curvature: Float[Tensor, "views height width 1"] | None = field(
        default=None, kw_only=True
    )
    samples: Float[Tensor, "views height width 1"] | None = field(
        default=None, kw_only=True
    )
    bend: Float[Tensor, " views"] | None = field(default=None, kw_only=True)
    laplacian: Float[Tensor, " views"] | None = field(default=None, kw_only=True)
    depth: Float[Tensor, "views height width 1"] | None = field(
        default=None, kw_only=True
    )
    bumps: Float[Tensor, "views height width 1"] | None = field(
        default=None, kw_only=True
    )

    def shown(
        self, grey: float | None = None
    ) -> tuple[Float[Tensor, "views 3 height width"], Float[Tensor, "views 1 h w"]]:
        """Images from 0 to 1 and opacity, on the CPU.

        Args:
            grey: Level of a grey background; None: the scene's own.
        """
        rgb = self.rgb
        if grey is not None:
            rgb = self.foreground + (1 - self.opacity) * grey
        rgb, opacity = (part.permute(0, 3, 1, 2).cpu() for part in (rgb, self.opacity))
        return rgb.clamp(0, 1), opacity


class Renderer(nn.Module, abc.ABC):
    """Renders a field with a material over a background.

    `Config` is the dataclass of its settings, the only argument it is built from; it
    has `radius`, that of the ball outside of which nothing is rendered.
    """

    Config: type[Any]
    config: Any

    def check(self, geometry: Field) -> None:
        """Refuse a field that cannot be rendered; default: any can.

        Raises:
            ValueError: Says what to write instead.
        """
        del geometry

    def prepare(self, geometry: Field, step: int, random: StepRandom) -> None:
        """Bring the renderer's buffers to a training step; default: it has none.

        Called once per step, before its first images.

        Args:
            geometry: The field.
            step: The step on the trajectory.
            random: Source of the randomness of a step.
        """
        del geometry, step, random

    @abc.abstractmethod
    def forward(
        self,
        geometry: Field,
        material: Material,
        background: Background,
        views: Views,
        step: int | None,
        random: StepRandom,
        with_normals: bool = False,
    ) -> Rendering:
        """Render views, on the device of the geometry.

        Args:
            geometry: The field.
            material: Material of the field.
            background: Background of the scene.
            views: The views.
            step: A training step: samples, shading and background vary. None:
                evaluation.
            random: Source of the randomness of a step.
            with_normals: Return normals even if the material needs none.
        """
