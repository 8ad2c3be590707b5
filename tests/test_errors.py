"""Each message says what was given and what to write instead."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from dreampropeller import (
    AdaptiveWindow,
    Anderson,
    DriftThreshold,
    EMAThreshold,
    FittedMomentum,
    FixedThreshold,
    Momentum,
    NotConverged,
    PicardSolver,
    Result,
    Secant,
    Sequential,
    SlidingWindow,
    launch_workers,
    solve,
)
from tests.helpers import OrnsteinUhlenbeck

EXACT = FixedThreshold(0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SlidingWindow(0), r"`size` is 0.*`SlidingWindow\(8\)`"),
        (lambda: SlidingWindow(-3), r"`size` is -3"),
        (lambda: FixedThreshold(-1.0), r"`value` is -1.0.*at least 0"),
        (lambda: FixedThreshold(float("nan")), r"`value` is nan"),
        (lambda: FixedThreshold(float("inf")), r"`value` is inf"),
        (lambda: EMAThreshold(-1.0, 0.9, "mean"), r"`value` is -1.0"),
        (lambda: EMAThreshold(1.0, 1.1, "mean"), r"`ema_decay` is 1.1"),
        (lambda: DriftThreshold(-1.0), r"`value` is -1.0.*such as 0.2"),
        (
            lambda: DriftThreshold(0.1, 0),
            r"`hold_every` is 0: write a whole number, 1",
        ),
        (
            lambda: DriftThreshold(0.1, 8, 0),
            r"`memory` is 0: write a whole number, 1",
        ),
        (
            lambda: DriftThreshold(warmup=-1),
            r"`warmup` is -1: write a whole number, 0",
        ),
        (
            lambda: DriftThreshold(half_weight=math.inf),
            r"`half_weight` is inf: write a number above 0, as 0.5, or None",
        ),
        (lambda: AdaptiveWindow(0, 4), r"`smallest` is 0.*at least 1"),
        (lambda: AdaptiveWindow(8, 4), r"`largest` is 4.*smallest size 8"),
        (lambda: AdaptiveWindow(1, 32, 8), r"`multiple` is 8, too coarse"),
        (lambda: DriftThreshold(True), r"`value` is True"),
        (lambda: Secant(0.7, float("inf")), r"`shrinkage` is inf"),
        (lambda: FittedMomentum(2.0), r"`decay` is 2.0"),
        (lambda: FittedMomentum(probe_every=0), r"`probe_every` is 0"),
        (lambda: Momentum(1.0), r"`decay` is 1.0"),
        (
            lambda: PicardSolver(SlidingWindow(2), EXACT, "momentun"),
            r"`predictor` is 'momentun': write one of `repeat_last`, `momentum`,",
        ),
        (
            lambda: PicardSolver(SlidingWindow(2), acceleration=Anderson()),
            r"`DriftThreshold` measures.*write `acceleration=Secant\(\)`, or",
        ),
        (lambda: Secant(decay=1.0), r"`decay` is 1.0: write a number"),
        (lambda: Secant(shrinkage=0.0), r"`shrinkage` is 0.0: write a"),
        (lambda: Anderson(0), r"`memory` is 0: write a whole number, 1"),
        (
            lambda: Anderson(order=0),
            r"`order` is 0: write a whole number, 1",
        ),
        (lambda: Anderson(ridge=0.0), r"`ridge` is 0.0: write a number"),
        (lambda: Anderson(limit=float("nan")), r"`limit` is nan"),
        (lambda: launch_workers(print, num_workers=0), r"`num_workers` is 0"),
    ],
)
def test_bad_settings_are_refused_when_they_are_made(
    make: Callable[[], Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "make",
    [
        lambda kind: EMAThreshold(1.0, 0.9, kind),
        lambda kind: Sequential(kind),
        lambda kind: PicardSolver(SlidingWindow(2), EXACT, non_finite=kind),
        lambda kind: PicardSolver(kind, EXACT),
        lambda kind: PicardSolver(SlidingWindow(2), kind),
        lambda kind: PicardSolver(SlidingWindow(2), EXACT, acceleration=kind),
    ],
)
def test_unknown_choices_are_refused_with_the_known_ones(make: Any) -> None:
    # Written as a user's program runs it, without the tests' own type checker.
    with pytest.raises(Exception, match=r"write|violates type hint"):
        make("nonsense")


class Backwards(OrnsteinUhlenbeck):
    def next_jump(self, step: int) -> int:
        return 3


def test_jump_that_lies_behind_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"`next_jump\(3\)` returned 3"):
        solve(Backwards(), Sequential())


def test_solve_that_ends_early_keeps_what_it_reached() -> None:
    with pytest.raises(NotConverged, match=r"`max_iterations`.*step 3 of 12") as caught:
        solve(OrnsteinUhlenbeck(), Sequential(), max_iterations=3)
    assert caught.value.solution.state.step == 3
    assert caught.value.solution.result is Result.MAX_ITERATIONS


def test_every_result_is_a_sentence() -> None:
    assert all(result.value.endswith(".") for result in Result)


WRONG_KINDS = """
import dreampropeller as dp

for make, message in [
    (lambda: dp.SlidingWindow("auto"), "`size` is 'auto': write a whole number"),
    (lambda: dp.SlidingWindow(2.5), "`size` is 2.5"),
    (lambda: dp.AdaptiveWindow(2.5, 8), "`smallest` is 2.5: write a whole"),
    (lambda: dp.DriftThreshold("x"), "`value` is 'x': write the share"),
    (lambda: dp.DriftThreshold(0.2, 2.5), "`hold_every` is 2.5"),
    (lambda: dp.FixedThreshold("x"), "`value` is 'x': write a finite"),
    (lambda: dp.EMAThreshold("x", 0.9, "mean"), "`value` is 'x'"),
    (lambda: dp.Momentum("x"), "`decay` is 'x'"),
    (lambda: dp.FittedMomentum(probe_every=1.5), "`probe_every` is 1.5"),
    (lambda: dp.Secant("x"), "`decay` is 'x'"),
    (lambda: dp.Anderson(2.5), "`memory` is 2.5"),
]:
    try:
        make()
    except ValueError as error:
        assert message in str(error), (message, str(error))
    else:
        raise AssertionError(message)
"""


def test_arguments_of_another_kind_are_refused_by_name() -> None:
    """Where no type checker hooks into imports, as it does in these tests."""
    run = subprocess.run(
        [sys.executable, "-c", WRONG_KINDS], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
