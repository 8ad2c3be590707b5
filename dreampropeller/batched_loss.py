r"""Losses whose expensive part takes several steps at once.

A loss is split in two: what a step computes by itself, such as images of its views, and
what one call computes for several steps, such as a diffusion model on all the images,

$$\ell_1, \dots, \ell_w = \mathrm{together}\bigl(\mathrm{each}(t_1, \theta_1), \dots,
  \mathrm{each}(t_w, \theta_w)\bigr).$$

The gradients of a window are then one call and one backward pass. They are close to
those of each step by itself, not bitwise equal: kernels differ with the batch size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dreampropeller.sharded_loss import ShardedLoss
from dreampropeller.trajectory import Drift
from dreampropeller.tree import Aux, State


@dataclass(frozen=True)
class BatchedLoss:
    """A loss in two parts; as a function of step and state, that of one step.

    Args:
        each: ``(step, y)``, or ``(step, module)`` for
            `OptimizationTrajectory.from_module`, returns what `together` needs of the
            step. It is called in the step's random scope.
        together: Called with a list of these; returns the loss of each, or a tuple
            ``(loss, aux)`` of each. Its random numbers must be keyed by the steps.
    """

    each: Callable[[int, Any], Any]
    together: Callable[[list[Any]], list[Any]]

    def __call__(self, step: int, y: Any) -> Any:
        """The loss of one step, or ``(loss, aux)``."""
        return self.together([self.each(step, y)])[0]

    def then(self, function: Callable[[list[Any]], list[Any]]) -> BatchedLoss:
        """The same with a function applied to the list that `together` returns."""
        return BatchedLoss(self.each, lambda parts: function(self.together(parts)))

    def on_states(self, module: nn.Module) -> BatchedLoss:
        """The same as a function of states, in whose tensors the module is evaluated.

        Several states are alive at once, so hooks and whatever else refers to the
        module's own tensors do not see theirs.
        """
        holder = _Holder(module, self.each)

        def each(step: int, y: State) -> Any:
            named = {f"module.{name}": tensor for name, tensor in y.items()}
            found = torch.func.functional_call(holder, named, (step,))
            y.update({name: named[f"module.{name}"] for name in y})  # new buffers
            return found

        return BatchedLoss(each, self.together)


class _Holder(nn.Module):
    """A function of a module as a `forward`, so that tensors can be swapped."""

    def __init__(
        self, module: nn.Module, function: Callable[[int, nn.Module], Any]
    ) -> None:
        super().__init__()
        self.module = module
        self._function = function

    def forward(self, step: int) -> Any:
        return self._function(step, self.module)


def on_states(loss: Any, module: nn.Module | None) -> BatchedLoss | None:
    """The loss of a trajectory as a `BatchedLoss` of states; None if it is none.

    Args:
        loss: The loss, or a wrapper of a loss of the module.
        module: The module whose loss it is; None: the loss is one of states.
    """
    written = getattr(loss, "__wrapped__", loss)
    written = written.whole if isinstance(written, ShardedLoss) else written
    if not isinstance(written, BatchedLoss):
        return None
    return written if module is None else written.on_states(module)


@dataclass(frozen=True)
class BatchedDrift:
    """A drift whose window can be one call.

    Args:
        one: The drift of a step.
        batch: The drifts of several steps at their states, in order.
    """

    one: Drift
    batch: Callable[[Sequence[int], Sequence[State]], list[tuple[State, Aux]]]

    def __call__(self, step: int, y: State) -> tuple[State, Aux]:
        """The drift of one step, by itself."""
        return self.one(step, y)
