"""Relative errors of drifts, and their secants: believed within bounds, and pooled.

A secant is the relative change of a drift between two guesses of its step, divided by
their distance (Eq. 9).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

COUNTED = 4
"""Secants that an iteration counts as at most: those of one window are akin."""
SATURATED = 1
"""Relative change of a drift beyond which a secant is only a lower bound."""
LEAST = 4
"""A step's own secant counts as at least the pooled one divided by this."""


@dataclass(frozen=True)
class Measurement:
    """A step that was evaluated twice.

    Attributes:
        step: The step.
        error: Relative change of its drift.
        distance: Distance of the two guesses, above 0.
    """

    step: int
    error: float
    distance: float

    @property
    def secant(self) -> float:
        """The relative change over the distance."""
        return self.error / self.distance


def believed(found: Sequence[Measurement], pooled: float) -> dict[int, float]:
    """The secants of steps, none smaller than can be believed.

    Guesses that ran away are far apart. A drift that changed by more than itself says
    little of the way between, and one that happens to be alike at both ends nothing at
    all. The first kind is raised to the upper quartile of this iteration's other
    secants (to the largest if there is no other), then all to a quarter of the pool's:
    those of different steps differ by a factor of two to three.

    Args:
        found: What this iteration measured.
        pooled: Upper quartile of what earlier ones did; infinite if there is none.
    """
    known = {one.step: one.secant for one in found}
    certain = sorted(one.secant for one in found if one.error <= SATURATED)
    if certain:
        usual = certain[math.ceil(0.75 * len(certain)) - 1]
    else:
        usual = max(known.values(), default=0.0)
    least = pooled / LEAST if math.isfinite(pooled) else 0.0
    for one in found:
        if one.error > SATURATED:
            known[one.step] = max(known[one.step], usual)
        known[one.step] = max(known[one.step], least)
    return known


def upper_quartile(secants: Sequence[Sequence[float]]) -> float:
    """Of the secants of several iterations; infinite if there are none."""
    known = sorted(
        (secant, min(1, COUNTED / len(part))) for part in secants for secant in part
    )
    left = 0.75 * sum(weight for _, weight in known)
    for secant, weight in known:
        left -= weight
        if left < -1e-9:  # rounding
            return secant
    return math.inf


def relative_error(
    change: dict[str, float], unit: dict[str, float], moved: dict[str, float]
) -> float:
    """The relative error of a drift, tensors weighted by squared displacement.

    If no displacement is known, they are weighted by their squared drift, which makes
    the error Euclidean. NaN if there is no drift.

    Args:
        change: Norm of the change of the drift, by tensor.
        unit: Norm that it is relative to.
        moved: Displacement of the state.
    """
    known = {name: size for name, size in unit.items() if size > 0}
    ways = {name: moved.get(name, 0.0) for name in known}
    whole = math.hypot(*ways.values())
    if not whole > 0:
        ways, whole = known, math.hypot(*known.values())
    if not whole > 0:
        return math.nan
    return math.hypot(
        *(way / whole * change[name] / unit[name] for name, way in ways.items())
    )
