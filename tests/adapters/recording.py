"""What each step of a Trainer began with: its batch and all random streams."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


class Replay:
    """Mixed into a Lightning callback it records; afterwards it replays."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[Any] = []
        self.streams: list[Any] = []
        self.states: list[dict[str, Any]] = []

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        self.batches.append(copy.deepcopy(batch))
        self.streams.append(_streams())

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.states.append({n: t.clone() for n, t in tensors_of(pl_module).items()})

    def batch(self, step: int) -> Any:
        return copy.deepcopy(self.batches[step])

    @contextlib.contextmanager
    def scope(self, step: int) -> Iterator[None]:
        before = _streams()
        _set_streams(self.streams[step])
        try:
            yield
        finally:
            _set_streams(before)


def tensors_of(system: Any) -> dict[str, Any]:
    named = {**dict(system.named_parameters()), **dict(system.named_buffers())}
    return {name: tensor.detach() for name, tensor in named.items()}


def _streams() -> Any:
    return random.getstate(), np.random.get_state(), torch.get_rng_state()


def _set_streams(streams: Any) -> None:
    random.setstate(streams[0])
    np.random.set_state(streams[1])
    torch.set_rng_state(streams[2])
