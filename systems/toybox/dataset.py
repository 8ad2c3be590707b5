"""The training set: renders without background, as bytes, from a fixed seed.

Backgrounds are composed when a batch is drawn, so that a sample never repeats exactly.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from dreampropeller import StepRandom
from systems.scene.cameras import Cameras
from systems.toybox.captions import HELD_OUT, VIEWS, caption, view_of
from systems.toybox.objects import COLOURS, OBJECTS
from systems.toybox.render import render

_Label: TypeAlias = tuple[int, int, int]
"""Number of the object, number of the colour, 1 for a normal map."""


@dataclass(frozen=True)
class Dataset:
    """Renders of every trained pair.

    Attributes:
        rgba: Colour times coverage, and coverage, uint8, shape ``(samples, 4, h, w)``.
        labels: Object number, colour number, view number, and 1 for a normal map,
            uint8, shape ``(samples, 4)``.
    """

    rgba: Tensor
    labels: Tensor

    def fingerprint(self) -> str:
        """SHA-256 of all bytes."""
        digest = hashlib.sha256(self.rgba.numpy().tobytes())
        digest.update(self.labels.numpy().tobytes())
        return digest.hexdigest()

    def save(self, path: Path) -> None:
        """Write it as safetensors."""
        save_file({"rgba": self.rgba, "labels": self.labels}, path)

    @classmethod
    def load(cls, path: Path) -> Dataset:
        """Read what `save` wrote."""
        with safe_open(path, framework="pt") as file:
            return cls(file.get_tensor("rgba"), file.get_tensor("labels"))


def random_cameras(count: int, generator: torch.Generator) -> Cameras:
    """Cameras of the training distribution; overhead ones are not left rare."""

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    return Cameras(
        azimuth=uniform(-180, 180),
        elevation=uniform(-10, 80),
        distance=uniform(2.1, 2.7),
        fov=uniform(45, 55),
    )


def build(
    samples: int,
    normals: int,
    size: int = 32,
    seed: int = 0,
    skip: Collection[tuple[str, str]] = HELD_OUT,
) -> Dataset:
    """Render the training set.

    Args:
        samples: Renders of each trained pair of colour and object.
        normals: Normal maps of each object.
        size: Width and height in pixels.
        seed: Same seed, same bytes (on the same machine and versions).
        skip: Pairs of colour and object that are not rendered. A judge, unlike the
            prior, must have seen every pair: it passes none.
    """
    random = StepRandom(seed)
    rgba: list[Tensor] = []
    labels: list[Tensor] = []

    def add(picture: Tensor, mask: Tensor, cameras: Cameras, label: _Label) -> None:
        stacked = torch.cat([picture, mask], 1).contiguous()
        rgba.append((stacked * 255).round().to(torch.uint8))
        angles = zip(cameras.azimuth.tolist(), cameras.elevation.tolist(), strict=True)
        number, colour_number, is_normal = label
        labels.extend(
            torch.tensor([number, colour_number, VIEWS.index(view_of(*a)), is_normal])
            for a in angles
        )

    for number, name in enumerate(tqdm(OBJECTS, desc="rendering", unit="object")):
        for colour_number, colour in enumerate(COLOURS):
            if (colour, name) in skip:
                continue
            cameras = random_cameras(samples, random.generator(0, f"{colour} {name}"))
            picture = render(name, colour, cameras, size)
            add(picture.rgb, picture.mask, cameras, (number, colour_number, 0))
        if not normals:
            continue
        cameras = random_cameras(normals, random.generator(0, f"normal {name}"))
        picture = render(name, next(iter(COLOURS)), cameras, size)
        normal = (picture.normal + picture.mask) / 2
        # A normal map has no colour: number 0 stands for none.
        add(normal, picture.mask, cameras, (number, 0, 1))
    return Dataset(torch.cat(rgba), torch.stack(labels).to(torch.uint8))


def batch(
    dataset: Dataset, size: int, generator: torch.Generator
) -> tuple[Tensor, list[str]]:
    """Draw pictures over random plain backgrounds, and captions with gaps.

    Returns:
        Pictures from −1 to 1, shape ``(size, 3, h, w)``, and their captions; one in
        ten is empty, for classifier-free guidance.
    """
    index = torch.randint(len(dataset.rgba), (size,), generator=generator)
    pictures = compose(dataset.rgba[index], generator)
    chance = torch.rand(size, 3, generator=generator).tolist()
    captions = [
        _spell(label, dice)
        for label, dice in zip(dataset.labels[index].tolist(), chance, strict=True)
    ]
    return pictures, captions


def compose(rgba: Tensor, generator: torch.Generator) -> Tensor:
    """Put renders over random plain backgrounds, more often grey than coloured.

    Returns:
        Pictures from −1 to 1, shape ``(samples, 3, h, w)``.
    """
    count = len(rgba)
    values = rgba.float() / 255
    grey = torch.rand(count, 1, generator=generator).expand(count, 3)
    colour = torch.rand(count, 3, generator=generator)
    plain = torch.where(torch.rand(count, 1, generator=generator) < 0.6, grey, colour)
    return (values[:, :3] + (1 - values[:, 3:]) * plain[:, :, None, None]) * 2 - 1


def _spell(label: list[int], dice: list[float]) -> str:
    """Caption of a sample: `dice`, uniform in 0…1, decide what is left out."""
    number, colour_number, view, is_normal = label
    if dice[0] < 0.1:
        return ""
    name = list(OBJECTS)[number]
    colours = list(COLOURS)
    colour = colours[colour_number]
    keep = dice[1] > 0.06
    if is_normal:
        # A normal map has no colour; half of the captions name one all the same, so
        # that a prompt with a colour can be asked for its normals.
        colours = [c for c in colours if (c, name) not in HELD_OUT]
        colour = colours[int(dice[1] * 2 * len(colours)) % len(colours)]
        keep = dice[1] > 0.5
    return caption(
        colour if keep else None,
        name,
        VIEWS[view] if dice[2] > 0.12 else None,
        bool(is_normal),
    )
