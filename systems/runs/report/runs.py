"""What a finished run folder tells."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dreampropeller as dp
from dreampropeller import checkpoint
from systems import build, quality
from systems.base import System
from systems.runs import folders, history
from systems.settings.config import Config, load
from systems.settings.reader import ConfigError


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        folder: Where it is.
        config: What it was.
        report: Its `report.json`.
        iterations: Its iterations, as `systems.runs.recorder` wrote them.
    """

    folder: Path
    config: Config
    report: dict[str, Any]
    iterations: list[dict[str, Any]]

    @property
    def seconds(self) -> float:
        """Wall-clock of the solve."""
        return self.report["solving_seconds"]

    @property
    def device_seconds(self) -> float:
        """What it cost: every worker is held for the whole solve."""
        return self.report["device_seconds"]

    def seconds_at(self, step: int) -> float | None:
        """Wall-clock at which a step was reached."""
        for entry in self.iterations:
            if entry["begin"] + entry["stride"] >= step:
                return entry["solving"]
        return None

    def state(self, system: System) -> dp.State:
        """What it ended with."""
        return folders.load_state(str(self.folder), system).y


def open_run(folder: str | Path) -> Run:
    """Read a finished run.

    Raises:
        ConfigError: It is none, or not finished.
    """
    folder = folders.folder_of(str(folder))
    try:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"`{folder}` is no finished run: it needs a readable `report.json` "
            f"({error}). Finish it with `python launch.py --train "
            f"resume={folder}`."
        ) from error
    config = load(folder / folders.CONFIG)
    if report["steps"] < config.trainer.max_steps:
        raise ConfigError(
            f"`{folder}` is not finished: it has reached step {report['steps']} of "
            f"{config.trainer.max_steps}. Finish it with `python launch.py --train "
            f"resume={folder}`."
        )
    iterations = history.iterations(history.lines(folder))
    if not report.get("solving_seconds") or len(iterations) != report["iterations"]:
        raise ConfigError(
            f"`{folder}` does not say how long all of its iterations took, so it "
            f"cannot be compared: its `{history.FILE}` is not whole. Run it again."
        )
    return Run(folder, config, report, iterations)


def quality_over_time(run: Run, system: System) -> list[dict[str, float]]:
    """PSNR of every checkpoint that was kept, with its step and wall-clock.

    Empty when the prompt has no truth.
    """
    wanted = quality.truth_of(system)
    if wanted is None:
        return []
    points = []
    for path in sorted((run.folder / folders.CHECKPOINTS).glob("step-*.safetensors")):
        state = checkpoint.load(path, device=system.device)
        seconds = run.seconds_at(state.step)
        if seconds is not None:
            found = quality.against_truth(system, state.y, wanted)
            points.append(
                {"step": state.step, "seconds": seconds, "psnr": round(found.psnr, 3)}
            )
    return points


def system_of(run: Run) -> System:
    """The system that renders a run's states."""
    return build(run.config)
