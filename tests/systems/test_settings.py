"""Schedules by hand, and settings that cannot be used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import dreampropeller as dp
from systems import build
from systems.runs import workers
from systems.sampling import SamplerConfig
from systems.scene.backgrounds import EnvironmentConfig, SolidConfig
from systems.scene.materials import PointLightConfig
from systems.settings import notes
from systems.settings.checks import at_least, check_range
from systems.settings.config import Config, load
from systems.settings.dispatch import DispatchConfig
from systems.settings.presets import fast
from systems.settings.reader import ConfigError, read, to_section
from systems.settings.schedules import check_schedule, value_at
from systems.settings.solver import SolverConfig


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
    auto = "solver.window.name=auto"
    resolved = config(auto, "dispatch.num_workers=3").solver
    assert resolved.window == dp.AdaptiveWindow(3, 12, 3)
    section = to_section(resolved)  # what is recorded says the same
    assert section["window"] == {
        "name": "adaptive",
        "smallest": 3,
        "largest": 12,
        "multiple": 3,
    }
    assert read(SolverConfig, section, "solver") == resolved
    assert solver(auto).window == dp.AdaptiveWindow(1, 4, 1)
    monkeypatch.setenv("WORLD_SIZE", "2")  # torchrun
    monkeypatch.setenv("RANK", "0")
    assert solver(auto).window == dp.AdaptiveWindow(2, 8, 2)


def test_more_threads_than_a_machine_can_hold_are_refused() -> None:
    """100000 of them ended in a segmentation fault."""
    workers.check(DispatchConfig(threads=64))  # a result of a larger machine
    with pytest.raises(ConfigError, match=r"`dispatch.threads` is 100000.*at most \d+"):
        workers.check(DispatchConfig(threads=100_000))


def test_settings_that_a_launcher_leaves_no_effect_are_noted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    notes.note.cache_clear()
    config = DispatchConfig(num_workers=4, max_restarts=3)
    workers.check(config)
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    workers.check(config)
    said = capsys.readouterr().err
    assert "`dispatch.num_workers=4` has no effect under torchrun and srun" in said
    assert "write `torchrun --max-restarts=3`" in said
    workers.check(DispatchConfig(num_workers=2))
    assert capsys.readouterr().err == ""


def test_thresholds_by_name() -> None:
    name = "solver.threshold.name="
    assert solver().threshold == dp.DriftThreshold()
    assert solver(f"{name}ema").threshold == dp.EMAThreshold(5e-6, 0.9, "median")
    zero = solver(f"{name}fixed", "solver.threshold.value=0").threshold
    assert zero == dp.FixedThreshold(0)
    warm = solver("solver.threshold.warmup=64").threshold
    assert warm == dp.DriftThreshold(warmup=64)
    single = solver("solver.threshold.sums=false").threshold
    assert single == dp.DriftThreshold(sums=False)
    relative = ("solver.threshold.value=2", "solver.threshold.relative=true")
    assert solver(f"{name}fixed", *relative).threshold == dp.FixedThreshold(2, True)
    held = ("solver.threshold.hold_every=4", "solver.threshold.memory=2")
    assert solver(*held).threshold == dp.DriftThreshold(hold_every=4, memory=2)


def test_the_measurement_of_growth_can_be_turned_off() -> None:
    assert solver().growth
    assert not solver("solver.growth=false").growth


def test_predictors_by_name_with_their_arguments() -> None:
    assert solver("solver.predictor=auto").predictor == dp.FittedMomentum()
    assert isinstance(solver("solver.predictor=repeat_last").predictor, dp.RepeatLast)
    name = "solver.predictor.name=momentum"
    assert solver(name).predictor == dp.Momentum()
    assert solver(name, "solver.predictor.decay=0.5").predictor == dp.Momentum(0.5)
    decay = solver("solver.predictor.decay=0.5").predictor  # the file's own, `auto`
    assert decay == dp.FittedMomentum(0.5)


def test_numbers_of_a_file_are_not_those_of_another_threshold() -> None:
    """The files of Stable Diffusion hold the published rule's first threshold."""
    path, prompt = "configs/dreamfusion-sd.yaml", "system.prompt_processor.prompt=a cup"

    def threshold(*settings: str) -> dp.Threshold:
        return load(path, [prompt, *settings]).solver.threshold

    name = "solver.threshold.name="
    assert (
        threshold() == threshold(f"{name}ema") == dp.EMAThreshold(3e-5, 0.9, "median")
    )
    assert threshold(f"{name}drift") == dp.DriftThreshold()
    with pytest.raises(ConfigError, match=r"`solver\.threshold\.value` is missing"):
        threshold(f"{name}fixed")
    assert threshold(f"{name} ema") == threshold(f'{name}"ema"') == threshold()
    value = "solver.threshold.value=0.1"
    for settings in ((value, f"{name}drift"), (f"{name}drift", value)):
        assert threshold(*settings) == dp.DriftThreshold(0.1)
    assert threshold("solver.threshold={name: drift}") == dp.DriftThreshold()
    assert threshold("solver.threshold=drift") == dp.DriftThreshold()
    assert threshold("solver.threshold[name]=drift") == dp.DriftThreshold()


def test_acceleration_by_name() -> None:
    fixed = ("solver.threshold.name=fixed", "solver.threshold.value=1e-6")
    name = "solver.acceleration.name="
    assert solver(f"{name}none").acceleration is None
    assert solver(f"{name}secant").acceleration == dp.Secant()
    assert solver(f"{name}anderson", *fixed).acceleration == dp.Anderson()
    more = ("solver.acceleration.memory=3", "solver.acceleration.order=4")
    assert solver(f"{name}anderson", *fixed, *more).acceleration == dp.Anderson(3, 4)
    ridge = "solver.acceleration.ridge=0.1"
    made = solver(f"{name}anderson", *fixed, ridge).acceleration
    assert made == dp.Anderson(ridge=0.1)
    assert solver("solver.acceleration.decay=0.5").acceleration == dp.Secant(0.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["solver.threshold.name=fixed"], "`solver.threshold.value` is missing"),
        (
            ["solver.threshold.name=ema", "solver.threshold.warmup=64"],
            "no effect on `ema`: write `solver.threshold.name=drift`",
        ),
        (
            ["solver.threshold.relative=true"],
            "no effect on `drift`.*name=fixed`",
        ),
        (["solver.window.size=soon"], "`solver.window.size` is `soon`: write a whole"),
        (["solver.window.largest=4"], "no effect on `sliding`.*name=adaptive`"),
        (
            ["solver.window={name: adaptive, smallest: 8, largest: 4}"],
            "In `solver.window`: `largest` is 4, less than the smallest size 8",
        ),
        (["solver.window.size=null"], "`solver.window.size` is empty: write a whole"),
        (["solver.threshold=7"], "as `solver.threshold.name=…`"),
        (
            ["solver.window.name=auto", "solver.acceleration.name=anderson"],
            r"write `acceleration=Secant",
        ),
        (["solver.window.name=auto", "solver.window.size=4"], "no effect on `auto`"),
        (
            ["solver.acceleration.name=newton"],
            "`newton`: write one of `none`, `secant`, `anderson`",
        ),
        (
            ["solver.acceleration.memory=3"],
            "no effect on `secant`.*name=anderson`",
        ),
        (
            ["solver.acceleration.name=anderson"],
            r"write `acceleration=Secant\(\)`, or `threshold=Fixed",
        ),
        (
            ["solver.acceleration.name=anderson", "solver.acceleration.memory=0"],
            "In `solver.acceleration`: `memory` is 0: write a whole number, 1",
        ),
        (["solver.acceleration.depth=3"], "no setting `solver.acceleration.depth`"),
    ],
)
def test_solver_settings_that_cannot_be_used(settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(*settings)


GUIDANCE = "system.guidance."


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (f"{GUIDANCE}max_step_percent=7", "its values go from 0 to 1"),
        (f"{GUIDANCE}min_step_percent=-0.1", "its values go from 0 to 1"),
        (f"{GUIDANCE}max_step_percent=[0,0.9,2.0,100]", "its values go from 0 to 1"),
        (
            f"{GUIDANCE}max_step_percent=0.1",
            "`min_step_percent` is 0.2 at step 0, above `max_step_percent`, 0.1",
        ),
        (
            f"{GUIDANCE}min_step_percent=[0,0.2,0.9,100]",
            "`min_step_percent` is 0.9 at step 100, above `max_step_percent`, 0.74",
        ),
        (f"{GUIDANCE}grad_clip=-1", "its values go 0 up"),
        (f"{GUIDANCE}guidance_scale=-3", "`guidance_scale` is -3.0: write 0 or more"),
        (f"{GUIDANCE}guidance_scale=.nan", "is `nan`: write a finite number"),
        ("data.eval_camera_distance=.inf", "is `inf`: write a finite number"),
        ("data.eval_fovy_deg=0", "write a number from 1 to 170"),
        ("data.camera_distance_range=[1,.inf]", "write a finite number"),
        ("system.loss.lambda_sds=.nan", "`lambda_sds` is nan: write a number, or"),
        ("system.loss.lambda_opaque=-1", "its values go 0 up"),
        ("system.background.range=[0.5,1.5]", "`[low, high]` with 0 ≤ low ≤ high ≤ 1"),
        ("system.renderer.occupancy.decay=1.1", "write a number from 0 to 1"),
        ("system.optimizer.args.lr=.inf", "`args.lr` is `inf`: write finite numbers"),
        ("system.optimizer.args.lr=.nan", "`args.lr` is `nan`: write finite numbers"),
        ("system.optimizer.args.lr=nan", "`args.lr` is `nan`: write a learning rate"),
        ("system.optimizer.args.lr=-1", "`args.lr` is `-1`: write a learning rate"),
        ("system.optimizer.args.betas=[0.9,.nan]", "write finite numbers"),
        (
            "system.optimizer.params.geometry=0.1",
            "`params.geometry` is `0.1`: write a section",
        ),
        (
            "system.optimizer.params.geometry.lr=fast",
            "`params.geometry.lr` is `fast`: write a learning rate",
        ),
        ("system.prompt_processor.overhead_threshold=91", "from 0 to 90"),
        ("system.prompt_processor.back_threshold=200", "from 0 to 180"),
    ],
)
def test_numbers_that_make_no_sense(setting: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(config(setting))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("section", "kind", "settings", "message"),
    [
        ("material", PointLightConfig, {"diffuse_prob": 2}, "from 0 to 1"),
        (
            "material",
            PointLightConfig,
            {"ambient_light_color": [0, 0, 2]},
            "write channels from 0 to 1",
        ),
        ("background", SolidConfig, {"color": [0, -1, 0]}, "channels from 0 to 1"),
        ("background", EnvironmentConfig, {"random_aug_prob": 1.5}, "from 0 to 1"),
        ("background", EnvironmentConfig, {"n_neurons": 0}, "write 1 or more"),
        ("sampler", SamplerConfig, {"eta": 2.0}, "from 0 to 1"),
    ],
)
def test_shares_and_colors_stay_in_bounds(
    section: str, kind: type, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=f"In `{section}`: .*{message}"):
        read(kind, settings, section)
    assert read(kind, {}, section) == kind()


def test_everything_that_is_wrong_is_said_at_once() -> None:
    wrong = ("data.width=wide", "data.depth=3", "system.geometry.radius=-1")
    with pytest.raises(ConfigError) as caught:
        build(config(*wrong, "system.guidance.scale=3"))
    assert len(caught.value.problems) == 5  # the renderer has the same radius
    assert str(caught.value).splitlines()[1:] == [
        f"- {problem}" for problem in caught.value.problems
    ]


def test_fast_settings_come_before_those_of_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    shipped = Path("configs/dreamfusion-toybox.yaml")
    look = load(shipped, [*fast(shipped), "system.prompt_processor.prompt=a red mug"])
    assert (look.trainer.max_steps, look.dispatch.num_workers) == (60, 2)
    plain = shipped.read_text(encoding="utf-8").split("\nfast:")[0]
    file.write_text(f"{plain}\nfast: [trainer.max_steps=7, seed=5]\n")
    prompt = "system.prompt_processor.prompt=a red mushroom"
    assert load(file, [prompt]).trainer.max_steps == 200  # only where it is asked for
    found = load(file, [*fast(file), prompt, "seed=6"])
    assert (found.trainer.max_steps, found.seed) == (7, 6)
    file.write_text(f"{plain}\nfast: {{trainer.max_steps: 7}}\n")
    with pytest.raises(ConfigError, match="`fast` must be a list of overrides"):
        load(file, [prompt])
    with pytest.raises(ConfigError, match="has no `fast` section: leave `--fast` out"):
        fast(Path("configs/dreamfusion-sd.yaml"))
    with pytest.raises(ConfigError, match="`--fast` chooses the settings of a new run"):
        fast(None)
