r"""Rendering of Gaussian splats: projection, tiles, front-to-back compositing.

A splat with mean $\mu$ and covariance $\Sigma$ (camera coordinates) is an ellipse in
the image, by the derivative J of the projection (EWA; M. Zwicker et al., 2001), widened
by a low-pass of 0.3 square pixels:

$$\Sigma' = J \Sigma J^\top + 0.3\, I, \qquad
  \alpha_i(p) = \min\bigl(0.999,\; o_i\, e^{-\frac12 (p - \mu'_i)^\top
  \Sigma_i'^{-1} (p - \mu'_i)}\bigr), \qquad
  C(p) = \sum_i c_i \alpha_i \prod_{j < i} (1 - \alpha_j)$$

over the splats in order of depth, nearest first. An α below 1/255 counts as zero, and a
pixel is finished before its transmittance falls to $10^{-4}$ (B. Kerbl et al., 2023,
arXiv 2308.04079; formulas and constants as in gsplat 1.5, V. Ye et al., 2024, arXiv
2409.06765).

The image is cut into tiles of 16 pixels, and a tile composites the splats whose
bounding box meets it. In a tile the exponent is a quadratic polynomial of the pixel, so
all exponents are one matrix product. Gradients are autograd's. On CUDA, gsplat's
kernels do the same where gsplat is installed and built.
"""

from __future__ import annotations

import functools
import logging
import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from systems.extras import probe
from systems.scene.cameras import Views
from systems.scene.gaussians.shapes import covariances

TILE = 16
"""Side of a tile, pixels."""
MAX_ALPHA = 0.999
MIN_ALPHA = 1 / 255
MIN_TRANSMITTANCE = 1e-4
LOW_PASS = 0.3
"""Added to the variance of a projected splat, square pixels."""
EXTENT = 3.33
"""Standard deviations after which an opaque splat's α is below 1/255."""
NEAR = 0.01
"""Splats nearer than this are not seen."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pinhole:
    """Cameras in gsplat's convention: x to the right, y down, z forward, pixels.

    Attributes:
        world_to_camera: Shape ``(views, 4, 4)``.
        focal: Focal length in pixels, equal for both axes, shape ``(views,)``.
        height: Height in pixels.
        width: Width in pixels; the principal point is the centre of the image.
    """

    world_to_camera: Float[Tensor, "views 4 4"]
    focal: Float[Tensor, " views"]
    height: int
    width: int

    @classmethod
    def of(cls, views: Views, like: Tensor) -> Pinhole:
        """The cameras of views, on the device and in the precision of a tensor."""
        position, right, up, forward = views.cameras.axes()
        rotation = torch.stack([right, -up, forward], 1)
        matrix = torch.eye(4).repeat(len(rotation), 1, 1)
        matrix[:, :3, :3] = rotation
        matrix[:, :3, 3] = -(rotation @ position[..., None])[..., 0]
        focal = views.height / 2 / torch.tan(views.cameras.fov.deg2rad() / 2)
        return cls(matrix.to(like), focal.to(like), views.height, views.width)

    @property
    def centres(self) -> Float[Tensor, "views 3"]:
        """Positions of the cameras in the world."""
        rotation, shift = (
            self.world_to_camera[:, :3, :3],
            self.world_to_camera[:, :3, 3],
        )
        return -(rotation.mT @ shift[..., None])[..., 0]

    @property
    def intrinsics(self) -> Float[Tensor, "views 3 3"]:
        """The matrices K."""
        matrix = torch.zeros_like(self.world_to_camera[:, :3, :3])
        matrix[:, 0, 0] = matrix[:, 1, 1] = self.focal
        matrix[:, 0, 2], matrix[:, 1, 2], matrix[:, 2, 2] = (
            self.width / 2,
            self.height / 2,
            1.0,
        )
        return matrix


@dataclass(frozen=True)
class Projection:
    r"""Splats projected into images.

    Attributes:
        means: Centres in pixels, shape ``(views, splats, 2)``.
        conics: Entries xx, xy, yy of $\Sigma'^{-1}$, shape ``(views, splats, 3)``.
        depths: Depths, shape ``(views, splats)``.
        radii: Half sides of the bounding box in whole pixels; 0 where a splat is not
            seen; shape ``(views, splats, 2)``.
    """

    means: Float[Tensor, "views splats 2"]
    conics: Float[Tensor, "views splats 3"]
    depths: Float[Tensor, "views splats"]
    radii: Int[Tensor, "views splats 2"]


def project(
    means: Float[Tensor, "splats 3"],
    covariances: Float[Tensor, "splats 3 3"],
    opacities: Float[Tensor, " splats"],
    camera: Pinhole,
) -> Projection:
    """Project splats into the images of cameras; see the module.

    Args:
        means: Means in the world.
        covariances: Covariances in the world.
        opacities: Opacities from 0 to 1; a faint splat has a smaller box.
        camera: The cameras.
    """
    rotation = camera.world_to_camera[:, :3, :3]
    local = means @ rotation.mT + camera.world_to_camera[:, None, :3, 3]
    x, y, depth = local.unbind(-1)
    focal = camera.focal[:, None]
    # Far outside of the image the derivative is taken at its margin.
    limits = [
        0.65 * side / camera.focal[:, None] for side in (camera.width, camera.height)
    ]
    flat = [
        torch.maximum(torch.minimum(part / depth, limit), -limit)
        for part, limit in zip((x, y), limits, strict=True)
    ]
    along = focal / depth
    zero = torch.zeros_like(along)
    jacobian = torch.stack(
        [
            torch.stack([along, zero, -along * flat[0]], -1),
            torch.stack([zero, along, -along * flat[1]], -1),
        ],
        -2,
    )
    to_image = jacobian @ rotation[:, None]
    spread = to_image @ covariances @ to_image.mT
    xx, xy, yy = (
        spread[..., 0, 0] + LOW_PASS,
        spread[..., 0, 1],
        spread[..., 1, 1] + LOW_PASS,
    )
    determinant = (xx * yy - xy * xy).clamp(min=1e-10)
    centre = torch.stack(
        [
            along * x + camera.width / 2,
            along * y + camera.height / 2,
        ],
        -1,
    )
    conics = torch.stack([yy, -xy, xx], -1) / determinant[..., None]
    with torch.no_grad():
        reach = (2 * (opacities / MIN_ALPHA).log().clamp(min=0)).sqrt()
        reach = reach.clamp(max=EXTENT)[..., None]
        radii = (reach * torch.stack([xx, yy], -1).sqrt()).ceil()
        size = centre.new_tensor([camera.width, camera.height])
        seen = (depth > NEAR) & (opacities >= MIN_ALPHA)
        seen &= ((centre + radii > 0) & (centre - radii < size)).all(-1)
        radii = torch.where(seen[..., None], radii, 0).int()
    return Projection(centre, conics, depth, radii)


@torch.no_grad()
def intersections(
    projection: Projection, height: int, width: int
) -> tuple[Int[Tensor, " pairs"], Int[Tensor, " tiles"]]:
    """The splats that each tile composites, in order.

    Args:
        projection: The projected splats.
        height: Height of the images in pixels.
        width: Width of the images in pixels.

    Returns:
        Indices view · splats + splat, tile by tile (views first, then rows), nearest
        first; and the number of splats per tile.
    """
    radii = projection.radii.flatten(0, 1)
    means = projection.means.flatten(0, 1)
    views, splats = projection.depths.shape
    columns, rows = -(-width // TILE), -(-height // TILE)
    grid = torch.tensor([columns, rows], device=means.device)
    low = ((means - radii) / TILE).floor().long().clamp(min=0)
    high = torch.minimum(((means + radii) / TILE).ceil().long(), grid)
    sides = (high - low).clamp(min=0) * (radii > 0).all(-1, keepdim=True)
    order = projection.depths.flatten().argsort(stable=True)
    counts = sides.prod(-1)[order]
    owners = order.repeat_interleave(counts)
    offset = torch.arange(len(owners), device=means.device)
    offset -= (counts.cumsum(0) - counts).repeat_interleave(counts)
    across = sides[owners, 0]
    column = low[owners, 0] + offset % across
    row = low[owners, 1] + offset // across
    tile = (owners // splats * rows + row) * columns + column
    by_tile = tile.argsort(stable=True)
    return owners[by_tile], torch.bincount(tile, minlength=views * rows * columns)


def composite(
    projection: Projection,
    opacities: Float[Tensor, " splats"],
    colours: Float[Tensor, "views splats channels"],
    height: int,
    width: int,
) -> tuple[
    Float[Tensor, "views height width channels"], Float[Tensor, "views height width 1"]
]:
    """Composite projected splats.

    Args:
        projection: The projected splats.
        opacities: Opacities from 0 to 1.
        colours: Colours of the splats in each view.
        height: Height of the images in pixels.
        width: Width of the images in pixels.

    Returns:
        The images over black, and their opacity.
    """
    views, _, channels = colours.shape
    columns, rows = -(-width // TILE), -(-height // TILE)
    pairs, counts = intersections(projection, height, width)
    pixels = _monomials(colours)
    exponents = _polynomials(projection, opacities, pairs, counts, columns, rows)
    painted = torch.cat([colours, torch.ones_like(colours[..., :1])], -1)
    painted = painted.flatten(0, 1).index_select(0, pairs)
    sizes = counts.tolist()
    tiles = [
        _tile(pixels, exponent, colour)
        for exponent, colour in zip(
            exponents.split(sizes), painted.split(sizes), strict=True
        )
    ]
    image = torch.stack(tiles).view(views, rows, columns, TILE, TILE, channels + 1)
    image = image.transpose(2, 3).reshape(views, rows * TILE, columns * TILE, -1)
    image = image[:, :height, :width]
    return image[..., :-1], image[..., -1:]


def _monomials(like: Tensor) -> Float[Tensor, "pixels 6"]:
    """x², xy, y², x, y, 1 of a tile's pixels, measured from its middle."""
    side = torch.arange(TILE, dtype=like.dtype, device=like.device) + 0.5 - TILE / 2
    y, x = (part.flatten() for part in torch.meshgrid(side, side, indexing="ij"))
    return torch.stack([x * x, x * y, y * y, x, y, torch.ones_like(x)], -1)


def _polynomials(
    projection: Projection,
    opacities: Tensor,
    pairs: Tensor,
    counts: Tensor,
    columns: int,
    rows: int,
) -> Float[Tensor, "pairs 6"]:
    """Logarithms of α of splats as polynomials of `_monomials`."""
    tiles = torch.arange(len(counts), device=pairs.device)
    corner = torch.stack([tiles % columns, tiles // columns % rows], -1)
    middle = ((corner + 0.5) * TILE).to(opacities).repeat_interleave(counts, 0)
    x, y = (projection.means.flatten(0, 1).index_select(0, pairs) - middle).unbind(-1)
    a, b, c = projection.conics.flatten(0, 1).index_select(0, pairs).unbind(-1)
    # Taken first: the logarithm of splats that no tile sees may be infinite.
    strength = opacities.index_select(0, pairs % len(opacities)).log()
    constant = strength - (a * x * x + c * y * y) / 2 - b * x * y
    return torch.stack([-a / 2, -b, -c / 2, a * x + b * y, b * x + c * y, constant], -1)


def _tile(
    pixels: Float[Tensor, "pixels 6"],
    exponents: Float[Tensor, "splats 6"],
    colours: Float[Tensor, "splats channels"],
) -> Float[Tensor, "pixels channels"]:
    # Clamped: exponentials of distant pixels are denormal, which is slow.
    low, high = math.log(MIN_ALPHA) - 1, math.log(MAX_ALPHA)
    alpha = (pixels @ exponents.T).clamp(low, high).exp()
    alpha = torch.where(alpha >= MIN_ALPHA, alpha, 0.0)
    single = torch.log1p(-alpha)
    through = single.cumsum(-1)
    weights = alpha * (through - single).exp()
    done = through <= math.log(MIN_TRANSMITTANCE)
    return torch.where(done, 0.0, weights) @ colours


def rasterize(
    means: Float[Tensor, "splats 3"],
    scales: Float[Tensor, "splats 3"],
    quats: Float[Tensor, "splats 4"],
    opacities: Float[Tensor, " splats"],
    colours: Float[Tensor, "views splats 3"],
    camera: Pinhole,
    backend: str = "torch",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Render images of splats.

    Args:
        means: Means in the world.
        scales: Logarithms of the standard deviations.
        quats: Rotations (w, x, y, z), of any length.
        opacities: Opacities from 0 to 1.
        colours: Colours of the splats in each view.
        camera: The cameras.
        backend: "torch", or "gsplat" on CUDA.

    Returns:
        Images over black ``(views, height, width, 3)``, their opacity, centres in
        pixels ``(views, splats, 2)`` and half sides of bounding boxes.
    """
    if backend == "gsplat":
        return _gsplat(means, scales, quats, opacities, colours, camera)
    seen = project(means, covariances(scales, quats), opacities, camera)
    image, opacity = composite(seen, opacities, colours, camera.height, camera.width)
    return image, opacity, seen.means, seen.radii


def _gsplat(
    means: Tensor,
    scales: Tensor,
    quats: Tensor,
    opacities: Tensor,
    colours: Tensor,
    camera: Pinhole,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    module, _ = gsplat_module()
    image, opacity, seen = module.rasterization(
        means=means,
        quats=quats,
        scales=scales.exp(),
        opacities=opacities,
        colors=colours,
        viewmats=camera.world_to_camera,
        Ks=camera.intrinsics,
        width=camera.width,
        height=camera.height,
        near_plane=NEAR,
        eps2d=LOW_PASS,
        tile_size=TILE,
        packed=False,
    )
    return image, opacity, seen["means2d"], seen["radii"]


@functools.cache
def gsplat_module() -> tuple[Any, str]:
    """The gsplat module, or None and the reason."""
    module, reason = probe("gsplat", needs_cuda=True)
    if module is None:
        return None, reason
    built, reason = probe("gsplat.cuda._backend")
    if built is None or built._C is None:
        return None, reason or "`gsplat` is not used: it needs `nvcc` to be built."
    return module, ""


def choose_backend(wanted: str, device: torch.device) -> str:
    """The rasterizer that renders on a device.

    Args:
        wanted: "auto", "torch" or "gsplat".
        device: Device of the splats.

    Raises:
        ValueError: "gsplat" is requested and unavailable here.
    """
    if wanted == "torch" or (wanted == "auto" and device.type != "cuda"):
        return "torch"
    module, reason = gsplat_module()
    if module is not None and device.type == "cuda":
        return "gsplat"
    reason = reason or f"`gsplat` is not used: the splats are on `{device.type}`."
    if wanted == "gsplat":
        raise ValueError(
            f"{reason} Write `system.renderer.rasterizer=torch` or `auto`."
        )
    _say_once(reason)
    return "torch"


@functools.cache
def _say_once(reason: str) -> None:
    _log.warning("%s Splats are rendered by plain torch.", reason)
