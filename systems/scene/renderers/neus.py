r"""Volume rendering of a signed distance along rays.

A sample of length $\delta$ at a point x of a ray with direction d has the opacity

$$\alpha = \operatorname{clip}\Bigl(\frac{\Phi_s(f^-) - \Phi_s(f^+) + \epsilon}
  {\Phi_s(f^-) + \epsilon}, 0, 1\Bigr), \qquad
  f^\mp = f(x) \pm \tfrac{\delta}{2}\,c, \qquad \epsilon = 10^{-5},$$

with the sigmoid $\Phi_s(f) = 1 / (1 + e^{-s f})$ of learned sharpness
$s = e^{10 v}$, and the rate c at which the ray approaches the surface: with the cosine
$\kappa = \langle d, n \rangle$ and the share $\rho = \min(1, t / T)$ of the annealing
steps T,

$$c = (1 - \rho) \max(0, \tfrac{1 - \kappa}{2}) + \rho \max(0, -\kappa)$$

(P. Wang et al., 2021, NeuS, arXiv 2106.10689, Eqs. 3–13, and its published code). With
`use_volsdf` instead $\alpha = \delta\,\sigma$ for the density of a Laplace
distribution, $\sigma = s\,(\tfrac12 + \tfrac12 \operatorname{sign}(f)
(e^{-s|f|} - 1))$ (L. Yariv et al., 2021, VolSDF, arXiv 2106.12052, Eqs. 2–3), without
its exponential, as in threestudio.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from nerfacc import render_weight_from_alpha
from torch import Tensor, nn

from systems.scene.fields import Field
from systems.scene.fields.sdf import SDFField
from systems.scene.renderers.volume import Met, Samples, VolumeConfig, VolumeRenderer
from systems.settings.checks import at_least

_EPS = 1e-5


@dataclass(frozen=True)
class NeuSConfig(VolumeConfig):
    """Volume rendering of signed distances (``neus-volume-renderer``).

    Args:
        learned_variance_init: Initial v of the sharpness $e^{10 v}$.
        cos_anneal_end_steps: Number of steps T over which the cosine is annealed.
        use_volsdf: Use the density of VolSDF instead of the opacity of NeuS.
    """

    learned_variance_init: float = 0.3
    cos_anneal_end_steps: int = 0
    use_volsdf: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("cos_anneal_end_steps", self.cos_anneal_end_steps, 0)


class NeuSRenderer(VolumeRenderer):
    """Renders a signed distance with a material over a background.

    Args:
        config: Settings of the renderer.
    """

    Config = NeuSConfig
    config: NeuSConfig

    def __init__(self, config: NeuSConfig) -> None:
        super().__init__(config)
        self.variance = nn.Parameter(torch.tensor(config.learned_variance_init))

    def check(self, geometry: Field) -> None:
        """See `Renderer.check`."""
        if not isinstance(geometry, SDFField):
            raise ValueError(
                "`neus-volume-renderer` renders a signed distance, which "
                f"`{type(geometry).__name__}` is not: write `system.geometry_type: "
                "implicit-sdf` or `voxel-sdf`, or `system.renderer_type: "
                "nerf-volume-renderer`."
            )

    @property
    def sharpness(self) -> Tensor:
        """s, at most 10⁶; 1 / s is the width of the surface."""
        return torch.exp(self.variance * 10).clamp(1e-6, 1e6)

    def density(self, geometry: Field, points: Tensor, step: int | None) -> Tensor:
        """The opacity of a sample that meets the surface head on, per length."""
        distance = -geometry(points, step)[0]
        head_on = torch.ones_like(distance)
        size = self.config.step_size
        return self._opacity(distance, head_on, size * head_on) / size

    def met(
        self,
        geometry: Field,
        points: Tensor,
        directions: Tensor,
        samples: Samples,
        step: int | None,
        with_normals: bool,
    ) -> Met:
        """See `VolumeRenderer.met`; the gradient is always needed."""
        del with_normals
        assert isinstance(geometry, SDFField)
        inside, features = geometry(points, step)
        slope, laplacian = geometry.gradient(points, step, -inside)
        normals = nn.functional.normalize(slope, dim=-1)
        cosine = (directions * normals).sum(-1)
        share, end = 1.0, self.config.cos_anneal_end_steps
        if step is not None and end:
            share = min(1.0, step / end)
        rate = (0.5 - 0.5 * cosine).clamp(min=0) * (1 - share)
        rate = rate + (-cosine).clamp(min=0) * share
        alpha = self._opacity(-inside, rate, samples.end - samples.begin)
        sums = {"eikonal": (slope.norm(dim=-1) - 1).square()}
        if laplacian is not None:
            sums["curvature"] = laplacian.abs()
        return Met(_weights(samples, alpha), features, normals, sums)

    def _opacity(self, distance: Tensor, rate: Tensor, length: Tensor) -> Tensor:
        s = self.sharpness
        if self.config.use_volsdf:
            s = s.clamp(max=80)
            decay = torch.expm1(-distance.abs() * s)
            return length * s * (0.5 + 0.5 * distance.sign() * decay)
        half = rate * length / 2
        before = torch.sigmoid((distance + half) * s)
        after = torch.sigmoid((distance - half) * s)
        return ((before - after + _EPS) / (before + _EPS)).clip(0, 1)


def _weights(samples: Samples, alpha: Tensor) -> Tensor:
    """The weight of each sample in the colour of its ray."""
    if samples.slots is None:
        return render_weight_from_alpha(
            alpha, ray_indices=samples.rays, n_rays=samples.dense[0]
        )[0]
    # nerfacc's flattened form needs CUDA; its dense form does not.
    dense = render_weight_from_alpha(samples.laid_out(alpha))[0]
    return dense.flatten()[samples.slots]
