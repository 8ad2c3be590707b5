"""Evaluation of a prior: accuracy of the sampled object and colour.

`python -m systems.toybox evaluate` samples 200 prompts of the first prior's 16 objects
and 8 colours (25 DDIM steps, guidance scale 3), a fifth of them with held-out
pairs, classifies them with the prior's classifier, and writes figures, a confusion
table and images. For the second prior there are more figures: see
`systems.toybox.measure`.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from systems.images import save_sheet
from systems.toybox import classifier, measure, pipeline
from systems.toybox.captions import (
    FIRST_COLOURS,
    FIRST_HELD_OUT,
    FIRST_OBJECTS,
    SCORED,
    VIEWS,
    caption,
)
from systems.toybox.classifier import Classification
from systems.toybox.conditions import takes_conditions
from systems.toybox.objects import COLOURS, OBJECTS
from systems.toybox.truth import truth, view_cameras

NUM_PROMPTS = 200
BACKGROUND = 0.75


@dataclass(frozen=True)
class Prompt:
    """A prompt to evaluate, and whether its pair was in the training set."""

    colour: str
    name: str
    view: str
    trained: bool

    @property
    def text(self) -> str:
        """The prompt, spelled out."""
        return caption(self.colour, self.name, self.view, normal=False)


def prompts(count: int = NUM_PROMPTS) -> list[Prompt]:
    """A fixed list: every fifth prompt is a held-out pair, and views alternate.

    Trained pairs come in an order that goes through the objects first.
    """
    trained = [
        (colour, name)
        for shift in range(len(FIRST_COLOURS))
        for number, name in enumerate(FIRST_OBJECTS)
        if (colour := FIRST_COLOURS[(number + shift) % len(FIRST_COLOURS)], name)
        not in FIRST_HELD_OUT
    ]
    result: list[Prompt] = []
    seen = unseen = 0
    for i in range(count):
        if i % 5 == 4:
            colour, name = FIRST_HELD_OUT[unseen % len(FIRST_HELD_OUT)]
            # Shifted by one view per round, so that every pair is seen from all sides.
            view = VIEWS[(unseen + unseen // len(FIRST_HELD_OUT)) % len(VIEWS)]
            unseen += 1
        else:
            colour, name = trained[seen % len(trained)]
            view = VIEWS[(seen + seen // len(FIRST_OBJECTS)) % len(VIEWS)]
            seen += 1
        result.append(Prompt(colour, name, view, i % 5 != 4))
    return result


def score(asked: Sequence[Prompt], seen: Classification) -> dict[str, object]:
    """Accuracy of objects and colours, and the confusions."""
    names, colours = list(OBJECTS), list(COLOURS)
    right_object = [
        names[i] == p.name for i, p in zip(seen.objects.tolist(), asked, strict=True)
    ]
    right_colour = [
        colours[i] == p.colour
        for i, p in zip(seen.colours.tolist(), asked, strict=True)
    ]

    def share(right: Sequence[bool], chosen: Sequence[bool]) -> float | None:
        kept = [r for r, c in zip(right, chosen, strict=True) if c]
        return round(sum(kept) / len(kept), 4) if kept else None

    groups = {
        "trained pairs": [p.trained for p in asked],
        "held-out pairs": [not p.trained for p in asked],
        **{
            f"{v} view, trained": [p.view == v and p.trained for p in asked]
            for v in VIEWS
        },
    }
    mistakes = Counter(
        (p.name, names[i])
        for i, p in zip(seen.objects.tolist(), asked, strict=True)
        if names[i] != p.name
    )
    return {
        "groups": {
            title: {
                "prompts": sum(chosen),
                "object": share(right_object, chosen),
                "colour": share(right_colour, chosen),
            }
            for title, chosen in groups.items()
        },
        "objects": {
            name: share(right_object, [p.name == name for p in asked])
            for name in FIRST_OBJECTS
        },
        "mistakes": [[a, b, n] for (a, b), n in mistakes.most_common()],
    }


def confusion_table(asked: Sequence[Prompt], seen: Classification) -> str:
    """Markdown: one row per object requested, one column per object seen."""
    names = list(OBJECTS)[: 1 + max(int(seen.objects.max()), len(FIRST_OBJECTS) - 1)]
    counts = torch.zeros(len(names), len(names), dtype=torch.long)
    for prompt, number in zip(asked, seen.objects.tolist(), strict=True):
        counts[names.index(prompt.name), number] += 1
    lines = [
        "| asked \\ seen | " + " | ".join(names) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    for name, row in zip(names, counts.tolist(), strict=True):
        cells = [str(value) if value else "·" for value in row]
        lines.append(f"| **{name}** | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def beside_truth(prior: pipeline.ToyboxPipeline, seed: int = 0) -> Tensor:
    """Scored and held-out pairs: four ground-truth views, then four samples per row.

    Returns:
        Images from 0 to 1, shape ``(28 · 8, 3, size, size)``.
    """
    pairs = [*SCORED, *FIRST_HELD_OUT]
    asked = [(pair, view) for pair in pairs for view in VIEWS]
    texts = [caption(*pair, view, normal=False) for pair, view in asked]
    cameras = [view_cameras(view) for _, view in asked]
    given = {"camera": measure.join(cameras)} if takes_conditions(prior.unet) else {}
    samples = pipeline.draw(prior, texts, seed, **given)
    background = torch.full((3,), BACKGROUND)
    truths = [
        truth(text).render(camera, samples.shape[-1]).over(background)
        for text, camera in zip(texts, cameras, strict=True)
    ]
    shape = (len(pairs), len(VIEWS), *samples.shape[1:])
    both = [torch.cat(truths).view(shape), samples.view(shape)]
    return torch.cat(both, 1).flatten(0, 1)


def guided_step_seconds(prior: pipeline.ToyboxPipeline, repeats: int = 9) -> float:
    """Median time of one guided evaluation of four views."""
    words = prior.encode(["a red mushroom, front view"] * 4)
    blank = prior.encode([""])
    shape = (4, prior.unet.config["out_channels"], 32, 32)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        prior.velocity(x, torch.tensor(500), words, blank, 3.0)
        times.append(time.perf_counter() - start)
    return sorted(times)[repeats // 2]


def first_list(
    prior: pipeline.ToyboxPipeline,
    classifier: classifier.Classifier,
    count: int,
    seed: int,
) -> tuple[dict[str, object], str]:
    """Figures and confusion table of the first prior's prompts, the view in words."""
    asked = prompts(count)
    seen = classifier.classify(pipeline.draw(prior, [p.text for p in asked], seed))
    return {"prompts": count, **score(asked, seen)}, confusion_table(asked, seen)


def second_list(
    prior: pipeline.ToyboxPipeline,
    classifier: classifier.Classifier,
    count: int,
    seed: int,
    to: Path,
) -> dict[str, object]:
    """Figures of combinations, cameras and images; see `systems.toybox.measure`.

    Args:
        prior: The second prior.
        classifier: Classifier of the prior.
        count: Number of trained combinations; half as many are held out.
        seed: Seed of questions and noise.
        to: Folder of the sheets.
    """
    report: dict[str, object] = {}
    asked: list[measure.Question] = []
    images: list[Tensor] = []
    for title, number, held_out in (
        ("trained combinations", count, False),
        ("held-out combinations", count // 2, True),
    ):
        part = measure.questions(number, held_out, seed)
        images.append(measure.answers(prior, part, seed))
        report[title] = measure.combinations(part, images[-1], classifier)
        asked += part
    report["cameras"] = measure.cameras(asked, torch.cat(images), classifier)
    shown = [i * len(asked) // 64 for i in range(64)]
    truths = [measure.ground_truth(asked[i], images[0].shape[-1]) for i in shown]
    pairs = torch.stack([torch.cat(truths), torch.cat(images)[shown]], 1)
    save_sheet(pairs.flatten(0, 1), to / "combinations.png", columns=16, scale=2)
    views = measure.new_views(prior, min(64, count), seed)
    report["images"] = views.figures()
    rows = torch.stack([views.references, views.truths, views.samples], 1)
    save_sheet(rows[:32].flatten(0, 1), to / "images.png", columns=12, scale=2)
    return report


def evaluate(weights: Path, file: Path, to: Path, count: int, seed: int) -> str:
    """Measure a prior and write figures, a confusion table and sheets.

    Args:
        weights: A pipeline folder.
        file: A classifier of the same generation.
        to: Output folder.
        count: Number of prompts of the first list; the second has twice as many
            combinations.
        seed: Seed of the noise.

    Returns:
        The figures as JSON.
    """
    start = time.perf_counter()
    prior = pipeline.load(weights)
    prior.set_progress_bar_config(disable=True)
    seconds = {"loading": round(time.perf_counter() - start, 3)}
    seconds["guided step of 4 views"] = round(guided_step_seconds(prior), 4)
    model = classifier.load(file)
    report, table = first_list(prior, model, count, seed)
    files = [f for f in weights.rglob("*") if f.is_file()]
    report |= {
        "seconds": seconds,
        "threads": torch.get_num_threads(),
        "package megabytes": round(sum(f.stat().st_size for f in files) / 1e6, 2),
    }
    to.mkdir(parents=True, exist_ok=True)
    if takes_conditions(prior.unet):
        training = weights / "training.json"
        if training.exists():
            report["training"] = json.loads(training.read_text())
        report |= second_list(prior, model, 2 * count, seed, to)
    text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    (to / "evaluation.json").write_text(text, encoding="utf-8")
    (to / "confusion.md").write_text(table, "utf-8")
    save_sheet(beside_truth(prior), to / "samples.png", columns=16, scale=2)
    return text
