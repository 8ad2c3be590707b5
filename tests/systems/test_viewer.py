"""`viewer.html`: complete by itself, drawn by a browser and turned by a mouse."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trimesh
from trimesh.visual import ColorVisuals

from systems.images import save_image, save_video
from systems.runs import viewer
from systems.scene.mesh_files import save_mesh, with_texture

FIGURES = {
    "steps": 200,
    "quality": {"psnr": 25.31, "iou": 0.881},
    "mesh_quality": {"iou_3d": 0.912, "chamfer": 0.0213, "bodies": 1},
}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The viewer of a box, orange in front (+x) and cyan at the back."""
    folder = tmp_path_factory.mktemp("name") / "a_<b>box@now"
    mesh = trimesh.creation.box((1.0, 1.2, 0.8))
    mesh = mesh.subdivide().subdivide()
    front = mesh.vertices[:, :1] > 0
    colours = np.where(front, [[255, 128, 0]], [[0, 200, 200]]).astype(np.uint8)
    mesh.visual = ColorVisuals(mesh, vertex_colors=colours)
    save_mesh(mesh, folder)
    grey = [torch.full((3, 32, 32), value) for value in (0.2, 0.8)]
    save_video(grey, folder / "turntable.mp4")
    save_image(torch.stack(grey), folder / "preview.png")
    (folder / "command.txt").write_text("python launch.py 'a <b> box'\n")
    report: dict[str, Any] = {**FIGURES, "truth": "failed: no <room>"}
    viewer.add(folder, report, "a <b> box")
    assert report["viewer"] == "viewer.html"
    return folder / "viewer.html"


def test_page_is_complete_and_asks_for_nothing(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = re.findall(r'(?:src|href)="([^"]{0,40})', text)
    assert len(links) >= 4
    assert all(link.startswith(("data:", "#")) for link in links)
    assert not re.search(r"\$[a-z]+\b", text)  # every placeholder is filled
    assert text.count("<script") == 1
    assert 'type="module"' not in text
    assert "<b>" not in text
    assert "python launch.py &#x27;a &lt;b&gt; box&#x27;" in text
    assert "Truth failed: no &lt;room&gt;" in text
    for shown in ("25.3", "0.88", "0.91", "0.021", "<td>1</td>"):
        assert shown in text


def test_no_mesh_no_viewer(tmp_path: Path) -> None:
    report: dict[str, Any] = {}
    viewer.add(tmp_path, report, "a box")
    assert report == {}
    assert not list(tmp_path.iterdir())


def test_a_mesh_of_before_is_not_shown_beside_new_figures(tmp_path: Path) -> None:
    save_mesh(trimesh.creation.box(), tmp_path)
    report: dict[str, Any] = {"mesh": "none: there is no surface"}
    viewer.add(tmp_path, report, "a box")
    assert not (tmp_path / "viewer.html").exists()


def test_without_video_and_preview_the_mesh_is_shown(
    page: Path, tmp_path: Path
) -> None:
    shutil.copy(page.with_name("mesh.glb"), tmp_path)
    viewer.add(tmp_path, {}, "a box")
    text = (tmp_path / "viewer.html").read_text()
    assert "<video" not in text
    assert "<img" not in text


def middle(view: Any) -> list[int]:
    """The colour drawn in the middle of the canvas."""
    return view.evaluate(
        """() => {
          const gl = canvas.getContext("webgl"), pixel = new Uint8Array(4);
          gl.readPixels(canvas.width >> 1, canvas.height >> 1, 1, 1, gl.RGBA,
                        gl.UNSIGNED_BYTE, pixel);
          return [...pixel];
        }"""
    )


def settled(view: Any) -> dict[str, str]:
    """Where the camera is, once it has drawn."""
    view.evaluate(
        "new Promise((done) => requestAnimationFrame(() => setTimeout(done)))"
    )
    return view.evaluate("({...canvas.dataset})")


@pytest.mark.browser
def test_a_texture_is_drawn_as_it_is_without_light(
    chromium: Any, tmp_path: Path
) -> None:
    corners = np.array([[0, -1, -1], [0, 1, -1], [0, 1, 1], [0, -1, 1]], float)
    faces = np.array([[0, 1, 2], [0, 2, 3]])
    uv = np.array([[0.0, 0], [1, 0], [1, 1], [0, 1]])
    shown = np.full((8, 8, 3), [0.5, 0.25, 0.02])
    save_mesh(with_texture(corners, faces, None, uv, shown), tmp_path)
    viewer.add(tmp_path, {}, "a sheet")
    view = chromium.new_page()
    said: list[str] = []
    view.on("console", lambda message: said.append(message.text))
    view.on("pageerror", lambda error: said.append(str(error)))
    view.goto((tmp_path / "viewer.html").resolve().as_uri())
    view.wait_for_function("canvas.dataset.map === '8'")
    settled(view)
    lit = middle(view)
    view.click("#unlit")
    settled(view)
    wanted = [128, 64, 5, 255]
    assert all(abs(a - b) <= 1 for a, b in zip(middle(view), wanted, strict=True))
    assert lit[0] < 128
    assert said == []
    view.close()


@pytest.mark.browser
@pytest.mark.parametrize(("width", "height"), [(1200, 900), (375, 812)])
def test_mesh_is_drawn_and_turns(
    page: Path, chromium: Any, width: int, height: int
) -> None:
    view = chromium.new_page(viewport={"width": width, "height": height})
    asked: list[str] = []
    said: list[str] = []
    view.on("request", lambda request: asked.append(request.url))
    view.on("console", lambda message: said.append(message.text))
    view.on("pageerror", lambda error: said.append(str(error)))
    view.goto(page.resolve().as_uri())
    assert [url for url in asked if not url.startswith("data:")] == [view.url]
    start = settled(view)
    assert start["faces"] == str(12 * 16)
    red, green, blue, alpha = middle(view)  # the front is orange, at full light or less
    assert alpha == 255
    assert red > 150
    assert 0.4 < green / red < 0.6
    assert blue < 10
    box = view.locator("#mesh").bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    view.mouse.move(x, y)
    view.mouse.down()
    view.mouse.move(x - 100, y + 20, steps=4)
    view.mouse.up()
    turned = settled(view)
    assert float(turned["azimuth"]) == pytest.approx(70, abs=0.5)
    assert float(turned["elevation"]) == pytest.approx(28, abs=0.5)
    view.locator("#mesh").press("ArrowLeft")
    assert float(settled(view)["azimuth"]) == pytest.approx(78, abs=0.5)
    for _ in range(13):  # round to the back
        view.locator("#mesh").press("ArrowLeft")
    settled(view)
    red, green, blue, _ = middle(view)
    assert red < 10
    assert min(green, blue) > 100
    view.mouse.wheel(0, -200)
    assert float(settled(view)["zoom"]) > 1.1
    view.locator("#mesh").dblclick()
    assert settled(view)["zoom"] == "1.000"
    view.get_by_role("button", name="Shape only").click()
    settled(view)
    grey = middle(view)[:3]
    assert max(grey) - min(grey) <= 1
    inner, outer = view.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert inner <= outer
    assert said == []
    with view.expect_download() as download:
        view.get_by_text("mesh.glb").click()
    assert Path(download.value.path()).read_bytes() == (
        page.with_name("mesh.glb").read_bytes()
    )
    view.close()


@pytest.mark.browser
def test_two_fingers_zoom_and_one_turns(page: Path, chromium: Any) -> None:
    view = chromium.new_page(viewport={"width": 375, "height": 812}, has_touch=True)
    view.goto(page.resolve().as_uri())
    settled(view)
    session = view.context.new_cdp_session(view)

    def touch(kind: str, *points: tuple[float, float]) -> None:
        session.send(
            "Input.dispatchTouchEvent",
            {"type": kind, "touchPoints": [{"x": x, "y": y} for x, y in points]},
        )

    box = view.locator("#mesh").bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    touch("touchStart", (x, y))
    touch("touchMove", (x + 50, y))
    touch("touchEnd")
    assert float(settled(view)["azimuth"]) == pytest.approx(10, abs=1)
    touch("touchStart", (x - 30, y), (x + 30, y))
    touch("touchMove", (x - 60, y), (x + 60, y))
    touch("touchEnd")
    assert float(settled(view)["zoom"]) == pytest.approx(2, abs=0.1)
    view.close()


@pytest.mark.browser
def test_without_webgl_images_are_shown(page: Path, chromium: Any) -> None:
    view = chromium.new_page()
    view.add_init_script("HTMLCanvasElement.prototype.getContext = () => null")
    view.goto(page.resolve().as_uri())
    assert view.locator("#still img").is_visible()
    assert not view.locator("#mesh").is_visible()
    assert "no WebGL" in view.locator("#hint").inner_text()
    view.close()
