import math

import pytest
import torch

from systems.toybox.captions import VIEWS, view_of
from systems.toybox.finishes import FINISHES
from systems.toybox.objects import COLOURS, OBJECTS, WITH_FRONT, ToyObject
from systems.toybox.render import AMBIENT, LIGHT, Cameras, render, trace
from systems.toybox.sdf import Sdf
from systems.toybox.truth import truth, view_cameras
from systems.toybox.views import random_cameras

RADIUS = 0.65  # of the toybox sphere


def _cameras(count: int = 12, seed: int = 0) -> Cameras:
    return random_cameras(count, torch.Generator().manual_seed(seed))


def _rays_and_hits(
    cameras: Cameras, size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rays, and where they meet the ball, by the quadratic formula."""
    origins, directions = cameras.rays(size)
    b = (origins * directions).sum(-1)
    discriminant = b.square() - origins.square().sum(-1) + RADIUS**2
    return (
        origins,
        directions,
        torch.where(discriminant > 0, -b, math.nan)
        - (discriminant.clamp(min=0).sqrt()),
    )


def test_tracer_finds_the_sphere_where_algebra_does() -> None:
    origins, directions, expected = _rays_and_hits(_cameras(), 32)
    _, depth, hit = trace(OBJECTS["sphere"], origins, directions)
    # Rays that graze the ball within the hit distance may count as hits.
    closest = (
        origins + -(origins * directions).sum(-1, keepdim=True) * directions
    ).norm(dim=-1)
    clear = (closest - RADIUS).abs() > 0.01
    assert torch.equal(hit[clear], ~expected.isnan()[clear])
    sure = hit & clear
    assert (depth - expected)[sure].abs().max() < 0.02
    assert (depth - expected)[sure].abs().mean() < 2e-3


def test_colour_of_a_surface_point_does_not_depend_on_the_camera() -> None:
    """From many cameras, a sphere's colour is one function of the point in space."""
    cameras = _cameras()
    origins, directions, depth = _rays_and_hits(cameras, 32)
    image = render("sphere", "blue", cameras, 32, supersample=1)
    inside = (image.mask[:, 0] == 1) & ~depth.isnan()
    normals = (origins + depth[..., None] * directions)[inside] / RADIUS
    diffuse = (normals @ torch.tensor(LIGHT)).clamp(min=0)
    shade = AMBIENT + (1 - AMBIENT) * diffuse
    expected = shade[:, None] * torch.tensor(COLOURS["blue"])
    actual = image.rgb.permute(0, 2, 3, 1)[inside]
    assert len(actual) > 1000
    error = (actual - expected).abs()
    assert error.mean() < 1e-3
    assert error.max() < 0.03  # at the rim, where the tracer stops a little early


def test_normals_are_in_camera_space() -> None:
    """Of a sphere seen straight on, the middle faces the camera from every side."""
    cameras = Cameras(
        azimuth=torch.tensor([0.0, 90.0, -120.0, 30.0]),
        elevation=torch.tensor([0.0, 30.0, -10.0, 90.0]),
        distance=torch.full((4,), 2.4),
        fov=torch.full((4,), 50.0),
    )
    normal = render("sphere", "red", cameras, 33, supersample=1).normal[:, :, 16, 16]
    torch.testing.assert_close(
        normal, torch.tensor([0.0, 0.0, 1.0]).expand(4, 3), atol=5e-3, rtol=0
    )


def test_front_is_seen_from_x_and_up_is_up() -> None:
    """The snowman's orange nose is in front, his hat on top."""
    front, back = (
        truth("a blue snowman").render(view_cameras(view), 64)
        for view in ("front", "back")
    )
    orange, blue = torch.tensor(COLOURS["orange"]), torch.tensor(COLOURS["blue"])

    def rows_like(image: torch.Tensor, colour: torch.Tensor) -> torch.Tensor:
        direction = torch.nn.functional.normalize(image[0], dim=0)
        like = torch.einsum("chw,c->hw", direction, colour / colour.norm()) > 0.99
        return like.nonzero()[:, 0].float()

    assert len(rows_like(front.rgb, orange)) > 3
    assert len(rows_like(back.rgb, orange)) == 0
    assert rows_like(front.rgb, blue).mean() < rows_like(front.rgb, orange).mean()


@pytest.mark.parametrize("view", VIEWS)
def test_view_cameras_show_the_view_they_are_named_for(view: str) -> None:
    cameras = view_cameras(view)
    assert view_of(float(cameras.azimuth), float(cameras.elevation)) == view


@pytest.mark.parametrize("name", OBJECTS)
def test_mesh_lies_on_the_surface(name: str) -> None:
    thing = truth(f"a red {name}")
    mesh = thing.mesh(48)
    assert mesh.faces.max() < len(mesh.vertices)
    distance = thing.sdf(mesh.vertices).abs()
    assert distance.mean() < 0.01
    corners = mesh.vertices[mesh.faces]
    spans = torch.linalg.cross(
        corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0], dim=-1
    )
    volume = (corners[:, 0] * spans).sum() / 6
    assert volume > 0, "faces are counter-clockwise seen from outside"


def test_mesh_of_the_sphere_has_its_volume() -> None:
    mesh = truth("a red sphere").mesh(64)
    a, b, c = mesh.vertices[mesh.faces].unbind(1)
    volume = (a * torch.linalg.cross(b, c, dim=-1)).sum() / 6
    assert abs(volume / (4 / 3 * math.pi * RADIUS**3) - 1) < 0.01


def test_an_unknown_colour_is_refused() -> None:
    with pytest.raises(ValueError, match="`mauve` is no colour: write one of red"):
        render("cube", "mauve", _cameras(1), 8)


def _turned(thing: ToyObject) -> ToyObject:
    """The object turned by 180° about the vertical."""

    def turn(solid: Sdf) -> Sdf:
        return lambda p: solid(p * p.new_tensor([-1, -1, 1]))

    return ToyObject(
        turn(thing.body), tuple((turn(solid), colour) for solid, colour in thing.parts)
    )


@pytest.mark.parametrize("name", OBJECTS)
def test_an_object_with_a_front_differs_from_itself_turned_around(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PSNR below 30 dB from all around; the light does not turn with the object."""
    cameras = Cameras(
        azimuth=torch.arange(6) * 60.0,
        elevation=torch.full((6,), 15.0),
        distance=torch.full((6,), 2.4),
        fov=torch.full((6,), 50.0),
    )
    grey = torch.full((3,), 0.5)
    straight = render(name, "red", cameras, 32).over(grey)
    monkeypatch.setattr("systems.toybox.render.OBJECTS", {name: _turned(OBJECTS[name])})
    around = render(name, "red", cameras, 32).over(grey)
    psnr = -10 * math.log10(float((straight - around).square().mean()) + 1e-12)
    assert (psnr < 30) == (name in WITH_FRONT)


@pytest.mark.parametrize("finish", ["striped", "spotted"])
def test_marks_are_fixed_in_space_and_leave_most_of_the_body(finish: str) -> None:
    points = torch.rand(20_000, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1
    marked = FINISHES[finish](points)
    assert 0.25 < float(marked.float().mean()) < 0.4
    thing = OBJECTS["cube"]
    albedo = thing.albedo(points, "red", finish, "white")
    assert torch.equal(
        albedo[marked], torch.tensor(COLOURS["white"]).expand(int(marked.sum()), 3)
    )
    assert torch.equal(albedo[~marked], thing.albedo(points, "red")[~marked])
    # Parts keep their colours, whatever the body's finish.
    cap = OBJECTS["mushroom"]
    stem = torch.tensor([[0.0, 0.0, z / 50] for z in range(-30, -10)])
    plain = cap.albedo(stem, "red")
    assert torch.equal(cap.albedo(stem, "red", finish, "blue"), plain)


def test_the_truth_of_a_finish_is_in_renders_and_mesh() -> None:
    striped, plain = truth("a red mug with white stripes"), truth("a red mug")
    view = view_cameras("side")
    seen, bare = striped.render(view, 32), plain.render(view, 32)
    assert torch.equal(seen.mask, bare.mask)
    assert torch.equal(seen.normal, bare.normal)
    assert (seen.rgb - bare.rgb).abs().max() > 0.2
    colours = {tuple(c) for c in striped.mesh(32).colours.tolist()}
    white_and_red = torch.tensor([COLOURS["red"], COLOURS["white"]])
    assert colours == {tuple(c) for c in white_and_red.tolist()}
