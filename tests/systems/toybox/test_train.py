import json
from datetime import datetime
from pathlib import Path

import pytest
import torch
from diffusers.utils import logging

from systems.toybox import classifier, evaluate
from systems.toybox import dataset as data
from systems.toybox.captions import HELD_OUT
from systems.toybox.classifier import Judgement
from systems.toybox.export import export
from systems.toybox.objects import COLOURS, OBJECTS
from systems.toybox.pipeline import draw, load
from systems.toybox.train import Budget, Run, learning_rate, seconds_until, train

logging.disable_progress_bar()


@pytest.fixture(scope="module")
def renders() -> data.Dataset:
    return data.build(samples=1, normals=1)


def test_a_resumed_run_is_the_uninterrupted_one(
    renders: data.Dataset, tmp_path: Path
) -> None:
    rates = (1e-4, 3e-4, 2e-4)
    straight = Run(None, seed=0)
    losses = [straight.advance(renders, 2, rate) for rate in rates]
    first = Run(None, seed=0)
    assert first.advance(renders, 2, rates[0]) == losses[0]
    first.save(tmp_path / "state.pt")
    second = Run(None, seed=1)  # the state, not the seed, decides the weights
    second.random = first.random
    second.restore(tmp_path / "state.pt")
    assert [second.advance(renders, 2, rate) for rate in rates[1:]] == losses[1:]
    for one, other in zip(
        straight.average.parameters(), second.average.parameters(), strict=True
    ):
        assert torch.equal(one, other)


def test_train_logs_and_its_state_can_be_exported(
    renders: data.Dataset, tmp_path: Path
) -> None:
    state = train(tmp_path, Budget(minutes=5, steps=20), renders, batch=1)
    entries = (tmp_path / "loss.jsonl").read_text().splitlines()
    assert [json.loads(entry)["step"] for entry in entries] == [20]
    assert export(state, tmp_path / "pipeline") == 20
    picture = draw(
        load(tmp_path / "pipeline"), ["a red cube"], 0, num_inference_steps=1
    )
    assert picture.shape == (1, 3, 32, 32)
    # Only the repository survives: exported weights are a place to start from.
    again = Run(tmp_path / "pipeline", seed=0)
    exported = torch.load(state, weights_only=True)["average"]
    for name, value in again.model.state_dict().items():
        torch.testing.assert_close(value, exported[name], atol=1e-3, rtol=1e-3)


def test_learning_rate_warms_up_and_ends_near_zero() -> None:
    assert learning_rate(0, 0.0) < learning_rate(75, 0.0) < learning_rate(150, 0.0)
    assert learning_rate(1000, 0.1) == learning_rate(1000, 0.4)
    assert learning_rate(1000, 1.0) == pytest.approx(0.01 * learning_rate(1000, 0.4))


def test_the_clock_bounds_a_run() -> None:
    noon = datetime(2026, 1, 1, 12, 0, 0)
    assert seconds_until("12:30", noon) == 1800
    assert seconds_until("11:59", noon) == 86340  # tomorrow
    assert seconds_until(None) == float("inf")
    with pytest.raises(ValueError, match="`25:00` is no clock time"):
        seconds_until("25:00")


def test_shipped_classifier_knows_fresh_renders() -> None:
    renders = data.build(samples=1, normals=0, seed=7, skip=())
    score = classifier.accuracy(classifier.load(), renders, seed=7)
    assert score["object"] > 0.92  # of 128; the figure over 2048 is in docs/toybox.md
    assert score["colour"] > 0.92


def test_a_fifth_of_the_judged_prompts_is_held_out() -> None:
    asked = evaluate.prompts()
    assert len(asked) == 200
    assert len({p.text for p in asked if p.trained}) >= 116
    held_out = [p for p in asked if not p.trained]
    assert len(held_out) == 40
    assert {(p.colour, p.name) for p in held_out} == set(HELD_OUT)
    assert not {(p.colour, p.name) for p in asked if p.trained} & set(HELD_OUT)


def test_score_counts_what_was_seen() -> None:
    asked = evaluate.prompts(10)
    objects = torch.tensor([list(OBJECTS).index(p.name) for p in asked])
    colours = torch.tensor([list(COLOURS).index(p.colour) for p in asked])
    objects[0] = (objects[0] + 1) % 16
    report = evaluate.score(asked, Judgement(objects, colours))
    groups = report["groups"]
    assert isinstance(groups, dict)
    assert groups["trained pairs"] == {"prompts": 8, "object": 0.875, "colour": 1.0}
    assert groups["held-out pairs"] == {"prompts": 2, "object": 1.0, "colour": 1.0}
    assert report["mistakes"] == [["sphere", "cube", 1]]
