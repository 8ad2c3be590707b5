"""References: image files of any origin become objects without background."""

from __future__ import annotations

import functools
import io
import math
import os
import struct
import sys
import types
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageDraw
from torch import Tensor

from systems.extras import probe
from systems.references import Reference, read_reference
from systems.references.reading import LARGEST_FILE, UPRIGHT, read_pixels
from systems.toybox.render import Render
from systems.toybox.truth import truth, view_cameras
from tests.systems.mutation import mutated


@pytest.fixture(autouse=True)
def _no_rembg(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if rembg were not installed, unless a test puts a stub in its place."""
    monkeypatch.setitem(sys.modules, "rembg", None)
    probe.cache_clear()
    yield
    probe.cache_clear()


def gradient(size: tuple[int, int] = (64, 48), mode: str = "RGB") -> Image.Image:
    """Colours of which no two corners are alike, with an alpha for RGBA."""
    x, y = np.meshgrid(np.linspace(0, 255, size[0]), np.linspace(0, 255, size[1]))
    colours = np.stack([x, y, 255 - x, np.where(x + y > 200, 255, 0)], -1)
    return Image.fromarray(colours.round().astype(np.uint8)).convert(mode)


def disc(size: int = 64, alpha: int = 255, radius: int = 20) -> Image.Image:
    """A red disc, offset from the centre, on transparency of another colour."""
    image = Image.new("RGBA", (size, size), (0, 255, 0, 0))
    middle = size // 2 - 4
    box = [middle - radius, middle - radius, middle + radius, middle + radius]
    ImageDraw.Draw(image).ellipse(box, (200, 20, 40, alpha))
    return image


def show(image: Image.Image) -> Tensor:
    """The colours of an image over white, as every viewer composites them."""
    values = torch.from_numpy(np.asarray(image.convert("RGBA")).astype(np.float32))
    rgb, alpha = values[..., :3] / 255, values[..., 3:] / 255
    return (rgb * alpha + 1 - alpha).permute(2, 0, 1)


def same(first: Tensor, second: Tensor) -> bool:
    return torch.allclose(first, second, rtol=0, atol=1e-6)


# --- colours --------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["png", "webp"])
def test_a_render_with_its_own_alpha_keeps_every_pixel(
    ending: str, tmp_path: Path
) -> None:
    """Its framing is known: nothing moves, and the composite is exact."""
    image = disc()
    image.putpixel((30, 8), (10, 200, 30, 77))
    image.save(tmp_path / f"a.{ending}", lossless=True, exact=True)
    found = read_reference(tmp_path / f"a.{ending}", side=64)
    assert found.notes == ("The object is only 41 pixels across: " + DETAILS,)
    torch.testing.assert_close(found.over(1.0), show(image), atol=1e-6, rtol=0)
    colour = torch.tensor([0.2, 0.4, 0.6])
    alpha = torch.from_numpy(np.asarray(image)[..., 3] / np.float32(255))
    clear = found.over(colour)[:, alpha == 0]
    torch.testing.assert_close(clear, colour[:, None].expand_as(clear))
    # Where nothing is, the colour is the object's, not the file's green.
    nothing = found.rgb[:, alpha == 0].mT * 255
    torch.testing.assert_close(
        nothing, torch.tensor([200.0, 20, 40]).expand_as(nothing)
    )


DETAILS = "a larger image would show details."


@pytest.mark.parametrize("turn", [1, 2, 3, 4, 5, 6, 7, 8])
def test_an_exif_orientation_equals_the_upright_image(
    turn: int, tmp_path: Path
) -> None:
    """Against PIL's own transposition, which is not used here."""
    from PIL import ImageOps

    image = gradient()
    tags = Image.Exif()
    tags[274] = turn
    image.save(tmp_path / "turned.png", exif=tags)
    with Image.open(tmp_path / "turned.png") as stored:
        ImageOps.exif_transpose(stored).save(tmp_path / "upright.png", exif=b"")
    found = read_reference(tmp_path / "turned.png", 64, cut="none")
    expected = read_reference(tmp_path / "upright.png", 64, cut="none")
    assert torch.equal(found.over(0), expected.over(0))
    assert any("EXIF" in note for note in found.notes) is (turn in UPRIGHT)


def deep_png(values: np.ndarray) -> bytes:
    """A PNG of 16 bits per channel, which PIL cannot write."""
    height, width, channels = values.shape
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = values.astype(">u2").reshape(height, -1).view(np.uint8)
    lines = np.concatenate([np.zeros((height, 1), np.uint8), rows], 1).tobytes()

    def chunk(name: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + check

    head = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(lines))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("channels", "mode"), [(1, "L"), (2, "LA"), (3, "RGB"), (4, "RGBA")]
)
def test_16_bits_equal_8_bits(channels: int, mode: str, tmp_path: Path) -> None:
    image = gradient((48, 48), "RGBA").convert(mode)
    values = np.asarray(image).reshape(48, 48, channels).astype(np.uint16) * 257
    image.save(tmp_path / "8.png")
    (tmp_path / "16.png").write_bytes(deep_png(values + (values < 65535) * 90))
    cut = "alpha" if "A" in mode else "none"
    shallow, deep = (
        read_reference(tmp_path / f"{bits}.png", 48, cut, recentre=False)
        for bits in (8, 16)
    )
    torch.testing.assert_close(deep.over(1), shallow.over(1), atol=1 / 255, rtol=0)
    steps = deep.rgb * 255
    assert bool(((steps - steps.round()).abs() > 0.01).any()) is (mode == "L")


def palette() -> Image.Image:
    image = disc().convert("RGB").quantize(16)
    image.info["transparency"] = image.getpixel((0, 0))
    return image


MODES: dict[str, Callable[[], tuple[Image.Image, Image.Image]]] = {
    "grey": lambda: (gradient(mode="L"), gradient(mode="L")),
    "grey and alpha": lambda: (disc().convert("LA"), disc().convert("LA")),
    "1 bit": lambda: (gradient(mode="1"), gradient(mode="1")),
    "palette": lambda: (gradient().convert("P"), gradient().convert("P")),
    "palette with transparency": lambda: (palette(), disc()),
    "transparent colour": lambda: (disc().convert("RGB"), disc()),
    "transparent grey": lambda: (gradient(mode="L"), gradient(mode="L")),
}


@pytest.mark.parametrize("kind", MODES)
def test_kinds_of_png(kind: str, tmp_path: Path) -> None:
    image, expected = MODES[kind]()
    key = {"transparent colour": (0, 255, 0), "transparent grey": 1}.get(kind)
    path = tmp_path / "a.png"
    image.save(path, **({} if key is None else {"transparency": key}))
    own = expected.mode in ("LA", "RGBA")
    found = read_reference(path, 64, "alpha" if own else "none", recentre=False)
    rows = slice(None) if own else slice(8, 56)  # padded to a square
    torch.testing.assert_close(
        found.over(1)[:, rows], show(expected), atol=1e-6, rtol=0
    )
    assert torch.isfinite(found.rgb).all()


def test_cmyk_jpegs_are_read(tmp_path: Path) -> None:
    image = Image.new("CMYK", (64, 64), (0, 255, 255, 0))
    image.save(tmp_path / "a.jpg", quality=95)
    found = read_reference(tmp_path / "a.jpg", 64, "none")
    red = torch.tensor([1.0, 0, 0])[:, None, None].expand(3, 64, 64)
    torch.testing.assert_close(found.over(0), red, atol=0.02, rtol=0)


def test_colour_profiles_are_converted_or_said_to_be_ignored(tmp_path: Path) -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image = gradient((64, 64))
    for name, profile in {"none": b"", "srgb": srgb, "bad": b"no profile"}.items():
        image.save(tmp_path / f"{name}.png", icc_profile=profile)
    plain, tagged, bad = (
        read_reference(tmp_path / f"{name}.png", 64, "none")
        for name in ("none", "srgb", "bad")
    )
    assert torch.equal(plain.rgb, tagged.rgb)
    assert torch.equal(plain.rgb, bad.rgb)
    assert (plain.notes, tagged.notes) == ((), ())
    assert bad.notes == ("Its colour profile cannot be used and was ignored.",)
    # The profile with red and green exchanged, so that a conversion shows.
    swapped = srgb.replace(b"rXYZ", b"tXYZ").replace(b"gXYZ", b"rXYZ")
    swapped = swapped.replace(b"tXYZ", b"gXYZ").replace(b"s\0R\0G\0B", b"x\0R\0G\0B")
    swapped = swapped.replace(b"sRGB built-in", b"xRGB built-in")
    Image.new("RGB", (64, 64), (255, 0, 0)).save(
        tmp_path / "other.png", icc_profile=swapped
    )
    other = read_reference(tmp_path / "other.png", 64, "none")
    assert "xRGB" in other.notes[0]
    assert other.rgb.mean((1, 2)).tolist() == pytest.approx([0, 1, 0], abs=0.02)


@pytest.mark.parametrize("ending", ["png", "webp"])
def test_the_first_frame_of_an_animation_is_taken(ending: str, tmp_path: Path) -> None:
    frames = [disc(), disc(radius=5)]
    path = tmp_path / f"a.{ending}"
    frames[0].save(path, save_all=True, append_images=frames[1:], lossless=True)
    found = read_reference(path, 64)
    assert "first of 2 frames" in found.notes[0]
    torch.testing.assert_close(found.over(1), show(frames[0]), atol=1e-6, rtol=0)


def test_huge_images_are_averaged_first(tmp_path: Path) -> None:
    """3,000 pixels along one side: as the mean of the mean."""
    fine = np.zeros((300, 3000, 4), np.uint8)
    fine[50:250, 250:2750] = [240, 120, 60, 255]
    fine[50:250:2, 250:2750] = [60, 120, 240, 255]
    Image.fromarray(fine).save(tmp_path / "a.png", compress_level=1)
    pixels = read_pixels(tmp_path / "a.png")
    assert pixels.rgb.shape == (205, 2048, 3)
    found = read_reference(tmp_path / "a.png", 100, recentre=True, fill=0.5)
    assert "reduced from 3000 × 300 to 2048 × 205" in found.notes[0]
    inside = found.rgb[:, 50, 30:70]
    expected = torch.tensor([150.0, 120, 150])[:, None].expand(3, 40) / 255
    torch.testing.assert_close(inside, expected, atol=0.01, rtol=0)


# --- framing --------------------------------------------------------------------------


def test_an_object_is_recentred_and_scaled(tmp_path: Path) -> None:
    image = Image.new("RGBA", (100, 60))
    image.paste((10, 20, 30, 255), (5, 10, 45, 30))
    image.save(tmp_path / "a.png")
    found = read_reference(tmp_path / "a.png", 100, fill=0.8)
    expected = torch.zeros(100, 100)
    expected[30:70, 10:90] = 1
    assert ((found.alpha[0] > 0.5) == (expected > 0.5)).all()
    assert any("40 × 20 pixels fill 80%" in note for note in found.notes)
    larger = read_reference(tmp_path / "a.png", 100, fill=0.4)
    assert int((larger.alpha > 0.5).any(1).sum()) == 40


@pytest.mark.parametrize("recentre", [True, False, "auto"])
@pytest.mark.parametrize("cut_off", [True, False])
def test_known_framings_are_kept_and_cut_objects_named(
    recentre: bool | str, cut_off: bool, tmp_path: Path
) -> None:
    image = Image.new("RGBA", (80, 80))
    left = 0 if cut_off else 10
    image.paste((200, 20, 30, 255), (left, 20, left + 20, 40))
    image.save(tmp_path / "a.png")
    found = read_reference(tmp_path / "a.png", 80, recentre=recentre)
    moved = recentre is True or (recentre == "auto" and cut_off)
    assert same(found.over(1), show(image)) is not moved
    assert any("cut off" in n and "left" in n for n in found.notes) is cut_off


def test_a_reference_is_resized_by_premultiplied_areas() -> None:
    """By hand: a clear pixel's colour counts for nothing."""
    rgb = torch.tensor([[0.2, 0.9], [0.4, 0.6]]).expand(3, 2, 2)
    alpha = torch.tensor([[[1.0, 0.0], [1.0, 0.5]]])
    found = Reference(rgb, alpha, ("a",)).resized(1, 1)
    assert found.notes == ("a",)
    assert found.alpha.item() == pytest.approx(2.5 / 4)
    assert found.rgb[0].item() == pytest.approx((0.2 + 0.4 + 0.3) / 2.5)
    noise = torch.rand(4, 12, 9, generator=torch.Generator().manual_seed(0))
    whole = Reference(noise[:3], noise[3:])
    assert whole.resized(12, 9) is whole
    for size in ((4, 3), (5, 7), (24, 18)):  # composites keep their mean over black
        found = whole.resized(*size)
        difference = found.over(0).mean() - whole.over(0).mean()
        assert abs(difference) < (1e-6 if size != (24, 18) else 1e-2)
    averaged = torch.nn.functional.avg_pool2d(whole.over(0.3), 3)
    torch.testing.assert_close(whole.resized(4, 3).over(0.3), averaged)


# --- cutting --------------------------------------------------------------------------


@functools.cache
def rendered(prompt: str) -> Render:
    return truth(prompt).render(view_cameras(None), 256)


def save_over(path: Path, prompt: str, background: Tensor, quality: int) -> Tensor:
    """Write the render of a toybox object over a background; its true mask."""
    render = rendered(prompt)
    values = render.rgb[0] + (1 - render.mask[0]) * background
    levels = (values.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(levels).save(path, quality=quality)
    return render.mask[0, 0]


def iou(alpha: Tensor, mask: Tensor) -> float:
    a, b = alpha > 0.5, mask > 0.5
    return float((a & b).sum() / (a | b).sum())


@pytest.mark.parametrize("quality", [75, 95])
@pytest.mark.parametrize("background", ["grey", "white", "uneven"])
@pytest.mark.parametrize("prompt", ["a red mug", "a blue chair"])
def test_objects_are_cut_from_plain_backgrounds(
    prompt: str, background: str, quality: int, tmp_path: Path
) -> None:
    """JPEG over an even, a clipped, and an unevenly lit and noisy background."""
    grid = torch.linspace(-1, 1, 256)
    uneven = 0.75 + 0.1 * grid[:, None] - 0.08 * grid**2
    noise = torch.randn(3, 256, 256, generator=torch.Generator().manual_seed(0))
    plain = {"grey": torch.tensor(0.7), "white": torch.tensor(1.0)}
    colour = plain.get(background, uneven + 0.008 * noise)
    mask = save_over(tmp_path / "a.jpg", prompt, colour, quality)
    found = read_reference(tmp_path / "a.jpg", 256, recentre=False)
    assert iou(found.alpha[0], mask) >= 0.95
    assert (found.alpha[0] - mask).abs().mean() < 0.01
    assert any("plain background was cut" in note for note in found.notes)


def test_what_a_cut_cannot_know_is_said(tmp_path: Path) -> None:
    """The hole of a handle; edges of the background's colour; separate pieces."""
    save_over(tmp_path / "mug.jpg", "a red mug", torch.tensor(0.7), 90)
    save_over(tmp_path / "pale.png", "a white mushroom", torch.tensor(0.85), 90)
    two = Image.new("RGB", (96, 96), (250, 250, 250))
    two.paste((20, 60, 90), (10, 10, 40, 40))
    two.paste((90, 30, 20), (60, 60, 90, 80))
    two.save(tmp_path / "two.png")
    for name, doubt in {
        "mug.jpg": "cut out as holes",
        "pale.png": "hardly differs",
        "two.png": "2 separate pieces",
    }.items():
        notes = " ".join(read_reference(tmp_path / name, 64).notes)
        assert "unsure" in notes, name
        assert doubt in notes, name
    one = Image.new("RGB", (96, 96), (250, 250, 250))
    one.paste((20, 60, 90), (10, 10, 80, 80))
    one.save(tmp_path / "one.png")
    assert "unsure" not in " ".join(read_reference(tmp_path / "one.png", 64).notes)


def test_edges_are_unmixed_from_the_background(tmp_path: Path) -> None:
    """An anti-aliased black disc on white leaves no light seam over black."""
    image = Image.new("RGB", (512, 512), "white")
    ImageDraw.Draw(image).ellipse([100, 100, 411, 411], "black")
    image = image.resize((128, 128), Image.Resampling.BOX)
    image.save(tmp_path / "a.png")
    found = read_reference(tmp_path / "a.png", 128, recentre=False)
    assert found.over(0).max() < 0.06
    torch.testing.assert_close(found.over(1), show(image), atol=0.06, rtol=0)


@pytest.mark.parametrize(
    ("prepare", "reason"),
    [
        (lambda r: r.random((96, 96, 3)), "background is not plain"),
        (lambda r: np.kron(r.random((6, 6, 3)), np.ones((16, 16, 1))), "is not plain"),
        (lambda r: np.full((64, 64, 3), 0.5), "nothing stands out"),
        (lambda r: np.full((64, 64, 3), 0.5) + 0.02 * r.random((64, 64, 3)), "nothing"),
    ],
    ids=["noise", "clutter", "empty", "empty and noisy"],
)
def test_what_cannot_be_cut_is_refused_with_the_ways_out(
    prepare: Callable[[np.random.Generator], np.ndarray], reason: str, tmp_path: Path
) -> None:
    values = (prepare(np.random.default_rng(0)) * 255).astype(np.uint8)
    Image.fromarray(values).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=reason) as error:
        read_reference(tmp_path / "a.png")
    for way_out in ("a.png", "transparent background", "rembg[cpu]", "data.cut=none"):
        assert way_out in str(error.value)
    whole = read_reference(tmp_path / "a.png", 64, cut="none")
    assert (whole.alpha == 1).all()


class Stub(types.ModuleType):
    """A module as rembg: it takes the left half as the object."""

    def new_session(self, name: str) -> str:
        return name

    def remove(self, image: Image.Image, session: str, only_mask: bool) -> Image.Image:
        assert only_mask
        assert session == "u2net"
        mask = Image.new("L", image.size)
        mask.paste(255, (0, 0, image.size[0] // 2, image.size[1]))
        return mask


@pytest.fixture
def with_rembg(monkeypatch: pytest.MonkeyPatch) -> Stub:
    stub = Stub("rembg")
    monkeypatch.setitem(sys.modules, "rembg", stub)
    probe.cache_clear()
    return stub


@pytest.mark.parametrize("cut", ["auto", "rembg"])
def test_rembg_is_used_where_it_is_installed(
    cut: str, with_rembg: Stub, tmp_path: Path
) -> None:
    gradient((64, 64)).save(tmp_path / "a.jpg")
    found = read_reference(tmp_path / "a.jpg", 64, cut, recentre=False)
    assert (found.alpha[0, :, :32] == 1).all()
    assert (found.alpha[0, :, 32:] == 0).all()
    assert "rembg" in found.notes[0]
    disc().save(tmp_path / "own.png")  # the file's own alpha goes before
    assert same(read_reference(tmp_path / "own.png", 64).over(1), show(disc()))


def _raise(error: BaseException) -> Callable[..., Any]:
    def fails(*_: Any, **__: Any) -> Any:
        raise error

    return fails


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("new_session", _raise(ConnectionError("no route to host")), "no route"),
        ("remove", _raise(RuntimeError("bad weights\nmore")), r"\(bad weights\)"),
        ("remove", lambda *_, **__: Image.new("L", (64, 64)), "no object"),
        ("remove", lambda *_, **__: Image.new("L", (9, 9), 255), "no object"),
        ("new_session", _raise(SystemExit(1)), "no onnxruntime"),
    ],
    ids=["offline", "broken", "nothing", "wrong size", "no onnxruntime"],
)
def test_a_rembg_that_fails_is_said_and_replaced(
    name: str,
    value: Callable[..., Any],
    reason: str,
    with_rembg: Stub,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(with_rembg, name, value)
    image = Image.new("RGB", (64, 64), (250, 250, 250))
    image.paste((20, 60, 90), (10, 10, 50, 50))
    image.save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=reason):
        read_reference(tmp_path / "a.png", 64, "rembg")
    found = read_reference(tmp_path / "a.png", 64)
    assert "not cut by rembg" in found.notes[0]
    assert int((found.alpha > 0.5).sum()) == pytest.approx(51**2, rel=0.05)


# --- refusals -------------------------------------------------------------------------


def head_of_png(width: int, height: int) -> bytes:
    """The beginning of a PNG that promises an image."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    check = struct.pack(">I", zlib.crc32(head))
    body = b"IDAT" + zlib.compress(bytes(100))
    return (
        b"\x89PNG\r\n\x1a\n\0\0\0\r" + head + check
        + struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    )  # fmt: skip


def encoded(image: Image.Image, kind: str) -> bytes:
    memory = io.BytesIO()
    image.save(memory, kind)
    return memory.getvalue()


def faint(solid: int) -> Image.Image:
    image = Image.new("RGBA", (64, 64))
    for x in range(5):
        image.putpixel((10 + x, 30), (200, 0, 0, 255 if x < solid else 60))
    return image


CONVERT = "convert it to PNG, JPEG or WebP"
BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty.*again"),
    "text": (b"a mug, red\n", f"is text.*{CONVERT}"),
    "web page": (b"<!DOCTYPE html><html>", "web page.*download the image"),
    "svg": (b"<?xml version='1.0'?><svg/>", f"an SVG drawing.*{CONVERT}"),
    "heic": (b"\0\0\0\x18ftypheic" + bytes(40), f"a HEIC image.*{CONVERT}"),
    "avif": (b"\0\0\0\x18ftypavif" + bytes(40), f"an AVIF image.*{CONVERT}"),
    "gif": (encoded(gradient(mode="P"), "GIF"), f"a GIF image.*{CONVERT}"),
    "tiff": (encoded(gradient(), "TIFF"), f"a TIFF.*{CONVERT}"),
    "bmp": (encoded(gradient(), "BMP"), f"a BMP image.*{CONVERT}"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "bytes": (bytes(range(128, 256)) * 4, "cannot be read as an image.*write it again"),
    "truncated png": (
        encoded(gradient(), "PNG")[:-80],
        "cannot be read.*write it again",
    ),
    "truncated jpeg": (
        encoded(gradient((400, 300)), "JPEG")[:-900],
        "truncated.*again",
    ),
    "truncated webp": (encoded(gradient(), "WEBP")[:-60], "cannot be read.*write it"),
    "bomb": (head_of_png(30_000, 3_000), "30000 × 3000.*67,108,864.*Scale it down"),
    "larger bomb": (head_of_png(200_000, 200_000), "bomb.*67,108,864.*scale it down"),
    "one pixel": (encoded(gradient((1, 1)), "PNG"), "1 × 1 pixels.*at least 16 × 16"),
    "a line": (encoded(gradient((300, 4)), "PNG"), "300 × 4 pixels.*at least 16 × 16"),
    "transparent": (
        encoded(Image.new("RGBA", (64, 64)), "PNG"),
        "is transparent.*save",
    ),
    "faint": (encoded(faint(0), "PNG"), "is transparent: no pixel.*save the image"),
    "specks": (encoded(faint(5), "PNG"), r"5 pixel\(s\) across.*take an image"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_files_are_refused_in_one_sentence(kind: str, tmp_path: Path) -> None:
    content, message = BAD[kind]
    path = tmp_path / "mug.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_reference(path)
    assert "mug.png" in str(error.value)
    assert "\n" not in str(error.value)


def test_paths_that_are_no_images_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    with pytest.raises(ValueError, match=r"is a folder: write the path of a PNG"):
        read_reference(folder)
    disc().save(folder / "mug.png")
    with pytest.raises(ValueError, match=r"is a folder: .* such as `.*mug\.png`"):
        read_reference(folder)
    with pytest.raises(ValueError, match=r"no image `.*mgu\.png`: did you.*mug\.png`"):
        read_reference(folder / "mgu.png")
    with pytest.raises(ValueError, match=r"no image .*such as `.*mug\.png`"):
        read_reference(folder / "something-else.jpeg")
    with pytest.raises(ValueError, match=r"no image .* write the path of a PNG"):
        read_reference(tmp_path / "nowhere" / "a.png")
    for odd in ("a" * 5000, "nul\0.png"):
        with pytest.raises(ValueError, match=r"(write|did you)") as error:
            read_reference(tmp_path / odd)
        assert len(str(error.value)) < 500
    os.mkfifo(tmp_path / "pipe.png")  # reading it would wait forever
    with pytest.raises(ValueError, match="no image"):
        read_reference(tmp_path / "pipe.png")
    with open(tmp_path / "sparse.png", "wb") as file:
        file.truncate(LARGEST_FILE + 1)
    with pytest.raises(ValueError, match=r"536,870,913 bytes.*scale the image down"):
        read_reference(tmp_path / "sparse.png")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"cut": "magic"}, "`cut` is `magic`: write auto or alpha or"),
        ({"cut": "alpha"}, "no alpha channel.*cut=background"),
        ({"cut": "rembg"}, "not installed; install it with"),
        ({"side": 4}, "`side` is 4"),
        ({"fill": 0}, "`fill` is 0"),
        ({"fill": math.nan}, "`fill` is nan"),
        ({"recentre": "maybe"}, "write true, false or auto"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(
    setting: dict[str, Any], message: str, tmp_path: Path
) -> None:
    gradient().save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=message):
        read_reference(tmp_path / "a.png", **setting)


@pytest.mark.parametrize("alpha", [255, 254, 180])
def test_an_alpha_that_separates_nothing_is_ignored_and_said(
    alpha: int, tmp_path: Path
) -> None:
    image = Image.new("RGBA", (64, 64), (250, 250, 250, 255))
    image.paste((20, 60, 90, 255), (10, 10, 50, 50))
    image.putalpha(alpha)
    image.save(tmp_path / "a.png")
    found = read_reference(tmp_path / "a.png", 64, recentre=False)
    assert "opaque everywhere, which is ignored" in found.notes[0]
    assert 0.3 < found.alpha.mean() < 0.5
    with pytest.raises(ValueError, match="opaque everywhere, so it does not tell"):
        read_reference(tmp_path / "a.png", 64, "alpha")


# --- every file -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def originals() -> dict[str, bytes]:
    tags = Image.Exif()
    tags[274] = 6
    memory = io.BytesIO()
    disc(24, radius=8).save(memory, "PNG", exif=tags, icc_profile=b"x" * 200)
    return {
        "png": memory.getvalue(),
        "jpeg": encoded(gradient((24, 20)), "JPEG"),
        "webp": encoded(disc(24, radius=8), "WEBP"),
    }


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
@settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_a_mutated_image_is_read_or_refused_in_one_sentence(
    kind: str, data: st.DataObject, originals: dict[str, bytes], tmp_path: Path
) -> None:
    """The same file gives the same bits; anything else is a `ValueError`."""
    path = tmp_path / "a.png"
    path.write_bytes(mutated(originals[kind], data))
    first, refused = None, ""
    try:
        first = read_reference(path, 16)
    except ValueError as error:
        refused = str(error)
    if first is None:
        assert ("a.png" in refused, "\n" in refused) == (True, False)
        return
    second = read_reference(path, 16)
    for name in ("rgb", "alpha"):
        values = getattr(first, name)
        assert torch.equal(values, getattr(second, name))
        assert bool(((values >= 0) & (values <= 1)).all())
    assert first.notes == second.notes
