"""Parts of threestudio that need a GPU, in torch: for its systems run on CPU."""

from __future__ import annotations

import functools
import importlib
import sys
import types
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def rasterise_in_torch() -> None:
    """Replace nvdiffrast by dense barycentric coordinates, without anti-aliasing."""
    context: Any = importlib.import_module(
        "threestudio.utils.rasterize"
    ).NVDiffRasterizerContext

    def rasterize(_: Any, pos: Tensor, tri: Tensor, resolution: Any) -> Any:
        height, width = resolution
        if not len(tri):
            return torch.zeros(len(pos), height, width, 4), None
        rows = (torch.arange(height) + 0.5) / height * 2 - 1
        columns = (torch.arange(width) + 0.5) / width * 2 - 1
        y, x = torch.meshgrid(rows, columns)
        pixels = torch.stack([x, y], -1).reshape(-1, 2)
        images = []
        for one in pos:
            w = one[:, 3:].clamp_min(1e-6)
            flat = one[:, :3] / w
            corners = flat[tri]  # faces, 3, xyz
            with torch.no_grad():
                inside = _barycentric(corners[:, None, :, :2], pixels[None])
                depth = (inside * corners[:, None, :, 2]).sum(-1)
                hit = (inside >= 0).all(-1)
                nearest, face = torch.where(hit, depth, torch.inf).min(0)
                covered = nearest < torch.inf
            weights = _barycentric(corners[face][:, :, :2], pixels)
            weights = weights / w[tri[face], 0]
            weights = weights / weights.sum(-1, keepdim=True)
            values = [weights[:, :2], nearest[:, None], face[:, None] + 1.0]
            image = torch.cat(values, -1) * covered[:, None]
            images.append(image.reshape(height, width, 4))
        return torch.stack(images), None

    def interpolate(
        _: Any, attr: Tensor, rast: Tensor, tri: Tensor, *__: Any, **___: Any
    ) -> Any:
        face = (rast[..., 3].long() - 1).clamp_min(0)
        u, v = rast[..., :1], rast[..., 1:2]
        parts = attr.expand(len(rast), -1, -1)
        a, b, c = (
            torch.stack([p[tri[f, i]] for p, f in zip(parts, face, strict=True)])
            for i in range(3)
        )
        return (u * a + v * b + (1 - u - v) * c) * (rast[..., 3:] > 0), None

    context.initialize_context = lambda *_: None
    context.rasterize, context.interpolate = rasterize, interpolate
    context.antialias = lambda _, color, *__: color


class Light(nn.Module):
    """A smooth light from everywhere, instead of an environment map."""

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def forward(self, directions: Tensor, roughness: Any = 0.5) -> Tensor:
        return 0.6 + 0.3 * directions * (1 - roughness)


def look_up(table: Tensor, uv: Tensor, **_: Any) -> Tensor:
    """Bilinear look-up in a texture."""
    image = table.permute(0, 3, 1, 2)
    found = F.grid_sample(image, 2 * uv - 1, "bilinear", "border", False)
    return found.permute(0, 2, 3, 1)


def with_depth(forward: Any) -> Any:
    """A rasteriser of splats that returns depth and opacity, too."""

    def wrapped(self: Any, **given: Any) -> tuple[Tensor, ...]:
        image, radii = forward(self, **given)
        settings = self.s
        self.s = settings._replace(bg=torch.zeros(3))
        xyz = given["means3D"]
        z = (torch.cat([xyz, torch.ones_like(xyz[:, :1])], 1) @ settings.viewmatrix)[
            :, 2:3
        ]
        colors = (z.expand(-1, 3), torch.ones_like(xyz))
        depth, alpha = (
            forward(self, **{**given, "shs": None, "colors_precomp": color})[0][:1]
            for color in colors
        )
        self.s = settings
        return image, radii, depth, alpha

    return wrapped


def place_on_cpu() -> None:
    """Replace what upstream takes from a GPU, if there is none."""
    if torch.cuda.is_available():
        return
    # On CPU the default driver reads pivots that it has not set; a GPU uses this one.
    torch.linalg.lstsq = functools.partial(torch.linalg.lstsq, driver="gels")
    shading: Any = importlib.import_module("threestudio.models.materials.pbr_material")
    shading.envlight = types.SimpleNamespace(EnvLight=Light)
    shading.dr = types.SimpleNamespace(texture=look_up)
    splats = sys.modules.get("diff_gaussian_rasterization")
    if splats is not None:
        vars(splats)["GaussianRasterizer"].forward = with_depth(
            vars(splats)["GaussianRasterizer"].forward
        )
    for module in list(sys.modules.values()):
        table = getattr(module, "__dict__", {})
        if getattr(table.get("get_rank"), "__module__", "") == "threestudio.utils.misc":
            table["get_rank"] = lambda: "cpu"
        if "PerceptualLoss" in table:  # downloads trained weights
            table["PerceptualLoss"] = lambda *_: nn.Identity()


def _barycentric(corners: Tensor, points: Tensor) -> Tensor:
    """Barycentric coordinates of points in triangles, in the plane."""
    a, b, c = corners.unbind(-2)

    def area(p: Tensor, q: Tensor, r: Tensor) -> Tensor:
        (x, y), (z, w) = (q - p).unbind(-1), (r - p).unbind(-1)
        return x * w - y * z

    whole = area(a, b, c)
    whole = torch.where(whole.abs() < 1e-12, torch.full_like(whole, 1e-12), whole)
    parts = [area(points, b, c), area(a, points, c), area(a, b, points)]
    return torch.stack(parts, -1) / whole[..., None]
