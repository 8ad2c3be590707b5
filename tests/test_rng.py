from __future__ import annotations

import random

import numpy as np
import torch

from dreampropeller import StepRandom


def test_generator_depends_on_seed_step_and_stream_alone() -> None:
    def draw(seed: int, step: int, stream: str) -> list[float]:
        return torch.rand(
            3, generator=StepRandom(seed).generator(step, stream)
        ).tolist()

    first = draw(0, 7, "noise")
    torch.rand(100)
    assert draw(0, 7, "noise") == first
    others = [draw(1, 7, "noise"), draw(0, 8, "noise"), draw(0, 7, "camera")]
    assert all(other != first for other in others)


def test_keys_are_the_same_in_every_process_and_version() -> None:
    assert StepRandom(0).key(7, "noise") == 7269300463423882561


def test_scope_replays_all_global_generators_and_restores_them() -> None:
    def draw() -> tuple[float, float, float]:
        return torch.rand(()).item(), random.random(), float(np.random.rand())

    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    before = draw()
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    inside = []
    for _ in range(2):
        with StepRandom(1).scope(4):
            inside.append(draw())
    assert inside[0] == inside[1] != before
    assert draw() == before
