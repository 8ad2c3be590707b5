import pytest
import torch

from systems.toybox import sdf
from systems.toybox.finishes import FINISHES
from systems.toybox.objects import COLOURS, OBJECTS
from systems.toybox.render import RADIUS, surface_normals, trace


def _points(count: int, reach: float = 1.2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    unit = torch.rand(count, 3, generator=generator, dtype=torch.float64)
    return (unit * 2 - 1) * reach


def _gradient(distance: sdf.Sdf, points: torch.Tensor) -> torch.Tensor:
    points = points.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(distance(points).sum(), points)
    return gradient


@pytest.mark.parametrize("name", OBJECTS)
def test_no_object_overstates_its_distance(name: str) -> None:
    """1-Lipschitz and zero on the surface: a bound that a tracer may step by."""
    slopes = _gradient(OBJECTS[name].sdf, _points(4000)).norm(dim=-1)
    assert slopes.max() <= 1 + 1e-9


@pytest.mark.parametrize(
    "solid",
    [
        sdf.sphere((0.1, 0, 0), 0.4),
        sdf.torus((0, 0, 0.2), 0.5, 0.2),
        sdf.cylinder((0, 0.1, 0), 0.4, 0.3),
        sdf.box((0, 0, 0), (0.4, 0.3, 0.2), 0.05),
        sdf.capsule((0.1, 0, -0.3), (-0.2, 0.3, 0.4), 0.15),
    ],
    ids=["sphere", "torus", "cylinder", "box", "capsule"],
)
def test_simple_solids_are_exact_outside(solid: sdf.Sdf) -> None:
    """Walking the distance against the gradient ends on the surface."""
    points = _points(2000)
    points = points[solid(points) > 0.01]
    gradient = _gradient(solid, points)
    torch.testing.assert_close(
        gradient.norm(dim=-1), torch.ones(len(points), dtype=torch.float64)
    )
    landed = points - solid(points)[:, None] * gradient
    assert solid(landed).abs().max() < 1e-9


def test_a_triangle_is_inside_between_its_corners() -> None:
    corners = ((-0.5, -0.2), (0.6, -0.2), (0.1, 0.7))
    solid = sdf.triangle(corners, 0.1)
    middle = [sum(c[i] for c in corners) / 3 for i in (0, 1)]
    for x, z in corners:
        inside = torch.tensor(
            [0.9 * x + 0.1 * middle[0], 0.0, 0.9 * z + 0.1 * middle[1]]
        )
        outside = torch.tensor(
            [1.1 * x - 0.1 * middle[0], 0.0, 1.1 * z - 0.1 * middle[1]]
        )
        assert solid(inside) < 0 < solid(outside)
    assert solid(torch.tensor([middle[0], 0.2, middle[1]])) == pytest.approx(0.1)


@pytest.mark.parametrize("name", OBJECTS)
def test_every_object_fits_the_ball(name: str) -> None:
    shell = torch.nn.functional.normalize(_points(4000), dim=-1) * RADIUS
    assert OBJECTS[name].sdf(shell).min() > 0


@pytest.mark.parametrize("name", OBJECTS)
def test_normals_point_outwards(name: str) -> None:
    thing = OBJECTS[name]
    aims = _points(400, 0.4).float()
    origins = torch.nn.functional.normalize(_points(400) + 1e-3, dim=-1).float() * 2.5
    directions = torch.nn.functional.normalize(aims - origins, dim=-1)
    points, _, hit = trace(thing, origins, directions)
    points = points[hit]
    normals = surface_normals(thing, points)
    assert len(points) > 50
    # Where two surfaces meet a normal is arbitrary: nearly all points, not all.
    outside = thing.sdf(points + 0.01 * normals) > thing.sdf(points - 0.01 * normals)
    assert outside.float().mean() > 0.99
    facing = (normals * directions[hit]).sum(-1) < 0.05
    assert facing.float().mean() > 0.97


def test_the_order_of_objects_and_colours_is_fixed() -> None:
    """Scored and held-out pairs, and the shipped weights, refer to these numbers."""
    assert list(OBJECTS) == [
        *("sphere", "cube", "torus", "cone", "cylinder", "mushroom", "tree", "house"),
        *("mug", "snowman", "chair", "table", "ice cream cone", "rocket", "car"),
        *("fish", "teapot", "sailboat", "airplane", "duck", "lamp", "key", "guitar"),
        *("boot", "rabbit", "robot"),
    ]
    assert list(COLOURS) == [
        *("red", "green", "blue", "yellow", "purple", "orange", "cyan", "pink"),
        *("white", "black"),
    ]
    assert list(FINISHES) == ["plain", "striped", "spotted"]
