"""A browser for the tests of pages."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest


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
