"""Losses of a surface equal those of threestudio's own code (`tests/golden`)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dreampropeller import StepRandom
from systems.scene.backgrounds import Solid, SolidConfig
from systems.scene.fields import SDFField
from systems.scene.fields.sdf import SDFConfig
from systems.scene.materials import Albedo, AlbedoConfig
from systems.scene.regularisers import MESH_REGULARISERS, SURFACE_REGULARISERS
from systems.scene.renderers import Rendering
from systems.scene.renderers.neus import NeuSConfig, NeuSRenderer
from systems.scene.renderers.surface import bend, edges_of, laplacian, vertex_normals
from systems.scene.renderers.volume import Samples
from tests.golden import surface_oracle as oracle

EXACT = 1e-5
"""Rounding of single precision, relative to the largest number."""


@pytest.fixture(scope="module")
def theirs() -> dict[str, Tensor]:
    return load_file(oracle.FILE)


class Bumpy(SDFField):
    """The oracle's field."""

    def __init__(self) -> None:
        super().__init__(SDFConfig(radius=oracle.RADIUS, normal_type="analytic"))
        values = oracle.parameters()
        self.scale = nn.ParameterDict({n: v.detach() for n, v in values.items()})

    def eps(self, step: int | None) -> float:
        del step
        return 0.0

    def raw(self, points: Tensor, step: int | None) -> tuple[Tensor, Tensor]:
        del step
        scale = {name: self.scale[name] for name in oracle.SCALES}
        return oracle.distance(points, scale), oracle.colours(points)

    def forward(self, points: Tensor, step: int | None) -> tuple[Tensor, Tensor]:
        distance, features = self.raw(points, step)
        return -distance, features


def close(found: Tensor, expected: Tensor) -> None:
    error = (found.detach() - expected).abs().max() / expected.abs().max()
    assert float(error) < EXACT


@pytest.mark.parametrize("kind", oracle.RENDERERS)
def test_one_view_has_the_losses_and_gradients_of_their_textmesh(
    kind: str, theirs: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    renderer = NeuSRenderer(
        NeuSConfig(
            radius=oracle.RADIUS,
            grid_prune=False,
            learned_variance_init=oracle.VARIANCE,
            **oracle.RENDERERS[kind],
        )
    )
    number, begin, end = oracle.samples()
    dense = (oracle.SIDE**2, oracle.SAMPLES)
    cut = Samples(begin, end, number, torch.arange(len(number)), dense)
    monkeypatch.setattr(renderer, "_cut", lambda _: cut)
    origins, directions = oracle.rays()
    shape, size = (1, oracle.SIDE, oracle.SIDE, 3), oracle.SIDE
    rays = origins.reshape(shape), directions.reshape(shape)
    cameras = SimpleNamespace(rays=lambda *_: rays)
    views: Any = SimpleNamespace(
        cameras=cameras, height=size, width=size, light=torch.zeros(1, 3)
    )
    field, black = Bumpy(), Solid(SolidConfig((0.0, 0.0, 0.0)))
    material = Albedo(AlbedoConfig())
    seen = renderer(field, material, black, views, oracle.STEP, StepRandom(0), True)
    images = torch.cat([seen.rgb[0], seen.opacity[0]], -1)
    close(images, theirs[f"{kind}/images"])
    learned = [*(field.scale[n] for n in oracle.SCALES), renderer.variance]
    for loss in oracle.LOSSES:
        value = SURFACE_REGULARISERS[loss](seen)
        close(value, theirs[f"{kind}/{loss}"])
        found = torch.autograd.grad(
            value, learned, retain_graph=True, allow_unused=True
        )
        flat = torch.stack([torch.zeros(()) if g is None else g for g in found])
        close(flat, theirs[f"{kind}/{loss}/gradient"])


def test_a_mesh_has_the_losses_and_gradients_of_theirs(
    theirs: dict[str, Tensor],
) -> None:
    vertices, faces = oracle.mesh()
    vertices.requires_grad_(True)
    edges = edges_of(faces)
    nothing = torch.zeros(1, 1, 1, 3)
    seen = Rendering(
        nothing, nothing, nothing[..., :1], nothing, nothing[..., :1],
        bend=bend(vertex_normals(vertices, faces), edges).expand(1),
        laplacian=laplacian(vertices, edges).expand(1),
    )  # fmt: skip
    for loss in oracle.MESH_LOSSES:
        value = MESH_REGULARISERS[loss](seen)
        close(value, theirs[f"mesh/{loss}"])
        (found,) = torch.autograd.grad(value, vertices, retain_graph=True)
        close(found.flatten(), theirs[f"mesh/{loss}/gradient"])
