r"""A field of multi-resolution hash tables of features, decoded by two networks.

Level $l$ has resolution $\lfloor b\,s^l \rfloor$; corner $(x, y, z)$ of a level that is
too fine for its table is found at

$$(x \oplus 2654435761\,y \oplus 805459861\,z) \bmod T$$

(T. Müller et al., 2022, arXiv 2201.05989, Eqs. 2–4). Pure torch; on a GPU the encoding
of tiny-cuda-nn is used where it is installed (that path has not been run).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from systems.extras import probe
from systems.scene.fields.base import Field
from systems.scene.fields.density import DensityConfig, DensityField
from systems.scene.networks import MLP
from systems.settings.checks import at_least, one_of

_PRIMES = (1, 2654435761, 805459861)


@dataclass(frozen=True)
class HashGridConfig:
    """The encoding (`pos_encoding_config`), in tiny-cuda-nn's terms.

    Args:
        otype: "HashGrid", or "ProgressiveBandHashGrid", which adds fine levels later.
        n_levels: Number of resolutions.
        n_features_per_level: Number of channels of a table.
        log2_hashmap_size: Binary logarithm of the largest number of rows of a table.
        base_resolution: Cells per side at the coarsest level.
        per_level_scale: Resolution of a level relative to the one before.
        start_level: Number of levels active from the start, if progressive.
        start_step: Step from which further levels are added, if progressive.
        update_steps: Number of steps between two added levels, if progressive.
    """

    otype: str = "HashGrid"
    n_levels: int = 16
    n_features_per_level: int = 2
    log2_hashmap_size: int = 19
    base_resolution: int = 16
    per_level_scale: float = 1.447269237440378
    start_level: int = 8
    start_step: int = 2000
    update_steps: int = 500

    def __post_init__(self) -> None:
        one_of("otype", self.otype, ("HashGrid", "ProgressiveBandHashGrid"))
        for name in (
            "n_levels",
            "n_features_per_level",
            "log2_hashmap_size",
            "base_resolution",
            "start_level",
            "update_steps",
        ):
            at_least(name, getattr(self, name), 1)
        at_least("per_level_scale", self.per_level_scale, 1)
        at_least("start_step", self.start_step, 0)

    def active_levels(self, step: int | None) -> int:
        """Number of levels active at a step; None: all."""
        if step is None or self.otype == "HashGrid":
            return self.n_levels
        late = max(0, step - self.start_step) // self.update_steps
        return min(self.n_levels, self.start_level + late)


@dataclass(frozen=True)
class NetworkConfig:
    """The networks (`mlp_network_config`).

    Args:
        n_neurons: Width of the hidden layers.
        n_hidden_layers: Number of hidden layers.
    """

    n_neurons: int = 64
    n_hidden_layers: int = 1

    def __post_init__(self) -> None:
        at_least("n_neurons", self.n_neurons, 1)
        at_least("n_hidden_layers", self.n_hidden_layers, 0)


@dataclass(frozen=True)
class ImplicitVolumeConfig(DensityConfig):
    """A hash grid with networks (``implicit-volume``).

    Args:
        pos_encoding_config: Hash-grid encoding of positions.
        mlp_network_config: Networks that decode the features.
    """

    pos_encoding_config: HashGridConfig = field(default_factory=HashGridConfig)
    mlp_network_config: NetworkConfig = field(default_factory=NetworkConfig)


class HashGrid(nn.Module):
    """The encoding: points of the unit cube to features, in pure torch."""

    def __init__(self, config: HashGridConfig) -> None:
        super().__init__()
        self.config = config
        scales = [
            config.base_resolution * config.per_level_scale**level
            for level in range(config.n_levels)
        ]
        self._resolutions = [int(scale) for scale in scales]
        largest = 2**config.log2_hashmap_size
        self._rows = [min((r + 1) ** 3, largest) for r in self._resolutions]
        table = torch.empty(sum(self._rows), config.n_features_per_level)
        self.table = nn.Parameter(nn.init.uniform_(table, -1e-4, 1e-4))

    def forward(
        self, points: Float[Tensor, "points 3"]
    ) -> Float[Tensor, "points channels"]:
        """Interpolated features, coarse levels first."""
        # One-dimensional gathers: the backward pass of `embedding` is ten times slower
        # on a CPU.
        columns = self.table.unbind(1)
        features: list[Tensor] = []
        begin = 0
        for resolution, count in zip(self._resolutions, self._rows, strict=True):
            scaled = points * resolution
            low = scaled.detach().floor().clamp(0, resolution - 1)
            weight = _corner_weights(scaled - low)
            row = begin + _corner_rows(low.long(), resolution + 1, count)
            features += [
                (weight * column.gather(0, row.flatten()).view_as(row)).sum(-1)
                for column in columns
            ]
            begin += count
        return torch.stack(features, -1)


def _corner_weights(share: Tensor) -> Tensor:
    """Trilinear weights of a cell's corners, ``(points, 8)``."""
    share = share.t().contiguous()
    return _of_corners(torch.mul, torch.stack([1 - share, share], 1))


def _corner_rows(low: Tensor, side: int, count: int) -> Tensor:
    """Rows of a cell's corners, ``(points, 8)``, in a table of `count` rows.

    Args:
        low: The lowest corner, shape ``(points, 3)``.
        side: Grid points per side.
        count: Number of rows of the table.
    """
    low = low.t().contiguous()
    corner = torch.stack([low, low + 1], 1)
    if side**3 <= count:  # the table fits all corners: no collisions
        return _of_corners(torch.add, corner * _factors([side * side, side, 1], low))
    return _of_corners(torch.bitwise_xor, corner * _factors(_PRIMES, low)) % count


def _factors(numbers: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor(numbers, device=like.device)[:, None, None]


def _of_corners(join: Callable[[Tensor, Tensor], Tensor], ends: Tensor) -> Tensor:
    """A cell's eight corners from its ends along the axes, ``(points, 8)``.

    Args:
        join: Joins two axes.
        ends: Shape ``(3, 2, points)``. Points last: operations over the short
            dimension of corners are five times slower on a CPU.
    """
    x, y, z = ends
    corners = join(join(x[:, None, None], y[:, None]), z)
    return corners.flatten(0, 2).t().contiguous()


class HashGridFeatures(Field):
    """Features of a hash grid, read by a network.

    `value_network` names a network for values, made before that of the features; empty
    for none.
    """

    value_network: str = ""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        encoding, network = config.pos_encoding_config, config.mlp_network_config
        self.encoding = _make_encoding(encoding)
        channels = encoding.n_levels * encoding.n_features_per_level
        shape = (network.n_neurons, network.n_hidden_layers)
        if self.value_network:
            self.add_module(self.value_network, MLP(channels, 1, *shape))
        self.feature_network = MLP(channels, config.n_feature_dims, *shape)

    def encode(
        self, points: Float[Tensor, "points 3"], step: int | None
    ) -> Float[Tensor, "points channels"]:
        """The encoding of points, without inactive levels."""
        config: HashGridConfig = self.config.pos_encoding_config
        unit = (points / self.config.radius + 1) / 2
        code = self.encoding(unit).to(points.dtype)
        seen = config.active_levels(step)
        if seen < config.n_levels:
            mask = torch.zeros(code.shape[-1], device=code.device, dtype=code.dtype)
            mask[: seen * config.n_features_per_level] = 1
            code = code * mask
        return code


class HashGridField(HashGridFeatures):
    """A hash grid read by one network for the value and one for the features."""

    def raw(
        self, points: Float[Tensor, "points 3"], step: int | None
    ) -> tuple[Float[Tensor, " points"], Float[Tensor, "points channels"]]:
        """Encode, and decode by both networks."""
        code = self.encode(points, step)
        value = self.get_submodule(self.value_network)(code)
        return value[:, 0], self.feature_network(code)


class ImplicitVolume(HashGridField, DensityField):
    """A density on a hash grid."""

    Config = ImplicitVolumeConfig
    value_network = "density_network"


def _make_encoding(config: HashGridConfig) -> nn.Module:
    """tiny-cuda-nn's encoding on a GPU that has it, ours otherwise."""
    tinycudann, _ = probe("tinycudann", needs_cuda=True)
    if tinycudann is None:
        return HashGrid(config)
    return tinycudann.Encoding(
        3,
        {
            "otype": "HashGrid",
            "n_levels": config.n_levels,
            "n_features_per_level": config.n_features_per_level,
            "log2_hashmap_size": config.log2_hashmap_size,
            "base_resolution": config.base_resolution,
            "per_level_scale": config.per_level_scale,
        },
        dtype=torch.float32,
    )
