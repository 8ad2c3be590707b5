"""Two ranks that stay: starting them takes longer than what most tests do there."""

from __future__ import annotations

import os
import pickle
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Client, Listener
from typing import Any, TypeVar

import torch

from dreampropeller import launch_workers

R = TypeVar("R")
NUM_RANKS = 2


class RankPool:
    """Calls functions on two ranks of one group, one function after the other.

    A function that raises is an error here, and leaves the ranks as they are.
    """

    def __init__(self) -> None:
        self._listener = Listener(family="AF_UNIX")
        self._launcher = threading.Thread(
            target=launch_workers,
            args=(serve, self._listener.address),
            kwargs={"num_workers": NUM_RANKS},
        )
        self._launcher.start()
        ranks = [self._listener.accept() for _ in range(NUM_RANKS)]
        self._ranks = [rank for _, rank in sorted((c.recv(), c) for c in ranks)]

    def __call__(self, function: Callable[..., R], *arguments: Any) -> list[R]:
        """Call an importable function; returns its value on each rank."""
        for rank in self._ranks:
            rank.send_bytes(pickle.dumps((function, arguments)))
        answers = [pickle.loads(rank.recv_bytes()) for rank in self._ranks]
        for _, error in answers:
            assert error is None, error
        return [value for value, _ in answers]

    def close(self) -> None:
        """End the ranks."""
        for rank in self._ranks:
            rank.send_bytes(pickle.dumps(None))
        self._launcher.join()
        self._listener.close()


def serve(address: str) -> None:
    """The work of a rank, until it is told to end."""
    torch.set_num_threads(1)  # results depend on the number of threads
    torch.distributed.init_process_group("gloo")
    with Client(address) as test:
        test.send(int(os.environ["RANK"]))
        while (call := pickle.loads(test.recv_bytes())) is not None:
            function, arguments = call
            value, error = None, None
            try:
                value = function(*arguments)
            except Exception:
                error = traceback.format_exc()
            test.send_bytes(pickle.dumps((value, error)))
