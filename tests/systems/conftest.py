"""A browser for the tests of pages, and quicker measurements of meshes."""

from __future__ import annotations

import contextlib
import importlib
import shutil
from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(autouse=True, scope="session")
def _few_samples() -> None:
    """Unfinished surfaces are far from the truth: 30,000 points then take seconds."""
    with contextlib.suppress(ImportError):
        mesh: Any = importlib.import_module("systems.quality.mesh")
        mesh.SAMPLES = 3_000


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A headless Chromium that draws WebGL in software."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="`pip install playwright`"
    )
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("no `chromium` on this machine")
    software = ["--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=path, args=["--no-sandbox", *software]
        )
        yield browser
        browser.close()
