"""A run's folder: its path, the description of the run, and resuming from it.

`outputs/<name>/<tag>@<time>/` holds `config.yaml` (resolved), `command.txt`,
`environment.json`, `ckpts/`, and the files that `systems.runs.recorder` and
`systems.runs.results` write.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import yaml

import dreampropeller as dp
from dreampropeller import checkpoint, identity
from systems import extras
from systems.files import CHECKPOINTS, CONFIG, named, written
from systems.problem import Problem
from systems.runs.stopping import forget
from systems.settings.config import Config, load
from systems.settings.reader import ConfigError, to_section

_SETUP = {CONFIG, "command.txt", "environment.json", "metrics.jsonl", "tensorboard"}
_SETUP |= {checkpoint.LOCK}
"""What a folder holds before the first iteration."""


def open_folder(config: Config, folder: Path | None = None) -> Path:
    """Make a run's folder and record its setup; a resumed run keeps its folder.

    Args:
        config: Config of the run.
        folder: A folder that has been made; default: a new one, or the resumed run's.

    Raises:
        CheckpointError: Another process runs in the folder.
        ConfigError: The folder cannot be written.
        ImportError: What records the run is not installed.
    """
    importlib.import_module("torch.utils.tensorboard")  # a run is recorded by it
    if folder is None:
        folder = make(config) if config.resume is None else folder_of(config.resume)
    folder.mkdir(parents=True, exist_ok=True)  # one that a refused attempt discarded
    checkpoint.lock(folder)
    forget(folder)
    write_setup(folder, config)
    print(f"Writing to {folder}")
    return folder


def continued(config: Config, folder: Path) -> Config:
    """The config of a run that is started again, from the last checkpoint if any."""
    saved = (folder / CHECKPOINTS).glob("step-*.safetensors")
    return replace(config, resume=str(folder)) if any(saved) else config


def make(config: Config) -> Path:
    """Make a new folder of a run.

    Raises:
        ConfigError: The folder cannot be written.
    """
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    tag = re.sub(r"[^\w.,()+-]+", "_", config.tag)[:100] or "run"
    parent = Path(config.exp_root_dir) / config.name
    folder = parent / f"{tag}@{stamp}"
    number = 1
    try:
        while folder.exists():  # two runs in the same second
            number += 1
            folder = parent / f"{tag}@{stamp}-{number}"
        folder.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(
            f"Results cannot be written to `{_short(parent)}`: "
            f"{error.strerror or error}. Name another folder: `exp_root_dir=…`."
        ) from error
    return folder


def discard(folder: Path) -> None:
    """Remove the folder of a run that was refused before its first iteration.

    A folder that holds anything besides the description of the run is kept.
    """
    if not folder.is_dir():
        return
    metrics = folder / "metrics.jsonl"
    found = {path.name for path in folder.iterdir()}
    if found <= _SETUP and not (metrics.exists() and metrics.stat().st_size):
        checkpoint.unlock(folder)
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # other runs are beside it
            folder.parent.rmdir()


def folder_of(resume: str) -> Path:
    """The run folder that a `resume` path names.

    Raises:
        ConfigError: The path does not exist.
    """
    path = Path(resume)
    if not os.path.exists(resume):  # False for an empty name and one that is too long
        raise ConfigError(
            f"There is nothing to resume at `{_short(resume)}`. Name a run folder "
            "(`outputs/<name>/<tag>@<time>`) or one of its checkpoints."
        )
    folder = path.parent if path.is_file() else path
    return folder.parent if folder.name == CHECKPOINTS else folder


def load_config(path: Path | None, overrides: Sequence[str]) -> Config:
    """The config of a command line: a file, or that of the run named by `resume=…`.

    Values that a file leaves open (`???`) are taken from the run.

    Raises:
        ConfigError: There is no config, or a setting cannot be used.
    """
    if path is None:
        return load(config_of(overrides), overrides)
    resumes = any(override.startswith("resume=") for override in overrides)
    known = config_of(overrides) if resumes else None
    return load(path, overrides, known if known and known.exists() else None)


def config_of(overrides: Sequence[str]) -> Path:
    """The config of the run that `resume=…` names.

    Raises:
        ConfigError: There is no such run.
    """
    for override in overrides:
        if override.startswith("resume="):
            return folder_of(override.removeprefix("resume=")) / CONFIG
    raise ConfigError(
        "Which config? Write `--config configs/dreamfusion-toybox.yaml`, or name a run "
        "to go on from: `resume=outputs/<name>/<tag>@<time>`."
    )


def load_state(resume: str, problem: Problem) -> dp.SolverState[Any]:
    """The solver state that a `resume` path names, checked against the problem.

    Raises:
        CheckpointError: The checkpoint cannot be read.
        ConfigError: The checkpoint belongs to another config.
    """
    path = Path(resume)
    folder_of(resume)
    if path.is_dir() and (path / CHECKPOINTS).is_dir():
        path = path / CHECKPOINTS
    state = checkpoint.load(path, device=problem.device)
    problem.check_state(state.y, path)
    return state


def load_own_state(problem: Problem) -> dp.SolverState[Any]:
    """The state that `resume` names, if it made what the config asks for.

    Raises:
        CheckpointError: It cannot be read.
        ConfigError: It belongs to another config, or made another thing.
    """
    resume = str(problem.config.resume)
    state = load_state(resume, problem)
    found, wanted = state.problem.get("about"), identity.plain(problem.about())
    if not found:
        return state
    differ = _differences(problem, found, wanted)
    if differ:
        raise ConfigError(
            f"`{resume}` made another thing: {differ}. Write the settings of its "
            "`config.yaml`, or start a new run without `resume`."
        )
    return replace(state, problem={**state.problem, "about": wanted})


def _differences(problem: Problem, before: Any, now: Any) -> str:
    """Differences of two fingerprints; a default may be written out or left out."""
    differ = identity.differences(before, now)
    if not differ or not isinstance(before, dict):
        return differ
    try:
        resolved = [identity.plain(problem.resolve(about)) for about in (before, now)]
    except ConfigError:  # settings of another version
        return differ
    return identity.differences(*resolved)


def start_of(problem: Problem) -> dp.SolverState[Any] | None:
    """The solver state that a run resumes from; None: a new run.

    Raises:
        CheckpointError: The checkpoint cannot be read.
        ConfigError: The checkpoint belongs to another config or another precision.
    """
    config = problem.config
    if config.resume is None:
        return None
    state = load_own_state(problem)
    steps = state.problem.get("num_steps", state.step)
    if steps > problem.num_steps:
        raise ConfigError(
            f"`{config.resume}` is a run of {steps} steps, and "
            f"{problem.num_steps} are asked for: write `trainer.max_steps={steps}` or "
            "more."
        )
    begun = state.problem.get("precision", str(config.trainer.precision))
    if begun != str(config.trainer.precision):
        raise ConfigError(
            f"`trainer.precision` is `{config.trainer.precision}`: write the precision "
            f"it began with, `{begun}`, to resume `{config.resume}`."
        )
    return state


def environment() -> dict[str, Any]:
    """Machine and versions, recorded beside the figures."""
    packages = ("torch", "diffusers", "transformers", "nerfacc", "numpy")
    return {
        "dreampropeller": extras.version("dreampropeller"),
        "commit": _commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "packages": {name: extras.version(name) for name in packages},
    }


def write_setup(folder: Path, config: Config) -> None:
    """Write `config.yaml`, `command.txt` and `environment.json`."""
    settings = {k: v for k, v in to_section(config).items() if k != "resume"}
    text = yaml.safe_dump(_plain(settings), sort_keys=False, allow_unicode=True)
    with written(folder / CONFIG) as part:
        part.write_text(text, encoding="utf-8")
    command = folder / "command.txt"
    with named(command), open(command, "a", encoding="utf-8") as file:
        file.write(" ".join(["python", *map(shlex.quote, sys.argv)]) + "\n")
    write_json(folder / "environment.json", environment())


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file atomically, so that a reader never sees a partial file."""
    with written(path) as part:
        part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def report(folder: Path) -> dict[str, Any]:
    """A run's `report.json`; empty before the run ends."""
    try:
        return json.loads((folder / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _short(path: str | Path) -> str:
    """A path for a message, cut if it is longer than any file's."""
    text = str(path)
    return text if len(text) <= 200 else f"{text[:100]}…"


def _plain(value: Any) -> Any:
    """Convert tuples to lists, as YAML writes them."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return (
        [_plain(entry) for entry in value] if isinstance(value, list | tuple) else value
    )


def _commit() -> str | None:
    try:
        return subprocess.check_output(
            ["git", "describe", "--always", "--dirty"],
            cwd=Path(__file__).parent,
            stderr=subprocess.DEVNULL,
            text=True,
        ).strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line for line in lines if line.startswith("model name")]
        return names[0].partition(":")[2].strip()
    except (OSError, IndexError):
        return platform.processor()
