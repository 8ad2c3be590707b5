"""A reference: the object of an image file, where a model expects it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from systems.references import framing
from systems.references.cutting import CUTS, Cut, cut_out
from systems.references.reading import read_pixels
from systems.settings.checks import between, one_of

LARGEST_SIDE = 4096


@dataclass(frozen=True)
class Reference:
    """The object of an image, without background.

    Attributes:
        rgb: Straight (not premultiplied) display colours from 0 to 1, in float32; where
            alpha is 0, the nearest colour of the object, and white if there is none.
        alpha: Alpha from 0 to 1.
        notes: Sentences about what was changed and what is unsure.
    """

    rgb: Float[Tensor, "3 height width"]
    alpha: Float[Tensor, "1 height width"]
    notes: tuple[str, ...] = ()

    def over(self, colour: float | Tensor) -> Float[Tensor, "3 height width"]:
        """The image over a solid colour: a grey level, or a tensor of shape ``(3,)``.

        This is α C + (1 − α) B, in display colours as every image program has it.
        """
        background = torch.as_tensor(colour, dtype=self.rgb.dtype).expand(3)
        return self.alpha * self.rgb + (1 - self.alpha) * background[:, None, None]

    def resized(self, height: int, width: int) -> Reference:
        """The reference at another size, by area averaging of premultiplied colours.

        Where it grows, it is interpolated linearly. The own size returns the reference.
        """
        for name, value in (("height", height), ("width", width)):
            between(name, value, 1, LARGEST_SIDE)
        rows, columns = self.rgb.shape[1:]
        if (rows, columns) == (height, width):
            return self
        values = torch.cat([self.rgb * self.alpha, self.alpha]).permute(1, 2, 0).numpy()
        box = (0, 0, columns, rows)
        return _reference(framing.resample(values, box, height, width), self.notes)


def _reference(premultiplied: np.ndarray, notes: tuple[str, ...]) -> Reference:
    """A reference of premultiplied values ``(height, width, 4)``."""
    rgb, alpha = framing.straight(premultiplied)
    colours = torch.from_numpy(np.ascontiguousarray(rgb.transpose(2, 0, 1)))
    return Reference(colours, torch.from_numpy(alpha)[None], notes)


def read_reference(
    path: str | Path,
    side: int = 512,
    cut: str = "auto",
    recentre: bool | str = "auto",
    fill: float = 0.8,
) -> Reference:
    """Read the object of an image file; the same file gives the same bits.

    Args:
        path: PNG, JPEG or WebP file.
        side: Pixels along each side of the result.
        cut: How the object is separated: "alpha" (of the file), "rembg", "background"
            (a plain one), "none" (the whole image is the object), or "auto", the first
            of these that works, without "none".
        recentre: Whether the object is moved to the centre and scaled. "auto" does so
            unless `cut` is "none", or the image is square with an alpha of its own
            whose object does not touch the border: a render whose framing is known.
            What is not recentred fits the square, padded with transparency.
        fill: Fraction of the side that a recentred object's longer side takes.

    Raises:
        ValueError: The file or a setting cannot be used; the message says what to do.
    """
    one_of("cut", cut, CUTS)
    between("side", side, 16, LARGEST_SIDE)
    between("fill", fill, 0.1, 1)
    if recentre not in (True, False, "auto"):
        raise ValueError(f"`recentre` is `{recentre}`: write true, false or auto.")
    path = Path(path)
    pixels = read_pixels(path, limit=max(2048, 4 * side))
    found = cut_out(pixels, cut, path)
    box, said = _framed(found, path, cut, recentre, fill)
    values = np.dstack([found.rgb * found.alpha[..., None], found.alpha])
    notes = (*pixels.notes, *found.notes, *said)
    return _reference(framing.resample(values, box, side, side), notes)


def _framed(
    found: Cut, path: Path, cut: str, recentre: bool | str, fill: float
) -> tuple[framing.Box, list[str]]:
    """The square of the image that is taken, and what there is to say about it."""
    height, width = found.alpha.shape
    box = framing.bounding_box(found.alpha)
    assert box is not None, "a cut has an object"
    longer = max(box[2] - box[0], box[3] - box[1])
    if longer < framing.SMALLEST_OBJECT:
        raise ValueError(
            f"The object of `{path}` is {longer} pixel(s) across, too few to show "
            f"anything: take an image whose object has at least "
            f"{framing.SMALLEST_OBJECT} pixels, better 400."
        )
    edges = [] if cut == "none" else framing.touched(box, height, width)
    notes = []
    if edges:
        notes.append(
            f"The object is cut off at the image's border ({', '.join(edges)}): what "
            "lies beyond it is treated as empty."
        )
    if recentre == "auto":
        framed = found.own and height == width and not edges
        recentre = not (framed or cut == "none")
    if not recentre:
        if height != width:
            notes.append(f"{width} × {height} pixels were padded to a square.")
        square = framing.square_around((0, 0, width, height), 1)
    else:
        square = framing.square_around(box, fill)
        notes.append(
            f"Recentred: the object's {box[2] - box[0]} × {box[3] - box[1]} pixels "
            f"fill {fill:.0%} of the side."
        )
    if longer < 64:
        notes.append(
            f"The object is only {longer} pixels across: a larger image would show "
            "details."
        )
    return square, notes
