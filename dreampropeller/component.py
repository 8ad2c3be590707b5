"""Components with a memory: threshold, window, predictor and acceleration.

A component is frozen; what it learns is a *memory*, which the solver passes in and out:

    memory = component.init()                        at the start of a solve
    memory = component.before(memory, evaluation)    once the drifts are known
    memory = component.after(memory, rollout)        once a stride is accepted
    memory = component.jumped(memory, y, parents)    after a jump

Its other methods depend on the kind of component (`bound`, `length`, `extend`,
`correct`). A memory is a frozen dataclass derived from `Memory`, so that checkpoints
can store it; its fields are nests (`dreampropeller.tree`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Generic, TypeVar

from dreampropeller.rollout import Evaluation, Rollout
from dreampropeller.trajectory import Parents
from dreampropeller.tree import State

LEAN = {"lean": True}
"""Metadata of a field that every checkpoint holds."""
FULL = {"lean": False}
"""Metadata of a field that a lean checkpoint leaves out; it needs a default."""


class Memory:
    """Marks the memory of a component: a frozen dataclass that a checkpoint can store.

    A field with the metadata `FULL` is left out of lean checkpoints.
    """

    @classmethod
    def kinds(cls) -> Iterator[type[Memory]]:
        """Every class of memory that has been defined."""
        for kind in cls.__subclasses__():
            yield kind
            yield from kind.kinds()


M = TypeVar("M")


class Component(Generic[M]):
    """A part of the solver with a memory of type `M`; default: no memory."""

    def init(self) -> M:
        """The memory at the start of a solve; default: None."""
        memory: Any = None
        return memory

    def before(self, memory: M, evaluation: Evaluation) -> M:
        """The memory once an iteration's drifts are known; default: unchanged."""
        del evaluation
        return memory

    def after(self, memory: M, rollout: Rollout) -> M:
        """The memory once an iteration's stride is accepted; default: unchanged."""
        del rollout
        return memory

    def jumped(self, memory: M, y: State, parents: Parents | None) -> M:
        """The memory after a jump; default: that of a new start.

        Args:
            memory: The memory before the jump.
            y: The state after the jump.
            parents: Origin of its rows; None: the rows are the same.
        """
        del memory, y, parents
        return self.init()

    def diagnostics(self, memory: M) -> dict[str, float]:
        """Estimates to log, by name; default: none."""
        del memory
        return {}
