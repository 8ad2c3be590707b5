"""What evaluations leave behind, and whether a later one reads it.

A loop may set something at one step that stays (`if step == 100: config.weight = 2`,
the best loss so far). In the loop all later steps see it. A solve evaluates steps out
of order, and puts a module's attributes back, so that they would see it too early or
never. Now and then an evaluation is therefore made both with what others have left and
without it, and must not differ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from dreampropeller.attributes import Attributes
from dreampropeller.host import ModuleHost
from dreampropeller.reachable import Reachable
from dreampropeller.trajectory import Drift
from dreampropeller.tree import Aux, State, copy_nest
from dreampropeller.verification import NotReproducible, names, require_equal

_FIRST, _EVERY = 8, 50
"""Evaluations after which the loss is looked at, and those between two looks."""
_ALWAYS, _GROWTH = 6, 3
"""What is left each time is tried six times, then the 18th, 54th, 162nd … time."""


class Due:
    """When an evaluation is made again, without what others have left.

    Args:
        last: The last step, at which all that stays is looked at.
    """

    def __init__(self, last: int) -> None:
        self.last = last
        self._times: dict[tuple[str, ...], int] = {}

    def __call__(self, step: int, changed: Sequence[str]) -> bool:
        """Whether it is now, with what has changed by name; counts."""
        key = tuple(changed)
        times = self._times[key] = self._times.get(key, 0) + 1
        power = _ALWAYS
        while power < times:
            power *= _GROWTH
        return times <= _ALWAYS or power == times or step >= self.last - 1


def require_unread(
    step: int,
    found: State,
    other: Callable[[], State],
    changed: Sequence[str],
    noise: Mapping[str, float],
) -> None:
    """Compare a drift with one from other leftovers.

    Args:
        step: The step.
        found: Its drift.
        other: Evaluates it with, or without, what others have left.
        changed: Names of what they have left.
        noise: See `dreampropeller.verification.Probe`.

    Raises:
        NotReproducible: They differ.
    """
    try:
        again = other()
    except (NotReproducible, torch.OutOfMemoryError):
        raise
    except Exception:  # which is a difference, too
        again = {}
    require_equal(
        found,
        again,
        f"Step {step} was evaluated with what earlier ones have left in "
        f"{names(changed)}, and without it",
        noise,
        lambda: (
            "What a step sets and leaves reaches others too early or never: compute it "
            "from `step` in every step, keep it in a registered buffer if the state "
            "decides it, or make the change between two solves."
        ),
    )


class Leftovers:
    """Evaluates drifts in a module, and compares.

    Args:
        host: The module; its attributes are put back after each evaluation.
        captured: What the loss refers to, as it was before the run.
        last: The last step.
        noise: See `dreampropeller.verification.Probe`.
    """

    def __init__(
        self,
        host: ModuleHost,
        captured: Reachable,
        last: int,
        noise: Mapping[str, float],
    ) -> None:
        self._host, self._captured, self._noise = host, captured, noise
        self._due = Due(last)
        self._count, self._step = 0, -1
        self._left: tuple[int, list[str], Attributes] | None = None
        host.watch, host.left = (lambda changed: self._due(self._step, changed)), None

    def evaluate(self, drift: Drift, step: int, y: State) -> tuple[State, Aux]:
        """Evaluate a drift.

        Raises:
            NotReproducible: It depends on what an earlier evaluation has left.
        """
        self._count += 1
        self._step = step
        alone = self._without(drift, step, y)
        self._taken()
        found, aux = drift(step, y)
        own = self._taken()
        if alone is not None:
            require_unread(step, found, *alone, self._noise)
        # In the loop nothing of a later step is left for an earlier one.
        if self._left is not None and step > self._left[0]:
            found = copy_nest(found)
            _, changed, attributes = self._left
            attributes.restore()
            require_unread(step, found, lambda: drift(step, y)[0], changed, self._noise)
            self._left = None
        if own is not None:
            self._left = (step, *own)
        return found, aux

    def _taken(self) -> tuple[list[str], Attributes] | None:
        """What the last evaluation has left in the module, if that was kept."""
        left, self._host.left = self._host.left, None
        return left

    def _without(
        self, drift: Drift, step: int, y: State
    ) -> tuple[Callable[[], State], Sequence[str]] | None:
        """The drift without what has changed that the loss refers to, and its names."""
        looks = self._count <= _FIRST or self._count % _EVERY == 0
        if not (looks or step == self._due.last):
            return None
        changed = self._captured.changed()
        if not changed or not self._due(step, changed):
            return None
        with self._captured.as_recorded():
            try:
                alone = copy_nest(drift(step, y)[0])
            except torch.OutOfMemoryError:
                raise
            except Exception:  # it needs what is left
                alone = {}
        return lambda: alone, changed
