"""Renderers: from a field to images."""

from collections.abc import Mapping

from systems.scene.renderers.base import Renderer, Rendering
from systems.scene.renderers.neus import NeuSRenderer
from systems.scene.renderers.surface import SurfaceRenderer
from systems.scene.renderers.volume import VolumeRenderer

RENDERERS: Mapping[str, type[Renderer]] = {
    "nerf-volume-renderer": VolumeRenderer,
    "neus-volume-renderer": NeuSRenderer,
    "nvdiff-rasterizer": SurfaceRenderer,
}

__all__ = [
    "RENDERERS",
    "NeuSRenderer",
    "Renderer",
    "Rendering",
    "SurfaceRenderer",
    "VolumeRenderer",
]
