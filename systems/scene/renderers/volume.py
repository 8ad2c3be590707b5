r"""Volume rendering of a field along rays.

With samples of length $\delta$ at $x_1, x_2, \dots$ the colour of a ray is

$$C = \sum_i w_i c_i + \bigl(1 - \sum_i w_i\bigr) c_{bg}, \qquad
  w_i = e^{-\sum_{j<i} \sigma_j \delta} \bigl(1 - e^{-\sigma_i \delta}\bigr)$$

(B. Mildenhall et al., 2020, arXiv 2003.08934, Eq. 3), by nerfacc's functions. Rays
are cut into equal samples inside the ball of the field, of which only those in occupied
cells are evaluated; on a GPU nerfacc's own marching is used, where its CUDA code could
be built (it compiles itself, with `nvcc`, at first use).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from nerfacc import (
    OccGridEstimator,
    accumulate_along_rays,
    render_weight_from_density,
)
from torch import Tensor

from dreampropeller import StepRandom
from systems.extras import probe
from systems.scene.backgrounds import Background
from systems.scene.cameras import Views
from systems.scene.fields import Field
from systems.scene.materials import Material
from systems.scene.renderers.base import Renderer, Rendering
from systems.scene.renderers.occupancy import Occupancy, OccupancyConfig
from systems.settings.checks import at_least

_log = logging.getLogger(__name__)

_BESIDE = 0.01
"""Standard deviation of a shift, in units of the world, as in threestudio."""


@dataclass(frozen=True)
class VolumeConfig:
    """Volume rendering (``nerf-volume-renderer``).

    Args:
        radius: Radius of the ball in which rays are sampled; the geometry's.
        num_samples_per_ray: Number of samples along the diagonal of the cube of side
            2 · radius (threestudio's count); the ball's diameter has 1/√3 of them.
        randomized: Shift the samples of each ray at random during training.
        grid_prune: Skip unoccupied cells.
        occupancy: Settings of the occupancy grid.
        eval_chunk_size: Number of rays rendered at once in evaluation.
        return_normal_perturb: Compare the normals of training steps with those slightly
            beside, for `lambda_3d_normal_smooth`.
    """

    radius: float = 1.0
    num_samples_per_ray: int = 512
    randomized: bool = True
    grid_prune: bool = True
    occupancy: OccupancyConfig = field(default_factory=OccupancyConfig)
    eval_chunk_size: int = 16384
    return_normal_perturb: bool = False

    def __post_init__(self) -> None:
        at_least("radius", self.radius, 1e-3)
        at_least("num_samples_per_ray", self.num_samples_per_ray, 2)
        at_least("eval_chunk_size", self.eval_chunk_size, 1)

    @property
    def step_size(self) -> float:
        """δ, in units of the world."""
        return 2 * 3**0.5 * self.radius / self.num_samples_per_ray


@dataclass(frozen=True)
class _Rays:
    """Rays: origins, directions and light positions, ``(rays, 3)``, and shifts."""

    origins: Tensor
    directions: Tensor
    light: Tensor
    jitter: Tensor  # shift of a ray's samples, as a fraction of a sample, (rays, 1)
    shifts: Callable[[], Tensor] | None  # draws those of nerfacc's marching


@dataclass(frozen=True)
class Samples:
    """Samples to evaluate: interval ends, and indices of their rays."""

    begin: Tensor
    end: Tensor
    rays: Tensor
    slots: Tensor | None  # indices of samples in the dense (rays, samples) arrays
    dense: tuple[int, int]

    def laid_out(self, values: Tensor) -> Tensor:
        """Values of samples in a dense array over rays and slots."""
        flat = values.new_zeros(self.dense[0] * self.dense[1])
        return flat.index_put((self.slots,), values).view(self.dense)


@dataclass(frozen=True)
class Met:
    """A field at the samples of rays.

    Attributes:
        weights: The weight of each sample in the colour of its ray, ``(samples,)``.
        features: Features for the material.
        normals: Normals, or None where they are not needed.
        sums: Amounts to sum over each ray without weights, by their names in
            `Rendering`.
    """

    weights: Tensor
    features: Tensor
    normals: Tensor | None
    sums: Mapping[str, Tensor] = field(default_factory=dict)


class VolumeRenderer(Renderer):
    """Renders a field with a material over a background.

    Args:
        config: Settings of the renderer.
    """

    Config = VolumeConfig

    def __init__(self, config: VolumeConfig) -> None:
        super().__init__()
        self.config = config
        self.occupancy = Occupancy(config.occupancy, config.radius)

    def check(self, geometry: Field) -> None:
        """See `Renderer.check`."""
        if not geometry.translucent:
            raise ValueError(
                f"`{type(self).__name__}` renders a density, and the geometry is a "
                "signed distance: write `system.renderer_type: neus-volume-renderer`."
            )

    def prepare(self, geometry: Field, step: int, random: StepRandom) -> None:
        """See `Renderer.prepare`: refreshes the occupancy grid."""
        if self.config.grid_prune:
            self.occupancy.refresh(
                step,
                lambda points: self.density(geometry, points, step),
                self.config.step_size,
                random,
            )

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
        """See `Renderer.forward`."""
        device = self.occupancy.value.device
        origins, directions = views.cameras.rays(views.height, views.width)
        shape = directions.shape[:3]
        light = views.light[:, None, None].expand(*shape, 3)
        behind = background(directions.to(device), step, random)
        flat = [
            part.expand(*shape, 3).reshape(-1, 3).to(device)
            for part in (origins, directions, light)
        ]
        jitter, shifts = torch.full((len(flat[0]), 1), 0.5, device=device), None
        if step is not None and self.config.randomized:
            sizes = (shape[0], shape[1] * shape[2])
            drawn = random.draws(step, "samples").rand(*sizes)
            jitter = drawn.reshape(-1, 1).to(device)
            # What nerfacc would draw where it marches, for the views of a shard.
            shifts = functools.partial(random.draws(step, None, device).rand, *sizes)
        material = material.at(step, random)
        shading = material.shading(step, random)
        beside = None
        if step is not None and with_normals and self.config.return_normal_perturb:
            beside = random.generator(step, "bumps")
        chunk = len(jitter) if step is not None else self.config.eval_chunk_size
        pieces = zip(*(part.split(chunk) for part in (*flat, jitter)), strict=True)
        parts = [
            self._rays(
                geometry,
                material,
                _Rays(*piece, shifts=shifts),
                shading,
                step,
                with_normals,
                beside,
            )
            for piece in pieces
        ]
        seen = {
            name: torch.cat([part[name] for part in parts]).reshape(*shape, -1)
            for name in parts[0]
        }
        rgb = seen["foreground"] + (1 - seen["opacity"]) * behind
        return Rendering(rgb, **seen)

    def density(self, geometry: Field, points: Tensor, step: int | None) -> Tensor:
        """The density that the occupancy grid remembers."""
        return geometry(points, step)[0]

    def met(
        self,
        geometry: Field,
        points: Tensor,
        directions: Tensor,
        samples: Samples,
        step: int | None,
        with_normals: bool,
    ) -> Met:
        """Evaluate a field at the samples of rays.

        Args:
            geometry: The field.
            points: The middles of the samples.
            directions: The directions of their rays.
            samples: The samples.
            step: The step on the trajectory; None: evaluation.
            with_normals: Whether normals are needed.
        """
        del directions
        density, features = geometry(points, step)
        normals = geometry.normals(points, step) if with_normals else None
        return Met(_weights(samples, density), features, normals)

    def _rays(
        self,
        geometry: Field,
        material: Material,
        rays: _Rays,
        shading: str,
        step: int | None,
        with_normals: bool,
        beside: torch.Generator | None,
    ) -> dict[str, Tensor]:
        """What `Rendering` holds, over rays; `beside` draws shifts of normals."""
        count = len(rays.origins)
        if rays.origins.is_cuda and self.config.grid_prune and _can_march():
            samples = self._march(rays, rays.shifts)
        else:
            samples = self._cut(rays)
        directions = rays.directions[samples.rays]
        middle = ((samples.begin + samples.end) / 2)[:, None]
        points = rays.origins[samples.rays] + directions * middle
        with_normals = with_normals or shading != "albedo"
        met = self.met(geometry, points, directions, samples, step, with_normals)

        def total(weights: Tensor, values: Tensor | None) -> Tensor:
            return accumulate_along_rays(weights, values, samples.rays, count)

        colours = material.albedo(met.features)
        seen = {
            "opacity": total(met.weights, None),
            "normal": met.weights.new_zeros(count, 3),
            "backfacing": met.weights.new_zeros(count, 1),
        }
        if met.normals is not None:
            seen["normal"] = total(met.weights, met.normals)
            away = (met.normals * directions).sum(-1).clamp(min=0)
            seen["backfacing"] = total(met.weights.detach(), away.square()[:, None])
            if shading != "albedo":
                lit = material.light(points, met.normals, rays.light[samples.rays])
                colours = lit if shading == "textureless" else colours * lit
        seen["foreground"] = total(met.weights, colours)
        seen["depth"] = total(met.weights, middle)
        ones, sums = torch.ones_like(met.weights), dict(met.sums)
        if beside is not None and met.normals is not None:
            shift = torch.randn(points.shape, generator=beside).to(points)
            there = geometry.normals(points + _BESIDE * shift, step)
            sums["bumps"] = (met.normals - there).abs().sum(-1)
        if sums:
            seen["samples"] = total(ones, None)
        for name, values in sums.items():
            seen[name] = total(ones, values[:, None])
        return seen

    @torch.no_grad()
    def _cut(self, rays: _Rays) -> Samples:
        """Equal samples inside the ball, without those in unoccupied cells."""
        size, radius = self.config.step_size, self.config.radius
        origins, directions = rays.origins, rays.directions
        closest = -(origins * directions).sum(-1, keepdim=True)
        distance = origins.square().sum(-1, keepdim=True) - closest.square()
        half = (radius**2 - distance).clamp(min=0).sqrt()
        near, far = (closest - half).clamp(min=0), closest + half
        slots = torch.arange(
            int(2 * radius / size) + 1, device=origins.device, dtype=origins.dtype
        )
        begin = near + (slots + rays.jitter - 0.5) * size
        middle = begin + size / 2
        points = origins[:, None] + directions[:, None] * middle[..., None]
        inside = (middle > near) & (middle < far)
        if self.config.grid_prune:
            inside &= self.occupancy.contains(points)
        number, _ = inside.nonzero(as_tuple=True)
        chosen = inside.flatten().nonzero()[:, 0]
        begin = begin[inside]
        dense = (inside.shape[0], inside.shape[1])
        return Samples(begin, begin + size, number, chosen, dense)

    @torch.no_grad()
    def _march(self, rays: _Rays, shifts: Callable[[], Tensor] | None) -> Samples:
        """Nerfacc's marching through our grid; CUDA only."""
        side, radius = self.config.occupancy.resolution, self.config.radius
        box = torch.tensor([-radius] * 3 + [radius] * 3)
        grid = OccGridEstimator(roi_aabb=box, resolution=side, levels=1)
        grid = grid.to(rays.origins.device)
        grid.binaries = self.occupancy.occupied().view(1, side, side, side)
        number, begin, end = grid.sampling(
            rays.origins,
            rays.directions,
            t_min=None
            if shifts is None
            else shifts().flatten() * self.config.step_size,
            render_step_size=self.config.step_size,
        )
        return Samples(begin, end, number.long(), None, (len(rays.origins), 0))


@functools.cache
def _can_march() -> bool:
    """Whether nerfacc's CUDA code is available; prints the reason once if not."""
    built, reason = probe("nerfacc.cuda._backend")
    if built is not None and built._C is not None:
        return True
    reason = reason or "it needs `nvcc` to compile."
    _log.warning("nerfacc's marching is not used, rays are cut evenly: %s", reason)
    return False


def _weights(samples: Samples, density: Tensor) -> Tensor:
    """The weight of each sample in the colour of its ray."""
    if samples.slots is None:
        return render_weight_from_density(
            samples.begin,
            samples.end,
            density,
            ray_indices=samples.rays,
            n_rays=samples.dense[0],
        )[0]
    # nerfacc's flattened form needs CUDA; its dense form does not.
    begin, end, sigma = map(samples.laid_out, (samples.begin, samples.end, density))
    return render_weight_from_density(begin, end, sigma)[0].flatten()[samples.slots]
