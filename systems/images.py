"""Image files: sheets of equally sized images, and videos."""

from __future__ import annotations

import contextlib
import shutil
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from systems.files import written

if TYPE_CHECKING:
    from PIL import Image

FRAMES_PER_SECOND = 30


def sheet(
    images: Float[Tensor, "n 3 height width"], columns: int
) -> Float[Tensor, "3 sheet_height sheet_width"]:
    """Arrange images row by row; the last row is padded with white."""
    missing = -len(images) % columns
    images = torch.cat([images, images.new_ones(missing, *images.shape[1:])])
    rows = images.unflatten(0, (-1, columns))
    return rows.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)


def save_sheet(
    images: Float[Tensor, "n 3 height width"],
    path: Path,
    columns: int = 4,
    scale: int = 1,
) -> None:
    """Write images as one sheet.

    Args:
        images: Images from 0 to 1.
        path: File whose ending names the format, such as ``.png``.
        columns: Number of images per row.
        scale: Integer magnification; each pixel is repeated so often per axis.

    Raises:
        ValueError: The ending is not that of an image format.
    """
    from PIL import Image

    Image.init()
    if path.suffix.lower() not in Image.EXTENSION:
        raise ValueError(
            f"`{path}` has no ending of an image format: write `{path.stem}.png`."
        )
    values = sheet(images, columns)
    values = values.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(to_bytes(values)).save(path)


LARGEST_IMAGE = 2**26
"""Pixels of an image that is read: 8192 × 8192."""


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """An image file of a stranger, whose size is checked before it is decoded.

    What decoding it in the body of the `with` statement raises is refused likewise.

    Raises:
        ValueError: It is no image, or has more pixels than `LARGEST_IMAGE`.
    """
    from PIL import Image

    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")  # of damaged metadata, and of sizes
            image = stack.enter_context(
                Image.open(path, formats=("PNG", "JPEG", "WEBP"))
            )
            width, height = image.size
            if width * height <= LARGEST_IMAGE:
                yield image
                return
        except FileNotFoundError:
            raise
        except Exception as error:  # whatever a damaged file raises inside Pillow
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            way_out = "write it again as PNG, JPEG or WebP"
            if isinstance(error, Image.DecompressionBombError):
                way_out = f"at most {LARGEST_IMAGE:,} pixels are read, scale it down"
            raise ValueError(
                f"`{path}` cannot be read as an image ({reason}): {way_out}."
            ) from error
    raise ValueError(
        f"`{path}` has {width} × {height} pixels: at most {LARGEST_IMAGE:,} are read. "
        "Scale it down first."
    )


def open_image(path: Path) -> Image.Image:
    """Read an image file of a stranger; see `opened`."""
    with opened(path) as image:
        return image.convert("RGBA" if image.has_transparency_data else "RGB")


def to_bytes(image: Float[Tensor, "3 height width"]) -> np.ndarray:
    """An image from 0 to 1 as bytes, shape ``(height, width, 3)``."""
    values = image.clamp(0, 1).mul(255).round().to(torch.uint8)
    return values.permute(1, 2, 0).contiguous().numpy()


def save_image(images: Tensor, path: Path, columns: int = 4) -> None:
    """Write images as one sheet, atomically: a viewer never sees a partial file."""
    with written(path) as part:
        save_sheet(images, part, columns)


class NoFFmpeg(RuntimeError):
    """Videos cannot be encoded; the message says what to install."""


def check_ffmpeg() -> None:
    """Check that videos can be encoded, before their frames are rendered.

    Raises:
        NoFFmpeg: Videos cannot be encoded.
    """
    try:
        import imageio_ffmpeg

        program = imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError) as error:
        program, reason = None, str(error).split("\n")[0].rstrip(".")
    else:
        reason = f"`{program}` is no program"
    if program is None or shutil.which(program) is None:
        raise NoFFmpeg(
            f"videos need ffmpeg, and there is none: {reason}. Install it with `pip "
            "install imageio-ffmpeg`, or name one in IMAGEIO_FFMPEG_EXE."
        )


def save_video(
    frames: Iterable[Float[Tensor, "3 height width"]],
    path: Path,
    fps: float = FRAMES_PER_SECOND,
) -> None:
    """Write frames as an mp4 that every browser plays.

    Args:
        frames: Frames from 0 to 1, with even width and height in pixels.
        path: File name ending in ``.mp4``.
        fps: Frames per second.

    Raises:
        NoFFmpeg: There is no encoder.
        OSError: The file cannot be written.
    """
    import imageio.v2 as imageio

    check_ffmpeg()
    with (
        written(path) as part,
        imageio.get_writer(
            part, fps=fps, codec="libx264", quality=8, macro_block_size=2
        ) as video,
    ):
        for frame in frames:
            video.append_data(to_bytes(frame))  # pyright: ignore[reportAttributeAccessIssue]
