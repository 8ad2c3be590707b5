r"""The views of a system that starts from images (`data` in a config).

Reference images with their cameras, and the random cameras of the guidance. Names and
defaults are those of threestudio's ``single-image-datamodule``, but for the azimuth,
which is 0 here, the front of the object, and for the elevation, 5 degrees.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from pathlib import Path

import torch

from systems.references.cutting import CUTS
from systems.references.reference import LARGEST_SIDE
from systems.scene.cameras import Cameras, RandomCameras, Views, check_milestones
from systems.settings.checks import at_least, between, one_of


@dataclass(frozen=True)
class ViewConfig:
    """Another image of the same object, with its camera (an entry of `data.more`).

    Args:
        image: File of the image.
        azimuth_deg: Azimuth of its camera in degrees, in the coordinates in which the
            first image has `default_azimuth_deg`.
        elevation_deg: Elevation of its camera in degrees.
    """

    image: str
    azimuth_deg: float
    elevation_deg: float

    def __post_init__(self) -> None:
        between("elevation_deg", self.elevation_deg, -90, 90)


@dataclass(frozen=True)
class SingleImageConfig:
    """Reference images, their cameras, and the random cameras (`data` in a config).

    Args:
        image: File of the image: PNG, JPEG or WebP.
        image_path: The same, by threestudio's name.
        more: Further images of the same object, with their cameras.
        height: Height in pixels at which the images are compared. This and `width` may
            be lists: a first value, and one from each of `resolution_milestones` on.
        width: Width in pixels, the same.
        resolution_milestones: Rising steps at which the later values begin.
        default_elevation_deg: Elevation of the image's camera in degrees.
        default_azimuth_deg: Azimuth of the image's camera in degrees.
        default_camera_distance: Distance of the cameras from the origin.
        default_fovy_deg: Full vertical field of view of the cameras in degrees.
        cut: How the object is cut out: "alpha", by the file's own alpha channel;
            "rembg", by that package; "background", by a plain background; "none", the
            whole image is the object; "auto", the first of them that applies.
        recentre: Move the object to the middle and scale it: true, false, or "auto",
            which keeps a square image with an alpha channel as it is.
        fill: Share of the image that a recentred object fills.
        depth: File of a depth map of the image, brighter is further, for `lambda_depth`
            and `lambda_depth_rel`; null: `x_depth.png` beside `x_rgba.png`.
        random_camera: The cameras of the guidance and of the turntable.
    """

    image: str = ""
    image_path: str | None = None
    more: list[ViewConfig] = field(default_factory=list)
    height: int | list[int] = 96
    width: int | list[int] = 96
    resolution_milestones: list[int] = field(default_factory=list)
    default_elevation_deg: float = 5.0
    default_azimuth_deg: float = 0.0
    default_camera_distance: float = 1.2
    default_fovy_deg: float = 60.0
    cut: str = "auto"
    recentre: bool | str = "auto"
    fill: float = 0.8
    depth: str | None = None
    random_camera: RandomCameras = field(default_factory=RandomCameras)

    def __post_init__(self) -> None:
        if self.image and self.image_path not in (None, self.image):
            raise ValueError(
                f"`image` is `{self.image}` and `image_path` `{self.image_path}`: "
                "write one of them."
            )
        if not self.paths[0]:
            raise ValueError(
                "the image is missing: name its file, for example `data.image=mug.png`."
            )
        one_of("cut", self.cut, CUTS)
        if isinstance(self.recentre, str):
            one_of("recentre", self.recentre, ("auto",))
        between("fill", self.fill, 0.1, 1)
        between("default_elevation_deg", self.default_elevation_deg, -90, 90)
        between("default_fovy_deg", self.default_fovy_deg, 1, 170)
        at_least("default_camera_distance", self.default_camera_distance, 1e-3)
        sizes = {"height": self.height, "width": self.width}
        check_milestones(sizes, self.resolution_milestones)
        if self.height != self.width:
            raise ValueError(
                f"`height` is {self.height} and `width` {self.width}: references are "
                "square, write the same for both."
            )
        between("height", self.largest, 1, LARGEST_SIDE)

    @property
    def paths(self) -> list[str]:
        """The files of all images."""
        return [self.image or self.image_path or "", *(one.image for one in self.more)]

    @property
    def depth_path(self) -> Path:
        """The file of the depth map.

        Raises:
            ValueError: It is not named, and the image's name does not tell it.
        """
        if self.depth is not None:
            return Path(self.depth)
        path = Path(self.paths[0])
        if not path.name.endswith("_rgba.png"):
            raise ValueError(
                "A depth map is compared with (`lambda_depth`, `lambda_depth_rel`), "
                f"and none belongs to `{path}`: name its file, `data.depth=FILE`."
            )
        return path.with_name(path.name.removesuffix("_rgba.png") + "_depth.png")

    def shape(self, step: int) -> tuple[int, int]:
        """Height and width of the reference views of a step."""
        passed = bisect_right(self.resolution_milestones, step)
        height, width = (
            value[passed] if isinstance(value, list) else value
            for value in (self.height, self.width)
        )
        return height, width

    @property
    def largest(self) -> int:
        """The largest side of the reference views, in pixels."""
        sizes = (self.height, self.width)
        return max(max(size) if isinstance(size, list) else size for size in sizes)

    def cameras(self) -> Cameras:
        """The cameras of all images."""
        angles = [(self.default_azimuth_deg, self.default_elevation_deg)]
        angles += [(one.azimuth_deg, one.elevation_deg) for one in self.more]
        azimuth, elevation = torch.tensor(angles).T
        one = torch.ones(len(angles))
        return Cameras(
            azimuth,
            elevation,
            self.default_camera_distance * one,
            self.default_fovy_deg * one,
        )

    def views(self, height: int, width: int) -> Views:
        """The reference views, lit from their cameras."""
        cameras = self.cameras()
        return Views(cameras, cameras.axes()[0], height, width)
