"""The report of a run, and its summary for the terminal."""

from __future__ import annotations

import math
import shlex
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import dreampropeller as dp
from dreampropeller.error_growth import Growths
from systems.extras import command
from systems.problem import Problem
from systems.runs import folders, history
from systems.settings.config import Config
from systems.settings.reader import to_section

GROWTH = 100.0
"""Ratio of the last to the first losses above which a run counts as diverged."""
SECONDS = ("seconds", "solving_seconds", "device_seconds", "seconds_by_phase")
"""The entries of a report that are null if the run's metrics were lost."""


def report_of(
    folder: Path, config: Config, solution: dp.Solution[Any]
) -> dict[str, Any]:
    """The content of `report.json`: problem, solver and cost.

    The counts are those of the solution, which includes the steps before a resume. The
    seconds are read from `metrics.jsonl`, which includes them too.
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
        "growth": _growth(stats),
        **seconds,
        "workers": config.dispatch.count,
        "threads": torch.get_num_threads(),
        "gpu_memory": (  # in bytes, on the first device
            torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
        ),
        "solver": to_section(config.solver),
        "environment": folders.environment(),
    }


def _growth(stats: dp.Stats) -> dict[str, Any] | None:
    """Whether the run forgets or amplifies errors; None if it was not measured."""
    found = Growths.over(stats.growth, stats.strides)
    return None if found is None else {**asdict(found), "says": found.sentence}


def summary(folder: Path, problem: Problem, report: dict[str, Any]) -> str:
    """A run in a few lines."""
    lines = [f"{problem.title}: {report['steps']} steps"]
    if "iterations" in report:
        known = report["seconds"] is not None
        seconds = f"{report['seconds']:.1f} s" if known else "unknown seconds"
        lines = [
            f"{report['steps']} steps in {report['iterations']} iterations "
            f"({report['steps_per_iteration']:.2f}x fewer), "
            f"{report['evaluations']} evaluations, {seconds} on "
            f"{report['workers']} worker(s). {report['result']}"
        ]
        batched = any(n.startswith("Batched") for n in report.get("notes", []))
        alone = report["workers"] == 1 and not batched
        if alone and report["evaluations"] > report["steps"]:
            lines.append(
                "On one worker the sequential run is faster: it takes "
                f"{report['steps']} evaluations (`solver.name=sequential`)."
            )
        if report.get("growth"):
            lines.append(report["growth"]["says"])
    lines += [*problem.summary(report), *report.get("notes", [])]
    return "\n".join([*lines, *next_steps(folder, problem, report)])


def next_steps(folder: Path, problem: Problem, report: dict[str, Any]) -> list[str]:
    """Commands for what can be done with the run next."""
    place = shlex.quote(str(folder))
    lines = []
    if "resume" in problem.sections:
        if report["steps"] < problem.num_steps:
            lines.append(f"Resume: {command('train')} resume={place}")
        if "turntable" not in report:
            lines.append(f"Render: {command('test')} resume={place}")
        if not isinstance(report.get("mesh"), list):
            lines.append(f"Export: {command('export')} resume={place}")
    return [*lines, f"Look into {folder}"]


def collapses(lines: Sequence[dict[str, Any]], y: dp.State) -> list[str]:
    """Warnings about a collapsed or diverged run; empty if there is no sign of it.

    Args:
        lines: Lines of the metrics.
        y: The final state.
    """
    advice = "Take a smaller learning rate (`system.optimizer.args.lr`)."
    broken = [
        name
        for name, tensor in y.items()
        if tensor.is_floating_point() and not torch.isfinite(tensor).all()
    ]
    if broken:
        return [f"Collapsed: `{broken[0]}` is no longer finite. {advice}"]
    losses = [line["loss"] for line in lines if "loss" in line]
    few = max(1, len(losses) // 10)
    first, last = losses[:few], losses[-few:]
    if None in last:
        return [f"Collapsed: the loss is no longer finite. {advice}"]
    usual = max((abs(loss) for loss in first if loss is not None), default=math.inf)
    if losses and statistics.median(map(abs, last)) > GROWTH * usual:
        return [
            f"Collapsed: the loss went from {usual:.3g} to {last[-1]:.3g}. {advice}"
        ]
    return []
