"""Pictures to disk: sheets of equal pictures, enlarged without blurring."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor


def sheet(
    pictures: Float[Tensor, "n 3 height width"], columns: int
) -> Float[Tensor, "3 sheet_height sheet_width"]:
    """Lay pictures out row by row; the last row is filled up with white."""
    missing = -len(pictures) % columns
    pictures = torch.cat([pictures, pictures.new_ones(missing, *pictures.shape[1:])])
    rows = pictures.unflatten(0, (-1, columns))
    return rows.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)


def save_sheet(
    pictures: Float[Tensor, "n 3 height width"],
    path: Path,
    columns: int = 4,
    scale: int = 1,
) -> None:
    """Write pictures as one file.

    Args:
        pictures: From 0 to 1.
        path: Its ending names the format, such as ``.png``.
        columns: Pictures in a row.
        scale: How many times each pixel is repeated, each way.

    Raises:
        ValueError: The ending names no format of pictures.
    """
    from PIL import Image

    Image.init()
    if path.suffix.lower() not in Image.EXTENSION:
        raise ValueError(
            f"`{path}` has no ending of a picture format: write `{path.stem}.png`."
        )
    values = sheet(pictures, columns)
    values = values.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(to_bytes(values)).save(path)


def to_bytes(picture: Float[Tensor, "3 height width"]) -> np.ndarray:
    """A picture from 0 to 1 as bytes, shape ``(height, width, 3)``."""
    values = picture.clamp(0, 1).mul(255).round().to(torch.uint8)
    return values.permute(1, 2, 0).contiguous().numpy()
