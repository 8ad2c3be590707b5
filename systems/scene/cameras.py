r"""Pinhole cameras, and the random ones of a training step.

Right-handed world coordinates, z up: azimuth 0 looks at the front (from +x), 90° from
+y; elevation is over the xy-plane. This is threestudio's convention.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dreampropeller import StepRandom
from systems.settings.checks import at_least, between, check_range, one_of


@dataclass(frozen=True)
class Cameras:
    """Pinhole cameras that look at the origin, or near it.

    Attributes:
        azimuth: Degrees, shape ``(views,)``.
        elevation: Degrees, shape ``(views,)``.
        distance: Distance from the origin, shape ``(views,)``.
        fov: Full vertical field of view, degrees, shape ``(views,)``.
        shift: Offset of the position, shape ``(views, 3)``; None: zero.
        centre: Point looked at, shape ``(views, 3)``; None: the origin.
        tilt: Offset of the upward direction, shape ``(views, 3)``; None: zero.
        aspect: Width over height of the images, shape ``(views,)``; None: 1.
    """

    azimuth: Float[Tensor, " views"]
    elevation: Float[Tensor, " views"]
    distance: Float[Tensor, " views"]
    fov: Float[Tensor, " views"]
    shift: Float[Tensor, "views 3"] | None = None
    centre: Float[Tensor, "views 3"] | None = None
    tilt: Float[Tensor, "views 3"] | None = None
    aspect: Float[Tensor, " views"] | None = None

    def __len__(self) -> int:
        return len(self.azimuth)

    def chosen(self, index: slice | Int[Tensor, " chosen"]) -> Cameras:
        """Some of the cameras."""
        every = {f.name: getattr(self, f.name) for f in fields(self)}
        cut: Any = {k: None if v is None else v[index] for k, v in every.items()}
        return Cameras(**cut)

    @classmethod
    def joined(cls, several: Sequence[Cameras]) -> Cameras:
        """The cameras of several steps, in order."""
        if len(several) == 1:
            return several[0]
        joined: dict[str, Any] = {}
        for one in fields(cls):
            values = [getattr(cameras, one.name) for cameras in several]
            if any(value is not None for value in values):
                missing = [
                    torch.ones_like(cameras.fov)
                    if one.name == "aspect"
                    else cameras.fov.new_zeros(len(cameras), 3)
                    for cameras in several
                ]
                filled = [
                    m if v is None else v for v, m in zip(values, missing, strict=True)
                ]
                joined[one.name] = torch.cat(filled)
        return cls(**joined)

    def axes(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Position, right, up and forward, each of shape ``(views, 3)``."""
        azimuth, elevation = self.azimuth.deg2rad(), self.elevation.deg2rad()
        flat = elevation.cos()
        out = torch.stack(
            [flat * azimuth.cos(), flat * azimuth.sin(), elevation.sin()], -1
        )
        # Not from a cross product with the vertical: that fails straight overhead.
        right = torch.stack(
            [-azimuth.sin(), azimuth.cos(), torch.zeros_like(azimuth)], -1
        )
        up = torch.linalg.cross(out, right, dim=-1)
        position = self.distance[:, None] * out
        if self.shift is None and self.centre is None and self.tilt is None:
            return position, right, up, -out
        if self.shift is not None:
            position = position + self.shift
        if self.tilt is not None:
            up = up + self.tilt
        centre = torch.zeros_like(position) if self.centre is None else self.centre
        forward = torch.nn.functional.normalize(centre - position, dim=-1)
        right = torch.nn.functional.normalize(
            torch.linalg.cross(forward, up, dim=-1), dim=-1
        )
        return position, right, torch.linalg.cross(right, forward, dim=-1), forward

    def rays(self, height: int, width: int | None = None) -> tuple[Tensor, Tensor]:
        """Origins ``(views, 1, 1, 3)``, unit directions ``(views, height, width, 3)``.

        Rays go through pixel centres; the first row is the top of the image.

        Args:
            height: Height in pixels.
            width: Width in pixels; default: the height.
        """
        width = height if width is None else width
        position, right, up, forward = self.axes()
        half = torch.tan(self.fov.deg2rad() / 2)[:, None, None, None]
        rows = (torch.arange(height, device=half.device) + 0.5) / height * 2 - 1
        columns = (torch.arange(width, device=half.device) + 0.5) / width * 2 - 1
        x = half * (columns * (width / height))[None, None, :, None]
        y = -half * rows[None, :, None, None]
        directions = (
            forward[:, None, None] + x * right[:, None, None] + y * up[:, None, None]
        )
        return position[:, None, None], torch.nn.functional.normalize(
            directions, dim=-1
        )


@dataclass(frozen=True)
class Views:
    """The views of one step.

    Attributes:
        cameras: The cameras.
        light: Positions of a point light, shape ``(views, 3)``.
        height: Height of the images in pixels.
        width: Width of the images in pixels.
    """

    cameras: Cameras
    light: Float[Tensor, "views 3"]
    height: int
    width: int

    def one(self, number: int) -> Views:
        """A single view by its index."""
        return self.chosen(slice(number, number + 1))

    def chosen(self, part: slice) -> Views:
        """Some of the views."""
        return Views(
            self.cameras.chosen(part), self.light[part], self.height, self.width
        )


_RESIZED = ("batch_size", "height", "width")


def check_milestones(sizes: Mapping[str, int | list[int]], steps: list[int]) -> None:
    """Refuse sizes, or lists of sizes, that do not fit the steps where they change.

    Raises:
        ValueError: Names the setting and what to write instead.
    """
    if steps != sorted(set(steps)):
        raise ValueError(
            f"`resolution_milestones` is {steps}: write rising steps, such as "
            "`[1000, 2000]`."
        )
    for name, value in sizes.items():
        for number in value if isinstance(value, list) else [value]:
            at_least(name, number, 1)
        if isinstance(value, list) and len(value) != len(steps) + 1:
            raise ValueError(
                f"`{name}` is {value}, and `resolution_milestones` {steps}: write "
                "a first value, and one more for each milestone."
            )
    if steps and not any(isinstance(value, list) for value in sizes.values()):
        raise ValueError(
            f"`resolution_milestones` is {steps}, and nothing changes there: write "
            f"`{'`, `'.join(sizes)}` as lists, or leave it out."
        )


@dataclass(frozen=True)
class RandomCameras:
    """The cameras of training steps and of turntables (`data` in a config).

    The names, defaults and distributions are those of threestudio's
    ``random-camera-datamodule``; the numbers are drawn from the step's own generator.

    Args:
        batch_size: Number of views per step. This, `height` and `width` may be lists:
            a first value, and one from each of `resolution_milestones` on.
        height: Height of a training image in pixels.
        width: Width of a training image in pixels.
        resolution_milestones: Rising steps at which the later values of those lists
            begin.
        elevation_range: Range of elevations in degrees. Half of the steps draw uniform
            angles, half uniform points of the sphere.
        azimuth_range: Range of azimuths in degrees.
        camera_distance_range: Range of distances from the origin.
        fovy_range: Range of the full vertical field of view in degrees.
        camera_perturb: Largest shift of the position along each axis.
        center_perturb: Standard deviation of the point looked at.
        up_perturb: Standard deviation of the upward direction.
        batch_uniform_azimuth: Space the azimuths of a step evenly.
        light_sample_strategy: Position of the light: "dreamfusion" near the camera,
            "magic3d" within 60° above the camera's horizon.
        light_position_perturb: Spread of the light around the camera.
        light_distance_range: Range of the light's distance from the origin.
        eval_height: Height of turntable images in pixels.
        eval_width: Width of turntable images in pixels.
        eval_elevation_deg: Elevation of the turntable in degrees.
        eval_camera_distance: Distance of the turntable's camera from the origin.
        eval_fovy_deg: Full vertical field of view of the turntable in degrees.
        n_test_views: Number of frames of the turntable.
    """

    batch_size: int | list[int] = 1
    height: int | list[int] = 64
    width: int | list[int] = 64
    resolution_milestones: list[int] = field(default_factory=list)
    elevation_range: tuple[float, float] = (-10.0, 90.0)
    azimuth_range: tuple[float, float] = (-180.0, 180.0)
    camera_distance_range: tuple[float, float] = (1.0, 1.5)
    fovy_range: tuple[float, float] = (40.0, 70.0)
    camera_perturb: float = 0.1
    center_perturb: float = 0.2
    up_perturb: float = 0.02
    batch_uniform_azimuth: bool = True
    light_sample_strategy: str = "dreamfusion"
    light_position_perturb: float = 1.0
    light_distance_range: tuple[float, float] = (0.8, 1.5)
    eval_height: int = 512
    eval_width: int = 512
    eval_elevation_deg: float = 15.0
    eval_camera_distance: float = 1.5
    eval_fovy_deg: float = 70.0
    n_test_views: int = 120

    def __post_init__(self) -> None:
        for name in ("eval_height", "eval_width", "n_test_views"):
            at_least(name, getattr(self, name), 1)
        sizes = {name: getattr(self, name) for name in _RESIZED}
        check_milestones(sizes, self.resolution_milestones)
        for name in (
            "camera_perturb",
            "center_perturb",
            "up_perturb",
            "light_position_perturb",
        ):
            at_least(name, getattr(self, name), 0)
        at_least("eval_camera_distance", self.eval_camera_distance, 1e-3)
        between("eval_elevation_deg", self.eval_elevation_deg, -90, 90)
        between("eval_fovy_deg", self.eval_fovy_deg, 1, 170)
        for name, least, most in (
            ("elevation_range", -90, 90),
            ("azimuth_range", -360, 360),
            ("camera_distance_range", 1e-3, math.inf),
            ("fovy_range", 1, 170),
            ("light_distance_range", 0, math.inf),
        ):
            check_range(name, getattr(self, name), least, most)
        one_of(
            "light_sample_strategy",
            self.light_sample_strategy,
            ("dreamfusion", "magic3d"),
        )

    def shape(self, step: int) -> tuple[int, int, int]:
        """Number of views, height and width of a training step."""
        passed = bisect_right(self.resolution_milestones, step)
        values = (getattr(self, name) for name in _RESIZED)
        views, height, width = (
            value[passed] if isinstance(value, list) else value for value in values
        )
        return views, height, width

    def views(self, step: int, random: StepRandom) -> Views:
        """The views of a training step, on the CPU; a pure function of the step."""
        generator = random.generator(step, "cameras")
        n, height, width = self.shape(step)

        def uniform(low: float, high: float, *shape: int) -> Tensor:
            return low + (high - low) * torch.rand(*shape, generator=generator)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        low, high = self.elevation_range
        if uniform(0, 1, 1) < 0.5:
            elevation = uniform(low, high, n)
        else:
            sines = [math.sin(math.radians(angle)) for angle in (low, high)]
            elevation = uniform(sines[0], sines[1], n).asin().rad2deg()
        share = uniform(0, 1, n)
        if self.batch_uniform_azimuth:
            share = (share + torch.arange(n)) / n
        west, east = self.azimuth_range
        cameras = Cameras(
            azimuth=west + (east - west) * share,
            elevation=elevation,
            distance=uniform(*self.camera_distance_range, n),
            fov=uniform(*self.fovy_range, n),
            shift=uniform(-self.camera_perturb, self.camera_perturb, n, 3)
            if self.camera_perturb
            else None,
            centre=self.center_perturb * normal(n, 3) if self.center_perturb else None,
            tilt=self.up_perturb * normal(n, 3) if self.up_perturb else None,
            aspect=None if width == height else torch.full((n,), width / height),
        )
        return Views(cameras, self._light(cameras, random, step), height, width)

    def _light(self, cameras: Cameras, random: StepRandom, step: int) -> Tensor:
        generator = random.generator(step, "light")
        n = len(cameras)
        near, far = self.light_distance_range
        distance = near + (far - near) * torch.rand(n, 1, generator=generator)
        position, right, up, forward = cameras.axes()
        if self.light_sample_strategy == "dreamfusion":
            spread = torch.randn(n, 3, generator=generator)
            out = position + self.light_position_perturb * spread
        else:  # between 30° and 90° over the plane that faces the camera
            around = 2 * math.pi * torch.rand(n, 1, generator=generator)
            over = math.pi / 6 + math.pi / 3 * torch.rand(n, 1, generator=generator)
            flat = around.cos() * right + around.sin() * up
            out = over.cos() * flat - over.sin() * forward
        return distance * torch.nn.functional.normalize(out, dim=-1)

    def turntable(self, count: int | None = None) -> Views:
        """Evenly spaced views all around, lit from the camera.

        Args:
            count: Number of views; default: `n_test_views`.
        """
        count = self.n_test_views if count is None else count
        one = torch.ones(count)
        cameras = Cameras(
            azimuth=torch.arange(count) / count * 360,
            elevation=self.eval_elevation_deg * one,
            distance=self.eval_camera_distance * one,
            fov=self.eval_fovy_deg * one,
        )
        return Views(cameras, cameras.axes()[0], self.eval_height, self.eval_width)

    def around(self, count: int = 12, size: int = 64) -> Views:
        """Views from all sides, within the elevations of training.

        At the turntable's distance and field of view, lit from the camera.

        Args:
            count: Number of views.
            size: Width and height in pixels.
        """
        number = torch.arange(count)
        low, high = self.elevation_range
        share = torch.tensor([0.2, 0.5, 0.8, 0.05])[number % 4]
        one = torch.ones(count)
        cameras = Cameras(
            azimuth=number / count * 360,
            elevation=low + (high - low) * share,
            distance=self.eval_camera_distance * one,
            fov=self.eval_fovy_deg * one,
        )
        return Views(cameras, cameras.axes()[0], size, size)
