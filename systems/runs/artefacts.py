"""What is made of a state, each by itself: one that fails does not cost the others."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import dreampropeller as dp
from systems import quality
from systems.base import System
from systems.images import check_ffmpeg, save_film, save_picture
from systems.runs.recorder import PREVIEW_VIEWS
from systems.scene.isosurface import EmptySurface
from systems.scene.zbuffer import render_mesh
from systems.toybox.truth import Truth

FAILED, NONE = "failed: ", "none: "
"""How the line of an artefact that is not there begins."""

_log = logging.getLogger(__name__)


def attempt(report: dict[str, Any], name: str, make: Callable[[], Any]) -> Any:
    """Make an artefact and report it; a failure is reported, not raised.

    Args:
        report: Gets under `name` what `make` returns, or a line that says why not.
        name: Of the artefact.
        make: Makes it.

    Returns:
        What `make` returned, or None.
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
    """The lines of artefacts that are not there."""
    return [
        f"{name.replace('_', ' ').capitalize()} {line}"
        for name, line in report.items()
        if isinstance(line, str) and line.startswith((FAILED, NONE))
    ]


def turntable(folder: Path, system: System, y: dp.State) -> str:
    """Write the video; returns its name."""
    check_ffmpeg()
    total = system.cameras.n_test_views
    frames = system.turntable(y)
    bar = tqdm(frames, total=total, desc="turntable", unit="frame", leave=False)
    save_film(bar, folder / "turntable.mp4")
    return "turntable.mp4"


def preview(folder: Path, system: System, y: dp.State, mesh: Any | None) -> str:
    """Write the volume's views and, below them, the mesh's; returns the file's name."""
    views = system.cameras.turntable(PREVIEW_VIEWS)
    rows = [torch.stack(list(system.turntable(y, PREVIEW_VIEWS)))]
    if mesh is not None:
        rows.append(render_mesh(mesh, views)[0])
    save_picture(torch.cat(rows), folder / "preview.png", PREVIEW_VIEWS)
    return "preview.png"


def judge(
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

    def write() -> str:
        both = torch.cat([measured.pictures, measured.wanted])
        large = both.repeat_interleave(4, -1).repeat_interleave(4, -2)
        save_picture(large, folder / "truth.png", quality.NUM_VIEWS)
        return "truth.png"

    attempt(report, "truth", write)
