"""`--plan` measures on this machine, and predicts for 1 to 64 devices."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

import launch
from dreampropeller import measurement
from dreampropeller.cost_model import Costs
from systems.dreamfusion import DreamFusion
from systems.runs import plan
from systems.runs.plan import Measured
from tests.systems.scenes import SMALL, TOYBOX, small

COSTS = Costs(
    drift={4: 0.4, 2: 0.2, 1: 0.1},
    rollout=0.0,
    strides={1: 1.0, 2: 2.0, 4: 4.0, 8: 4.0},
    segments=[40],
    num_bytes=10**6,
    latency=0.0,
    bandwidth=1e9,
)


def planned(*words: str) -> int:
    return launch.main(["--config", TOYBOX, "--plan", *SMALL, *words])


def test_a_plan_has_a_line_for_each_number_of_devices(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four steps at once are all that a window accepts: further devices take views."""
    monkeypatch.setattr(plan, "measure", lambda *_: Measured(COSTS, 1.0, 0.1, ""))
    assert planned("dispatch.num_workers=8") == 0
    found = capsys.readouterr().out
    assert "Predicted (nothing below was run):" in found
    rows = dict(re.findall(r"^ +(\d+) +(\d+ × \d+) +[\d–]+ +", found, re.MULTILINE))
    assert list(rows) == ["1", "2", "4", "8", "16", "32", "64"]
    assert rows["1"] == "1 × 1"
    assert rows["16"] == rows["64"] == "4 × 4"
    assert "The sequential run on one device takes 16 s (40 evaluations)." in found
    (best,) = re.findall(r"^Best for 8 devices.*write `(.*)`\.", found, re.MULTILINE)
    chosen = best.split()
    assert "dispatch.num_workers=8" in chosen
    config = small(*chosen, "data.batch_size=4").config
    assert config.dispatch.steps * config.dispatch.views == 8


def test_a_plan_measures_what_it_says(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards of two views, strides up to twice the window, and rendering.

    The clock counts rendered views: seconds depend on what else the machine does.
    """
    asked: list[int] = []
    clock = 0.0
    rendering = DreamFusion.rendering

    def counted(self: Any, module: Any, views: Any, *rest: Any) -> Any:
        nonlocal clock
        clock += 0.01 * len(views.cameras)
        return rendering(self, module, views, *rest)

    monkeypatch.setattr(DreamFusion, "rendering", counted)
    monkeypatch.setattr(
        measurement, "time", SimpleNamespace(perf_counter=lambda: clock)
    )

    def communication(num_bytes: int) -> tuple[float, float]:
        asked.append(num_bytes)
        return 1e-3, 1e8

    monkeypatch.setattr(plan, "communication", communication)
    system = small("data.batch_size=2", "solver.window={name: sliding, size: 2}")
    trajectory = system.trajectory()
    monkeypatch.setattr(plan, "ITERATIONS", 3)
    before = trajectory.init()[0]
    found = plan.measure(system, trajectory)
    costs = found.costs
    assert costs.drift == pytest.approx({1: 0.01, 2: 0.02})
    assert costs.strides[1] == 1.0
    assert max(costs.strides) == 16
    assert 1 <= costs.strides[16] <= 16
    assert costs.num_steps == 40
    assert asked == [costs.num_bytes]
    assert costs.num_bytes > 4 * sum(v.numel() for v in before.values()) / 2
    assert found.render == pytest.approx(0.02)
    lines = "\n".join(plan._inputs(found))
    assert "1 of its views" in lines
    assert "rendering its images takes" in lines
    assert "Measuring 3 iterations of window 16" in capsys.readouterr().out
    alone = replace(found, costs=replace(costs, bandwidth=float("inf")))
    assert (
        "not measured, as two processes could not meet" in list(plan._inputs(alone))[-1]
    )


def test_a_slow_drift_is_measured_less() -> None:
    solver: Any = small().solver()
    assert plan._affordable(solver, 0.01) == (16, plan.ITERATIONS)
    assert plan._affordable(solver, 1.0) == (8, plan.ITERATIONS)
    assert plan._affordable(solver, 100.0) == (8, 2)


def test_what_cannot_be_split_is_planned_without_views() -> None:
    assert plan._num_views(small())[0] == 1
    assert plan._num_views(small("data.batch_size=4")) == (4, "")
    assert plan._num_views(object()) == (1, "its steps have no views to split")


def test_images_have_no_plan(capsys: pytest.CaptureFixture[str]) -> None:
    prompt = "system.prompt_processor.prompt=a red mushroom"
    code = launch.main(["--config", "configs/sample-toybox.yaml", "--plan", prompt])
    assert code == 2
    assert "makes no 3D object: write `--sample`" in capsys.readouterr().err
