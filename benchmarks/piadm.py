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
from typing import Literal

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
    dim: int, kind: Literal["sde", "ode"], tolerance: float, samples: int
) -> dict[str, str | int | float]:
    """Depth, rounds, calls and states in memory, and the sequential steps."""
    step = min(1.0, 2 / dim if kind == "sde" else 1 / math.sqrt(dim))
    grid = Grid(horizon=math.log(dim / 0.1) + 2, step=step, stop=1e-2)
    source = torch.Generator().manual_seed(0)
    start = torch.randn(samples, dim, generator=source, dtype=torch.float64)
    score = target(dim)
    trajectory = DiffusionTrajectory(score, start, grid, kind)
    ends = [0, *trajectory.boundaries]
    longest = int(np.diff(ends).max())
    exact = piadm(score, start, grid, kind, form="sequential").value["x"]
    for depth in range(1, longest + 1):
        end = piadm(score, start, grid, kind, depth=depth)
        error = float((end.value["x"] - exact).square().mean())
        if error <= tolerance:
            return {
                "kind": kind,
                "dim": dim,
                "blocks": len(trajectory.boundaries),
                "steps_per_block": longest,
                "depth": depth,
                "rounds": end.stats.num_iterations,
                "calls": end.stats.num_evaluations,
                "sequential": trajectory.num_steps,
                "error": error,
            }
    raise AssertionError("the full depth is exact")


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
    for kind in args.kinds:
        rows = []
        for dim in args.dims:
            rows.append(measure(dim, kind, args.tolerance, args.samples))
            print(rows[-1], flush=True)
        lines = [*rows, {"kind": kind, **fit(rows)}]
        print(lines[-1], flush=True)
        if args.to is not None:
            args.to.parent.mkdir(parents=True, exist_ok=True)
            with args.to.open("a") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)


if __name__ == "__main__":
    main()
