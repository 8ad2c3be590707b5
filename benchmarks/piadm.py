"""Rounds of PIADM against the dimension: the depth that blocks need.

    python -m benchmarks.piadm --to benchmarks/results/piadm.jsonl

Target: two Gaussians at ±1.5 on one axis, with variances from 0.1 to 1. Blocks of
length 1; steps of 2/d (SDE) or 1/√d (ODE), so that a block's steps grow with d. The
depth K is the smallest whose final error E|Y(K) − Y(sequential)|²/d is at most 1e-4.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from dreampropeller.differential import DiffusionTrajectory, Grid
from dreampropeller.piadm import piadm
from dreampropeller.scores import GaussianMixtureScore


def target(dim: int) -> GaussianMixtureScore:
    """The mixture, in float64."""
    means = torch.zeros(2, dim, dtype=torch.float64)
    means[:, 0] = torch.tensor([1.5, -1.5])
    variances = torch.linspace(0.1, 1, dim, dtype=torch.float64).expand(2, dim)
    return GaussianMixtureScore(torch.tensor([0.5, 0.5]).double(), means, variances)


def measure(
    dim: int,
    kind: Literal["sde", "ode"],
    tolerance: float,
    samples: int,
    guess: int = 1,
) -> dict[str, str | int | float]:
    """Depth, rounds, calls and the sequential steps.

    The depth is sought from `guess` on, downwards if that is enough.
    """
    step = min(1.0, 2 / dim if kind == "sde" else 1 / math.sqrt(dim))
    grid = Grid(horizon=math.log(dim / 0.1) + 2, step=step, stop=1e-2)
    source = torch.Generator().manual_seed(0)
    start = torch.randn(samples, dim, generator=source, dtype=torch.float64)
    score = target(dim)
    trajectory = DiffusionTrajectory(score, start, grid, kind)
    ends = [0, *trajectory.boundaries]
    longest = int(np.diff(ends).max())
    exact = piadm(score, start, grid, kind, form="sequential").value["x"]
    found: dict[int, tuple[Any, float]] = {}

    def enough(depth: int) -> bool:
        end = piadm(score, start, grid, kind, depth=depth)
        found[depth] = end.stats, float((end.value["x"] - exact).square().mean())
        return found[depth][1] <= tolerance

    depth = min(guess, longest)
    if enough(depth):
        while depth > 1 and enough(depth - 1):
            depth -= 1
    else:
        depth += 1
        while not enough(depth):  # the full depth is exact
            depth += 1
    stats, error = found[depth]
    return {
        "kind": kind,
        "dim": dim,
        "blocks": len(trajectory.boundaries),
        "steps_per_block": longest,
        "depth": depth,
        "rounds": stats.num_iterations,
        "calls": stats.num_evaluations,
        "sequential": trajectory.num_steps,
        "error": error,
    }


def fit(rows: list[dict[str, float]]) -> dict[str, str | int | float]:
    """Power of K in d, and R² of N·K against log² d."""
    d = np.array([row["dim"] for row in rows], float)
    depth = np.array([row["depth"] for row in rows], float)
    rounds = np.array([row["rounds"] for row in rows], float)
    steps = np.array([row["sequential"] for row in rows], float)
    square = np.stack([np.ones_like(d), np.log(d) ** 2], 1)
    rest = rounds - square @ np.linalg.lstsq(square, rounds, rcond=None)[0]
    return {
        "power_of_depth": round(float(np.polyfit(np.log(d), np.log(depth), 1)[0]), 3),
        "power_of_steps": round(float(np.polyfit(np.log(d), np.log(steps), 1)[0]), 3),
        "r2_rounds_log2": round(1 - float(rest @ rest / rounds.var() / len(d)), 3),
    }


def main() -> None:
    """Measure and fit both kinds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dims", type=int, nargs="+", default=[4, 16, 64, 256, 1024])
    parser.add_argument("--kinds", nargs="+", default=["ode", "sde"])
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--tolerance", type=float, default=1e-4)
    parser.add_argument("--to", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    known = read(args.to)
    for kind in args.kinds:
        rows: list[Any] = []
        for dim in args.dims:
            old = [row for row in known if (row["kind"], row.get("dim")) == (kind, dim)]
            guess = rows[-1]["depth"] if rows else 1
            rows += old[-1:] or [
                measure(dim, kind, args.tolerance, args.samples, guess)
            ]
            print(rows[-1], flush=True)
            if not old:
                write(args.to, rows[-1])
        print({"kind": kind, **fit(rows)}, flush=True)


def read(log: Path | None) -> list[Any]:
    """The rows of a log; a benchmark continues where it ends."""
    if log is None or not log.exists():
        return []
    return [json.loads(line) for line in log.read_text("utf-8").splitlines()]


def write(log: Path | None, row: dict[str, Any]) -> None:
    """Append a row."""
    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
