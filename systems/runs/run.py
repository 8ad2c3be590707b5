"""From a config to files: build, solve, record, write."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from dreampropeller import checkpoint
from dreampropeller.dispatch import process_group
from dreampropeller.trajectory import Trajectory
from systems import artefacts, build, build_problem, problem_type
from systems.problem import Problem
from systems.runs import folders, results, viewer, workers
from systems.runs.recorder import FolderRecorder
from systems.settings.config import Config
from systems.settings.dispatch import is_rank
from systems.settings.reader import ConfigError


def execute(config: Config, option: str = "--train", folder: Path | None = None) -> int:
    """Run a config, in this process or on several ranks; returns the exit code.

    Args:
        config: Config of the run.
        option: The option of `launch.py` in use.
        folder: Folder to write to; default: a new folder, or that of a resumed run.

    Raises:
        ConfigError: A setting cannot be used.
        CheckpointError: The checkpoint to resume from cannot be read.
        NotConverged: The solve ended before its last step.
        WorkerError: A rank failed.
    """
    wanted = problem_type(config).option
    if wanted != option:
        raise ConfigError(
            f"`system_type` is `{config.system_type}`, which `{option}` does not run: "
            f"write `{wanted}` for this config."
        )
    workers.check(config.dispatch)
    if is_rank():  # started by torchrun
        return work(config, leads=os.environ["RANK"] == "0")
    alone = config.dispatch.num_workers == 1 and not config.dispatch.max_restarts
    if alone or config.dispatch.backend == "ray":
        return work(config, folder)
    folders.start_of(build_problem(config))  # refuse before anything is created
    folder = folder or folders.open_folder(config)
    try:
        return workers.run(work, config, folder)
    finally:
        checkpoint.unlock(folder)


def work(config: Config, folder: Path | None = None, leads: bool = True) -> int:
    """The work of each rank; the leading one records the run in a folder.

    Args:
        config: Config of the run.
        folder: The run's folder, if it has been made; otherwise the leading rank makes
            it.
        leads: Whether this is the leading rank.
    """
    restarted = process_group.attempt() > 0
    known = folder or workers.told_folder()
    if restarted and known is not None:
        config = folders.continued(config, known)
    dispatcher, threads = workers.dispatcher(config.dispatch, _maker(config))
    torch.set_num_threads(threads)
    problem = build_problem(config)
    state = folders.start_of(problem)
    if leads and folder is None:
        known = folders.open_folder(config, known)
        workers.tell_folder(known)
    if leads and restarted:
        step = 0 if state is None else state.step
        print(f"Restart {process_group.attempt()}, from step {step}.", file=sys.stderr)
    folder = known if leads else None
    recorder = FolderRecorder(problem, folder, state)
    try:
        with _page(config, folder):
            return recorder.run(lambda told: problem.solve(dispatcher, state, told))
    except ValueError:  # a refusal, as of a model that cannot be loaded
        restarts = config.dispatch.max_restarts  # they write to the same folder
        if folder is not None and config.resume is None and not restarts:
            folders.discard(folder)
        raise
    finally:
        if folder is not None:
            checkpoint.unlock(folder)
            checkpoint.unlock(folder / folders.CHECKPOINTS)


def _page(config: Config, folder: Path | None) -> AbstractContextManager[None]:
    """The live page of the leading rank, if one is asked for."""
    if folder is None or not config.viewer:
        return nullcontext()
    from systems.runs.live import beside

    return beside.page(folder, config.viewer_port)


def _maker(config: Config) -> Callable[[], Trajectory[Any]] | None:
    """Builds the trajectory from the config, on another process."""
    owned_elsewhere = problem_type(config).trajectory is Problem.trajectory
    return None if owned_elsewhere else functools.partial(_trajectory, config)


def _trajectory(config: Config) -> Trajectory[Any]:
    return build_problem(config).trajectory()


def look(config: Config, video: bool) -> int:
    """Render and measure the current state of a run, or export it.

    Returns the exit code.

    Raises:
        ConfigError: There is no such run, or its problem has no object.
    """
    if config.resume is None:
        raise ConfigError(
            "Nothing to look at: name a run, `resume=outputs/<name>/<tag>@<time>`, "
            "with the `config.yaml` in it."
        )
    system = build(config)
    state = folders.load_own_state(system)
    folder = folders.folder_of(config.resume)
    made = artefacts.write(folder, system, state.y, video=video, mesh=not video)
    viewer.add(folder, {**folders.report(folder), **made}, system.title)
    print(results.summary(folder, system, {**made, "steps": state.step}))
    return 1 if artefacts.failures(made) else 0
