"""What the second classifier reads in an image of a toybox object.

Object, colour and finish become a caption as in the training of the priors, and the
azimuth of an object with a front is estimated. The image is shown over several greys,
whose logits and directions are averaged.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from systems.toybox.captions import Caption
from systems.toybox.classifier import Classifier
from systems.toybox.finishes import FINISHES
from systems.toybox.objects import COLOURS, OBJECTS, WITH_FRONT

GREYS = (0.1, 0.3, 0.5, 0.7, 0.9)
SHADES = torch.linspace(0.45, 1.1, 14)
"""Brightness of a surface relative to its colour."""
SURE = 0.6
"""Least probability of the object that counts as sure."""


@dataclass(frozen=True)
class Recognised:
    """An object in an image.

    Attributes:
        caption: What it is.
        azimuth: Azimuth of the camera in degrees; None for objects without a front.
        confidence: Probability of the object.
    """

    caption: Caption
    azimuth: float | None
    confidence: float

    @property
    def sure(self) -> bool:
        """Whether the object is certain."""
        return self.confidence >= SURE


@torch.no_grad()
def recognise(
    rgb: Float[Tensor, "3 size size"],
    alpha: Float[Tensor, "1 size size"],
    classifier: Classifier,
) -> Recognised:
    """Read an image.

    Args:
        rgb: Colours from 0 to 1, at the size of the second prior.
        alpha: Alpha from 0 to 1.
        classifier: The second classifier.
    """
    greys = torch.tensor(GREYS)[:, None, None, None]
    images = alpha * rgb + (1 - alpha) * greys
    objects, colours, finishes, direction = (
        head.float().log_softmax(-1).mean(0) if index < 3 else head.float().mean(0)
        for index, head in enumerate(classifier(images * 2 - 1))
    )
    name = list(OBJECTS)[int(objects.argmax())]
    colour = list(COLOURS)[int(colours.argmax())]
    finish = list(FINISHES)[int(finishes.argmax())]
    second = None if finish == "plain" else second_colour(rgb, alpha, colour)
    azimuth = None
    if name in WITH_FRONT:
        azimuth = float(torch.atan2(direction[1], direction[0]).rad2deg())
    confidence = float(objects.softmax(-1).max())
    return Recognised(Caption(name, colour, finish, second), azimuth, confidence)


def second_colour(
    rgb: Float[Tensor, "3 size size"], alpha: Float[Tensor, "1 size size"], body: str
) -> str:
    """The colour of most pixels that are not the body's, in any shade."""
    pixels = rgb[:, alpha[0] > 0.9].T
    palette = torch.tensor(list(COLOURS.values()))
    shades = (SHADES[:, None, None] * palette).flatten(0, 1)
    nearest = torch.cdist(pixels, shades).argmin(1) % len(palette)
    counts = torch.bincount(nearest, minlength=len(palette))
    counts[list(COLOURS).index(body)] = -1
    return list(COLOURS)[int(counts.argmax())]


def classifier_of(model: Path, default: Path) -> Path | None:
    """The classifier beside a model's folder, or the default one; None: neither."""
    for file in (model / "classifier" / "model.safetensors", default):
        if file.is_file():
            return file
    return None
