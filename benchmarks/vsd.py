"""Variational score distillation beside score distillation, and windows for both.

    python -m benchmarks.vsd [--plan sdi] [--workers 2] [--logged]

The plan `vsd`: three toybox prompts, a plain, a striped and a spotted one, with two
seeds, both guidances at scale 7.5 without rescaling. The plan `sdi`: does noise from
inversion let wider windows pass than drawn noise? Each gives a table and a contact
sheet. Every accelerated run is compared with its own sequential run. An interrupted
benchmark resumes from its log.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import runs
from benchmarks.measured import (
    SEQUENTIAL,
    entries_of,
    make_parser,
    measured,
    problem,
    publish,
)
from systems import quality
from systems.toybox.classifier import SECOND_FILE, load
from systems.toybox.finishes import FINISHES
from systems.toybox.truth import truth

DREAMFUSION = "configs/dreamfusion-toybox.yaml"
UNRESCALED = [
    "system.guidance.guidance_scale=7.5",
    "system.guidance.guidance_rescale=0.0",
]
KINDS = {
    "VSD": ("configs/prolificdreamer-toybox.yaml", []),
    "SDS": (DREAMFUSION, UNRESCALED),
    "SDI": (DREAMFUSION, ["system.guidance_type=sdi-guidance", *UNRESCALED]),
}


@dataclass(frozen=True)
class Plan:
    """A table: its guidances, windows, prompts, seeds, number of steps and of views.

    There are fewer views per step than in the configs, and fewer steps: the whole plans
    take forty minutes and a quarter of an hour of one idle core.
    """

    kinds: tuple[str, ...]
    windows: tuple[int, ...]
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    steps: int
    views: int

    @property
    def solvers(self) -> dict[str, list[str]]:
        """Settings of the solver for each row."""
        windows = {f"window {w}": [f"solver.window.size={w}"] for w in self.windows}
        return {SEQUENTIAL: ["solver.name=sequential"], **windows}


MUSHROOM, TREE, ROCKET = map(runs.prompt_of, ("mushroom", "tree", "rocket"))
FINISHED = (MUSHROOM, f"{TREE} with white stripes", f"{ROCKET} with white spots")
PLANS = {
    "vsd": Plan(("VSD", "SDS"), (8, 16), FINISHED, (0, 1), 60, 2),
    "sdi": Plan(("SDI", "SDS"), (8, 32), (MUSHROOM, ROCKET), (0,), 100, 2),
}


def jobs(plan: Plan) -> list[dict[str, Any]]:
    """All runs, complete problems first."""
    return [
        runs.job(
            config,
            prompt,
            *settings,
            f"data.batch_size={plan.views}",
            f"trainer.max_steps={plan.steps}",
            *solver,
            f"seed={seed}",
            kind=kind,
            row=row,
            seed=seed,
        )
        for seed in plan.seeds
        for prompt in plan.prompts
        for kind in plan.kinds
        for config, settings in [KINDS[kind]]
        for row, solver in plan.solvers.items()
    ]


def solve(to: Path, wanted: runs.Job) -> dict[str, Any]:
    """Solve a job, measure images and mesh, and save a strip of images."""
    entry, found, _ = measured(wanted, to)
    excess = excess_saturation(found.images, found.wanted)
    finish = finish_accuracy(found.images, truth(wanted["prompt"]).finish)
    return {**entry, "saturation": round(excess, 4), "right_finish": finish}


def finish_accuracy(images: Tensor, finish: str) -> float:
    """Fraction of the views in which the second classifier sees the right finish."""
    sides = (2 * quality.SIZE, 2 * quality.SIZE)
    large = torch.nn.functional.interpolate(images, sides, mode="bilinear")
    seen = load(SECOND_FILE).classify(large).finishes
    assert seen is not None
    return float((seen == list(FINISHES).index(finish)).float().mean())


def excess_saturation(images: Tensor, truth: Tensor) -> float:
    """Mean of (max − min) / max over the channels, less that of the ground truth.

    Over the pixels in which the ground truth shows the object, and not the background.
    """
    shown = (truth - quality.GREY).abs().amax(1) > 0.02
    found, wanted = (
        ((x.amax(1) - x.amin(1)) / x.amax(1).clamp(min=1e-3))[shown].mean()
        for x in (images, truth)
    )
    return float(found - wanted)


def table(plan: Plan, entries: list[dict[str, Any]]) -> str:
    """Means over the runs that have a sequential run, as Markdown."""
    lines = [
        "| | runs | iterations | fewer | gradients | PSNR | saturation | colour | "
        "object | finish | IoU | chamfer | core seconds |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    sequential = {problem(e): e for e in entries if e["row"] == SEQUENTIAL}
    for kind in plan.kinds:
        for row in plan.solvers:
            found = [
                entry
                for entry in entries
                if (entry["kind"], entry["row"]) == (kind, row)
                and problem(entry) in sequential
            ]
            if found:
                lines.append(_line(kind, row, found, sequential))
    return "\n".join(lines) + "\n"


def _line(
    kind: str,
    row: str,
    found: list[dict[str, Any]],
    sequential: dict[tuple[Any, ...], dict[str, Any]],
) -> str:
    steps = sum(found[0]["strides"])
    own = [sequential[problem(entry)] for entry in found]
    few, many = runs.mean(found, "iterations"), runs.mean(found, "evaluations")
    change = runs.mean(found, "psnr") - runs.mean(own, "psnr")
    shapes = [entry for entry in found if entry["chamfer"] is not None]
    chamfer = f"{runs.mean(shapes, 'chamfer'):.4f}" if shapes else "none"
    return (
        f"| {kind}, {row} | {len(found)} | {few:.1f} | {steps / few:.2f} | "
        f"{many / steps:.2f} | {runs.mean(found, 'psnr'):.2f} ({change:+.2f}) | "
        f"{runs.mean(found, 'saturation'):+.3f} | "
        f"{runs.mean(found, 'right_colour'):.2f} | "
        f"{runs.mean(found, 'right_object'):.2f} | "
        f"{runs.mean(found, 'right_finish'):.2f} | {runs.mean(found, 'iou'):.3f} | "
        f"{chamfer} | {runs.mean(found, 'cpu_seconds'):.0f} |"
    )


def main() -> None:
    """Run the missing jobs, and write table and sheet."""
    parser = make_parser(__doc__, "vsd")
    parser.add_argument("--plan", choices=PLANS, default="vsd")
    arguments = parser.parse_args()
    plan = PLANS[arguments.plan]
    entries = entries_of(arguments, jobs(plan), solve)
    text = f"{table(plan, entries)}\n{runs.cost(entries)}\n"
    count = len(plan.kinds) * len(plan.solvers)
    publish(arguments, text, entries, count, arguments.plan)


if __name__ == "__main__":
    main()
