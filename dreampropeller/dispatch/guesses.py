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

_OF_VALUES = (AssertionError, IndexError, ValueError, RuntimeError)
"""Errors that the values of a state may cause; others end the solve at once."""
_log = logging.getLogger(__name__)


class Guesses:
    """Evaluates the slots of windows; the first failure at a guess is logged."""

    def __init__(self) -> None:
        self._has_told = False

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
        except (NotReproducible, torch.OutOfMemoryError):
            raise
        except _OF_VALUES as error:
            bad = {n: one for n, one in y.items() if one.is_floating_point()}
            if slot == 0 or not bad or _is_refusal(error):
                raise
            self._tell(step, error)
        name = min(bad, key=lambda name: bad[name].numel())
        return {name: torch.full_like(bad[name], torch.nan)}, {}

    def _tell(self, step: int, error: Exception) -> None:
        if not self._has_told:
            self._has_told = True
            _log.warning(
                "Step %d failed at a guess (%s: %s), and its window is cut before it. "
                "An error of the step itself ends the solve when it comes to it.",
                *(step, type(error).__name__, error),
            )


def _is_refusal(error: Exception) -> bool:
    """Whether the error was raised here, and not in the loss or a library."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = "" if trace is None else trace.tb_frame.f_globals.get("__name__", "")
    return where.startswith("dreampropeller.")
