"""Fields against written-out formulas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from systems.scene.fields import ImplicitVolume, VoxelGrid
from systems.scene.fields.base import Field
from systems.scene.fields.hash_grid import (
    HashGrid,
    HashGridConfig,
    ImplicitVolumeConfig,
)
from systems.scene.fields.voxel_grid import VoxelGridConfig
from systems.scene.networks import MLP, spherical_harmonics

POINTS = torch.rand(50, 3, generator=torch.Generator().manual_seed(1)) * 1.6 - 0.8


def voxels(**settings: Any) -> VoxelGrid:
    field = VoxelGrid(VoxelGridConfig(resolution=9, **settings))
    with torch.no_grad():
        field.grid.normal_(generator=torch.Generator().manual_seed(0))
    return field.double()


def volume(**settings: Any) -> ImplicitVolume:
    encoding = HashGridConfig(n_levels=3, log2_hashmap_size=8, base_resolution=4)
    torch.manual_seed(0)
    field = ImplicitVolume(
        ImplicitVolumeConfig(pos_encoding_config=encoding, **settings)
    )
    with torch.no_grad():
        table: Any = field.encoding.table
        table.uniform_(-1, 1)
    return field.double()


def test_voxel_grid_is_exact_at_its_corners_and_linear_between() -> None:
    field = voxels(radius=2.0)
    corner = torch.tensor([[0.5, -1.0, 2.0]]).double()  # spacing 0.5: x 5, y 2, z 8
    raw, features = field.raw(corner, None)
    stored = field.grid[0, :, 8, 2, 5]
    assert torch.allclose(raw, 10 * stored[0])
    assert torch.allclose(features[0], 3 * stored[1:])
    half = corner - torch.tensor([0.25, 0, 0])
    between = (stored + field.grid[0, :, 8, 2, 4]) / 2
    assert torch.allclose(field.raw(half, None)[0], 10 * between[0])


@pytest.mark.parametrize(
    ("bias", "value"),
    [
        ("blob_magic3d", 10 * (1 - 0.3 / 0.5)),
        ("blob_dreamfusion", 10 * torch.tensor(-0.09 / 0.5).exp()),
        (-2.5, -2.5),
    ],
)
def test_density_bias_by_hand(bias: Any, value: float) -> None:
    field = VoxelGrid(VoxelGridConfig(density_bias=bias, resolution=4))
    point = torch.tensor([[0.0, 0.3, 0.0]])
    expected = torch.nn.functional.softplus(torch.as_tensor(value))
    assert field.density(point, None).item() == pytest.approx(expected.item(), abs=1e-4)


@pytest.mark.parametrize("kind", ["finite_difference", "analytic"])
def test_normals_of_a_blob_point_outwards(kind: str) -> None:
    field = ImplicitVolume(ImplicitVolumeConfig(normal_type=kind))
    outward = torch.nn.functional.normalize(POINTS, dim=-1)
    assert (field.normals(POINTS, None) - outward).abs().max() < 0.05


def test_analytic_normals_are_the_limit_of_finite_differences() -> None:
    exact = volume(normal_type="analytic")
    close = volume(finite_difference_normal_eps=1e-6)
    error = exact.normals(POINTS.double(), None) - close.normals(POINTS.double(), None)
    assert error.abs().max() < 1e-3


@pytest.mark.parametrize("make", [voxels, volume])
def test_gradient_of_density_and_features_is_right(
    make: Callable[[], Field],
) -> None:
    field = make()
    names = [name for name, _ in field.named_parameters()]
    values = [p.detach().requires_grad_() for p in field.parameters()]

    def outputs(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        state = dict(zip(names, tensors, strict=True))
        return torch.func.functional_call(field, state, (POINTS[:3].double(), None))

    assert torch.autograd.gradcheck(outputs, values, fast_mode=True)


def test_hash_grid_level_against_the_formula() -> None:
    """One coarse and one hashed level, corner by corner."""
    config = HashGridConfig(
        n_levels=2, log2_hashmap_size=5, base_resolution=2, per_level_scale=4
    )
    grid = HashGrid(config).double()
    point = torch.tensor([0.3, 0.61, 0.9]).double()
    expected = []
    for resolution, begin, rows in ((2, 0, 27), (8, 27, 32)):
        low = (point * resolution).floor().long()
        share = point * resolution - low
        total = torch.zeros(2).double()
        for corner in torch.cartesian_prod(*[torch.arange(2)] * 3):
            x, y, z = (low + corner).tolist()
            dense = (x * 3 + y) * 3 + z
            hashed = (x ^ (y * 2654435761) ^ (z * 805459861)) % 32
            row = begin + (dense if rows == 27 else hashed)
            weight = torch.where(corner == 1, share, 1 - share).prod()
            total = total + weight * grid.table[row]
        expected.append(total)
    assert torch.allclose(grid(point[None])[0], torch.cat(expected))


def test_table_that_happens_to_be_a_cube_is_still_hashed() -> None:
    """2⁶ rows are 4³, yet the level has 17³ corners."""
    config = HashGridConfig(n_levels=1, log2_hashmap_size=6, base_resolution=16)
    assert HashGrid(config)(torch.rand(20, 3)).shape == (20, 2)


def test_fine_levels_come_later() -> None:
    config = HashGridConfig(
        otype="ProgressiveBandHashGrid",
        n_levels=4,
        start_level=2,
        start_step=100,
        update_steps=50,
    )
    seen = [config.active_levels(step) for step in (0, 149, 150, 200, 900, None)]
    assert seen == [2, 2, 3, 4, 4, 4]
    field = ImplicitVolume(ImplicitVolumeConfig(pos_encoding_config=config))
    grads: dict[int, int] = {}
    for step in (0, 500):
        field.zero_grad()
        field.raw(POINTS, step)[1].sum().backward()
        table: Any = field.encoding.table
        grads[step] = int((table.grad.abs().sum(-1) > 0).sum())
    assert 0 < grads[0] < grads[500]


def test_spherical_harmonics_are_orthonormal() -> None:
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(
        torch.randn(200_000, 3, generator=generator, dtype=torch.float64), dim=-1
    )
    basis = spherical_harmonics(directions)
    gram = 4 * torch.pi * basis.T @ basis / len(basis)
    assert (gram - torch.eye(9)).abs().max() < 0.03


def test_perceptron_has_the_layers_asked_for() -> None:
    widths = [
        tuple(p.shape) for p in MLP(5, 3, neurons=7, hidden_layers=2).parameters()
    ]
    assert widths == [(7, 5), (7, 7), (3, 7)]


def test_voxels_have_no_analytic_normals() -> None:
    with pytest.raises(ValueError, match="write `finite_difference`"):
        VoxelGridConfig(normal_type="analytic")
