"""Exact traces of the published sliding-window rule (`tests/golden/README.md`)."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dreampropeller import (
    EMAThreshold,
    FixedThreshold,
    OptimizationTrajectory,
    PicardSolver,
    Sequential,
    SlidingWindow,
    State,
    solve,
)

FOLDER = Path(__file__).parent / "golden"
FILES = {path.stem: json.loads(path.read_text()) for path in FOLDER.glob("*.json")}


class Published(OptimizationTrajectory):
    """Errors in the published unit, a millionth."""

    def error_scale(self, step: int) -> float:
        return 1e-6


def _quadratic_loss(step: int, y: State) -> Tensor:
    index = torch.arange(10, dtype=torch.float64)
    noise = 0.3 * torch.sin(1.7 * step + 0.9 * index)
    return (0.05 * (index + 1) * y["x"].square() + noise * y["x"]).sum()


def _net_loss(step: int, y: State) -> Tensor:
    w, b, v = y["x"].view(3, 2)
    u = math.sin(0.37 * step + 0.2)
    return ((v * torch.tanh(w * u + b)).sum() - 0.5 * math.sin(3 * u)).square() / 2


def _trajectory(golden: dict[str, Any]) -> Published:
    start = {"x": torch.tensor(golden["x0"], dtype=torch.float64)}
    if golden["dim"] == 10:
        return Published(
            _quadratic_loss,
            start,
            lambda p: torch.optim.Adam(
                p.values(), lr=0.05, betas=(0.9, 0.99), eps=1e-15
            ),
            golden["T"],
        )
    return Published(
        _net_loss,
        start,
        lambda p: torch.optim.SGD(p.values(), lr=0.05, momentum=0.9),
        golden["T"],
    )


@pytest.mark.parametrize("name", FILES)
def test_sequential_reproduces_the_golden_trajectory(name: str) -> None:
    golden = FILES[name]
    solution = solve(_trajectory(golden), Sequential())
    expected = torch.tensor(golden["sequential"]["final_x"], dtype=torch.float64)
    torch.testing.assert_close(solution.value["x"], expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "index"),
    [
        (name, i)
        for name, golden in FILES.items()
        for i, run in enumerate(golden["runs"])
        if run["ema_decay"] < 1 or run["adaptivity"] == "mean"  # else the same run
    ],
)
def test_picard_reproduces_the_golden_run(name: str, index: int) -> None:
    golden = FILES[name]
    run = golden["runs"][index]
    never_adapts = run["ema_decay"] == 1
    solver = PicardSolver(
        SlidingWindow(run["P"]),
        FixedThreshold(run["threshold"])
        if never_adapts
        else EMAThreshold(run["threshold"], run["ema_decay"], run["adaptivity"]),
    )
    seen: list[dict[str, Any]] = []
    solution = solve(
        _trajectory(golden),
        solver,
        on_iteration=lambda state, it: seen.append(
            {"x": state.y["x"], "begin": it.begin, "it": it}
        ),
    )
    expected = torch.tensor(run["final_x"], dtype=torch.float64)
    torch.testing.assert_close(solution.value["x"], expected, rtol=0, atol=1e-6)
    if run["bitwise_fragile"]:
        return
    assert solution.stats.num_iterations == run["n_iterations"]
    for ours, theirs in zip(seen, run["iterations"], strict=True):
        assert ours["begin"] == theirs["begin"]
        assert ours["it"].stride == theirs["stride"]
        assert ours["it"].errors == pytest.approx(theirs["errors"], rel=1e-4, abs=1e-9)
        assert ours["it"].threshold == pytest.approx(theirs["thresh_before"], rel=1e-4)
        accepted = torch.tensor(theirs["x_accepted"], dtype=torch.float64)
        torch.testing.assert_close(ours["x"], accepted, rtol=0, atol=1e-6)
