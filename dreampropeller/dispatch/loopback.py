"""Where the ranks of one machine meet: a store that only this machine can reach.

torch's own rendezvous listens on every address of the machine, and reads pickles from
its store. Here the store listens on 127.0.0.1 alone, at a port that the system chooses
and nobody else can take in between, and nothing is pickled.
"""

from __future__ import annotations

import socket
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)

HOST = "127.0.0.1"
NAME = "dreampropeller-loopback"
"""The backend's name in torch's registry."""


class Loopback(RendezvousHandler):
    """One launcher that meets nobody else, and holds the store of its ranks.

    Args:
        run_id: Prefix of the launcher's own keys.
    """

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id
        self._listener = socket.socket()
        self._listener.bind((HOST, 0))
        self._listener.listen()
        self._port = self._listener.getsockname()[1]
        make: Any = vars(dist)["TCPStore"]  # missing from torch's type stubs
        self._store = make(
            HOST,
            self._port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(minutes=10),
            master_listen_fd=self._listener.detach(),  # the store closes it
        )

    @property
    def use_agent_store(self) -> bool:
        """The ranks use this store, too, so that it outlives their restarts."""
        return True

    def get_backend(self) -> str:
        """The backend's name."""
        return NAME

    def next_rendezvous(self) -> RendezvousInfo:
        """The store, at once: there is one launcher."""
        store = dist.distributed_c10d.PrefixStore(self._run_id, self._store)
        return RendezvousInfo(store, 0, 1, RendezvousStoreInfo(HOST, self._port))

    def is_closed(self) -> bool:
        """Never: the launcher ends with its ranks."""
        return False

    def set_closed(self) -> None:
        """Nothing to do."""

    def num_nodes_waiting(self) -> int:
        """Nobody else can join."""
        return 0

    def get_run_id(self) -> str:
        """The prefix of the launcher's keys."""
        return self._run_id

    def shutdown(self) -> bool:
        """Nothing to do: the store ends with the launcher."""
        return True


def _make(parameters: RendezvousParameters) -> RendezvousHandler:
    return Loopback(parameters.run_id)


def register() -> str:
    """Make the backend known to torch; returns its name."""
    rendezvous_handler_registry.register(NAME, _make)
    return NAME
