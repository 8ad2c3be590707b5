r"""A surface on tetrahedra that starts from the result of another run.

Values v of a field become signed distances at the vertices of the grid,

$$f(x_i) = \frac{\tau - v(x_i)}{\operatorname{median} \|\nabla v\|}$$

with the level τ of the surface and the median over the vertices next to it, limited to
two cells: the sign is that of the field, and the size near the surface that of a
distance. A run on tetrahedra of the same grid is taken over as it is.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dreampropeller import checkpoint
from systems.files import CHECKPOINTS, CONFIG
from systems.scene.fields import TetrahedralField, TetrahedraSDFGrid, VoxelTetrahedra
from systems.scene.isosurface import Values
from systems.settings.reader import ConfigError

_CELLS = 2.0
"""Cells to which distances are limited."""


@torch.no_grad()
def start_from(geometry: TetrahedralField, run: str, with_colours: bool = True) -> None:
    """Take surface and colours of a finished run.

    Args:
        geometry: Receives them.
        run: A run folder; its last checkpoint is read.
        with_colours: Whether to take its colours, if it has any.

    Raises:
        ConfigError: There is no finished run, or its geometry cannot be converted.
    """
    source, y = _open(run)
    values, features = _functions(source, y, run)
    found = source.scene.geometry
    if isinstance(found, TetrahedralField):
        with_colours = with_colours and found.has_features
    if isinstance(found, TetrahedralField) and _are_alike(geometry, found):
        scale = found.config.sdf_scale / geometry.config.sdf_scale
        geometry.sdf.copy_(y["geometry.sdf"] * scale)
        if geometry.config.isosurface_deformable_grid:
            geometry.deformation.copy_(y["geometry.deformation"])
    else:
        distances = _sampled(geometry, values, source, y)
        geometry.sdf.copy_(distances / geometry.config.sdf_scale)
    if not with_colours or not geometry.has_features:
        return
    if isinstance(geometry, VoxelTetrahedra):
        config = geometry.config
        ticks = torch.linspace(-config.radius, config.radius, config.resolution)
        # The grid's last axis is x.
        z, y_, x = torch.meshgrid(ticks, ticks, ticks, indexing="ij")
        places = torch.stack([x, y_, z], -1).reshape(-1, 3)
        found = torch.cat([features(part) for part in places.split(2**16)])
        found = found.T.reshape(geometry.grid.shape) / config.feature_scale
        geometry.grid.copy_(found)
    elif isinstance(geometry, TetrahedraSDFGrid):
        _copy_networks(geometry, y, run)


def _open(run: str) -> tuple[Any, Any]:
    from systems import build
    from systems.settings.config import load

    folder = Path(run)
    if not (folder / CONFIG).exists():
        raise ConfigError(
            f"`system.geometry_convert_from` is `{run}`, which holds no "
            f"`{CONFIG}`: name the folder of a finished run."
        )
    # As a resumed run, it does not start from the run before it.
    source = build(replace(load(folder / CONFIG), resume=run))
    state = checkpoint.load(folder / CHECKPOINTS)
    if state.step < source.num_steps:
        raise ConfigError(
            f"`system.geometry_convert_from` is `{run}`, which ended at step "
            f"{state.step} of {source.num_steps}: finish it first, `python launch.py "
            f"--train resume={folder}`."
        )
    return source, state.y


def _functions(source: Any, y: Any, run: str) -> tuple[Values, Values]:
    """Values and features of a run's field."""
    from systems.dreamfusion import DreamFusion

    if not isinstance(source, DreamFusion):
        raise ConfigError(
            f"`system.geometry_convert_from` is `{run}`, a run of "
            f"`{source.config.system_type}`, whose geometry cannot be taken over: name "
            "a run of a `dreamfusion-system`, `textmesh-system`, `magic3d-system` or "
            "`prolificdreamer-system`."
        )
    return source.values(y), source.features(y)


def _are_alike(one: TetrahedralField, two: TetrahedralField) -> bool:
    """Whether two surfaces have the same grid."""
    names = ("radius", "isosurface_resolution", "isosurface_deformable_grid")
    return all(getattr(one.config, n) == getattr(two.config, n) for n in names)


def _sampled(
    geometry: TetrahedralField, values: Values, source: Any, y: Any
) -> Float[Tensor, " vertices"]:
    """Signed distances at the vertices of a grid, from the values of a field."""
    config = geometry.config
    level = float(source.mesh(y).metadata["level"])
    points = geometry.grid_points().cpu()
    found = torch.cat([values(part) for part in points.split(2**16)])
    cell = 2 * config.radius / config.isosurface_resolution
    return _distances(found, level, config.isosurface_resolution + 1, cell)


def _distances(
    values: Float[Tensor, " vertices"], level: float, side: int, cell: float
) -> Float[Tensor, " vertices"]:
    volume = (level - values).view(side, side, side)
    slopes = torch.stack(torch.gradient(volume, spacing=cell)).norm(dim=0)
    near = torch.zeros_like(volume, dtype=torch.bool)
    for axis in range(3):
        one, two = (volume.narrow(axis, k, side - 1) for k in (0, 1))
        crossed = (one < 0) != (two < 0)
        near.narrow(axis, 0, side - 1).logical_or_(crossed)
        near.narrow(axis, 1, side - 1).logical_or_(crossed)
    slope = float(slopes[near].median().clamp(min=1e-9))
    return (volume / slope).clamp(-_CELLS * cell, _CELLS * cell).flatten()


def _copy_networks(geometry: TetrahedraSDFGrid, y: Any, run: str) -> None:
    """Encoding and network of the colours, which must be alike."""
    for name, parameter in geometry.named_parameters():
        if not name.startswith(("encoding.", "feature_network.")):
            continue
        found = y.get(f"geometry.{name}")
        if found is None or found.shape != parameter.shape:
            raise ConfigError(
                f"`system.geometry_convert_from` is `{run}`, whose colours do not fit "
                f"`tetrahedra-sdf-grid` (`{name}`): write the same "
                "`pos_encoding_config` and `mlp_network_config` as there, "
                "`geometry_type: voxel-tetrahedra`, or "
                "`geometry_convert_inherit_texture: false` for new colours."
            )
        parameter.copy_(found)
