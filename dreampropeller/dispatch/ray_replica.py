"""The actor of Ray that evaluates drifts, and the messages to and from it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from dreampropeller.dispatch import wire
from dreampropeller.dispatch.guesses import Guesses
from dreampropeller.dispatch.process_group import local_device
from dreampropeller.trajectory import Drift, Trajectory
from dreampropeller.tree import Aux, State

if TYPE_CHECKING:
    import numpy as np

Message = tuple[list[wire.Entry], "np.ndarray"]


class Replica:
    """An actor: evaluates drifts of its own replica of the trajectory."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._drift: Drift | None = None
        self._guesses = Guesses()

    def ready(self, make: Callable[[], Trajectory[Any]]) -> int:
        """Build the replica; returns the process.

        Not in the constructor: what raises here is the replica's own error, and what
        ends the constructor is the worker's death.
        """
        torch.set_num_threads(self._threads)
        self._trajectory = make()
        self._device = local_device()
        return os.getpid()

    def ping(self) -> None:
        """A sign of life; answered by another thread during a drift."""

    def evaluate(self, slot: int, step: int, message: Message) -> Message:
        """The drift of a slot, from a guess."""
        y, _ = unpacked(message, self._device)
        if self._drift is None:
            self._drift = self._trajectory.make_drift(self._device)
        return packed(*self._guesses.evaluate(self._drift, slot, step, y))


def packed(drift: State, aux: Aux) -> Message:
    """A drift, or a state, as one array of bytes."""
    slot = wire.entries(drift, aux)
    row = list(slot)
    buffer = torch.empty(wire.size([row]), dtype=torch.uint8)
    wire.pack([row], [slot], buffer)
    return row, buffer.numpy()


def unpacked(message: Message, device: torch.device) -> tuple[State, Aux]:
    """The tensors of a message, in memory that torch has aligned."""
    row, content = message
    buffer = torch.empty(len(content), dtype=torch.uint8)
    buffer.numpy()[:] = content
    ((drift, aux),) = wire.unpack([row], buffer)
    return {name: value.to(device) for name, value in drift.items()}, aux
