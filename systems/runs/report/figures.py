r"""Figures of a comparison: speed-ups, costs and deviations.

The deviation of two states is measured twice: on their images, as the PSNR of one
against the other over 16 fixed views, and on their entries, relative to the distance
that the sequential run covered,

$$d(a, b) = \lVert a - b \rVert_2 / \lVert b - y_0 \rVert_2.$$
"""

from __future__ import annotations

import math
from typing import Any

import torch

import dreampropeller as dp
from systems import quality
from systems.base import System
from systems.runs.report.runs import Run

NOTICEABLE = 0.2
"""Difference in decibels below which qualities count as equal."""


def deviation(system: System, a: dp.State, b: dp.State) -> dict[str, float | None]:
    """How far state a is from state b.

    Returns:
        ``psnr`` of the images in dB (None: equal images), ``relative`` distance of
        the entries, and ``bitwise``, 1 if every entry is equal.
    """
    views = quality.fixed_views()
    images = [
        torch.cat(
            [system.render(y, views.one(i), grey=quality.GREY)[0] for i in range(16)]
        )
        for y in (a, b)
    ]
    error = float((images[0] - images[1]).square().mean())
    start, _ = system.trajectory().init()
    floating = [name for name, tensor in b.items() if tensor.is_floating_point()]

    def distance(x: dp.State, y: dp.State) -> float | None:
        if any(x[name].shape != y[name].shape for name in floating):
            return None  # a state that grew has no distance to another number of rows
        squares = [(x[n] - y[n]).double().square().sum() for n in floating]
        return math.sqrt(float(torch.stack(squares).sum()))

    apart, covered = distance(a, b), distance(b, start)
    return {
        "psnr": round(-10 * math.log10(error), 2) if error else None,
        "relative": (
            None if apart is None or covered is None else apart / max(covered, 1e-30)
        ),
        "bitwise": float(all(torch.equal(a[name], b[name]) for name in b)),
    }


def describe(run: Run) -> dict[str, Any]:
    """A run's figures."""
    kept = ("steps", "iterations", "evaluations", "workers", "threads", "quality")
    return {
        "folder": str(run.folder),
        "solver": run.config.solver.name,
        "seed": run.config.seed,
        **{name: run.report[name] for name in kept},
        "mesh": run.report.get("mesh_quality"),
        "seconds": round(run.seconds, 2),
        "device_seconds": round(run.device_seconds, 2),
        "seconds_by_phase": run.report["seconds_by_phase"],
    }


def speed_up(base: Run, other: Run) -> dict[str, float]:
    """Ratios to the base: fewer iterations and seconds, and more work."""
    return {
        "iterations": base.report["iterations"] / other.report["iterations"],
        "wall_clock": base.seconds / other.seconds,
        "evaluations": other.report["evaluations"] / base.report["evaluations"],
        "device_seconds": other.device_seconds / base.device_seconds,
    }


def score_of(found: dict[str, Any]) -> tuple[str, float] | None:
    """Name and value of the score that ranks a run or a rival."""
    measured = found["quality"]
    if not isinstance(measured, dict):
        return None
    name = "psnr" if "psnr" in measured else "clip_score"
    return name, measured[name]


def verdict(
    base: dict[str, Any],
    other: dict[str, Any],
    gain: dict[str, float],
    rivals: list[dict[str, Any]],
) -> list[str]:
    """The verdict of the comparison, in sentences."""
    told = [_speed(other, gain), _quality(base, other)]
    mine = score_of(other)
    for rival in rivals:
        theirs = score_of(rival)
        if mine is None or theirs is None:
            continue
        unit = "dB" if mine[0] == "psnr" else "points of CLIP score"
        ahead = theirs[1] - mine[1]
        edge = ", the edge of those tried" if rival["edge"] else ""
        how = f"{rival['name']} (learning rate {rival['rate']:g}{edge})"
        if ahead > NOTICEABLE:
            told.append(f"A rival wins: {how} is {ahead:.1f} {unit} better.")
        elif ahead > -NOTICEABLE:
            told.append(f"A rival draws: {how} is as good, {ahead:+.1f} {unit}.")
        else:
            told.append(f"{how} is {-ahead:.1f} {unit} worse.")
    return told


def _speed(other: dict[str, Any], gain: dict[str, float]) -> str:
    count = other["workers"]
    machine = "1 worker" if count == 1 else f"{count} workers"
    wall = gain["wall_clock"]
    pays = (
        f"{wall:.2f}x faster by the clock"
        if wall > 1.02
        else "no faster by the clock"
        if wall > 0.98
        else f"{1 / wall:.2f}x slower by the clock: it does not pay here"
    )
    return (
        f"{gain['iterations']:.1f}x fewer iterations; on {machine} {pays}, for "
        f"{gain['device_seconds']:.2f}x the device time."
    )


def _quality(base: dict[str, Any], other: dict[str, Any]) -> str:
    first, second = score_of(base), score_of(other)
    if first is None or second is None:
        return "Quality was not measured, so this is no claim that the results match."
    change = second[1] - first[1]
    unit = "dB" if first[0] == "psnr" else "points of CLIP score"
    if abs(change) < NOTICEABLE:
        return f"The quality is the sequential run's ({change:+.2f} {unit})."
    better = "better" if change > 0 else "worse"
    return (
        f"The quality is {abs(change):.1f} {unit} {better} than the sequential run's."
    )
