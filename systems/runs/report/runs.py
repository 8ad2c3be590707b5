"""A finished run, read from its folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dreampropeller as dp
from dreampropeller import checkpoint
from systems import build, quality
from systems.base import System
from systems.extras import command
from systems.runs import folders, history
from systems.settings.config import Config, load
from systems.settings.reader import ConfigError


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        folder: Folder of the run.
        config: Config of the run.
        report: Content of `report.json`.
        iterations: Iterations as recorded by `systems.runs.recorder`.
    """

    folder: Path
    config: Config
    report: dict[str, Any]
    iterations: list[dict[str, Any]]

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of the solve."""
        return self.report["solving_seconds"]

    @property
    def device_seconds(self) -> float:
        """Device seconds: every worker is occupied for the whole solve."""
        return self.report["device_seconds"]

    def seconds_at(self, step: int) -> float | None:
        """Wall-clock seconds at which a step was reached."""
        for entry in self.iterations:
            if entry["begin"] + entry["stride"] >= step:
                return entry["solving"]
        return None

    def state(self, system: System) -> dp.State:
        """The final state."""
        return folders.load_state(str(self.folder), system).y


def open_run(folder: str | Path) -> Run:
    """Read a finished run.

    Raises:
        ConfigError: The folder holds no run, or the run is not finished.
    """
    folder = folders.folder_of(str(folder))
    try:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"`{folder}` is no finished run: it needs a readable `report.json` "
            f"({error}). Finish it with `{command('train')} "
            f"resume={folder}`."
        ) from error
    config = load(folder / folders.CONFIG)
    if report["steps"] < config.trainer.max_steps:
        raise ConfigError(
            f"`{folder}` is not finished: it has reached step {report['steps']} of "
            f"{config.trainer.max_steps}. Finish it with `{command('train')} "
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
    """PSNR of every kept checkpoint, with its step and wall-clock seconds.

    Empty if the prompt has no ground truth.
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
