"""Starts the ranks of one machine with torch's elastic launcher."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar

from torch.distributed.elastic.multiprocessing.errors import (
    ChildFailedError,
    ProcessFailure,
)
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from tqdm import tqdm

from dreampropeller.dispatch.base import WorkerError

R = TypeVar("R")
_STARTED_WHILE_IMPORTED = 87
"""Exit code of a worker whose script calls `launch_workers` during import."""
_GRACE = 8.0
"""Seconds that a worker may live on after its launcher was killed."""


def launch_workers(
    function: Callable[..., R], *args: Any, num_workers: int, max_restarts: int = 0
) -> list[R]:
    """Call a function in `num_workers` new processes, as `torchrun` would start them.

    Args:
        function: Importable from a module (processes are spawned); it calls `solve`
            with a `DistributedDispatcher`.
        *args: Picklable arguments of the function.
        num_workers: Number of processes on this machine, one per device; further ones
            share GPUs.
        max_restarts: Number of times that all processes are started again after one
            failed. The function then continues from its last checkpoint;
            `process_group.attempt()` counts its starts.

    Returns:
        The return value of the function on each rank.

    Raises:
        WorkerError: A rank failed. All other ranks have been ended.
    """
    if num_workers < 1:
        raise ValueError(f"`num_workers` is {num_workers}: write at least 1.")
    if max_restarts < 0:
        raise ValueError(f"`max_restarts` is {max_restarts}: write at least 0.")
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        sys.exit(_STARTED_WHILE_IMPORTED)  # a new process imports the script again
    with tempfile.TemporaryDirectory(prefix="dreampropeller-") as folder:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=num_workers,
            run_id=f"dreampropeller-{os.getpid()}",
            **_meeting(),
            max_restarts=max_restarts,
            monitor_interval=0.1,
            **_logs_in(folder),
        )
        try:
            with _quiet(), _temporary_files_in(folder):
                results = elastic_launch(config, _run)(
                    os.getpid(), folder, function, args
                )
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            if failure.exitcode == _STARTED_WHILE_IMPORTED:
                raise WorkerError(
                    "Every process imports the script that calls `launch_workers`, and "
                    "would call it again: "
                    'put the call under `if __name__ == "__main__":`.'
                ) from None
            raise WorkerError(
                f"Rank {rank} failed (exit code {failure.exitcode}):{_text(failure)}"
            ) from None
    return [results[rank] for rank in range(num_workers)]


def _meeting() -> dict[str, Any]:
    """Where the ranks meet: out of reach of other machines."""
    try:
        from dreampropeller.dispatch import loopback
    except ImportError:  # torch < 2.4
        return {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0"}
    return {"rdzv_backend": loopback.register(), "rdzv_endpoint": loopback.HOST}


def _logs_in(folder: str) -> dict[str, Any]:
    """The folder of the launcher's files; by default one is left behind."""
    try:
        from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    except ImportError:  # torch < 2.3
        return {"log_dir": folder}
    return {"logs_specs": DefaultLogsSpecs(log_dir=folder)}


@contextlib.contextmanager
def _temporary_files_in(folder: str) -> Iterator[None]:
    """Let torch leave its error files, which it does not remove, in a folder."""
    before, tempfile.tempdir = tempfile.tempdir, folder
    try:
        yield
    finally:
        tempfile.tempdir = before


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch from logging a failure that is about to be raised anyway."""
    loggers = [
        logging.getLogger("torch.distributed.elastic.multiprocessing.api"),
        logging.getLogger("torch.multiprocessing.spawn"),
    ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _text(failure: ProcessFailure) -> str:
    """The traceback that a rank recorded, or on the same line why it ended."""
    message = failure.error_file_data.get("message")
    if isinstance(message, dict):
        stack = message["extraInfo"]["py_callstack"]
        stack = stack.rpartition("WorkerError: ")[2]  # it holds the first traceback
        return f"\n{stack}"
    return f" {failure.message}"


def _run(
    parent: int, folder: str, function: Callable[..., R], args: tuple[Any, ...]
) -> R:
    threading.Thread(target=_follow, args=(parent, folder), daemon=True).start()
    # The default is a semaphore with a name, which a killed process leaves behind.
    tqdm.set_lock(threading.RLock())
    if sys.platform == "linux":  # gloo's connections stay on this machine, too
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        return function(*args)
    except BaseException as error:
        if os.getppid() != parent:
            print(f"error: {error}", file=sys.stderr)
            _end(folder)
        raise


def _follow(parent: int, folder: str) -> None:
    """End this process if its launcher is killed, as nothing else would end it.

    The launcher holds the store of the process group. So the heartbeat notices, too,
    and a solve on several ranks fails and is saved meanwhile.
    """
    while os.getppid() == parent:
        time.sleep(0.5)
    time.sleep(_GRACE)
    _end(folder)


def _end(folder: str) -> NoReturn:
    """End this process without its launcher, whose files nobody else removes."""
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)
