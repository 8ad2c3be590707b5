r"""Training views without colours: layers for painting any colour and finish.

A pixel of an object with body colour $c$, second colour $c'$ and fixed parts is linear
in both colours,

$$\text{rgb} = (b - m)\,c + m\,c' + f,$$

where $b$ is the shading of the body averaged over the pixel, $m$ the same over the
stripes or the spots alone (zero for plain objects) and $f$ the colour of the fixed
parts. So one traced view serves every colour and finish exactly, up to the rounding of
the stored bytes.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from dreampropeller import StepRandom
from systems.scene.cameras import Cameras
from systems.toybox.finishes import FINISHES
from systems.toybox.objects import OBJECTS
from systems.toybox.render import find_surface

CHANNELS = (
    "body",
    "striped",
    "spotted",
    "red",
    "green",
    "blue",
    "alpha",
    "x",
    "y",
    "z",
)
"""Shading of the body, of its stripes and of its spots; the fixed parts' colour; the
coverage; normals in camera space, from −1…1 to 0…1 where covered."""
SIZE = 64
PER_OBJECT = 77
"""Views of each object in a shard; 24 shards of 26 objects are 48 048 views."""


def random_cameras(count: int, generator: torch.Generator) -> Cameras:
    """Cameras of the training distribution, with enough overhead views."""

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    return Cameras(
        azimuth=uniform(-180, 180),
        elevation=uniform(-10, 80),
        distance=uniform(2.1, 2.7),
        fov=uniform(45, 55),
    )


@torch.no_grad()
def layers(
    name: str, cameras: Cameras, size: int = SIZE, supersample: int = 2
) -> Float[Tensor, "views layers size size"]:
    """The layers of `CHANNELS`, from 0 to 1.

    Args:
        name: A key of `OBJECTS`.
        cameras: The views, on the device that renders.
        size: Width and height in pixels.
        supersample: Rays per pixel and direction.
    """
    thing = OBJECTS[name]
    surface = find_surface(thing, cameras, size * supersample)
    piece = thing.distances(surface.points).argmin(-1)
    body = (piece == 0)[:, None]
    palette = surface.points.new_tensor([(0, 0, 0), *(c for _, c in thing.parts)])
    marks = [
        FINISHES[finish](surface.points)[:, None] & body
        for finish in ("striped", "spotted")
    ]
    values = [surface.shade * where for where in (body, *marks)]
    values += [surface.shade * palette[piece], torch.ones_like(surface.shade)]
    values += [(surface.normals + 1) / 2]
    return surface.pixels(torch.cat(values, -1), supersample)


def paint(
    layers: Float[Tensor, "views layers size size"],
    colour: Float[Tensor, "views 3"],
    second: Float[Tensor, "views 3"],
    finish: Int[Tensor, " views"],
) -> Float[Tensor, "views 3 size size"]:
    """Colour times coverage of painted layers, from 0 to 1.

    Args:
        layers: The result of `layers`.
        colour: Colours of the body.
        second: Colours of stripes or spots; no effect on plain objects.
        finish: Index of the finish in `FINISHES`.
    """
    # Indexed by the finish: no marks on a plain body, else its stripes or its spots.
    marked = torch.cat([torch.zeros_like(layers[:, :1]), layers[:, 1:3]], 1)
    marked = marked[torch.arange(len(layers), device=layers.device), finish][:, None]
    body = layers[:, :1] - marked
    return (
        body * colour[:, :, None, None]
        + marked * second[:, :, None, None]
        + layers[:, 3:6]
    )


@dataclass(frozen=True)
class ViewSet:
    """Stored views of every object.

    Attributes:
        shards: Layers as bytes, arrays (or tensors) of shape ``(views, layers, size,
            size)``. Within a shard, views are ordered by object.
        cameras: Azimuth, elevation, distance and field of view, shape ``(all views,
            4)``.
    """

    shards: tuple[np.ndarray | Tensor, ...]
    cameras: Float[Tensor, "views 4"]

    def __len__(self) -> int:
        return len(self.cameras)

    @property
    def size(self) -> int:
        """Width and height in pixels."""
        return self.shards[0].shape[-1]

    def objects(self, index: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
        """Index of the object in each view."""
        per_shard = len(self.shards[0])
        return index % per_shard // (per_shard // len(OBJECTS))

    def other_views(
        self, index: Int[Tensor, " n"], generator: torch.Generator
    ) -> Int[Tensor, " n"]:
        """For each view a random view of the same object, possibly itself."""
        per_shard = len(self.shards[0])
        per_object = per_shard // len(OBJECTS)
        shard = torch.randint(len(self.shards), index.shape, generator=generator)
        place = torch.randint(per_object, index.shape, generator=generator)
        return shard * per_shard + self.objects(index) * per_object + place

    def layers(self, index: Int[Tensor, " n"]) -> Float[Tensor, "n layers size size"]:
        """Layers of some views, from 0 to 1."""
        per_shard = len(self.shards[0])
        rows = [self.shards[i // per_shard][i % per_shard] for i in index.tolist()]
        stacked = torch.stack(
            [
                torch.as_tensor(np.array(row)) if isinstance(row, np.ndarray) else row
                for row in rows
            ]
        )
        return stacked.float() / 255

    def to(self, device: torch.device) -> ViewSet:
        """The set with its layers on a device."""
        moved = (
            torch.as_tensor(np.array(s)).to(device)
            if isinstance(s, np.ndarray)
            else s.to(device)
            for s in self.shards
        )
        return ViewSet(tuple(moved), self.cameras)


def build_shard(
    shard: int,
    per_object: int = PER_OBJECT,
    size: int = SIZE,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Render one shard; the same seed gives the same bytes on the same machine.

    Returns:
        Layers as bytes, on the device, and cameras, on the CPU.
    """
    random = StepRandom(seed)
    rendered: list[Tensor] = []
    cameras: list[Tensor] = []
    for name in tqdm(OBJECTS, desc=f"shard {shard}", unit="object"):
        chosen = random_cameras(per_object, random.generator(shard, f"views {name}"))
        numbers = (chosen.azimuth, chosen.elevation, chosen.distance, chosen.fov)
        cameras.append(torch.stack(numbers, -1))
        # On a CPU few views at a time: the intermediate tensors then stay in its cache.
        together = 8 if torch.device(device).type == "cpu" else per_object
        for part in cameras[-1].to(device).split(together):
            values = layers(name, Cameras(*part.unbind(-1)), size)
            rendered.append((values * 255).round().to(torch.uint8))
    return torch.cat(rendered), torch.cat(cameras)


def render_shards(folder: Path, shards: int, per_object: int = PER_OBJECT) -> None:
    """Render the shards missing from a folder, one file after another."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        if _file(folder, "layers", shard).exists():
            continue
        values, cameras = build_shard(shard, per_object)
        _write(_file(folder, "cameras", shard), cameras.numpy())
        _write(_file(folder, "layers", shard), values.numpy())


def open_shards(folder: Path) -> ViewSet:
    """The shards of a folder, read from disk on demand.

    Raises:
        ValueError: There are no shards.
    """
    files = sorted(folder.glob("layers-*.npy"))
    if not files:
        raise ValueError(
            f"`{folder}` holds no views. Render them with `python -m systems.toybox "
            "views`."
        )
    shards = tuple(np.load(file, mmap_mode="r") for file in files)
    cameras = [
        np.load(file.with_name(file.name.replace("layers", "cameras")))
        for file in files
    ]
    return ViewSet(shards, torch.from_numpy(np.concatenate(cameras)))


def _file(folder: Path, kind: str, shard: int) -> Path:
    return folder / f"{kind}-{shard:03d}.npy"


def _write(path: Path, values: np.ndarray) -> None:
    part = path.with_suffix(".part")
    with open(part, "wb") as file:
        np.save(file, values)
    os.replace(part, path)
