"""Schedules by hand, and settings that cannot be used."""

from __future__ import annotations

from typing import Any

import pytest

from systems.settings import at_least, check_range, check_schedule, value_at


@pytest.mark.parametrize(
    ("schedule", "step", "value"),
    [
        (2, 100, 2.0),
        ([10, 1.0, 3.0, 20], 0, 1.0),
        ([10, 1.0, 3.0, 20], 15, 2.0),
        ([10, 1.0, 3.0, 20], 30, 3.0),
        ([1.0, 3.0, 20], 10, 2.0),
        ([0, 0.0, 1.0, 10, 5.0, 20], 5, 0.5),
        ([0, 0.0, 1.0, 10, 5.0, 20], 10, 1.0),
        ([0, 0.0, 1.0, 10, 5.0, 20], 15, 3.0),
        ([0, 0.0, 1.0, 10, 5.0, 20], 99, 5.0),
    ],
)
def test_schedule_by_hand(schedule: Any, step: int, value: float) -> None:
    check_schedule("x", schedule)
    assert value_at(schedule, step) == pytest.approx(value)


@pytest.mark.parametrize(
    "schedule",
    ["fast", [1.0, 2.0], [], [0, 1.0, 2.0, 0], [0, 1, 2, 3, 4], [0, "a", 1, 2], True],
)
def test_what_is_no_schedule_is_refused(schedule: Any) -> None:
    with pytest.raises(ValueError, match=r"`x` is .*write a number, or `\[start"):
        check_schedule("x", schedule)


def test_nan_is_not_at_least_anything() -> None:
    with pytest.raises(ValueError, match="`x` is nan: write 0 or more"):
        at_least("x", float("nan"), 0)


def test_range_upside_down_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`\[low, high\]` with -90 ≤ low ≤ high ≤ 90"):
        check_range("elevation_range", (80, -10), -90, 90)
