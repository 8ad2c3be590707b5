"""What a run's metrics tell of its seconds, and what a summary makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from systems.runs import history
from systems.runs.results import collapses, next_steps
from tests.systems.scenes import small


def line(number: int, solving: float, **more: Any) -> dict[str, Any]:
    return {
        **{"iteration": number, "begin": 2 * (number - 1), "window": 4, "stride": 2},
        **{"solving": solving, "elapsed": solving + 1, "evaluations": 4 * number},
        **{"seconds": {"drift": 0.5, "update": 0.25}, "workers": 1},
        **more,
    }


def written(folder: Path, *entries: dict[str, Any] | str) -> list[dict[str, Any]]:
    texts = [e if isinstance(e, str) else json.dumps(e) for e in entries]
    (folder / history.FILE).write_text("\n".join(texts) + "\n")
    return history.lines(folder)


def test_seconds_are_those_of_all_parts(tmp_path: Path) -> None:
    """Three iterations, killed; on from the second, with two workers; then an end."""
    found = written(
        tmp_path,
        {"step": 0, "loss": 1.0},
        line(1, 1.0),
        line(2, 2.0),
        line(3, 4.0),
        '{"iteration": 4, "begi',
        line(3, 2.5, workers=2),
        line(4, 3.5, workers=2, stride=3),
        {"end": 4, "elapsed": 9.0},
    )
    assert [entry["solving"] for entry in history.iterations(found)] == [1, 2, 2.5, 3.5]
    assert history.elapsed(found, 2) == 3.0
    assert history.totals(found) == {
        "steps": 9,
        "iterations": 4,
        "evaluations": 16,
        "strides": [2, 2, 2, 3],
        "steps_per_iteration": 2.25,
        "seconds": 9.0,
        "solving_seconds": 3.5,
        "device_seconds": 2 + 2 * 1.5,
        "seconds_by_phase": {"drift": 2.0, "update": 1.0},
    }


def test_a_part_that_is_missing_makes_no_number(tmp_path: Path) -> None:
    found = history.totals(written(tmp_path, line(2, 2.0), line(3, 4.0)))
    assert found["iterations"] == 3
    assert found["solving_seconds"] is found["seconds_by_phase"] is None
    (tmp_path / history.FILE).unlink()
    assert history.lines(tmp_path) == []


@pytest.mark.parametrize(
    ("losses", "value", "message"),
    [
        ([2.0, 1.0] * 10, 0.0, None),
        ([-2.0, -1.0] * 10, 0.0, None),
        ([2.0] * 18 + [1e9, 1e9], 0.0, "the loss went from 2 to 1e+09"),
        ([2.0] * 18 + [None, None], 0.0, "the loss is no longer finite"),
        ([2.0], float("nan"), "`x` is no longer finite"),
        ([], 0.0, None),
    ],
)
def test_a_run_that_went_astray_is_told(
    losses: list[float | None], value: float, message: str | None
) -> None:
    lines = [{"step": step, "loss": loss} for step, loss in enumerate(losses)]
    found = collapses(lines, {"x": torch.tensor([1.0, value]), "n": torch.tensor([1])})
    if message is None:
        assert found == []
        return
    assert message in found[0]
    assert "smaller learning rate" in found[0]


def test_a_summary_says_what_to_do_next() -> None:
    system = small()
    folder = Path("out puts")
    told = next_steps(folder, system, {"steps": 7})
    command = "python launch.py --{} resume='out puts'"
    assert told == [
        f"Resume: {command.format('train')}",
        f"Render: {command.format('test')}",
        f"Export: {command.format('export')}",
        "Look into out puts",
    ]
    done = {"steps": 40, "turntable": "turntable.mp4", "mesh": ["mesh.glb"]}
    assert next_steps(folder, system, done) == ["Look into out puts"]
    done["mesh"] = "none: nothing is there"
    assert next_steps(folder, system, done)[0] == f"Export: {command.format('export')}"
