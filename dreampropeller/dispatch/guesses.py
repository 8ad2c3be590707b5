"""Evaluation at guesses, at which a drift may fail where the exact state is well.

A guess may hold a count that is out of range, or a matrix that is not positive
definite. Like one that is not finite, such a drift only cuts the window.
"""

from __future__ import annotations

import logging

import torch

from dreampropeller.trajectory import Drift
from dreampropeller.tree import Aux, State
from dreampropeller.verification import NotReproducible

OF_VALUES = (AssertionError, IndexError, ValueError, RuntimeError)
"""Errors that the values of a state may cause; others end the solve at once."""
_log = logging.getLogger(__name__)


class Guesses:
    """Evaluates the slots of windows; failures at guesses are logged, ever more rarely.

    A loop that fails at every guess advances one step at a time, which should be seen.
    """

    def __init__(self) -> None:
        self._times, self._next = 0, 1

    def evaluate(
        self, drift: Drift, slot: int, step: int, y: State
    ) -> tuple[State, Aux]:
        """A drift; one that is not finite where a guess makes it fail.

        An error of the step itself is raised when the step is the anchor.

        Args:
            drift: The drift.
            slot: Slot of the window; 0 is the anchor, which is exact.
            step: The step.
            y: The state.
        """
        try:
            return drift(step, y)
        except OF_VALUES as error:
            bad = {  # an empty tensor cannot show that it is not finite
                name: one
                for name, one in y.items()
                if one.is_floating_point() and one.numel()
            }
            if slot == 0 or not bad or not is_of_values(error):
                raise
            self._tell(step, error)
        name = min(bad, key=lambda name: bad[name].numel())
        return {name: torch.full_like(bad[name], torch.nan)}, {}

    def _tell(self, step: int, error: Exception) -> None:
        self._times += 1
        if self._times == self._next:
            self._next *= 10
            _log.warning(
                "Step %d failed at a guess (%s: %s), and its window is cut before it "
                "(failures so far: %d). An error of the step itself ends the solve "
                "when it comes to it.",
                *(step, type(error).__name__, error, self._times),
            )


def is_of_values(error: Exception) -> bool:
    """Whether values may have caused an error of `OF_VALUES`, raised by others."""
    if isinstance(error, (NotReproducible, torch.OutOfMemoryError)):
        return False
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = "" if trace is None else trace.tb_frame.f_globals.get("__name__", "")
    return not where.startswith("dreampropeller.")
