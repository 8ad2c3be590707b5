"""The rasteriser: who is seen, what of it, and the gradients of both."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trimesh
from torch import Tensor

from systems.scene.cameras import Cameras, Views
from systems.scene.renderers import raster
from systems.scene.renderers.raster import (
    BruteForce,
    Embree,
    choose_backend,
    meet,
    project,
    rasterize,
    sample,
)
from systems.scene.renderers.silhouettes import Adjacency, antialias
from systems.toybox.truth import truth

CPU = torch.device("cpu")


def views(count: int, height: int, width: int | None = None) -> Views:
    one = torch.ones(count)
    cameras = Cameras(torch.arange(count) * 97.0, 15 + 20 * one, 2.6 * one, 50 * one)
    return Views(cameras, cameras.axes()[0], height, width or height)


def bumpy(level: int = 2) -> tuple[Tensor, Tensor]:
    """A ball with bumps, which hide each other, in double precision."""
    ball = trimesh.creation.icosphere(level)
    vertices = torch.tensor(ball.vertices)
    return vertices * (0.8 + 0.15 * torch.sin(5 * vertices)), torch.tensor(ball.faces)


def test_embree_sees_what_testing_every_face_sees() -> None:
    vertices, faces = bumpy(3)
    seen = views(3, 32, 40)
    found = Embree(vertices, faces)(seen)
    assert torch.equal(found, BruteForce(vertices, faces)(seen))
    assert 0.3 < float((found >= 0).float().mean()) < 0.9


def image_of(vertices: Tensor, faces: Tensor, seen: Views, values: Tensor) -> Tensor:
    """Interpolated values and a mask, antialiased, with a weight for each pixel."""
    found = rasterize(vertices, faces, seen, BruteForce(vertices, faces))
    layers = torch.cat(
        [
            found.interpolate(values, faces),
            values.new_ones(1).expand(len(found.depth), 1),
        ],
        -1,
    )
    image = antialias(found.image(layers), found, vertices, faces, seen)
    weight = torch.arange(image.numel(), dtype=image.dtype).sin().view_as(image)
    return (image * (1 + 0.3 * weight)).sum()


def test_gradients_are_those_of_finite_differences() -> None:
    vertices, faces = bumpy()
    seen = views(2, 24)
    values = torch.rand(len(vertices), 3, dtype=torch.float64)
    leaves = [vertices.requires_grad_(), values.requires_grad_()]
    gradients = torch.autograd.grad(image_of(vertices, faces, seen, values), leaves)
    step = 1e-6
    for which, gradient in enumerate(gradients):
        for seed in range(2):
            generator = torch.Generator().manual_seed(seed)
            way = torch.randn(gradient.shape, generator=generator, dtype=torch.float64)
            moved = [[*leaves], [*leaves]]
            for side, sign in enumerate((1, -1)):
                moved[side][which] = leaves[which].detach() + sign * step * way
            high, low = (image_of(v, faces, seen, c) for v, c in moved)
            numeric = (high - low).item() / (2 * step)
            assert numeric == pytest.approx(float((gradient * way).sum()), rel=1e-4)


def test_the_outline_moves_an_antialiased_mask_like_its_area() -> None:
    """Of a triangle: the mask's sum is its area in pixels, and so is the derivative."""
    corners = torch.tensor([[0.0, -0.6, -0.5], [0.1, 0.7, -0.3], [-0.1, 0.05, 0.65]])
    vertices = corners.double().requires_grad_()
    faces, seen = torch.tensor([[0, 1, 2]]), views(1, 64)
    found = rasterize(vertices, faces, seen, BruteForce(vertices, faces))
    mask = found.image(torch.ones(len(found.depth), 1, dtype=torch.float64))
    total = antialias(mask, found, vertices, faces, seen).sum()
    a, b, c = project(vertices, seen)[0]
    area = ((b - a)[0] * (c - a)[1] - (b - a)[1] * (c - a)[0]).abs() / 2
    assert total.item() == pytest.approx(area.item(), rel=0.01)
    got, wanted = (torch.autograd.grad(x, vertices)[0] for x in (total, area))
    assert float((got - wanted).norm() / wanted.norm()) < 0.05
    alias = torch.autograd.grad(mask.sum() + 0 * vertices.sum(), vertices)[0]
    assert not alias.any()  # without antialiasing there is no gradient at all


def test_an_inner_edge_is_no_outline_however_its_faces_turn() -> None:
    corners = torch.tensor(
        [[0.0, -0.5, -0.5], [0.0, 0.5, -0.5], [0.0, 0.5, 0.5], [0.0, -0.5, 0.5]]
    )
    for second in ([0, 2, 3], [3, 2, 0]):  # the other one is inside out
        faces = torch.tensor([[0, 1, 2], second])
        edges = Adjacency.of(faces).outline(corners, faces, views(1, 8))
        assert edges.sum() == 4


@pytest.mark.parametrize("name", ["mug", "rocket"])
def test_mask_depth_and_normals_are_those_of_the_sphere_tracer(name: str) -> None:
    wanted = truth(f"a red {name}")
    mesh = wanted.mesh(96)
    seen = views(3, 48)
    right = wanted.render(seen.cameras, 48, supersample=1)
    found = rasterize(mesh.vertices, mesh.faces, seen)
    hit, mask = found.hit, right.mask[:, 0] > 0
    assert int((hit & mask).sum()) / int((hit | mask).sum()) > 0.96
    both = hit & mask
    depth = found.image(found.depth[:, None])[..., 0]
    assert float((depth - right.depth[:, 0])[both].abs().median()) < 0.01
    flat = trimesh.Trimesh(mesh.vertices.numpy(), mesh.faces.numpy(), process=False)
    normals = torch.from_numpy(flat.vertex_normals.copy()).float()
    normal = found.image(found.interpolate(normals, mesh.faces))
    _, right_, up, forward = seen.cameras.axes()
    turned = torch.einsum(
        "vac,vhwc->vhwa", torch.stack([right_, up, -forward], 1), normal
    )
    cosine = (turned * right.normal.permute(0, 2, 3, 1)).sum(-1)[both]
    assert float(cosine.median()) > 0.99


def test_a_texture_is_bilinear_and_starts_at_the_lower_left() -> None:
    texture = torch.arange(12.0).view(3, 4, 1)
    u, v = (1 + 0.5) / 4, (0 + 0.5) / 3  # column 1 of the lowest row
    points = torch.tensor([[u, v], [u + 0.125, v], [u, v + 1 / 6], [0.0, 1.0], [1, 0]])
    wanted = [9.0, 9.5, 7.0, 0.0, 11.0]
    assert sample(texture, points)[:, 0].tolist() == pytest.approx(wanted, abs=1e-5)


def test_a_ray_in_the_plane_of_a_face_meets_nothing() -> None:
    corners = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0]])
    weights, depth = meet(
        torch.tensor([-1.0, 0, 0]), torch.tensor([1.0, 0, 0]), corners
    )
    assert weights.tolist() == [-1, -1, -1]
    assert float(depth) == 0


def test_backends_are_probed_with_one_line_of_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert choose_backend("auto", CPU) == (Embree, "")
    with pytest.raises(ValueError, match=r"`nvdiffrast\.torch` is not used: it needs"):
        choose_backend("nvdiffrast", CPU)
    with pytest.raises(ValueError, match="write auto or nvdiffrast or embree or brute"):
        choose_backend("best", CPU)
    monkeypatch.setattr(raster, "probe", lambda name, **_: (None, f"`{name}`: none."))
    kind, why = choose_backend("auto", CPU)
    assert kind is BruteForce
    assert why == "`embreex`: none. Every ray is tested against every face: slow."


def software(clip: Tensor, faces: Tensor, size: list[int]) -> Tensor:
    """Clip coordinates as OpenGL draws them: rows from below, face numbers from one."""
    height, width = size
    place = clip[..., :3] / clip[..., 3:]
    y, x = torch.meshgrid(
        (torch.arange(height) + 0.5) / height * 2 - 1,
        (torch.arange(width) + 0.5) / width * 2 - 1,
        indexing="ij",
    )
    pixels = torch.stack([x, y], -1).reshape(-1, 1, 2)
    image = torch.zeros(len(clip), height * width, 4)
    for view, points in enumerate(place):
        a, b, c = points[faces.long()].unbind(1)

        def area(p: Tensor, q: Tensor, r: Tensor) -> Tensor:
            one, two = q - p, r - p
            return one[..., 0] * two[..., 1] - one[..., 1] * two[..., 0]

        whole = area(a[:, :2], b[:, :2], c[:, :2])
        weights = (
            torch.stack(
                [
                    area(pixels, b[:, :2], c[:, :2]),
                    area(a[:, :2], pixels, c[:, :2]),
                    area(a[:, :2], b[:, :2], pixels),
                ],
                -1,
            )
            / whole[:, None]
        )
        depth = (weights * torch.stack([a, b, c], 1)[..., 2]).sum(-1)
        depth = torch.where((weights >= 0).all(-1), depth, math.inf)
        nearest, face = depth.min(-1)
        image[view, :, 3] = torch.where(nearest.isfinite(), face + 1, 0).float()
    return image.view(len(clip), height, width, 4)


def test_nvdiffrast_is_asked_for_the_same_image(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By a stand-in with its conventions; the sides are no multiples of 8."""

    def rasterize_(_: Any, clip: Tensor, faces: Tensor, resolution: list[int]) -> Any:
        assert [side % 8 for side in resolution] == [0, 0]
        return software(clip, faces, resolution), None

    module = SimpleNamespace(
        RasterizeCudaContext=lambda device: None, rasterize=rasterize_
    )
    monkeypatch.setattr(raster, "probe", lambda name, **_: (module, ""))
    vertices, faces = bumpy()
    seen = views(2, 19, 29)
    found = raster.Nvdiffrast(vertices, faces)(seen)
    wanted = BruteForce(vertices, faces)(seen)
    assert found.shape == wanted.shape
    assert float((found != wanted).float().mean()) < 0.005  # on edges of faces
