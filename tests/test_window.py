"""Strides and thresholds worked by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

from dreampropeller import (
    AdaptiveWindow,
    BlockWindow,
    EMAThreshold,
    FixedThreshold,
    PicardSolver,
    Rollout,
    Sequential,
    SequentialStart,
    SlidingWindow,
    solve,
)
from tests.helpers import TOYS, rolled_out, tree_equal


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
    assert SlidingWindow(len(passed)).stride(None, passed) == stride


@pytest.mark.parametrize(("remaining", "length"), [(1, 1), (6, 6), (7, 7), (90, 7)])
def test_window_is_cut_by_what_remains(remaining: int, length: int) -> None:
    assert SlidingWindow(7).length(None, 0, remaining) == length


def tried(length: int, stride: int) -> Rollout:
    return rolled_out([], [], [], stride, length=length)


def test_adaptive_window_follows_the_strides() -> None:
    window = AdaptiveWindow(4, 32, multiple=4)
    memory, sizes = window.init(), []
    for _ in range(12):  # everything passes
        sizes.append(window.length(memory, 0, 1000))
        memory = window.after(memory, tried(sizes[-1], sizes[-1]))
    # Mean strides 2, 3, 5.5, 8.75 … make round(2 s̄ / 4) 4.
    assert sizes[:4] == [4, 8, 12, 16]
    assert sizes[-1] == 32
    for _ in range(20):  # a quarter passes: down to the bound
        size = window.length(memory, 0, 1000)
        memory = window.after(memory, tried(size, max(1, size // 4)))
    assert window.length(memory, 0, 1000) == 4
    for _ in range(30):  # six pass whatever the size: twice as many are tried
        memory = window.after(memory, tried(window.length(memory, 0, 1000), 6))
    assert window.length(memory, 0, 1000) == 12
    assert window.length(memory, 0, 3) == 3
    assert (
        window.after(memory, tried(3, 1)) == memory
    )  # cut by the end: teaches nothing


def test_adaptive_window_with_equal_bounds_is_a_sliding_one() -> None:
    strides = [
        solve(TOYS["network-sgd"].make(), PicardSolver(window, FixedThreshold(1e-4)))
        for window in (AdaptiveWindow(5, 5, 3), SlidingWindow(5))
    ]
    assert strides[0].stats == strides[1].stats


def observed(errors: list[float]) -> Rollout:
    return rolled_out([], [], [], errors=errors)


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
    memory = threshold.after(threshold.init(), observed(errors))
    assert threshold.bound(memory) == pytest.approx(after)


def test_fixed_threshold_never_adapts() -> None:
    threshold = FixedThreshold(2.5)
    memory = threshold.after(threshold.init(), observed([9.0]))
    assert threshold.bound(memory) == 2.5
    assert not threshold.exact
    assert FixedThreshold(0).exact


class Unchecked(AdaptiveWindow):
    def __post_init__(self) -> None:
        pass


def is_accepted(*arguments: int) -> bool:
    try:
        AdaptiveWindow(*arguments)
    except ValueError:
        return False
    return True


def grown(window: AdaptiveWindow) -> int:
    """Its size when everything passes, again and again."""
    memory = window.init()
    for _ in range(60):
        size = window.length(memory, 0, 1000)
        memory = window.after(memory, tried(size, size))
    return window.length(memory, 0, 1000)


def test_a_window_that_could_not_grow_is_refused_and_no_other() -> None:
    bounds = [(a, b, n) for a in range(1, 7) for b in range(a, 15) for n in range(1, 8)]
    for smallest, largest, multiple in bounds:
        grows = grown(Unchecked(smallest, largest, multiple)) > smallest
        accepted = is_accepted(smallest, largest, multiple)
        assert accepted == (grows or smallest == largest), (smallest, largest, multiple)


def test_a_sequential_start_holds_one_step_and_then_the_window() -> None:
    window = SequentialStart(AdaptiveWindow(4, 8), 2)
    memory = window.init()
    assert [window.length(memory, step, 10) for step in range(4)] == [1, 1, 4, 4]
    assert window.stride(memory, [True, False, True]) == 2
    expected = solve(TOYS["sde"].make(), Sequential()).value
    found = solve(TOYS["sde"].make(), PicardSolver(window, FixedThreshold(0)))
    assert tree_equal(found.value, expected)
    assert found.stats.strides[:2] == [1, 1]
    with pytest.raises(ValueError, match=r"write `SlidingWindow\(8\)` in its place"):
        SequentialStart(BlockWindow(4, 2), 2)
    with pytest.raises(ValueError, match="write a whole number from 0"):
        SequentialStart(SlidingWindow(4), -1)
