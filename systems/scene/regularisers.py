r"""Terms of a loss that depend on the rendering alone.

Each is a quotient of two sums over views,

$$R = \sum_v a_v \Big/ \sum_v n_v,$$

with differentiable amounts $a_v$ and constant counts $n_v$, so that views can be split
over devices: shards sum their amounts, and their total is divided by the total count.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from systems.scene.renderers import Rendering


class Regulariser(abc.ABC):
    """A term of the loss computed from a rendering."""

    needs_normals = False
    counts_vary = False
    """Whether $n_v$ depends on what the views show; otherwise it is the same for all,
    and R is a mean over views."""

    @abc.abstractmethod
    def amounts(self, seen: Rendering) -> Float[Tensor, " views"]:
        """$a_v$: differentiable sums over each view's pixels."""

    def counts(self, seen: Rendering) -> Float[Tensor, " views"]:
        """$n_v$: constants; by default each view's number of pixels."""
        views, height, width, _ = seen.opacity.shape
        return seen.opacity.new_full((views,), height * width)

    def __call__(self, seen: Rendering) -> Float[Tensor, ""]:
        """The term over all views of the rendering."""
        return self.amounts(seen).sum() / self.counts(seen).sum().clamp(min=1)


class Orientation(Regulariser):
    """Penalty on normals that face away from the camera, over rays that hit something.

    References:
        D. Verbin et al., 2021, arXiv 2112.03907, Eq. 10.
    """

    needs_normals = True
    counts_vary = True

    def amounts(self, seen: Rendering) -> Float[Tensor, " views"]:
        """Squared cosines of normals that face away, weighted by visibility."""
        return seen.backfacing.flatten(1).sum(1)

    def counts(self, seen: Rendering) -> Float[Tensor, " views"]:
        """The number of rays that hit something."""
        return (seen.opacity > 0).flatten(1).sum(1).to(seen.opacity)


class Sparsity(Regulariser):
    r"""Penalty on opacity: the mean of $\sqrt{o^2 + 0.01}$ (threestudio's form)."""

    def amounts(self, seen: Rendering) -> Float[Tensor, " views"]:
        """The summand, per view."""
        return (seen.opacity.square() + 0.01).sqrt().flatten(1).sum(1)


class Opaqueness(Regulariser):
    """Binary entropy of the opacity: a penalty on half-transparent pixels."""

    def amounts(self, seen: Rendering) -> Float[Tensor, " views"]:
        """The entropy, summed per view."""
        opacity = seen.opacity.float().clamp(1e-3, 1 - 1e-3)
        with torch.autocast(opacity.device.type, enabled=False):  # CUDA's refuses it
            entropy = nn.functional.binary_cross_entropy(
                opacity, opacity, reduction="none"
            )
        return entropy.flatten(1).sum(1)


class Eikonal(Regulariser):
    r"""Deviation of a signed distance from one: the mean of $(\|\nabla f\| - 1)^2$.

    Over all samples of all rays.

    References:
        A. Gropp et al., 2020, arXiv 2002.10099, Eq. 2.
    """

    counts_vary = True

    def amounts(self, seen: Rendering) -> Float[Tensor, " views"]:
        """The squared deviation, summed per view."""
        assert seen.eikonal is not None, "needs a signed distance"
        return seen.eikonal.flatten(1).sum(1)

    def counts(self, seen: Rendering) -> Float[Tensor, " views"]:
        """The number of samples."""
        assert seen.samples is not None, "needs a signed distance"
        return seen.samples.detach().flatten(1).sum(1)


class Curvature(Eikonal):
    r"""Roughness of a surface: the mean of $|\Delta f|$ over all samples.

    Zero where central differences do not give the Laplacian.

    References:
        Z. Li et al., 2023, arXiv 2306.03092, Eq. 6.
    """

    def amounts(self, seen: Rendering) -> Float[Tensor, " views"]:
        """The Laplacian's magnitude, summed per view."""
        if seen.curvature is None:
            return seen.opacity.new_zeros(len(seen.opacity))
        return seen.curvature.flatten(1).sum(1)


class NormalConsistency(Regulariser):
    """Roughness of a mesh: 1 − cos between the normals at the ends of an edge.

    In the mean over edges (threestudio's form).
    """

    def amounts(self, seen: Rendering) -> Float[Tensor, " views"]:
        """The mean over edges, once per view."""
        assert seen.bend is not None, "needs a mesh"
        return seen.bend

    def counts(self, seen: Rendering) -> Float[Tensor, " views"]:
        """One per view."""
        return torch.ones_like(self.amounts(seen)).detach()


class LaplacianSmoothness(NormalConsistency):
    """Roughness of a mesh: how far vertices are from the mean of their neighbours.

    The length of the sum of a vertex's differences from its neighbours, in the mean
    over vertices (threestudio's form).
    """

    def amounts(self, seen: Rendering) -> Float[Tensor, " views"]:
        """The mean over vertices, once per view."""
        assert seen.laplacian is not None, "needs a mesh"
        return seen.laplacian


class NormalSmoothness(Regulariser):
    """Differences of the normal map between neighbouring pixels.

    The mean square over horizontal pairs plus that over vertical pairs, of the map from
    0 to 1 over black (threestudio's form).
    """

    needs_normals = True

    def amounts(self, seen: Rendering) -> Float[Tensor, " views"]:
        """The two means, per view."""
        normal = nn.functional.normalize(seen.normal, dim=-1)
        image = (normal + 1) / 2 * seen.opacity
        down, right = image.diff(dim=1), image.diff(dim=2)
        return down.square().flatten(1).mean(1) + right.square().flatten(1).mean(1)

    def counts(self, seen: Rendering) -> Float[Tensor, " views"]:
        """One per view."""
        return seen.opacity.new_ones(len(seen.opacity))


class NormalSmoothness3D(Regulariser):
    """Differences of the normals of samples from those slightly beside them.

    The mean absolute difference over all samples and axes (threestudio's form).
    """

    needs_normals = True
    counts_vary = True

    def amounts(self, seen: Rendering) -> Float[Tensor, " views"]:
        """The absolute differences, summed per view; zeros if they were not asked."""
        if seen.bumps is None:
            return seen.opacity.new_zeros(len(seen.opacity))
        return seen.bumps.flatten(1).sum(1) / 3

    def counts(self, seen: Rendering) -> Float[Tensor, " views"]:
        """The number of samples."""
        if seen.samples is None:
            return seen.opacity.new_ones(len(seen.opacity))
        return seen.samples.detach().flatten(1).sum(1)


REGULARISERS: Mapping[str, Regulariser] = {
    "orient": Orientation(),
    "sparsity": Sparsity(),
    "opaque": Opaqueness(),
}
"""By the names of their weights, `lambda_<name>`."""

SURFACE_REGULARISERS: Mapping[str, Regulariser] = {
    **REGULARISERS,
    "eikonal": Eikonal(),
    "curvature": Curvature(),
}
"""Those of a surface besides."""

SMOOTH_REGULARISERS: Mapping[str, Regulariser] = {
    **REGULARISERS,
    "normal_smooth": NormalSmoothness(),
    "3d_normal_smooth": NormalSmoothness3D(),
}
"""Those of a density whose normals shall be smooth besides."""

MESH_REGULARISERS: Mapping[str, Regulariser] = {
    "normal_consistency": NormalConsistency(),
    "laplacian_smoothness": LaplacianSmoothness(),
}
"""Those of a mesh that is optimised."""
