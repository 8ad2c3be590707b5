"""Strides and thresholds worked by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

from dreampropeller import EMAThreshold, FixedThreshold, SlidingWindow
from dreampropeller.threshold import Observation


@pytest.mark.parametrize(
    ("passed", "stride"),
    [
        ([True], 1),
        ([False], 1),
        ([False, True, True], 1),
        ([True, False, True], 2),
        ([True, True, False], 3),
        ([True, True, True], 3),
    ],
)
def test_stride_is_the_first_failure_plus_one(passed: list[bool], stride: int) -> None:
    assert SlidingWindow(len(passed)).stride(passed) == stride


@pytest.mark.parametrize(("remaining", "length"), [(1, 1), (6, 6), (7, 7), (90, 7)])
def test_window_is_cut_by_what_remains(remaining: int, length: int) -> None:
    assert SlidingWindow(7).length(None, remaining) == length


def observed(errors: list[float]) -> Observation:
    return Observation([], [], [], [], errors)


@pytest.mark.parametrize(
    ("adaptivity", "errors", "after"),
    [
        ("mean", [1.0, 2.0, 6.0], 0.9 * 10 + 0.1 * 3),
        ("median", [1.0, 2.0, 6.0], 0.9 * 10 + 0.1 * 2),
        ("median", [1.0, 2.0, 6.0, 7.0], 0.9 * 10 + 0.1 * 6),  # position, not median
        ("median", [9.0], 0.9 * 10 + 0.1 * 9),
        ("mean", [1.0, math.nan], 10),
        ("mean", [1.0, math.inf], 10),
        ("median", [math.nan, 5.0], 0.9 * 10 + 0.1 * 5),
    ],
)
def test_published_rule_follows_the_window(
    adaptivity: Any, errors: list[float], after: float
) -> None:
    threshold = EMAThreshold(10.0, 0.9, adaptivity)
    memory = threshold.adapt(threshold.init(), observed(errors))
    assert threshold.bound(memory) == pytest.approx(after)


def test_fixed_threshold_never_adapts() -> None:
    threshold = FixedThreshold(2.5)
    memory = threshold.adapt(threshold.init(), observed([9.0]))
    assert threshold.bound(memory) == 2.5
    assert not threshold.exact
    assert FixedThreshold(0).exact
