r"""Trajectories: the problems to solve.

A trajectory is the recurrence (Eq. 1 of `docs/method.md`)

$$y_{t+1}, c_{t+1} = \mathrm{update}(t, y_t, c_t, \mathrm{drift}(t, y_t)),
  \qquad t = 0, \dots, T - 1.$$

`drift` is expensive and depends on $y$ alone; `update` is cheap and also sees the
*carry* $c$ (optimizer moments, multistep history). The solver uses nothing else.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import ClassVar, Generic, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from dreampropeller.identity import Fingerprint
from dreampropeller.shards import added_up
from dreampropeller.tree import Aux, State
from dreampropeller.verification import Checked, EvaluationFailed, probe

C = TypeVar("C")

Parents = dict[str, Tensor]
"""Row map of a jump: entry $r$ of `parents[name]` is the old row of new row $r$, or −1
for a row that is new; int64, shape ``(rows,)``."""


@runtime_checkable
class Drift(Protocol):
    """A pure function of step and state; a plain function is a `Drift`."""

    def __call__(self, step: int, y: State) -> tuple[State, Aux]:
        """Evaluate the drift of a step.

        Args:
            step: The step $t$, from 0 to `num_steps` − 1.
            y: A guess of the state at the step. It must not be changed.

        Returns:
            The drift, whose names and shapes need not match those of `y`, and scalars
            to log.
        """
        ...


class Trajectory(abc.ABC, Generic[C]):
    """A recurrence with an expensive drift and a cheap update (Eq. 1).

    Attributes:
        num_steps: The number of steps $T$.
    """

    num_steps: int
    advice: ClassVar[str] = (
        'Lower the learning rate, or set `non_finite="skip"` to leave such steps out.'
    )
    """What to do about a drift that is not finite."""

    @abc.abstractmethod
    def init(self) -> tuple[State, C]:
        """The state and carry at step 0: the same values at every call, own tensors."""

    @abc.abstractmethod
    def make_drift(self, device: torch.device) -> Drift:
        """Build the drift; called once per worker.

        Args:
            device: Device of the states to evaluate.
        """

    def make_shard(self, device: torch.device, index: int, count: int) -> Drift:
        """Build one of several drifts that make up the drift; default: refused.

        A step's random numbers are drawn for all its views and then sliced. What is
        not a sum over views (buffers, terms without views) is reported by shard 0
        only. A shard without views returns an empty drift.

        Args:
            device: Device of the states to evaluate.
            index: Index of the slice of the step's views, from 0 to `count` − 1.
            count: The number of slices.

        Raises:
            ValueError: The trajectory's steps cannot be split.
        """
        if count == 1:
            return self.make_drift(device)
        raise ValueError(
            f"`{type(self).__name__}` cannot split a step into {count} shards (this "
            f"would be shard {index}): it gives no access to the step's views. Split "
            "the window instead, one step per worker (`dispatch.views=1`, `views=1`), "
            "or write its `make_shard`."
        )

    def join_shards(self, parts: Sequence[tuple[State, Aux]]) -> tuple[State, Aux]:
        """The drift of a step from those of its shards; default: their sum.

        Called on every rank with the same parts, and deterministic.

        Args:
            parts: Drift and scalars of each shard, in order. They must not be changed.
        """
        return added_up(parts)

    @abc.abstractmethod
    def update(self, step: int, y: State, carry: C, drift: State) -> tuple[State, C]:
        """Move from step to step + 1: cheap, deterministic, the same on every rank.

        It may consume its carry; `y` and `drift` must not be changed.
        """

    def next_jump(self, step: int) -> int:
        """The smallest jump after `step` (−1 asks for the first); default: none."""
        del step
        return self.num_steps

    def jump(self, step: int, y: State, carry: C) -> tuple[State, C, Parents | None]:
        """Change the structure of the state at a step, before its drift.

        Returns:
            The new state and carry, and the origin of each row (None: no entry changed
            its rows).
        """
        del step
        return y, carry, None

    def check(self, step: int, y: State, carry: C, drift: Drift) -> Checked | None:
        """Verify before a run that it will be the run it stands for.

        Here: drifts again in reverse order, and an update twice from one carry
        (`dreampropeller.verification`). The hosts of a user's module also compare with
        the module's own loop.

        Args:
            step: The step at which the solve begins.
            y: The state at this step; it must not be changed.
            carry: The carry; it must not be changed.
            drift: This worker's drift.

        Returns:
            What was verified; None if an evaluation failed, which the run will meet.

        Raises:
            NotReproducible: A step depends on more than its index and state.
        """
        try:
            return probe(self, step, y, carry, drift).checked(whole=False)
        except EvaluationFailed:
            return None

    def fingerprint(self) -> Fingerprint:
        """The values that must agree for a state to be resumed (`identity`)."""
        return {"trajectory": type(self).__qualname__, "num_steps": self.num_steps}

    def error_scale(self, step: int) -> float:
        """The unit of the error of the state at a step; default 1."""
        del step
        return 1.0


def next_jump(trajectory: Trajectory, step: int) -> int:
    """The next jump, checked and cut at the end of the trajectory.

    Raises:
        ValueError: The trajectory named a step that is not in the future.
    """
    jump = trajectory.next_jump(step)
    if jump <= step:
        raise ValueError(
            f"`next_jump({step})` returned {jump}; it must return the smallest jump "
            f"after step {step}, or `num_steps` when there is none."
        )
    return min(jump, trajectory.num_steps)
