"""What a 3D object leaves behind: turntable, images beside the truth, quality, mesh."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

import dreampropeller as dp
from systems import quality
from systems.images import save_film, save_picture
from systems.scene.isosurface import EmptySurface
from systems.scene.mesh_files import save_mesh

if TYPE_CHECKING:
    from systems.base import System


def write(
    folder: Path, system: System, y: dp.State, film: bool = True, mesh: bool = True
) -> dict[str, Any]:
    """Write turntable, mesh and quality of a state; returns what there is to report.

    An empty surface is reported, not raised: the rest is still of use.
    """
    report: dict[str, Any] = {}
    if film:
        frames = system.turntable(y)
        total = system.cameras.n_test_views
        bar = tqdm(frames, total=total, desc="turntable", unit="frame", leave=False)
        save_film(bar, folder / "turntable.mp4")
        report["turntable"] = "turntable.mp4"
        save_picture(system.preview(y), folder / "preview.png")
        wanted = quality.truth_of(system)
        if wanted is None:
            report["quality"] = quality.by_clip(system, y)
        else:
            measured = quality.against_truth(system, y, wanted)
            report["quality"] = measured.figures()
            report["notes"] = _notes(system, measured)
            both = torch.cat([measured.pictures, measured.wanted])
            save_picture(
                both.repeat_interleave(4, -1).repeat_interleave(4, -2),
                folder / "truth.png",
                quality.NUM_VIEWS,
            )
    if mesh:
        try:
            surface = system.mesh(y)
            report["mesh"] = [path.name for path in save_mesh(surface, folder)]
            report["faces"] = len(surface.faces)
        except EmptySurface as error:
            report["mesh"] = f"none: {error}"
    return report


def _notes(system: System, measured: quality.Quality) -> list[str]:
    """What the figures alone do not say."""
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
            f"Against the truth: PSNR {found['psnr']:.1f} dB, "
            f"SSIM {found['ssim']:.2f}, IoU {found['iou']:.2f}; "
            f"right colour in {found['right_colour']:.0%} and "
            f"right object in {found['right_object']:.0%} of the views."
        )
    elif found:
        lines.append(f"Quality {found}.")
    if isinstance(report.get("mesh"), str):
        lines.append(f"Mesh {report['mesh']}")
    return lines
