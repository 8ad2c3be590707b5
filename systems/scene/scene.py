"""Everything that is optimised, and how it is seen."""

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
from systems.settings.reader import choose, read


@dataclass(frozen=True, kw_only=True)
class SceneConfig:
    """The scene's part of `system`: names of its parts, and a section for each.

    Args:
        geometry_type: A key of `systems.scene.fields.FIELDS`.
        geometry: Its settings.
        material_type: A key of `systems.scene.materials.MATERIALS`.
        material: Its settings.
        background_type: A key of `systems.scene.backgrounds.BACKGROUNDS`.
        background: Its settings.
        renderer_type: A key of `systems.scene.renderers.RENDERERS`.
        renderer: Its settings.
    """

    geometry_type: str = "implicit-volume"
    geometry: dict[str, Any] = field(default_factory=dict)
    material_type: str = "diffuse-with-point-light-material"
    material: dict[str, Any] = field(default_factory=dict)
    background_type: str = "neural-environment-map-background"
    background: dict[str, Any] = field(default_factory=dict)
    renderer_type: str = "nerf-volume-renderer"
    renderer: dict[str, Any] = field(default_factory=dict)


class Scene(nn.Module):
    """Everything that is optimised, and how it is seen.

    Args:
        config: The system's settings.
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
            kind: Any = choose(
                table, getattr(config, f"{name}_type"), f"system.{name}_type"
            )
            section = getattr(config, name)
            parts[name] = kind(read(kind.Config, section, f"system.{name}"))
        self.geometry = parts["geometry"]
        self.material = parts["material"]
        self.background = parts["background"]
        self.renderer = parts["renderer"]
        inside, seen = self.geometry.config.radius, self.renderer.config.radius
        if inside != seen:
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
        """See `systems.scene.renderers.volume.VolumeRenderer`."""
        return self.renderer(
            self.geometry,
            self.material,
            self.background,
            views,
            step,
            random,
            with_normals,
        )
