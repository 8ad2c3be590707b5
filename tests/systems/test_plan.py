"""`--plan` gives the bounds that follow from window, jumps and workers."""

from __future__ import annotations

import re

import pytest

import launch
from systems.runs import plan
from tests.helpers import TOYS, OrnsteinUhlenbeck
from tests.systems.scenes import SMALL, TOYBOX


class Jumping(OrnsteinUhlenbeck):
    """Jumps at every multiple of five."""

    num_steps = 23

    def next_jump(self, step: int) -> int:
        return step - step % 5 + 5


def test_windows_end_at_jumps_and_at_the_last_step() -> None:
    trajectory = Jumping()
    assert plan.windows(trajectory, 8) == [5, 5, 5, 5, 3]
    assert plan.windows(trajectory, 3) == [3, 2] * 4 + [3]
    toy = TOYS["network-adamw"].make()
    assert sum(plan.windows(toy, 4)) == toy.num_steps


def test_a_plan_has_one_evaluation_and_what_follows(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "_time", lambda *_: (1.0, 0.5))
    words = [*SMALL, "dispatch.num_workers=2"]
    assert launch.main(["--config", TOYBOX, "--plan", *words]) == 0
    found = capsys.readouterr().out
    assert "Sequential: 40 evaluations, 20 s." in found
    assert "Window 8: at least 5 iterations, at most 8.00x fewer than steps." in found
    assert "on 2 workers: 10 s at best, plus" in found
    assert "on 8 workers: 2.5 s at best, plus" in found
    monkeypatch.undo()
    assert launch.main(["--config", TOYBOX, "--plan", *SMALL]) == 0
    found = capsys.readouterr().out
    assert re.search(
        r"A step: \S+ s \(median of 3; the first took \S+ s; \d+ thread", found
    )
    assert "On one worker the sequential run is faster" in found


def test_images_have_no_plan(capsys: pytest.CaptureFixture[str]) -> None:
    prompt = "system.prompt_processor.prompt=a red mushroom"
    code = launch.main(["--config", "configs/sample-toybox.yaml", "--plan", prompt])
    assert code == 2
    assert "makes no 3D object: write `--sample`" in capsys.readouterr().err
