"""The Ray cluster of a dispatcher: one that is joined, or an embedded one."""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import signal
import socket
import tempfile
from pathlib import Path
from typing import Any

from dreampropeller.dispatch.base import WorkerError

_PATIENCE = 5.0
"""Seconds that the address of a cluster may take to answer."""


def load() -> Any:
    """The module `ray`.

    Raises:
        ImportError: It is not installed.
    """
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise ImportError(
            "`RayDispatcher` needs Ray: `pip install ray`, or use "
            "`DistributedDispatcher`, which needs nothing more."
        ) from error


def check_address(address: str | None) -> None:
    """Refuse an address where nothing listens: `ray.init` would try it for minutes.

    Raises:
        ValueError: It is no address.
        OSError: Nothing listens there.
    """
    if address is None or address in ("auto", "local"):
        return
    place = address.removeprefix("ray://")
    if "://" in place:  # of another client, which Ray knows
        return
    host, _, port = place.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ValueError(
            f"The address of the Ray cluster is `{address}`: write `HOST:PORT`, such "
            "as `10.0.0.1:6379`, `ray://HOST:10001` or `auto`."
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), _PATIENCE).close()
    except OSError as error:
        raise ConnectionError(
            f"No Ray cluster answers at `{address}` ({error}): start one with `ray "
            "start --head`, which prints its address, or leave the address out for "
            "one on this machine."
        ) from error


def resources(ray: Any) -> str:
    """A clause about what a cluster has, and what of it is free."""
    found = ray.cluster_resources(), ray.available_resources()
    has, free = (
        " and ".join(f"{one.get(name, 0):g} {name}" for name in ("CPU", "GPU"))
        for one in found
    )
    return f"the cluster has {has}, of which {free} are free"


class Cluster:
    """Joins a cluster, or starts and ends an embedded one.

    Args:
        ray: The module.
        address: Address of a running cluster; None: an embedded one, or the one that
            the process has joined before.
        num_cpus: CPUs of an embedded one.
    """

    def __init__(self, ray: Any, address: str | None, num_cpus: int) -> None:
        self._ray, self._address, self._num_cpus = ray, address, num_cpus
        self._owned = False
        self._folder: str | None = None

    def start(self) -> None:
        """Join or start it; nothing if the process has joined one before.

        Raises:
            WorkerError: Ray cannot do so.
        """
        if self._ray.is_initialized():
            return
        self._owned = True
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            self._open()
        except Exception as error:  # whatever Ray raises, `Exception` itself too
            raise WorkerError(
                "Ray could not start a cluster, or join one: "
                f"{' '.join(str(error).split())}"
            ) from error

    def _open(self) -> None:
        quiet = {"log_to_driver": False, "configure_logging": False}
        if self._address is not None:
            self._ray.init(self._address, **quiet)
            return
        self._folder = tempfile.mkdtemp(prefix="dp-")  # a socket's path is short
        self._ray.init(
            num_cpus=self._num_cpus,
            include_dashboard=False,
            object_store_memory=2**28,
            _node_ip_address="127.0.0.1",
            _temp_dir=self._folder,
            **quiet,
        )

    def end(self, process: int) -> None:
        """Kill the process of a worker of an embedded cluster, which may be stopped.

        Ray itself asks it first, and waits some seconds for an answer.
        """
        if self._folder is None or not process:
            return
        with contextlib.suppress(OSError):  # it has ended, or there is no /proc
            # Not another process, which has got its number since.
            if b"ray::" in Path(f"/proc/{process}/cmdline").read_bytes():
                os.kill(process, signal.SIGKILL)

    def stop(self) -> None:
        """Leave it, or end an embedded one."""
        if self._owned:
            self._ray.shutdown()
            self._owned = False
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None
