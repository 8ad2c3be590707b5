"""An image becomes an object: unseen views, beside the copy of the input.

    python -m benchmarks.images --model FOLDER [--workers 2] [--logged]

Renders of toybox objects with a front, held-out combinations among them, are given
without a word about what they show; 16 other views are compared with the ground truth.
FOLDER is the second embedded prior. An interrupted benchmark resumes from its log.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from benchmarks import runs
from benchmarks.measured import (
    SEQUENTIAL,
    make_parser,
    measured,
    problem,
    publish,
)
from systems import build, quality
from systems.image_to_3d import ImageTo3D
from systems.images import to_bytes
from systems.scene.cameras import Cameras
from systems.settings.config import load
from systems.toybox import measure
from systems.toybox.truth import Truth, truth

CONFIG = "configs/zero123-toybox.yaml"
PROMPTS = (
    "a red mug",
    "a blue chair",
    "a yellow duck",
    "a green car",
    "an orange fish",
    "a purple teapot",
    "a white sailboat",
    "a red airplane",
    "a yellow mug",
    "a cyan duck",
    "a white teapot",
)
"""The last three are pairs of colour and object that the prior was not trained on."""
OTHER_LIGHT = "a yellow duck"
"""The object that is given once more, under another light."""
AZIMUTH, ELEVATION = 30.0, 20.0
"""The camera of the images, in degrees; it is none of the views that are measured."""
ROWS = {
    "window 8": ["solver.window.size=8"],
    SEQUENTIAL: ["solver.name=sequential"],
    "window 16": ["solver.window.size=16"],
}


def jobs(model: str) -> list[dict[str, Any]]:
    """All runs, those of the default first."""
    common = [f"system.guidance.pretrained_model_name_or_path={model}"]
    named = [(prompt, None) for prompt in PROMPTS]
    made = [
        _job(prompt, kind, row, [*settings, *common])
        for row, settings in ROWS.items()
        for prompt, kind in named
    ]
    lit = _job(OTHER_LIGHT, "other light", "window 8", [*ROWS["window 8"], *common])
    return [*made[: len(PROMPTS)], lit, *made[len(PROMPTS) :]]


def _job(
    prompt: str, kind: str | None, row: str, settings: list[str]
) -> dict[str, Any]:
    return {
        "config": CONFIG,
        "prompt": prompt,
        "settings": [
            f"quality.truth={prompt}",
            f"data.image={'lit ' if kind else ''}{prompt}.png",
            f"data.default_azimuth_deg={AZIMUTH}",
            f"data.default_elevation_deg={ELEVATION}",
            *settings,
        ],
        "kind": kind,
        "row": row,
        "seed": 0,
    }


def solve(to: Path, wanted: runs.Job) -> dict[str, Any]:
    """Make the image of a job, solve it, and compare unseen views."""
    image = to / "inputs" / _file(wanted)
    if not image.exists():
        draw(wanted["prompt"], image, lit=wanted["kind"] is not None)
    settings = [
        f"data.image={image}" if s.startswith("data.image=") else s
        for s in wanted["settings"]
    ]
    entry, found, y = measured({**wanted, "settings": settings}, to)
    system = build(load(wanted["config"], settings))
    assert isinstance(system, ImageTo3D)
    known = system.against_references(y)[0]
    goal = truth(wanted["prompt"])
    copied = system.references[0].resized(quality.SIZE, quality.SIZE)
    count = len(found.images)
    return {
        **entry,
        **wanted,
        "known_psnr": known["psnr"],
        "known_iou": known["iou"],
        **unseen(found.images, found.wanted, goal),
        **{
            f"copy_{name}": value
            for name, value in unseen(
                copied.over(quality.GREY).expand(count, -1, -1, -1), found.wanted, goal
            ).items()
        },
    }


def _file(wanted: runs.Job) -> str:
    (name,) = [s for s in wanted["settings"] if s.startswith("data.image=")]
    return name.partition("=")[2].replace(" ", "-")


def unseen(images: Tensor, wanted: Tensor, goal: Truth) -> dict[str, float]:
    """PSNR over the union of masks, and their IoU, in the mean over the views."""
    exact = (
        goal.render(quality.fixed_views().cameras, images.shape[-1]).mask[:, 0] > 0.5
    )
    own = [measure.mask(image) for image in images]
    psnr = [
        measure.masked_psnr(a, b, m | n)
        for a, b, m, n in zip(images, wanted, own, exact, strict=True)
    ]
    overlap = [measure.mask_iou(m, n) for m, n in zip(own, exact, strict=True)]
    return {
        "union_psnr": round(sum(psnr) / len(psnr), 4),
        "mask_iou": round(sum(overlap) / len(overlap), 4),
    }


def draw(prompt: str, path: Path, lit: bool, size: int = 256) -> None:
    """Write the image of an object, with alpha.

    Args:
        prompt: Prompt of the object.
        path: File to write.
        lit: Under a lamp from the left, over a cluttered background that the alpha
            channel cuts away.
        size: Width and height in pixels.
    """
    angles = (AZIMUTH, ELEVATION, 2.4, 50.0)
    seen = truth(prompt).render(Cameras(*(torch.tensor([a]) for a in angles)), size)
    alpha = seen.mask[0]
    rgb = seen.over(torch.zeros(3))[0] / alpha.clamp(min=1e-3)
    if lit:
        lamp = torch.nn.functional.normalize(torch.tensor([0.2, -0.8, 0.55]), dim=0)
        facing = torch.einsum("c,chw->hw", lamp, seen.normal[0]).clamp(min=0)
        rgb = rgb * (0.35 + 0.9 * facing)
        clutter = torch.rand(3, size, size, generator=torch.Generator().manual_seed(0))
        rgb = torch.where(alpha > 0, rgb, clutter)
    path.parent.mkdir(parents=True, exist_ok=True)
    rgba = torch.cat([rgb.clamp(0, 1), alpha])
    colours = to_bytes(rgba[:3])
    image = Image.fromarray(colours)
    image.putalpha(Image.fromarray((rgba[3] * 255).round().byte().numpy()))
    image.save(path)


def table(entries: list[dict[str, Any]]) -> str:
    """Means over the objects that have a sequential run, as Markdown."""
    lines = [
        "| | objects | iterations | fewer | PSNR, unseen | IoU, unseen | known view | "
        "chamfer |",
        "|---|---|---|---|---|---|---|---|",
    ]
    plain = [e for e in entries if e["kind"] is None]
    sequential = {problem(e): e for e in plain if e["row"] == SEQUENTIAL}
    for row in (SEQUENTIAL, *(r for r in ROWS if r != SEQUENTIAL)):
        found = [e for e in plain if e["row"] == row and problem(e) in sequential]
        if found:
            lines.append(_line(row, found, [sequential[problem(e)] for e in found]))
    everything = [e for e in plain if e["row"] == "window 8"]
    if everything:
        lines.append(
            f"| copy of the input | {len(everything)} | | | "
            f"{runs.mean(everything, 'copy_union_psnr'):.1f} dB | "
            f"{runs.mean(everything, 'copy_mask_iou'):.2f} | | |"
        )
    lines += [
        _line(f"{e['row']}, {e['kind']}", [e], [e])
        for e in entries
        if e["kind"] is not None
    ]
    each = [
        f"- {e['prompt']}: {e['union_psnr']:.1f} dB, IoU {e['mask_iou']:.2f} (copy "
        f"{e['copy_union_psnr']:.1f} dB, {e['copy_mask_iou']:.2f}), known view "
        f"{e['known_psnr']:.1f} dB"
        for e in everything
    ]
    return "\n".join([*lines, "", *each, "", runs.cost(entries)]) + "\n"


def _line(row: str, found: list[dict[str, Any]], beside: list[dict[str, Any]]) -> str:
    few, many = (runs.mean(some, "iterations") for some in (found, beside))
    gap = runs.mean(found, "union_psnr") - runs.mean(beside, "union_psnr")
    shapes = [e for e in found if e["chamfer"] is not None]
    chamfer = f"{runs.mean(shapes, 'chamfer'):.3f}" if shapes else ""
    return (
        f"| {row} | {len(found)} | {few:.1f} | {many / few:.2f} | "
        f"{runs.mean(found, 'union_psnr'):.2f} dB ({gap:+.2f}) | "
        f"{runs.mean(found, 'mask_iou'):.3f} | "
        f"{runs.mean(found, 'known_psnr'):.1f} dB | {chamfer} |"
    )


def main() -> None:
    """Run the missing jobs, and write table and sheet."""
    parser = make_parser(__doc__, "images")
    parser.add_argument("--model", default="toybox2", help="the second prior's folder")
    arguments = parser.parse_args()
    wanted, log = jobs(arguments.model), arguments.to / "runs.jsonl"
    if arguments.logged:
        entries = runs.logged(wanted, log, problem, SEQUENTIAL)
    else:
        how = functools.partial(solve, arguments.to)
        entries = runs.run_all(wanted, log, arguments.workers, how)
    publish(arguments, table(entries), entries, len(ROWS))


if __name__ == "__main__":
    main()
