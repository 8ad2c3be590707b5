"""Schedules by hand, and settings that cannot be used."""

from __future__ import annotations

from typing import Any

import pytest

import dreampropeller as dp
from systems.settings.checks import at_least, check_range
from systems.settings.config import Config, load
from systems.settings.reader import ConfigError
from systems.settings.schedules import check_schedule, value_at


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


def config(*overrides: str) -> Config:
    prompt = "system.prompt_processor.prompt=a red mushroom"
    return load("configs/dreamfusion-toybox.yaml", [prompt, *overrides])


def solver(*overrides: str) -> dp.PicardSolver:
    made = config(*overrides).solver.build()
    assert isinstance(made, dp.PicardSolver)
    return made


def test_window_auto_is_resolved_from_the_workers_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    auto = "solver.window.size=auto"
    resolved = config(auto, "dispatch.num_workers=3").solver
    assert (resolved.window.size, resolved.window.max_size) == (3, 12)
    assert resolved.build() == solver(  # what is written down says the same
        "solver.window.size=3", "solver.window.max_size=12", "solver.window.multiple=3"
    )
    assert solver(auto).window == dp.AdaptiveWindow(1, 4, 1)
    monkeypatch.setenv("WORLD_SIZE", "2")  # torchrun
    monkeypatch.setenv("RANK", "0")
    assert solver(auto).window == dp.AdaptiveWindow(2, 8, 2)


def test_thresholds_by_name() -> None:
    name = "solver.threshold.name="
    assert solver().threshold == dp.DriftThreshold()
    assert solver(f"{name}paper").threshold == dp.EMAThreshold(5e-6, 0.9, "median")
    zero = solver(f"{name}fixed", "solver.threshold.value=0").threshold
    assert zero == dp.FixedThreshold(0)
    warm = solver("solver.threshold.warmup=64").threshold
    assert warm == dp.DriftThreshold(warmup=64)
    relative = ("solver.threshold.value=2", "solver.threshold.relative=true")
    assert solver(f"{name}fixed", *relative).threshold == dp.FixedThreshold(2, True)
    assert solver("solver.predictor=auto").predictor == "auto"


def test_numbers_of_a_file_are_not_those_of_another_threshold() -> None:
    """The files of Stable Diffusion hold the published rule's first threshold."""
    path, prompt = "configs/dreamfusion-sd.yaml", "system.prompt_processor.prompt=a cup"

    def threshold(*settings: str) -> dp.Threshold:
        return load(path, [prompt, *settings]).solver.threshold.build()

    name = "solver.threshold.name="
    assert (
        threshold() == threshold(f"{name}paper") == dp.EMAThreshold(3e-5, 0.9, "median")
    )
    assert threshold(f"{name}drift") == dp.DriftThreshold()
    with pytest.raises(ConfigError, match="`value` is missing"):
        threshold(f"{name}fixed")
    assert threshold(f"{name} paper") == threshold(f'{name}"paper"') == threshold()
    value = "solver.threshold.value=0.1"
    for settings in ((value, f"{name}drift"), (f"{name}drift", value)):
        assert threshold(*settings) == dp.DriftThreshold(0.1)
    assert threshold("solver.threshold={name: drift}") == dp.DriftThreshold()
    assert threshold("solver.threshold[name]=drift") == dp.DriftThreshold()


def test_acceleration_by_name() -> None:
    fixed = ("solver.threshold.name=fixed", "solver.threshold.value=1e-6")
    name = "solver.acceleration.name="
    assert solver(f"{name}none").acceleration is None
    assert solver(f"{name}secant").acceleration == dp.Secant()
    assert solver(f"{name}anderson", *fixed).acceleration == dp.Anderson()
    more = ("solver.acceleration.memory=3", "solver.acceleration.order=4")
    assert solver(f"{name}anderson", *fixed, *more).acceleration == dp.Anderson(3, 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["solver.threshold.name=fixed"], "`value` is missing: write `value=0`"),
        (
            ["solver.threshold.name=paper", "solver.threshold.warmup=64"],
            "no effect on `paper`.*`name=drift`",
        ),
        (["solver.threshold.relative=true"], "no effect on `drift`.*`name=fixed`"),
        (["solver.window.size=soon"], "write a whole number or auto"),
        (["solver.window.max_size=4"], "`max_size` is 4, less than `size`, 8"),
        (["solver.window.multiple=4"], "without effect on a window of one size"),
        (["solver.window.size=null"], "write a whole number or auto"),
        (["solver.threshold=drift"], "as `solver.threshold.name=…`"),
        (
            ["solver.window.size=auto", "solver.acceleration.name=anderson"],
            r"write `acceleration=Secant",
        ),
        (["solver.window.size=auto", "solver.window.max_size=4"], "leave them out"),
        (
            ["solver.acceleration.name=newton"],
            "`newton`: write none or secant or anderson",
        ),
        (["solver.acceleration.memory=3"], "no effect on `secant`.*`name=anderson`"),
        (
            ["solver.acceleration.name=anderson"],
            r"write `acceleration=Secant\(\)`, or `threshold=Fixed",
        ),
        (
            ["solver.acceleration.name=anderson", "solver.acceleration.memory=0"],
            "`acceleration.memory` is 0: write a whole number, 1",
        ),
        (["solver.acceleration.depth=3"], "no setting `solver.acceleration.depth`"),
    ],
)
def test_solver_settings_that_cannot_be_used(settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(*settings)
