"""The rasterizer against finite differences, a slow loop and gsplat's CPU code."""

from __future__ import annotations

import math
from dataclasses import replace

import gsplat.cuda._torch_impl as oracle
import pytest
import torch
from torch import Tensor

from systems.scene.gaussians.harmonics import colours
from systems.scene.gaussians.shapes import covariances
from systems.scene.renderers.splats import (
    Pinhole,
    Projection,
    choose_backend,
    intersections,
    project,
    rasterize,
)
from tests.systems.gaussians.splats import Splats, around, random_splats


def projection(splats: Splats, opacities: Tensor | None = None) -> Projection:
    shapes = covariances(splats.scales, splats.quats)
    if opacities is None:
        opacities = splats.logits.sigmoid()
    return project(splats.means, shapes, opacities, splats.camera)


def slow_pixel(splats: Splats, view: int, row: int, column: int) -> list[float]:
    """A pixel, splat by splat, from the formula: no tiles, no boxes."""
    seen, opacities = projection(splats), splats.logits.sigmoid()
    found, through = torch.zeros(4, dtype=torch.float64), 1.0
    for i in seen.depths[view].argsort().tolist():
        if seen.depths[view, i] <= 0.01:
            continue
        x, y = ([column + 0.5, row + 0.5] - seen.means[view, i].numpy()).tolist()
        a, b, c = seen.conics[view, i].tolist()
        power = (a * x * x + c * y * y) / 2 + b * x * y
        alpha = min(float(opacities[i]) * math.exp(-power), 0.999)
        if alpha < 1 / 255:
            continue
        if through * (1 - alpha) <= 1e-4:
            break
        colour = torch.cat([splats.colours[view, i], torch.ones(1)])
        found += through * alpha * colour
        through *= 1 - alpha
    return found.tolist()


def test_tiles_and_polynomials_equal_the_slow_loop() -> None:
    splats = random_splats(60)
    image, opacity = splats.render()
    assert 0.2 < float(opacity.mean()) < 0.9
    assert float(opacity.max()) > 0.999  # somewhere the list is cut
    both = torch.cat([image, opacity], -1)
    pixels = [
        (v, r, c) for v in (0, 1) for r in range(1, 40, 3) for c in (0, 9, 16, 23)
    ]
    wanted = [slow_pixel(splats, *pixel) for pixel in pixels]
    found = torch.stack([both[pixel] for pixel in pixels])
    torch.testing.assert_close(
        found, torch.tensor(wanted, dtype=torch.float64), atol=1e-9, rtol=0
    )


def test_single_precision_is_as_good_as_an_image_needs() -> None:
    exact = random_splats(300, 64, 64)
    camera = Pinhole.of(around(2, 64, 64), exact.means.float())
    wanted = exact.render()[0]
    single = replace(exact, camera=camera)
    found = single.render(*[leaf.float() for leaf in exact.leaves])[0]
    # Not the maximum: an α that rounds to the other side of 1/255 moves a pixel by it.
    assert float((found - wanted).abs().mean()) < 2e-5


def test_gradients_are_finite_differences() -> None:
    splats = random_splats(6, 20, 18, views=2, size=-1.5)
    generator = torch.Generator().manual_seed(1)
    weight = torch.rand(2, 20, 18, 4, generator=generator, dtype=torch.float64)

    def loss(*leaves: Tensor) -> Tensor:
        image, opacity = splats.render(*leaves)
        return (torch.cat([image, opacity], -1) * weight).sum()

    leaves = [leaf.clone().requires_grad_(True) for leaf in splats.leaves]
    # A clipped α (below 1/255 or above 0.999) makes the image jump by less than 4e-3;
    # a difference of 1e-7 crosses none of these edges with these numbers.
    assert torch.autograd.gradcheck(loss, leaves, eps=1e-7, atol=1e-3, rtol=1e-3)


def test_projection_is_gsplats() -> None:
    splats = random_splats(200, 40, 24, views=3)
    # Behind the camera, and far to the side, where the derivative is held.
    splats.means[0], splats.means[1] = splats.camera.centres[0] * 1.5, 3.0
    camera = splats.camera
    # gsplat's CUDA code shrinks the boxes of all that is not more than opaque, as ours
    # does; its CPU code does not.
    found = projection(splats, torch.full((200,), 2.0, dtype=torch.float64))
    shapes, _ = oracle._quat_scale_to_covar_preci(splats.quats, splats.scales.exp())
    assert shapes is not None
    radii, means, depths, conics, _ = oracle._fully_fused_projection(
        splats.means, shapes, camera.world_to_camera, camera.intrinsics, 24, 40
    )
    visible = (radii > 0).all(-1)
    assert 0 < int((~visible).sum()) < 100
    assert torch.equal((found.radii > 0).all(-1), visible)
    assert torch.equal(found.radii[visible], radii[visible])
    for ours, theirs in (
        (found.means, means),
        (found.depths, depths),
        (found.conics, conics),
    ):
        torch.testing.assert_close(ours[visible], theirs[visible], atol=1e-9, rtol=1e-9)


def test_tile_lists_are_gsplats() -> None:
    splats = random_splats(60, 40, 24, views=2)
    found = projection(splats)
    pairs, counts = intersections(found, 40, 24)
    _, ids, flat = oracle._isect_tiles(
        found.means.float(), found.radii, found.depths.float(), 16, 2, 3
    )
    assert torch.equal(pairs, flat.long())
    offsets = oracle._isect_offset_encode(ids, 2, 2, 3).flatten()
    assert torch.equal(counts.cumsum(0) - counts, offsets.long())


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_harmonics_are_gsplats(degree: int) -> None:
    generator = torch.Generator().manual_seed(degree)
    directions = torch.randn(2, 30, 3, generator=generator, dtype=torch.float64)
    harmonics = torch.randn(
        30, (degree + 1) ** 2, 3, generator=generator, dtype=torch.float64
    )
    both = harmonics.expand(2, *harmonics.shape)
    wanted = (oracle._spherical_harmonics(degree, directions, both) + 0.5).clamp(min=0)
    torch.testing.assert_close(
        colours(harmonics, directions), wanted, atol=1e-9, rtol=0
    )


def test_pixels_are_where_the_rays_of_the_other_renderers_go() -> None:
    views = around(3, 30, 40)
    camera = Pinhole.of(views, torch.zeros(1, dtype=torch.float64))
    origins, directions = views.cameras.rays(30, 40)
    for view, row, column in ((0, 4, 33), (1, 29, 0), (2, 15, 20)):
        point = origins[view, 0, 0] + 1.7 * directions[view, row, column]
        seen = project(
            point[None].double(),
            1e-8 * torch.eye(3, dtype=torch.float64)[None],
            torch.ones(1, dtype=torch.float64),
            camera,
        )
        wanted = torch.tensor([column + 0.5, row + 0.5], dtype=torch.float64)
        torch.testing.assert_close(seen.means[view, 0], wanted, atol=1e-4, rtol=0)


def test_an_empty_image_is_black_and_has_gradients() -> None:
    splats = random_splats(3)
    behind = (splats.means + 10 * splats.camera.centres[0]).requires_grad_(True)
    image, opacity, _, _ = rasterize(
        behind,
        splats.scales,
        splats.quats,
        splats.logits.sigmoid(),
        splats.colours[:1],
        Pinhole.of(around(1, 40, 24), behind.detach()),
    )
    assert not image.any()
    assert not opacity.any()
    (gradient,) = torch.autograd.grad(image.sum(), behind)
    assert not gradient.any()


def test_a_rasterizer_that_is_not_there_is_a_sentence() -> None:
    cpu = torch.device("cpu")
    assert choose_backend("auto", cpu) == "torch"
    with pytest.raises(ValueError, match=r"`gsplat` is not used: .* Write `system\."):
        choose_backend("gsplat", cpu)
