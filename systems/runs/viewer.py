"""One HTML file that shows a run's object: interactive mesh, video and figures.

The file is self-contained, so it opens from a disk, from a mail or offline. It draws
`mesh.glb` as it was written, not another copy.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

from systems import artefacts
from systems.files import written

TEMPLATE = Path(__file__).with_name("viewer.html")
NAME = "viewer.html"

ROWS = (
    ("Steps", "steps", "{}"),
    ("Iterations", "iterations", "{}"),
    ("Evaluations", "evaluations", "{}"),
    ("Solving, seconds", "solving_seconds", "{:.1f}"),
    ("PSNR, dB", "quality.psnr", "{:.1f}"),
    ("SSIM", "quality.ssim", "{:.2f}"),
    ("IoU of the silhouettes", "quality.iou", "{:.2f}"),
    ("Right colour", "quality.right_colour", "{:.0%}"),
    ("Right object", "quality.right_object", "{:.0%}"),
    ("CLIP score", "quality.clip_score", "{:.1f}"),
    ("R-precision", "quality.r_precision", "{:.0%}"),
    ("3D IoU of the mesh", "mesh_quality.iou_3d", "{:.2f}"),
    ("Chamfer distance", "mesh_quality.chamfer", "{:.3f}"),
    ("Normal error", "mesh_quality.normal_error", "{:.0f}°"),
    ("Bodies", "mesh_quality.bodies", "{}"),
    ("Faces", "mesh_quality.faces", "{}"),
    ("Volume", "mesh_quality.volume", "{:.3f}"),
    ("Density at the surface", "mesh_quality.level", "{:.2f}"),
)
"""Title, where in the report, and how it is written; what is not there is left out."""


def add(folder: Path, report: dict[str, Any], title: str) -> None:
    """Write the viewer of a run whose folder has a mesh, and report it.

    Args:
        folder: Run folder with ``mesh.glb``, and optionally a video and a preview.
        report: Report of the run; receives ``viewer``.
        title: Title of the result.
    """
    failed = isinstance(report.get("mesh"), str)  # then the file is an older one
    if (folder / "mesh.glb").exists() and not failed:
        artefacts.attempt(report, "viewer", lambda: write(folder, report, title))


def write(folder: Path, report: Mapping[str, Any], title: str) -> str:
    """Write ``viewer.html``; returns its name.

    Args:
        folder: As for `add`.
        report: Report of the run.
        title: Title of the result.

    Raises:
        OSError: There is no mesh, or the file cannot be written.
    """
    command = folder / "command.txt"
    text = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=html.escape(title),
        prompt=html.escape(title),
        subtitle=html.escape(f"{folder.parent.name}/{folder.name}"),
        file=html.escape(f"{folder.name.partition('@')[0]}.glb"),
        still=_image(folder / "preview.png"),
        video=_video(folder / "turntable.mp4"),
        figures=_figures(report),
        failures=_failures(report),
        command=html.escape(
            command.read_text(encoding="utf-8").strip() if command.exists() else ""
        ),
        glb=_base64(folder / "mesh.glb"),
    )
    with written(folder / NAME) as part:
        part.write_text(text, encoding="utf-8")
    return NAME


def _figures(report: Mapping[str, Any]) -> str:
    rows = []
    for title, where, form in ROWS:
        value: Any = report
        for key in where.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is not None:
            rows.append(f"<tr><th>{title}</th><td>{form.format(value)}</td></tr>")
    return "\n".join(rows)


def _failures(report: Mapping[str, Any]) -> str:
    lines = artefacts.failures(dict(report))
    return "\n".join(f'<p class="soft">{html.escape(line)}</p>' for line in lines)


def _image(path: Path) -> str:
    if not path.exists():
        return ""
    source = f"data:image/png;base64,{_base64(path)}"
    return f'<img alt="The volume, and the mesh below it" src="{source}">'


def _video(path: Path) -> str:
    if not path.exists():
        return ""
    return (
        "<figure><video autoplay loop muted playsinline controls "
        f'src="data:video/mp4;base64,{_base64(path)}"></video>'
        "<figcaption>The volume, all around</figcaption></figure>"
    )


def _base64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()
