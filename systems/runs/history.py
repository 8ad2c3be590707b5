"""Iterations and seconds of a run, read from its `metrics.jsonl`.

Every iteration and every end of the run writes a line. A resumed run appends to the
same file, also when it resumes from an earlier checkpoint. An iteration that was
repeated counts once, by its last line.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

FILE = "metrics.jsonl"
Entry = dict[str, Any]


def lines(folder: Path) -> list[Entry]:
    """Every line of a run's metrics; incomplete lines are left out."""
    path = folder / FILE
    if not path.is_file():  # missing, or a device
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:  # the process was killed while writing
            continue
        found.append(entry)
    return found


def iterations(entries: Iterable[Entry]) -> list[Entry]:
    """The iterations of a run, in order; of a repeated one, the last."""
    found: list[Entry] = []
    for entry in entries:
        if "iteration" in entry:
            while found and found[-1]["iteration"] >= entry["iteration"]:
                found.pop()
            found.append(entry)
    return found


def elapsed(entries: Sequence[Entry], num_iterations: int) -> float:
    """Wall-clock seconds up to an iteration, or to the end if the run ended there."""
    reached = [
        entry["elapsed"]
        for entry in entries
        if num_iterations in (entry.get("iteration"), entry.get("end"))
    ]
    return reached[-1] if reached else 0.0


def totals(entries: Sequence[Entry]) -> Entry:
    """The counts in `report.json`: steps, iterations and seconds.

    Seconds are null if the file lacks an iteration of the run.
    """
    made = iterations(entries)
    strides = [entry["stride"] for entry in made]
    whole = [entry["iteration"] for entry in made] == list(range(1, len(made) + 1))
    phases: dict[str, float] = {}
    for entry in made:
        for phase, seconds in entry["seconds"].items():
            phases[phase] = phases.get(phase, 0.0) + seconds
    device, before = 0.0, 0.0
    for entry in made:
        device += (entry["solving"] - before) * entry["workers"]
        before = entry["solving"]
    num_iterations = made[-1]["iteration"] if made else 0
    return {
        "steps": made[-1]["begin"] + made[-1]["stride"] if made else 0,
        "iterations": num_iterations,
        "evaluations": made[-1]["evaluations"] if made else 0,
        "strides": strides,
        "steps_per_iteration": round(sum(strides) / max(1, len(strides)), 3),
        "seconds": round(elapsed(entries, num_iterations), 2) if whole else None,
        "solving_seconds": round(before, 3) if whole else None,
        "device_seconds": round(device, 3) if whole else None,
        "seconds_by_phase": {name: round(s, 3) for name, s in phases.items()}
        if whole
        else None,
    }
