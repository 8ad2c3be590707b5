"""The report of a run, and its summary for the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import dreampropeller as dp
from systems.problem import Problem
from systems.runs import folders, history
from systems.settings.config import Config
from systems.settings.reader import to_section

SECONDS = ("seconds", "solving_seconds", "device_seconds", "seconds_by_phase")
"""The part of a report that is null where the run's metrics were lost."""


def report_of(
    folder: Path, config: Config, solution: dp.Solution[Any]
) -> dict[str, Any]:
    """What was solved, how, and at what cost, as `report.json` has it.

    The counts are those of the solution, which a resumed run remembers; the seconds
    are read from `metrics.jsonl`, which has those before it was resumed.
    """
    stats = solution.stats
    steps = sum(stats.strides)
    told = history.totals(history.lines(folder))
    counted = {
        "steps": steps,
        "iterations": stats.num_iterations,
        "evaluations": stats.num_evaluations,
        "strides": list(stats.strides),
        "steps_per_iteration": round(steps / max(1, stats.num_iterations), 3),
    }
    complete = told["iterations"] == stats.num_iterations
    seconds = {name: told[name] if complete else None for name in SECONDS}
    return {
        "result": solution.result.value,
        **counted,
        **seconds,
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
