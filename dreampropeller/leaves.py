"""A state as the leaves of a gradient, and the drift that follows from it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from dreampropeller.buffers import buffer_drift
from dreampropeller.tree import State, like


@dataclass(frozen=True)
class Leaves:
    """A state to evaluate a loss at; several may be alive at once.

    Attributes:
        y: The state, which stays as it is.
        leaves: The tensors to differentiate by, by name.
        view: The leaves and copies of the buffers, which a loss may write into.
    """

    y: State
    leaves: State
    view: State

    @classmethod
    def of(cls, y: State, trainable: Iterable[str], names: Iterable[str]) -> Leaves:
        """Leaves and copies of a state.

        Args:
            y: The state.
            trainable: Names of the parameters to differentiate by.
            names: Names of all parameters and buffers.
        """
        leaves = {name: y[name].detach().requires_grad_(True) for name in trainable}
        view = {
            name: leaves[name] if name in leaves else y[name].detach().clone()
            for name in names
        }
        return cls(y, leaves, view)

    def gradients(self, found: Sequence[Tensor | None]) -> State:
        """The gradients that exist.

        Args:
            found: The gradient of each leaf; None where the loss does not depend on it.
                A loss that went backward itself has left others in `.grad`.
        """
        return {  # absent, not zero: a zero would make AdamW decay the parameter
            name: like(gradient, leaf)
            for (name, leaf), last in zip(self.leaves.items(), found, strict=True)
            if (gradient := _sum(leaf.grad, last)) is not None
        }

    def buffers(self) -> State:
        """The changes of the buffers."""
        return buffer_drift(
            {name: self.y[name] for name in self.view if name not in self.leaves},
            {name: tensor.detach() for name, tensor in self.view.items()},
        )


def _sum(one: Tensor | None, two: Tensor | None) -> Tensor | None:
    if one is None or two is None:
        return two if one is None else one
    return one + two
