"""A window of one device as one call of the guidance, for every kind of scene."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dreampropeller as dp
import launch
from dreampropeller.dispatch.batched import deviation
from systems import batching, build_problem, make_system
from systems.distillation import Distillation
from systems.dreamfusion import DreamFusion
from systems.guidance.base import Guidance
from systems.guidance.sds import ScoreDistillation
from systems.runs import folders
from systems.scene.cameras import Cameras
from systems.settings.config import load
from systems.settings.reader import ConfigError
from tests.helpers import tree_equal
from tests.systems.scenes import SMALL, TOYBOX, small

CPU = torch.device("cpu")
LOSSES = ("orient=0.1", "sparsity=0.2", "opaque=0.1")
TERMS = [f"system.loss.lambda_{term}" for term in LOSSES]
PROMPT = "system.prompt_processor.prompt=a red mushroom"
DATA = [f"data.{name}=16" for name in ("width", "height")]
SPLATS = [
    *("system.geometry.num_splats=40", "system.loss.lambda_sparsity=0.2"),
    *(PROMPT, "trainer.max_steps=40", "data.batch_size=2", *DATA),
]
HASHED = [
    *("system.geometry.pos_encoding_config.n_levels=3", *TERMS),
    *("system.geometry.pos_encoding_config.log2_hashmap_size=8",),
    *(setting for setting in SMALL if "geometry.resolution" not in setting),
]
SYSTEMS: dict[str, Callable[[], Any]] = {
    "voxels": lambda: small(*TERMS, "data.batch_size=2"),
    "perp-neg": lambda: small("system.guidance_type=perp-neg-guidance"),
    "resolutions": lambda: small("data.batch_size=[1,2]", *STAGES),
    "hash grid": lambda: make_system(
        "configs/dreamfusion-toybox-hashgrid.yaml", *HASHED
    ),
    "splats": lambda: make_system("configs/dreamgaussian-toybox.yaml", *SPLATS),
}
STAGES = (
    *("data.width=[16,24]", "data.height=[16,24]"),
    "data.resolution_milestones=[12]",
)
STEPS = [8, 11, 12]
TOLERANCE = 1e-4


def states(trajectory: dp.Trajectory[Any], count: int) -> list[dp.State]:
    """States on the way: each a few steps from the last."""
    y, carry = trajectory.init()
    drift = trajectory.make_drift(CPU)
    found = [y]
    for step in range(count - 1):
        y, carry = trajectory.update(step, y, carry, drift(step, y)[0])
        found.append(y)
    return found


@pytest.mark.parametrize("kind", SYSTEMS)
def test_a_batch_is_its_steps(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images, timesteps and noise to the bit; gradients and scalars to a rounding."""
    trajectory = SYSTEMS[kind]().trajectory()
    ys = states(trajectory, len(STEPS))
    drift: Any = trajectory.make_drift(CPU)
    asked: list[tuple[Tensor, ...]] = []
    direction = ScoreDistillation.direction

    def spied(self: Any, x: Tensor, cameras: Any, t: Tensor, noise: Tensor) -> Tensor:
        asked.append((x, cameras.azimuth, t, noise))
        return direction(self, x, cameras, t, noise)

    monkeypatch.setattr(ScoreDistillation, "direction", spied)
    found = drift.batch(STEPS, ys)
    (together,) = asked
    asked.clear()
    wanted = [drift(step, y) for step, y in zip(STEPS, ys, strict=True)]
    for several, alone in zip(together, zip(*asked, strict=True), strict=True):
        assert torch.equal(several, torch.cat(alone))
    for (one, aux), (other, logged) in zip(found, wanted, strict=True):
        assert deviation(one, other) < TOLERANCE
        assert aux == pytest.approx(logged, rel=1e-3, abs=1e-6)
    if kind == "voxels":  # a refresh of the occupancy grid is due at step 8 alone
        grids = ["renderer.occupancy.value" in one for one, _ in found]
        assert grids == [True, False, True]
    if kind == "splats":
        assert all("seen/count" in one for one, _ in found)


class Grey(Guidance):
    """A guidance that knows nothing of batches."""

    @classmethod
    def load(cls, config: Any, prompts: Any, device: torch.device) -> Guidance:
        return cls()

    def __call__(
        self, images: Tensor, cameras: Cameras, step: int, random: dp.StepRandom
    ) -> tuple[Tensor, dict[str, Any]]:
        noise = torch.rand(images.shape, generator=random.generator(step, "noise"))
        return (images - noise).square().sum(), {"noise": noise.mean()}


def test_a_guidance_without_a_batch_is_asked_step_by_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    system = small()
    monkeypatch.setattr(system, "load_guidance", Grey)
    trajectory = system.trajectory()
    ys = states(trajectory, 2)
    drift: Any = trajectory.make_drift(CPU)
    for (one, aux), step, y in zip(drift.batch([3, 5], ys), (3, 5), ys, strict=True):
        wanted, logged = drift(step, y)
        assert tree_equal(one, wanted)
        assert aux == logged


def test_a_window_in_one_call_reaches_the_sequential_state() -> None:
    system = small("trainer.max_steps=10")
    trajectory = system.trajectory()
    calls = []
    solver = dp.PicardSolver(dp.SlidingWindow(3), dp.FixedThreshold(1e-9), "momentum")
    found = dp.solve(
        trajectory,
        solver,
        dp.BatchedDispatcher,
        on_iteration=lambda state, iteration: calls.append(iteration.window),
    )
    plain = dp.solve(trajectory, dp.Sequential())
    assert max(calls) == 3
    views = system.cameras.turntable(2)
    images = [system.render(one.value, views)[0] for one in (found, plain)]
    assert float((images[0] - images[1]).abs().max()) < 1e-3


def test_a_guidance_that_is_trained_has_no_batch() -> None:
    """Its LoRA is part of the state, which one call cannot hold several of."""
    settings = [setting for setting in SMALL if "geometry.resolution" not in setting]
    system = make_system("configs/prolificdreamer-toybox.yaml", *settings)
    assert isinstance(system, Distillation)
    assert not hasattr(system.trajectory().make_drift(CPU), "batch")


def chosen(system: DreamFusion) -> Any:
    solver = system.solver()
    assert isinstance(solver, dp.PicardSolver)
    return batching.choose(system.config, system.trajectory(), solver, CPU)


def measured(gain: float, calls: list[int]) -> Callable[..., dp.Calibration]:
    def measure(trajectory: Any, solver: Any, *_: Any) -> dp.Calibration:
        calls.append(1)
        name = batching.device_name(CPU)
        return dp.Calibration(name, torch.get_num_threads(), 2, gain, 1.0)

    return measure


@pytest.mark.parametrize("gain", [0.9, 3.0])
def test_a_run_batches_only_where_that_was_measured_to_pay(
    gain: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    calls: list[int] = []  # of the measurement
    monkeypatch.setattr(batching, "calibrate_windows", measured(gain, calls))
    settings = (
        *SMALL,
        *("trainer.max_steps=6", "dispatch.batch=auto", f"exp_root_dir={tmp_path}"),
    )
    assert launch.main(["--config", TOYBOX, "--train", *settings]) == 0
    (folder,) = [
        path for path in (tmp_path / "dreamfusion-toybox").iterdir() if path.is_dir()
    ]
    report, said = folders.report(folder), capsys.readouterr().out
    again = small(*settings[len(SMALL) :], "seed=1")
    choice = chosen(again)
    assert any(f"{gain:.2f}x" in note for note in report["notes"])
    assert calls == [1]  # recorded for this config, whatever its seed
    if gain > 1:
        assert "Batched: a window of 2 was measured at 3.00x." in said
        assert report["iterations"] < 6 < report["evaluations"]
        assert choice.dispatcher is dp.BatchedDispatcher
        assert choice.solver.window == dp.SlidingWindow(2)
    else:
        assert "The sequential run: a window of 2 was measured at 0.90x" in said
        assert report["iterations"] == report["evaluations"] == 6
        assert choice.solver == dp.Sequential()
        exact = small(*settings[len(SMALL) :])
        plain = dp.solve(exact.trajectory(), dp.Sequential())
        state = folders.load_own_state(
            small(f"resume={folder}", *settings[len(SMALL) :])
        )
        assert tree_equal(state.y, plain.value)


def test_a_bitwise_threshold_is_never_batched() -> None:
    exact = ("solver.threshold={name: fixed, value: 0}", "trainer.max_steps=4")
    choice = chosen(small(*exact, "dispatch.batch=auto"))
    assert choice.dispatcher is dp.InlineDispatcher
    assert "bitwise equality" in choice.reason
    with pytest.raises(ConfigError, match=r"write `dispatch\.batch=never`"):
        chosen(small(*exact, "dispatch.batch=always"))
    sequential = "solver.name=sequential"
    with pytest.raises(ConfigError, match="no window to put into one call"):
        load(TOYBOX, [PROMPT, sequential, "dispatch.batch=always"])


def test_a_batch_is_refused_where_it_has_no_effect() -> None:
    with pytest.raises(ConfigError, match="there are several workers: choose one"):
        load(TOYBOX, [PROMPT, "dispatch.batch=auto", "dispatch.num_workers=2"])
    sampling = load("configs/sample-toybox.yaml", [PROMPT, "dispatch.batch=auto"])
    with pytest.raises(ConfigError, match=r"write `system\.sampler\.batched=true`"):
        build_problem(sampling)
