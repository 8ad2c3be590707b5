"""The artefacts of a run: turntable, preview, quality and mesh.

They are made independently: if one fails, the others are still written, and the report
says why it failed.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

import dreampropeller as dp
from systems import quality
from systems.images import check_ffmpeg, save_image, save_video
from systems.scene.isosurface import EmptySurface
from systems.scene.mesh_files import save_mesh
from systems.scene.zbuffer import render_mesh
from systems.toybox.truth import Truth

if TYPE_CHECKING:
    from systems.base import System

FAILED, NONE = "failed: ", "none: "
"""Prefix of the line of an artefact that failed."""

_log = logging.getLogger(__name__)


def write(
    folder: Path, system: System, y: dp.State, video: bool = True, mesh: bool = True
) -> dict[str, Any]:
    """Write turntable, mesh and quality of a state; returns their report."""
    report: dict[str, Any] = {}
    wanted = quality.truth_of(system)
    from systems import exports  # which loads all renderers

    surface = attempt(report, "mesh", lambda: exports.finished(system, y))
    if not mesh:
        report.pop("mesh", None)  # it was made for the preview only
    else:
        for name, make in system.exports(folder, y).items():
            attempt(report, name, make)
    if mesh and surface is not None:
        attempt(report, "mesh", lambda: [p.name for p in save_mesh(surface, folder)])
        attempt(
            report,
            "mesh_quality",
            lambda: quality.measure_mesh(surface, wanted).figures(),
        )
    if video:
        attempt(report, "turntable", lambda: _turntable(folder, system, y))
        attempt(report, "preview", lambda: _preview(folder, system, y, surface))
        _measure(report, folder, system, y, wanted)
    return report


def attempt(report: dict[str, Any], name: str, make: Callable[[], Any]) -> Any:
    """Make an artefact and report it; a failure is reported, not raised.

    Args:
        report: Receives under `name` the result of `make`, or why it failed.
        name: Name of the artefact.
        make: Function that makes the artefact.

    Returns:
        The result of `make`, or None if it failed.
    """
    try:
        report[name] = make()
    except EmptySurface as error:
        report[name] = f"{NONE}{error}"
    except Exception as error:
        _log.debug("`%s` failed", name, exc_info=True)
        known = isinstance(error, OSError | RuntimeError | ValueError) and str(error)
        report[name] = FAILED + (str(error) if known else repr(error))
    else:
        return report[name]
    return None


def failures(report: dict[str, Any]) -> list[str]:
    """Reasons of the artefacts that failed."""
    return [
        f"{name.replace('_', ' ').capitalize()} {line}"
        for name, line in report.items()
        if isinstance(line, str) and line.startswith((FAILED, NONE))
    ]


def summary(report: dict[str, Any]) -> list[str]:
    """Quality and mesh of a report, for the terminal."""
    lines = []
    found = report.get("quality")
    if isinstance(found, dict) and "clip_score" in found:
        lines.append(
            f"CLIP score {found['clip_score']:.1f}, R-precision "
            f"{found['r_precision']:.0%} among {found['num_prompts']} prompts."
        )
    elif isinstance(found, dict):
        lines.append(
            f"Against the ground truth: PSNR {found['psnr']:.1f} dB, "
            f"SSIM {found['ssim']:.2f}, IoU {found['iou']:.2f}; "
            f"right colour in {found['right_colour']:.0%} and "
            f"right object in {found['right_object']:.0%} of the views."
        )
    elif found and not found.startswith(FAILED):
        lines.append(f"Quality {found}.")
    if isinstance(report.get("mesh_quality"), dict):
        lines.append(_describe_mesh(report["mesh_quality"]))
    return [*lines, *failures(report)]


def _notes(system: System, measured: quality.Quality) -> list[str]:
    """Notes that qualify the figures."""
    notes = []
    if system.config.quality.clip is not None:
        notes.append(
            "`quality.clip` was not used: the ground truth of this prompt is known."
        )
    blank = float((measured.wanted - quality.GREY).square().mean())
    if measured.psnr < -10 * math.log10(max(blank, 1e-12)):
        notes.append(
            "Collapsed, or not there yet: an empty image is nearer to the ground "
            "truth. Take more steps or a smaller learning rate."
        )
    return notes


def _describe_mesh(found: dict[str, Any]) -> str:
    count = found["bodies"]
    parts = [f"{found['faces']} faces in {count} {'body' if count == 1 else 'bodies'}"]
    if "iou_3d" in found:
        parts.append(f"3D IoU {found['iou_3d']:.2f}")
        parts.append(f"Chamfer distance {found['chamfer']:.3f} to the ground truth")
    if not found["watertight"]:
        parts.append("not closed")
    return f"Mesh: {', '.join(parts)}."


def _turntable(folder: Path, system: System, y: dp.State) -> str:
    check_ffmpeg()
    total = system.cameras.n_test_views
    frames = system.turntable(y)
    bar = tqdm(
        frames,
        total=total,
        desc="turntable",
        unit="frame",
        leave=False,
        disable=None,
    )
    save_video(bar, folder / "turntable.mp4")
    return "turntable.mp4"


def _preview(folder: Path, system: System, y: dp.State, mesh: Any | None) -> str:
    """Write views of the volume and, below them, of the shaded mesh."""
    rows = [system.preview(y)]
    if mesh is not None:
        views = system.cameras.turntable(len(rows[0]))
        rows.append(render_mesh(mesh, views)[0])
    save_image(torch.cat(rows), folder / "preview.png", len(rows[0]))
    return "preview.png"


def _measure(
    report: dict[str, Any],
    folder: Path,
    system: System,
    y: dp.State,
    wanted: Truth | None,
) -> None:
    """Report the figures of the object's images; write those above the ground truth."""
    if wanted is None:
        attempt(report, "quality", lambda: quality.by_clip(system, y))
        return
    measured = attempt(
        report, "quality", lambda: quality.against_truth(system, y, wanted)
    )
    if measured is None:
        return
    report["quality"] = measured.figures()
    report["notes"] = _notes(system, measured)

    def write() -> str:
        both = torch.cat([measured.images, measured.wanted])
        large = both.repeat_interleave(4, -1).repeat_interleave(4, -2)
        save_image(large, folder / "truth.png", quality.NUM_VIEWS)
        return "truth.png"

    attempt(report, "truth", write)
