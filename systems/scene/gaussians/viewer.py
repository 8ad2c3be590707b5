"""A self-contained web page that shows splats as points sorted by depth.

Each splat is drawn as a disc with the mean of its scales, in its colour from the front.
"""

from __future__ import annotations

import base64
import html
from pathlib import Path

import torch

from dreampropeller.tree import State
from systems.files import written
from systems.scene.gaussians.harmonics import Y0

MOST = 200_000
"""Largest number of splats shown; of a larger scene, the most opaque ones."""


def write(path: Path, splats: State, title: str) -> None:
    """Write the page.

    Args:
        path: File name ending in ``.html``.
        splats: The parameters by name.
        title: Title of the page.
    """
    opacities = splats["opacities"].sigmoid()
    shown = opacities.argsort(descending=True, stable=True)[:MOST]
    rows = torch.cat(
        [
            splats["means"],
            (Y0 * splats["sh0"][:, 0] + 0.5).clamp(0, 1),
            opacities[:, None],
            splats["scales"].mean(-1, keepdim=True).exp(),
        ],
        -1,
    )[shown]
    data = rows.detach().float().cpu().numpy().astype("<f4").tobytes()
    reach = float(splats["means"].norm(dim=-1).quantile(0.98)) if len(rows) else 1.0
    page = (Path(__file__).parent / "viewer.html").read_text(encoding="utf-8")
    for name, text in (
        ("TITLE", html.escape(title)),
        ("COUNT", f"{len(rows):,}"),
        ("DISTANCE", f"{3 * max(reach, 1e-3):.4g}"),
        ("DATA", base64.b64encode(data).decode()),
    ):
        page = page.replace(name, text)
    with written(path) as part:
        part.write_text(page, encoding="utf-8")
