"""Image files of strangers as upright arrays of display colours.

PNG, JPEG and WebP only, by content. The sizes of file and image are checked before
anything is decoded; the first frame of an animation is taken.
"""

from __future__ import annotations

import difflib
import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from systems.images import opened
from systems.references.framing import straight, weights

if TYPE_CHECKING:
    from PIL import Image

LARGEST_FILE = 2**29
"""Bytes of a file that is read: as many as the largest image has uncompressed."""
LARGEST_PROFILE = 2**22
"""Bytes of a colour profile that is used."""
SMALLEST_SIDE = 16
"""Pixels along the shorter side of an image that is accepted."""
ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
WAY_OUT = "convert it to PNG, JPEG or WebP"

SIGNATURES: dict[bytes, str] = {
    b"GIF8": "a GIF image",
    b"BM": "a BMP image",
    b"II*\0": "a TIFF or raw camera image",
    b"MM\0*": "a TIFF or raw camera image",
    b"8BPS": "a Photoshop document",
    b"%PDF": "a PDF document",
    b"\0\0\1\0": "an icon",
    b"\xff\x0a": "a JPEG XL image",
    b"\0\0\0\x0cJXL ": "a JPEG XL image",
    b"\0\0\0\x0cjP  ": "a JPEG 2000 image",
    b"v/1\x01": "an OpenEXR image",
    b"#?RADIANCE": "a Radiance HDR image",
    b"PK\3\4": "a zip archive",
    b"version https://git-lfs": "a Git LFS pointer (run `git lfs pull`)",
}
"""First bytes of files that are not read, and what they are."""
BRANDS = {b"avif": "an AVIF image", b"avis": "an AVIF image", b"qt  ": "a video"}

UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a[::-1].swapaxes(0, 1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: a[:, ::-1].swapaxes(0, 1),
}
"""What undoes each orientation of EXIF (tag 274)."""


@dataclass(frozen=True)
class Pixels:
    """A decoded image.

    Attributes:
        rgb: Straight display colours from 0 to 1, shape ``(height, width, 3)``.
        alpha: Alpha from 0 to 1, shape ``(height, width)``; None: the file has none.
        notes: Sentences about what was changed.
    """

    rgb: np.ndarray
    alpha: np.ndarray | None
    notes: tuple[str, ...] = ()


def read_pixels(path: Path, limit: int = 2048) -> Pixels:
    """Read an image file.

    Args:
        path: PNG, JPEG or WebP file.
        limit: Pixels along the longer side of the result; larger images are averaged
            down to it.

    Raises:
        ValueError: The file cannot be used; the message says what to do.
    """
    _check_file(path)
    notes: list[str] = []
    with opened(path) as image:
        size = image.size
        if small := min(size) < SMALLEST_SIDE:
            values, turn = np.empty((0, 0, 3), np.uint8), None
        else:
            values, turn = _decoded(image, notes)
    if small:
        raise ValueError(
            f"`{path}` has {size[0]} × {size[1]} pixels, which show no object: take an "
            f"image of at least {SMALLEST_SIDE} × {SMALLEST_SIDE} pixels, better 512."
        )
    if turn:
        values = UPRIGHT[turn](values)
        notes.append(f"`{path.name}` was turned upright (EXIF orientation {turn}).")
    if max(size) > limit:
        reduced = _reduced(values, limit)
        rgb, alpha = straight(reduced)
        height, width = alpha.shape
        notes.append(
            f"`{path.name}` was reduced from {values.shape[1]} × {values.shape[0]} to "
            f"{width} × {height} pixels."
        )
        return Pixels(rgb, alpha if values.shape[2] == 4 else None, tuple(notes))
    scaled = values.astype(np.float32) / np.iinfo(values.dtype).max
    alpha = scaled[..., 3] if scaled.shape[2] == 4 else None
    return Pixels(scaled[..., :3], alpha, tuple(notes))


def _check_file(path: Path) -> None:
    """Refuse what is no file, or no image that is read here."""
    try:
        is_file, is_folder = path.is_file(), path.is_dir()
        size = path.stat().st_size if is_file else 0
        head = b""
        if is_file:
            with open(path, "rb") as file:
                head = file.read(1024)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(
            f"`{str(path)[:200]}` cannot be opened ({reason}): write the path of a "
            "PNG, JPEG or WebP file."
        ) from error
    if is_folder:
        raise ValueError(f"`{path}` is a folder: {_images_in(path)}.")
    if not is_file:
        near = difflib.get_close_matches(path.name, _names(path.parent), 1, 0.5)
        hint = (
            f"did you mean `{path.parent / near[0]}`?"
            if near
            else f"{_images_in(path.parent)}."
        )
        raise ValueError(f"There is no image `{path}`: {hint}")
    if not size:
        raise ValueError(f"`{path}` is empty: copy or save the image again.")
    if size > LARGEST_FILE:
        raise ValueError(
            f"`{path}` has {size:,} bytes, and at most {LARGEST_FILE:,} are read: "
            "scale the image down first."
        )
    if kind := _foreign(head):
        raise ValueError(f"`{path}` is {kind}, which is not read here: {WAY_OUT}.")


def _names(folder: Path) -> list[str]:
    """Names of the image files in a folder."""
    try:
        return sorted(p.name for p in folder.iterdir() if p.suffix.lower() in ENDINGS)
    except OSError:
        return []


def _images_in(folder: Path) -> str:
    """Which files of a folder can be named instead."""
    names = [f"`{folder / name}`" for name in _names(folder)[:4]]
    if names:
        return f"write the path of an image, such as {' or '.join(names)}"
    return "write the path of a PNG, JPEG or WebP file"


def _foreign(head: bytes) -> str:
    """What a file is, if its first bytes are those of something that is not read."""
    for start, kind in SIGNATURES.items():
        if head.startswith(start):
            return kind
    if head[4:8] == b"ftyp":
        heif = head[8:12] in (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1")
        return BRANDS.get(head[8:12], "a HEIC image" if heif else "a video")
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if b"<svg" in text and text.startswith((b"<svg", b"<?xml", b"<!")):
        return "an SVG drawing"
    if text.startswith((b"<!doctype html", b"<html")):
        return "a web page (download the image itself)"
    try:
        is_text = head.decode("utf-8").isprintable() or b"\n" in head
    except UnicodeDecodeError:
        return ""
    return "text" if is_text and b"\0" not in head else ""


def _decoded(image: Image.Image, notes: list[str]) -> tuple[np.ndarray, int | None]:
    """Integer values ``(height, width, 3 or 4)`` and the EXIF orientation, if any."""
    if getattr(image, "n_frames", 1) > 1:
        notes.append(f"Animated: the first of {image.n_frames} frames is taken.")  # pyright: ignore[reportAttributeAccessIssue]
    try:
        turn = image.getexif().get(274)
    except Exception:  # damaged metadata does not make an image unusable
        turn = None
    turn = turn if turn in UPRIGHT else None
    if image.mode.startswith("I"):  # grey, 16 bits
        grey = np.asarray(image).astype(np.uint16)[..., None]
        key = image.info.get("transparency")
        channels = [grey] * 3
        if key is not None:
            channels.append(np.where(grey == key, 0, 65535).astype(np.uint16))
        return np.concatenate(channels, -1), turn
    image.load()
    key = image.info.get("transparency")
    if isinstance(key, tuple) and max(key) > 255:  # 16 bits, of which 8 are decoded
        image.info["transparency"] = tuple(value >> 8 for value in key)
    if not image.has_transparency_data:
        return np.asarray(_to_srgb(image, notes)), turn
    whole = image.convert("RGBA")
    profile = image.info.get("icc_profile")
    coloured = profile and image.mode in ("P", "RGB", "RGBA")
    whole.info = {"icc_profile": profile} if coloured else {}
    rgb, alpha = _to_srgb(whole.convert("RGB"), notes), whole.getchannel("A")
    return np.dstack([np.asarray(rgb), np.asarray(alpha)]), turn


def _to_srgb(image: Image.Image, notes: list[str]) -> Image.Image:
    """An image without alpha as sRGB, by the colour profile of its file."""
    profile = image.info.get("icc_profile")
    if image.mode not in ("L", "RGB", "CMYK") or not profile:
        return image.convert("RGB")
    try:
        from PIL import ImageCms

        if len(profile) > LARGEST_PROFILE:
            raise ValueError("too large")
        source: Any = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        name = ImageCms.getProfileDescription(source).strip()
        if "srgb" in name.lower():
            return image.convert("RGB")
        target: Any = ImageCms.createProfile("sRGB")
        found: Any = ImageCms.profileToProfile(image, source, target, outputMode="RGB")
    except Exception:  # a profile that is damaged, or of another colour space
        notes.append("Its colour profile cannot be used and was ignored.")
        return image.convert("RGB")
    notes.append(f"Colours were converted from `{name[:60]}` to sRGB.")
    return found


def _reduced(values: np.ndarray, limit: int) -> np.ndarray:
    """Premultiplied averages of at most `limit` rows and columns, strip by strip."""
    rows, columns, channels = values.shape
    scale = limit / max(rows, columns)
    height, width = (max(1, round(side * scale)) for side in (rows, columns))
    along = weights(rows, 0, rows, height)
    across = weights(columns, 0, columns, width)
    largest = np.iinfo(values.dtype).max
    result = np.ones((height, width, 4))
    step = max(1, math.ceil(2**22 / columns / max(1, rows / height)))
    for begin in range(0, height, step):
        part = along[begin : begin + step]
        low, high = part.indices.min(), part.indices.max() + 1
        strip = values[low:high].astype(np.float64) / largest
        strip[..., :3] *= strip[..., 3:] if channels == 4 else 1
        mean = part[:, low:high] @ strip.reshape(high - low, -1)
        mean = mean.reshape(-1, columns, channels).swapaxes(0, 1)
        small = (across @ mean.reshape(columns, -1)).reshape(width, -1, channels)
        result[begin : begin + step, :, :channels] = small.swapaxes(0, 1)
    return result
