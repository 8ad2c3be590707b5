"""Random generators of torch, Python and numpy: their states, read and written."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch


def _numpy_state(one: np.random.Generator) -> Any:
    return dict(one.bit_generator.state)


def _set_numpy_state(one: np.random.Generator, state: Any) -> None:
    one.bit_generator.state = state


_KINDS: dict[type, tuple[Callable[[Any], Any], Callable[[Any, Any], None]]] = {
    torch.Generator: (lambda one: one.get_state(), lambda one, s: one.set_state(s)),
    random.Random: (random.Random.getstate, random.Random.setstate),
    np.random.Generator: (_numpy_state, _set_numpy_state),
    np.random.RandomState: (
        lambda one: one.get_state(legacy=False),
        lambda one, state: one.set_state(state),
    ),
}


def is_generator(value: object) -> bool:
    """Whether a value is a random generator."""
    return isinstance(value, tuple(_KINDS))


def state_of(value: Any) -> Any:
    """The state of a generator, not shared with it."""
    return _functions(value)[0](value)


def set_state(value: Any, state: Any) -> None:
    """Put a generator into a state."""
    _functions(value)[1](value, state)


def same(one: Any, two: Any) -> bool:
    """Whether two states of one generator are equal."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, two)
    return pickle.dumps(one) == pickle.dumps(two)


def _functions(value: Any) -> tuple[Callable[[Any], Any], Callable[[Any, Any], None]]:
    return next(pair for kind, pair in _KINDS.items() if isinstance(value, kind))
