import json
import os
import signal
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.utils import logging

from systems.scene.cameras import Cameras
from systems.toybox import WEIGHTS, classifier, evaluate, measure, pipeline
from systems.toybox.captions import FIRST_HELD_OUT, HELD_OUT, MARKS
from systems.toybox.classifier import Classification
from systems.toybox.conditions import labels, to_blocks
from systems.toybox.model import make_scheduler, make_tokenizer
from systems.toybox.objects import COLOURS, OBJECTS
from systems.toybox.train import (
    RATE,
    Budget,
    Run,
    learning_rate,
    seconds_until,
    train,
    train_on,
)
from systems.toybox.views import ViewSet, build_shard

logging.disable_progress_bar()
SMALL = (8, 16, 16)


@pytest.fixture(scope="module")
def views() -> ViewSet:
    layers, cameras = build_shard(0, per_object=1)
    return ViewSet((layers,), cameras)


def test_a_resumed_run_is_the_uninterrupted_one(views: ViewSet, tmp_path: Path) -> None:
    straight = Run(None, seed=0, widths=SMALL)
    losses = [straight.advance(views, 2, 1e-3) for _ in range(3)]
    first = Run(None, seed=0, widths=SMALL)
    assert first.advance(views, 2, 1e-3) == losses[0]
    first.save(tmp_path / "state.pt")
    second = Run(None, seed=1, widths=SMALL)  # the state decides the weights
    second.random = first.random
    second.restore(tmp_path / "state.pt")
    assert [second.advance(views, 2, 1e-3) for _ in range(2)] == losses[1:]
    assert (second.step, second.images) == (3, 6)
    for one, other in zip(
        straight.average.parameters(), second.average.parameters(), strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_stopped_run_loses_nothing(name: str, views: ViewSet, tmp_path: Path) -> None:
    run = Run(None, widths=SMALL)
    advance, number = run.advance, getattr(signal, name)

    def interrupted(*arguments: Any) -> torch.Tensor:
        if run.step == 3:
            os.kill(os.getpid(), number)  # in the middle of the fourth step
        return advance(*arguments)

    patched: Any = run
    patched.advance = interrupted
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        train(run, tmp_path, Budget(steps=1000), views, batch=1)
    assert signal.getsignal(number) is before
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["step"] == run.step == 4
    assert not (tmp_path / "pipeline").exists()


def test_a_part_keeps_the_state_before_its_learning_rate_falls(
    views: ViewSet, tmp_path: Path
) -> None:
    run = Run(None, widths=SMALL)
    written = train(run, tmp_path, Budget(steps=20), views, batch=1)
    assert run.step == 20
    report = json.loads((written / "training.json").read_text())
    assert report == {"steps": 20, "images": 20}
    (entry,) = (tmp_path / "loss.jsonl").read_text().splitlines()
    assert json.loads(entry)["step"] == 20
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["step"] == 18
    with pytest.raises(ValueError, match=r"widths \(8, 16, 16\).*--widths 8 16 16"):
        Run(None, widths=(8, 8, 8)).restore(tmp_path / "state.pt")
    # The next part goes on from there.
    again = Run(None, widths=SMALL)
    train(again, tmp_path, Budget(steps=1), views, batch=1)
    assert again.step == 19
    # Exported weights load, draw 64×64 images, and are a place to start from.
    prior = pipeline.load(written)
    image = pipeline.draw(prior, ["a red teapot"], 0, num_inference_steps=1)
    assert image.shape == (1, 3, 64, 64)
    with pytest.raises(ValueError, match="start from scratch with `--from none`"):
        Run(written, widths=(8, 8, 8))
    third = Run(written, widths=SMALL)
    for name, value in third.model.state_dict().items():
        torch.testing.assert_close(
            value, run.average.state_dict()[name], atol=1e-3, rtol=1e-3
        )


def test_views_can_be_rendered_on_the_device_that_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The form for a GPU, on the CPU: rendering counts towards the minutes."""
    made: list[int] = []

    def small(shard: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        made.append(shard)
        return build_shard(shard, per_object=1, device=device)

    monkeypatch.setattr("systems.toybox.train.build_shard", small)
    run = Run(None, widths=SMALL)
    written = train_on(run, tmp_path, Budget(10, steps=2), batch=2, shards=1)
    assert made == [0]
    assert json.loads((written / "training.json").read_text())["images"] == 4
    with pytest.raises(ValueError, match="Rendering took all of the 0 minutes"):
        train_on(run, tmp_path, Budget(0), batch=2, shards=1)


def test_the_first_priors_weights_predict_alike_at_twice_the_size() -> None:
    """On images of equal 2×2 blocks, without camera and reference."""
    first, run = pipeline.load(), Run(WEIGHTS)
    words = run.tokenizer(["a red mug, side view"], padding="max_length", max_length=16)
    ids = torch.tensor(words.input_ids)
    x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        t = torch.tensor([500])
        embedded = first.encode(["a red mug, side view"])
        ours = run.model.text_encoder(ids).last_hidden_state
        torch.testing.assert_close(ours, embedded, atol=1e-4, rtol=1e-4)
        expected = first.unet(x, t, embedded).sample
        blocks = to_blocks(x.repeat_interleave(2, 2).repeat_interleave(2, 3))
        shown = torch.cat([blocks, torch.zeros(1, 18, 32, 32)], 1)
        got = run.model(shown, t, ids, labels(1))
    means = got.unflatten(1, (3, 4))
    torch.testing.assert_close(means.mean(2), expected, atol=2e-3, rtol=1e-3)
    # The four pixels of a block differ, else they would learn alike.
    assert float(means.std(2).mean()) > 0.1
    known = make_tokenizer().get_vocab()
    assert {"teapot", *MARKS.values()} <= set(known)


def test_the_schedule_is_the_cosine_one_with_its_log_snr_shifted() -> None:
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    def log_snr(scheduler: DDIMScheduler) -> torch.Tensor:
        kept = torch.cumprod(1 - scheduler.betas.double(), 0)
        return (kept / (1 - kept)).log()

    cosine = DDIMScheduler(1000, beta_schedule="squaredcos_cap_v2")
    shift = log_snr(make_scheduler()) - log_snr(cosine)
    expected = torch.full_like(shift, -2 * torch.log(torch.tensor(2.0)).item())
    torch.testing.assert_close(shift[5:-1], expected[5:-1], atol=2e-2, rtol=0)


def test_learning_rate_warms_up_stays_and_falls_over_the_last_tenth() -> None:
    assert learning_rate(0, 0.0) < learning_rate(75, 0.0) < learning_rate(150, 0.0)
    assert learning_rate(1000, 0.0) == learning_rate(9000, 0.89) == RATE
    assert learning_rate(1000, 0.95) == pytest.approx(RATE / 2)
    assert learning_rate(1000, 1.0) == 0


def test_the_clock_bounds_a_run() -> None:
    noon = datetime(2026, 1, 1, 12, 0, 0)
    assert seconds_until("12:30", noon) == 1800
    assert seconds_until("11:59", noon) == 86340  # tomorrow
    assert seconds_until(None) == float("inf")
    with pytest.raises(ValueError, match="`25:00` is no clock time"):
        seconds_until("25:00")
    assert Budget(10).share(300, float("inf"), 5) == 0.5
    assert Budget(10).share(300, 400, 5) == 0.75
    assert Budget(10, steps=6).share(60, float("inf"), 3) == 0.5


def test_the_classifiers_loss_is_least_for_the_right_answers(views: ViewSet) -> None:
    index = torch.arange(8) * 3
    made = classifier.labelled(views, index, torch.Generator().manual_seed(0))

    def answer(right: bool) -> torch.Tensor:
        shift = 0 if right else 1
        kinds = (
            (made.objects, 26),
            (made.looks.colour, 10),
            (made.looks.finish, 3),
        )
        logits = [
            20 * torch.nn.functional.one_hot((value + shift) % n, n).float()
            for value, n in kinds
        ]
        angle = made.azimuths.deg2rad() + (0 if right else 3.0)
        given = (*logits, torch.stack([angle.cos(), angle.sin()], -1))

        class Fixed(classifier.Classifier):
            def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
                return given

        return classifier.loss_of(Fixed(), made)

    assert float(answer(True)) < 1e-3
    assert float(answer(False)) > 50


def test_a_classifier_learns_and_is_loaded_as_it_was_saved(
    views: ViewSet, tmp_path: Path
) -> None:
    model = classifier.train(views, steps=2)
    classifier.save(model, tmp_path / "model.safetensors", {"steps": 2})
    loaded = classifier.load(tmp_path / "model.safetensors")
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        loaded(images)[0], model(images)[0], atol=0.05, rtol=0.05
    )
    score = classifier.accuracy(loaded, views, seed=0)
    assert set(score) >= {"object", "colour", "finish"}
    assert 0 <= score["azimuth, median error in degrees"] <= 180
    first = classifier.load()
    assert first.classify(images[:, :, ::2, ::2]).finishes is None


def test_angles_wrap_around() -> None:
    a, b = torch.tensor([179.0, -10.0, 0.0]), torch.tensor([-179.0, 350.0, 180.0])
    assert classifier.angle_between(a, b).tolist() == [2, 0, 180]


def test_a_fifth_of_the_judged_prompts_is_held_out() -> None:
    asked = evaluate.prompts()
    assert len(asked) == 200
    assert len({p.text for p in asked if p.trained}) >= 116
    held_out = [p for p in asked if not p.trained]
    assert len(held_out) == 40
    assert {(p.colour, p.name) for p in held_out} == set(FIRST_HELD_OUT)
    assert not {(p.colour, p.name) for p in asked if p.trained} & set(HELD_OUT)


def test_score_counts_what_was_seen() -> None:
    asked = evaluate.prompts(10)
    objects = torch.tensor([list(OBJECTS).index(p.name) for p in asked])
    colours = torch.tensor([list(COLOURS).index(p.colour) for p in asked])
    objects[0] = (objects[0] + 1) % 16
    report = evaluate.score(asked, Classification(objects, colours))
    groups = report["groups"]
    assert isinstance(groups, dict)
    assert groups["trained pairs"] == {"prompts": 8, "object": 0.875, "colour": 1.0}
    assert groups["held-out pairs"] == {"prompts": 2, "object": 1.0, "colour": 1.0}
    assert report["mistakes"] == [["sphere", "cube", 1]]
    few = evaluate.score(asked[:1], Classification(objects[:1], colours[:1]))
    shown = json.loads(json.dumps(few, allow_nan=False))  # NaN is no JSON
    assert shown["groups"]["held-out pairs"]["object"] is None


class _Oracle(classifier.Classifier):
    """Sees what a list of questions asks for, turned by a given angle."""

    def __init__(self, asked: list[measure.Question], turn: float) -> None:
        super().__init__()
        self.asked, self.turn = asked, turn

    def classify(self, images: torch.Tensor) -> Classification:
        asked = [q for q in self.asked if len(images) == len(self.asked) or _front(q)]
        objects = [list(OBJECTS).index(q.asked.name or "") for q in asked]
        colours = [list(COLOURS).index(q.asked.colour or "") for q in asked]
        finishes = [("plain", *MARKS).index(q.asked.finish) for q in asked]
        azimuths = torch.cat([q.camera.azimuth for q in asked]) + self.turn
        return Classification(
            torch.tensor(objects),
            torch.tensor(colours),
            torch.tensor(finishes),
            azimuths,
        )


def _front(question: measure.Question) -> bool:
    return question.asked.name in measure.WITH_FRONT


def test_truths_are_measured_as_perfect() -> None:
    """Renders in place of samples: masks are found, all answers are right."""
    asked = [*measure.questions(26, False), *measure.questions(8, True)]
    assert {(q.asked.colour, q.asked.name) in HELD_OUT for q in asked[:26]} == {False}
    assert {(q.asked.colour, q.asked.name) in HELD_OUT for q in asked[26:]} == {True}
    assert all(q.asked.second != q.asked.colour for q in asked)
    grey = torch.full((3,), 0.75)
    images = torch.cat([q.truth.render(q.camera, 64).over(grey) for q in asked])
    classifier = _Oracle(asked, turn=10.0)
    figures = measure.combinations(asked, images, classifier)
    assert figures == {"samples": 34, "object": 1.0, "colour": 1.0, "finish": 1.0}
    seen = measure.cameras(asked, images, classifier)
    assert seen["azimuth, median error in degrees"] == pytest.approx(10, abs=0.01)
    assert seen["azimuth within 30 degrees"] == 1
    overlap = seen["mask IoU, mean"]
    assert overlap is not None
    assert overlap > 0.93
    round_ones = [i for i, q in enumerate(asked) if not _front(q)]
    few = [asked[i] for i in round_ones]
    nothing = measure.cameras(few, images[round_ones], classifier)
    assert nothing == {"samples": 0, **dict.fromkeys([*seen][1:])}


def test_figures_of_new_views_compare_with_the_copy() -> None:
    cameras = Cameras(*(torch.tensor([v, w]) for v, w in _TWO))
    (asked,) = measure.questions(1, True, names=["teapot"])
    renders = asked.truth.render(cameras, 64)
    images = renders.over(torch.full((3,), 0.75))
    masks = renders.mask[:, 0] > 0.5
    views = measure.NewViews(images[:1], images[1:], images[1:], masks[1:], masks[:1])
    figures = views.figures()
    assert figures["samples, PSNR"] == 100
    assert figures["samples, mask IoU"] > 0.93
    assert figures["copy of the input, PSNR"] < 25
    assert figures["copy of the input, mask IoU"] < 0.9


_TWO = ((0.0, 90.0), (20.0, 20.0), (2.4, 2.4), (50.0, 50.0))
