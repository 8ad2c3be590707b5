"""What should the drift threshold judge when scene and LoRA move together?

    python -m benchmarks.vsd_groups [--steps 32] [--objects mushroom rocket]

Three criteria on `configs/prolificdreamer-toybox.yaml`: one number over all tensors
weighted by displacement (`DriftThreshold` as it is), the larger of the scene's and the
LoRA's relative error, and the scene's alone, which feels the LoRA only through the
guidance. For each, the errors of the drifts that were accepted, against the drifts at
the accepted states, and the distance of the result from the sequential run's.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch

import dreampropeller as dp
from benchmarks import runs
from dreampropeller.secants import relative_error
from dreampropeller.tree import moving, norms
from systems import build, quality
from systems.prolificdreamer import LORA
from systems.settings.config import load

CONFIG = "configs/prolificdreamer-toybox.yaml"
SETTINGS = ("data.batch_size=1",)
GROUPS = {
    "scene": lambda name: not name.startswith(LORA),
    "lora": lambda name: name.startswith(LORA),
}


class Grouped(dp.DriftThreshold):
    """The largest relative error over groups of tensors, instead of one over all."""

    groups: tuple[str, ...] = ("scene", "lora")

    def _relative(
        self, change: dict[str, float], unit: dict[str, float], moved: dict[str, float]
    ) -> float:
        return max(
            relative_error(change, _only(group, unit), moved) for group in self.groups
        )


class SceneOnly(Grouped):
    """The scene's relative error: the LoRA counts by its effect on the guidance."""

    groups = ("scene",)


def _only(group: str, values: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in values.items() if GROUPS[group](name)}


class Recorded(dp.Trajectory[Any]):
    """A trajectory that keeps the last state and drift of each update."""

    def __init__(self, inner: dp.Trajectory[Any]) -> None:
        self.inner, self.num_steps = inner, inner.num_steps
        self.used: dict[int, tuple[dp.State, dp.State]] = {}

    def init(self) -> tuple[dp.State, Any]:
        """See `Trajectory.init`."""
        return self.inner.init()

    def make_drift(self, device: torch.device) -> dp.Drift:
        """See `Trajectory.make_drift`."""
        return self.inner.make_drift(device)

    def update(
        self, step: int, y: dp.State, carry: Any, drift: dp.State
    ) -> tuple[dp.State, Any]:
        """See `Trajectory.update`."""
        self.used[step] = (y, drift)
        return self.inner.update(step, y, carry, drift)


def errors_of(recorded: Recorded) -> dict[str, float]:
    """Median and largest relative error of the accepted drifts, by group."""
    drift = recorded.make_drift(torch.device("cpu"))
    found: dict[str, list[float]] = {group: [] for group in GROUPS}
    for step, (y, used) in recorded.used.items():
        exact = moving(y, drift(step, y)[0])
        for group, belongs in GROUPS.items():
            names = [n for n in exact if belongs(n) and n in used]
            size = math.hypot(*norms({n: exact[n] for n in names}).values())
            change = norms({n: used[n] - exact[n] for n in names})
            if size > 0:
                found[group].append(math.hypot(*change.values()) / size)
    worst = {f"{g}_error_worst": max(e) for g, e in found.items()}
    return {**{f"{g}_error": median(e) for g, e in found.items()}, **worst}


def measure(criterion: str, window: int, name: str, steps: int) -> dict[str, Any]:
    """One run with its errors; the sequential run's result is made along with it."""
    prompt = f"system.prompt_processor.prompt={runs.prompt_of(name)}"
    config = load(CONFIG, [prompt, *SETTINGS, f"trainer.max_steps={steps}"])
    system = build(config)
    solvers: dict[str, dp.Solver] = {
        "sequential": dp.Sequential(),
        **{
            kind.__name__: dp.PicardSolver(
                dp.SlidingWindow(window),
                kind(0.2),
                predictor="auto",
                acceleration=dp.Secant(),
            )
            for kind in (dp.DriftThreshold, Grouped, SceneOnly)
        },
    }
    recorded = Recorded(system.trajectory())
    solution = dp.solve(recorded, solvers[criterion])
    truth = quality.truth_of(system)
    assert truth is not None
    found = quality.against_truth(system, solution.value, truth)
    torch.save(solution.value, _state_file(criterion, window, name))
    sequential = torch.load(_state_file("sequential", 1, name), weights_only=True)
    start, _ = recorded.init()
    entry: dict[str, Any] = {
        **{"criterion": criterion, "window": window, "object": name},
        "iterations": solution.stats.num_iterations,
        "evaluations": solution.stats.num_evaluations,
        "psnr": round(found.figures()["psnr"], 2),
    }
    for group, belongs in GROUPS.items():
        names = [n for n in start if belongs(n) and start[n].is_floating_point()]
        off = norms({n: solution.value[n] - sequential[n] for n in names})
        way = norms({n: sequential[n] - start[n] for n in names})
        entry[f"{group}_off"] = math.hypot(*off.values()) / math.hypot(*way.values())
    if criterion != "sequential":
        entry |= errors_of(recorded)
    return entry


def _state_file(criterion: str, window: int, name: str) -> Path:
    return FOLDER / f"{criterion}-{window}-{name}.pt"


FOLDER = Path("outputs/vsd_groups")


def main() -> None:
    """Measure, and print one line of JSON per run; a finished run is not repeated."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--objects", nargs="+", default=["mushroom", "rocket"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    FOLDER.mkdir(parents=True, exist_ok=True)
    log = FOLDER / "runs.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    done = {
        tuple(json.loads(e)[k] for k in ("criterion", "window", "object"))
        for e in lines
    }
    plan = [("sequential", 1), *((c, w) for w in (8, 16) for c in CRITERIA)]
    for name in arguments.objects:
        for criterion, window in plan:
            if (criterion, window, name) in done:
                continue
            entry = measure(criterion, window, name, arguments.steps)
            line = json.dumps(entry)
            print(line, flush=True)
            with open(log, "a", encoding="utf-8") as file:
                file.write(line + "\n")


CRITERIA = ("DriftThreshold", "Grouped", "SceneOnly")

if __name__ == "__main__":
    main()
