"""Ranks: the dispatcher of a run, and starting and stopping processes."""

from __future__ import annotations

import functools
import os
import re
import signal
import sys
import threading
from collections.abc import Callable
from multiprocessing import resource_tracker
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import dreampropeller as dp
from dreampropeller.checkpoint import CheckpointError
from dreampropeller.dispatch import process_group
from systems import extras
from systems.runs.stopping import STOP
from systems.settings.config import Config
from systems.settings.dispatch import DispatchConfig, is_rank
from systems.settings.notes import note
from systems.settings.reader import ConfigError

_FOLDER = "dreampropeller/folder"
"""Key of the run's folder in torchrun's store."""

FAULTS = (
    *(CheckpointError, ImportError, ValueError, OSError),
    *(dp.NotConverged, dp.WorkerError),
)
"""What ends a command with a message instead of a traceback."""
_THREADS = 64
"""Threads that any machine may use, as results of a large one depend on them."""
_PASSED_ON = (signal.SIGINT, signal.SIGTERM)
"""Signals that the launching process passes on to rank 0."""


def check(config: DispatchConfig) -> None:
    """Refuse what this machine cannot do, and say what a launcher leaves no effect.

    Not while a config is read: a run that was made elsewhere can still be looked at.

    Raises:
        ConfigError: There are too many threads.
    """
    cores = os.cpu_count() or 1
    most = max(_THREADS, 4 * cores)
    if config.threads is not None and config.threads > most:
        raise ConfigError(
            f"`dispatch.threads` is {config.threads}, and this machine has {cores} "
            f"cores: write at most {most}, or leave it out."
        )
    if not is_rank():
        return
    if config.num_workers not in (1, config.count):
        note(
            f"`dispatch.num_workers={config.num_workers}` has no effect under torchrun "
            f"and srun, which have started {config.count} process(es)."
        )
    if config.max_restarts:
        note(
            f"`dispatch.max_restarts={config.max_restarts}` has no effect under "
            f"torchrun and srun: write `torchrun --max-restarts={config.max_restarts}`."
        )


def dispatcher(
    config: DispatchConfig, make: Callable[[], dp.Trajectory[Any]] | None = None
) -> tuple[Callable[[Any], dp.Dispatcher], int]:
    """The dispatcher of a run, and the number of CPU threads of this process.

    Args:
        config: The `dispatch` section.
        make: Builds a replica of the trajectory on a worker of Ray; default: the
            trajectory is pickled.

    Raises:
        ConfigError: Ranks of torchrun were asked to use Ray.
        ImportError: Ray is not installed.
        ValueError: `dispatch.ray_address` is no address.
        OSError: Nothing listens there.
    """
    if config.backend == "ray":
        from dreampropeller.dispatch import ray_cluster
        from dreampropeller.dispatch.ray import RayDispatcher

        if is_rank():
            raise ConfigError(
                "`dispatch.backend=ray` starts its workers itself: run it without "
                "torchrun, with `dispatch.num_workers=8`."
            )
        ray_cluster.load()  # refuse before a folder is made
        ray_cluster.check_address(config.ray_address)
        spread = functools.partial(
            RayDispatcher,
            num_workers=config.num_workers,
            make=make,
            address=config.ray_address,
            elastic=config.elastic,
            threads=config.threads or 1,
            timeout=config.timeout,
            heartbeat=config.heartbeat,
        )
        return spread, config.threads or 1
    if not is_rank():
        return dp.InlineDispatcher, config.threads or torch.get_num_threads()
    alone = config.count == 1  # under a launcher that restarts it
    threads = config.threads or (torch.get_num_threads() if alone else 1)
    spread = functools.partial(
        dp.DistributedDispatcher,
        threads=threads,
        timeout=config.timeout,
        heartbeat=config.heartbeat,
        views=config.views,
    )
    return spread, threads


def run(
    work: Callable[[Config, Path | None, bool], int], config: Config, folder: Path
) -> int:
    """Start `dispatch.num_workers` ranks of a function and wait for them.

    Args:
        work: Called with the config, the folder, and whether this is rank 0; returns an
            exit code.
        config: Config of the run.
        folder: Folder that the run is recorded in.

    Raises:
        WorkerError: A rank failed.
    """
    return start(
        _rank,
        work,
        config,
        folder,
        num_workers=config.dispatch.num_workers,
        max_restarts=config.dispatch.max_restarts,
        stop=folder / STOP,
    )


def start(
    function: Callable[..., int],
    *arguments: Any,
    num_workers: int,
    stop: Path,
    max_restarts: int = 0,
) -> int:
    """Start ranks of a function; returns rank 0's exit code.

    Ctrl-C and SIGTERM reach rank 0 through a file, so that it can finish its iteration;
    a second signal ends all ranks at once.

    Args:
        function: Called on each rank; it has to watch the file (`Stop`).
        *arguments: Arguments of the function.
        num_workers: Number of ranks.
        stop: File that requests a stop.
        max_restarts: Number of times that failed ranks are started again.

    Raises:
        WorkerError: A rank failed.
    """
    outcome: list[Any] = []

    def launch() -> None:
        # Ranks inherit the mask: a terminal's Ctrl-C must not end them as they start.
        # The tracker first, because its start unblocks the signals.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED_ON)
        try:
            outcome.extend(
                dp.launch_workers(
                    _quietly,
                    function,
                    *arguments,
                    num_workers=num_workers,
                    max_restarts=max_restarts,
                )
            )
        except BaseException as error:  # handed to the main thread
            outcome.append(error)

    asked: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        del frame
        if asked:
            os._exit(128 + number)  # ranks follow their launcher
        asked.append(number)
        stop.write_text(signal.Signals(number).name)

    previous = {n: signal.signal(n, pass_on) for n in _PASSED_ON}
    try:
        # Not in the main thread, where torch's launcher would end ranks on a signal.
        thread = threading.Thread(target=launch)
        thread.start()
        while thread.is_alive():
            thread.join(0.2)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    first = outcome[0]
    if isinstance(first, BaseException):
        raise first
    return int(first)


def _quietly(function: Callable[..., int], *arguments: Any) -> int:
    for number in _PASSED_ON:
        signal.signal(number, signal.SIG_IGN)  # the launching process passes them on
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _PASSED_ON)
    return function(*arguments)


def _rank(
    work: Callable[[Config, Path | None, bool], int], config: Config, folder: Path
) -> int:
    return work(config, folder, os.environ["RANK"] == "0")


def tell_folder(folder: Path) -> None:
    """Tell the run's folder to ranks that `torchrun` may start again."""
    store = process_group.agent_store()
    if store is not None:
        store.set(_FOLDER, str(folder.resolve()))


def told_folder() -> Path | None:
    """The folder of the run that this process continues, after a restart."""
    store = process_group.agent_store() if process_group.attempt() else None
    if store is None or not store.check([_FOLDER]):
        return None
    return Path(store.get(_FOLDER).decode())


def complain(text: str) -> None:
    """Print an error on standard error, once for all ranks of a machine."""
    mine = os.environ.get("TORCHELASTIC_ERROR_FILE")  # in one folder per rank
    if mine is not None:
        try:
            (Path(mine).parent.parent / "said").touch(exist_ok=False)
        except FileExistsError:
            return
        except OSError:  # print it twice rather than never
            pass
    print(f"error: {text}", file=sys.stderr)


def words(error: Exception) -> str:
    """A fault as a readable message; of a rank's traceback the last line."""
    if isinstance(error, ImportError):
        return extras.to_install(error)
    if not isinstance(error, dp.WorkerError):
        return str(error)
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    last = lines[-1] if lines else "A rank failed without a word."
    missing = re.match(r"ModuleNotFoundError: No module named '(\w+)", last)
    return last if missing is None else extras.not_installed(missing[1])
