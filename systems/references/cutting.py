"""The object of an image without its background: by alpha, by rembg, by colour."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from systems.extras import probe
from systems.references.framing import OPAQUE
from systems.references.plain import NotPlain, cut_plain
from systems.references.reading import Pixels

CUTS = ("auto", "alpha", "rembg", "background", "none")
CLEAR = 1e-3
"""Fraction of transparent pixels from which an alpha channel separates an object."""
REMBG = "u2net"
"""Model of rembg: its long-time default, with a permissive licence (Apache 2.0)."""
SAVE = "save it as PNG with a transparent background"
INSTALL = '`pip install "rembg[cpu]"`'
WHOLE = "write `data.cut=none` to take the whole image as the object"


@dataclass(frozen=True)
class Cut:
    """An object.

    Attributes:
        rgb: Straight display colours, shape ``(height, width, 3)``.
        alpha: Alpha from 0 to 1, shape ``(height, width)``.
        own: Whether the alpha is that of the file.
        notes: Sentences about what was done and what is unsure.
    """

    rgb: np.ndarray
    alpha: np.ndarray
    own: bool
    notes: tuple[str, ...] = ()


def cut_out(pixels: Pixels, cut: str, path: Path) -> Cut:
    """Separate the object from its background.

    Args:
        pixels: The image.
        cut: One of `CUTS`; "auto" takes the alpha of the file if it separates anything,
            else rembg if it is installed and works, else a plain background.
        path: Name of the file, for messages.

    Raises:
        ValueError: There is no object; the message says what to do.
    """
    if cut == "none":
        return Cut(pixels.rgb, np.ones(pixels.rgb.shape[:2], np.float32), False)
    notes: list[str] = []
    if cut in ("auto", "alpha"):
        if (reason := _useless(pixels.alpha)) is None:
            assert pixels.alpha is not None
            if not (pixels.alpha > OPAQUE).any():
                raise ValueError(
                    f"`{path}` is transparent: no pixel of it is more than "
                    f"{OPAQUE:.0%} opaque; save the image again with an opaque object."
                )
            return Cut(pixels.rgb, pixels.alpha, True)
        if cut == "alpha":
            raise ValueError(
                f"`{path}` {reason}, so it does not tell the object from the "
                f"background: {SAVE}, or write `data.cut=background`."
            )
        if pixels.alpha is not None:
            notes.append(f"`{path.name}` {reason}, which is ignored.")
    if cut in ("auto", "rembg"):
        alpha, reason = _rembg(pixels.rgb)
        if alpha is not None:
            notes.append(f"The background was cut by rembg ({REMBG}).")
            return Cut(pixels.rgb, alpha, False, tuple(notes))
        if cut == "rembg":
            raise ValueError(
                f"The background of `{path}` was not cut: {reason}; install it with "
                f"{INSTALL}, or {SAVE}."
            )
        if "not installed" not in reason:
            notes.append(f"The background was not cut by rembg: {reason}.")
    return _plain(pixels, path, notes)


def _useless(alpha: np.ndarray | None) -> str | None:
    """Why an alpha channel separates nothing; None: it does."""
    if alpha is None:
        return "has no alpha channel"
    if (alpha <= OPAQUE).mean() < CLEAR:
        how = "opaque" if alpha.min() > 254 / 255 else "almost opaque"
        return f"has an alpha channel that is {how} everywhere"
    return None


def _plain(pixels: Pixels, path: Path, notes: list[str]) -> Cut:
    """Cut from a plain background, saying what is unsure."""
    try:
        rgb, alpha, doubts = cut_plain(pixels.rgb)
    except NotPlain as error:
        said = "".join(f" {note}" for note in notes if "rembg" in note)
        raise ValueError(
            f"The object of `{path}` cannot be cut out, because {error}: {SAVE}, "
            f"install {INSTALL}, or {WHOLE}.{said}"
        ) from error
    if doubts:
        notes.append(
            f"The plain background was cut away, but this is unsure: "
            f"{'; '.join(doubts)}. Look at the reference; if it is wrong, {SAVE}."
        )
    else:
        notes.append("The plain background was cut away.")
    return Cut(rgb, alpha, False, tuple(notes))


def _rembg(rgb: np.ndarray) -> tuple[np.ndarray | None, str]:
    """Alpha by rembg, or None and the reason why there is none.

    It downloads its weights at first use, and ends the process when it is imported
    without an onnxruntime.
    """
    from PIL import Image

    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            module, reason = probe("rembg")
            if module is None:
                return None, reason.rstrip(".")
            image = Image.fromarray((rgb * 255).round().astype(np.uint8))
            session: Any = module.new_session(REMBG)
            mask: Any = module.remove(image, session=session, only_mask=True)
        alpha = np.asarray(mask.convert("L"), np.float32) / 255
    except SystemExit:
        return None, f"`rembg` has no onnxruntime ({INSTALL} brings one)"
    except Exception as error:  # no network, damaged weights, another version
        first = (str(error).splitlines() or [type(error).__name__])[0][:200]
        return None, f"`rembg` failed ({first.rstrip('.')})"
    if alpha.shape != rgb.shape[:2] or not (alpha > OPAQUE).any():
        return None, "`rembg` found no object"
    return alpha, ""
