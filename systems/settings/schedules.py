"""Numbers that change with the step, in threestudio's forms."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, TypeAlias

Schedule: TypeAlias = Any
"""A number, or ``[start, v0, v1, end]``; see `value_at`."""


def check_schedule(
    name: str, value: Schedule, least: float = -math.inf, most: float = math.inf
) -> None:
    """Refuse what `value_at` cannot read, and values out of bounds.

    Raises:
        ValueError: Names the setting and the form of a schedule, or its bounds.
    """
    _check_form(name, value)
    if not all(least <= number <= most for number in values_of(value)):
        bounds = f"from {least:g} to {most:g}" if most < math.inf else f"{least:g} up"
        raise ValueError(f"`{name}` is {value}: its values go {bounds}.")


def check_order(low: str, a: Schedule, high: str, b: Schedule) -> None:
    """Refuse a schedule that exceeds another at some step.

    Raises:
        ValueError: Names both schedules, and the step.
    """
    for step in sorted({0, *_steps_of(a), *_steps_of(b)}):  # both are linear in between
        least, most = value_at(a, step), value_at(b, step)
        if least > most:
            raise ValueError(
                f"`{low}` is {least:g} at step {step}, above `{high}`, {most:g}: write "
                f"at most `{high}`."
            )


def _check_form(name: str, value: Schedule) -> None:
    if _is_number(value):
        return
    if isinstance(value, Sequence) and all(map(_is_number, value)):
        steps, values = _pieces(value)
        rising = all(a < b for a, b in itertools.pairwise(steps))
        whole = len(value) >= 3 and len(values) == len(steps)
        if whole and rising:
            return
    raise ValueError(
        f"`{name}` is {value!r}: write a number, or `[start, v0, v1, end]` to go from "
        "v0 at step `start` to v1 at step `end`."
    )


def value_at(schedule: Schedule, step: float) -> float:
    """The value of a schedule at a step: constant before its start and after its end.

    Args:
        schedule: A number; ``[start, v0, v1, end]``, linear in between; ``[v0, v1,
            end]``, which starts at 0; or ``[start, v0, v1, step1, v2, step2, …]``,
            with several pieces (threestudio's forms).
        step: The step on the trajectory.
    """
    if _is_number(schedule):
        return float(schedule)
    steps, values = _pieces(schedule)
    if step <= steps[0]:
        return float(values[0])
    pieces = zip(itertools.pairwise(steps), itertools.pairwise(values), strict=True)
    for (left, right), (a, b) in pieces:
        if step < right:
            return float(a + (b - a) * (step - left) / (right - left))
    return float(values[-1])


def values_of(schedule: Schedule) -> list[float]:
    """The values that define a schedule; all others lie between them."""
    return [schedule] if _is_number(schedule) else _pieces(schedule)[1]


def _pieces(schedule: Sequence[float]) -> tuple[list[float], list[float]]:
    """The breakpoints of a schedule, and its values there."""
    entries = [0, *schedule] if len(schedule) == 3 else list(schedule)
    return [*entries[:1], *entries[3::2]], [*entries[1:2], *entries[2::2]]


def _steps_of(schedule: Schedule) -> list[float]:
    return [] if _is_number(schedule) else _pieces(schedule)[0]


def _is_number(value: object) -> bool:
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
    )
