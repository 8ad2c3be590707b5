"""The report of a run, and its summary for the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import dreampropeller as dp
from systems.problem import Problem
from systems.runs import folders
from systems.settings.config import Config
from systems.settings.reader import to_section


def report_of(config: Config, solution: dp.Solution[Any]) -> dict[str, Any]:
    """What was solved, how, and at what cost, as `report.json` has it."""
    stats = solution.stats
    steps = sum(stats.strides)
    return {
        "result": solution.result.value,
        "steps": steps,
        "iterations": stats.num_iterations,
        "evaluations": stats.num_evaluations,
        "strides": stats.strides,
        "steps_per_iteration": round(steps / max(1, stats.num_iterations), 3),
        "workers": config.dispatch.count,
        "threads": torch.get_num_threads(),
        "gpu_memory": (  # bytes, on the first device
            torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
        ),
        "solver": to_section(config.solver),
        "environment": folders.environment(),
    }


def summary(folder: Path, problem: Problem, report: dict[str, Any]) -> str:
    """A run in a few lines."""
    lines = [f"{problem.title}: {report['steps']} steps"]
    if "iterations" in report:
        lines = [
            f"{report['steps']} steps in {report['iterations']} iterations "
            f"({report['steps_per_iteration']:.2f}x fewer), "
            f"{report['evaluations']} evaluations, {report['seconds']:.1f} s on "
            f"{report['workers']} worker(s). {report['result']}"
        ]
        if report["workers"] == 1 and report["evaluations"] > 1.2 * report["steps"]:
            lines.append(
                "On one worker the sequential run is faster: it takes "
                f"{report['steps']} evaluations (`solver.name=sequential`)."
            )
    return "\n".join([*lines, *problem.summary(report), f"Look into {folder}"])
