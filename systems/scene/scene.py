"""The optimised scene: field, material, background and renderer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

import dreampropeller as dp
from systems.scene.backgrounds import BACKGROUNDS
from systems.scene.cameras import Views
from systems.scene.fields import FIELDS
from systems.scene.materials import MATERIALS
from systems.scene.renderers import RENDERERS, Rendering
from systems.settings.reader import part


@dataclass(frozen=True, kw_only=True)
class SceneConfig:
    """The scene's part of `system`: the names of its parts, and their sections.

    Args:
        geometry_type: Geometry; a key of `systems.scene.fields.FIELDS`.
        geometry: Settings of the geometry.
        material_type: Material; a key of `systems.scene.materials.MATERIALS`.
        material: Settings of the material.
        background_type: Background; a key of `systems.scene.backgrounds.BACKGROUNDS`.
        background: Settings of the background.
        renderer_type: Renderer; a key of `systems.scene.renderers.RENDERERS`.
        renderer: Settings of the renderer.
    """

    geometry_type: str = "implicit-volume"
    geometry: Any = field(metadata=part(FIELDS))
    material_type: str = "diffuse-with-point-light-material"
    material: Any = field(metadata=part(MATERIALS))
    background_type: str = "neural-environment-map-background"
    background: Any = field(metadata=part(BACKGROUNDS))
    renderer_type: str = "nerf-volume-renderer"
    renderer: Any = field(metadata=part(RENDERERS))


class Scene(nn.Module):
    """The optimised scene: field, material, background and renderer.

    Args:
        config: Settings of the system.
    """

    def __init__(self, config: SceneConfig) -> None:
        super().__init__()
        parts: dict[str, Any] = {}
        for name, table in (
            ("geometry", FIELDS),
            ("material", MATERIALS),
            ("background", BACKGROUNDS),
            ("renderer", RENDERERS),
        ):
            kind: Any = table[getattr(config, f"{name}_type")]
            parts[name] = kind(getattr(config, name))
        self.geometry = parts["geometry"]
        self.material = parts["material"]
        self.background = parts["background"]
        self.renderer = parts["renderer"]
        self.renderer.check(self.geometry)
        inside, seen = self.geometry.config.radius, self.renderer.config.radius
        if seen not in (inside, None):
            raise ValueError(
                f"`system.geometry.radius` is {inside} and `system.renderer.radius` "
                f"{seen}: write `radius: ${{system.geometry.radius}}` in the renderer."
            )

    def forward(
        self,
        views: Views,
        step: int | None,
        random: dp.StepRandom,
        with_normals: bool = False,
    ) -> Rendering:
        """See `systems.scene.renderers.Renderer`."""
        if step is not None:
            self.renderer.prepare(self.geometry, step, random)
        return self.renderer(
            self.geometry,
            self.material,
            self.background,
            views,
            step,
            random,
            with_normals,
        )
