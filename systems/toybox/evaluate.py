"""Judge the prior: does it draw the object and the colour it is asked for?

`python -m systems.toybox.evaluate` samples 200 prompts (25 DDIM steps, guidance scale
3), a fifth of them with pairs the prior has never seen, lets the classifier judge them,
and writes figures, a confusion table and pictures into `outputs/toybox/evaluation/`;
`--to docs/toybox` puts them where they are published.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from systems.images import save_sheet
from systems.toybox import WEIGHTS, classifier, pipeline
from systems.toybox.captions import HELD_OUT, SCORED, VIEWS, caption, view_in
from systems.toybox.classifier import Judgement
from systems.toybox.objects import COLOURS, OBJECTS
from systems.toybox.truth import truth, view_cameras

NUM_PROMPTS = 200
BACKGROUND = 0.75


@dataclass(frozen=True)
class Prompt:
    """A prompt to be judged, and whether its pair was in the training set."""

    colour: str
    name: str
    view: str
    trained: bool

    @property
    def text(self) -> str:
        """The prompt, spelled out."""
        return caption(self.colour, self.name, self.view, normal=False)


def prompts(count: int = NUM_PROMPTS) -> list[Prompt]:
    """A fixed list: every fifth prompt is a held-out pair, views take turns.

    Trained pairs come in an order that goes through the objects first.
    """
    trained = [
        (colour, name)
        for shift in range(len(COLOURS))
        for number, name in enumerate(OBJECTS)
        if (colour := list(COLOURS)[(number + shift) % len(COLOURS)], name)
        not in HELD_OUT
    ]
    result: list[Prompt] = []
    seen = unseen = 0
    for i in range(count):
        if i % 5 == 4:
            colour, name = HELD_OUT[unseen % len(HELD_OUT)]
            # One view further in each round, so that every pair is seen from all sides.
            view = VIEWS[(unseen + unseen // len(HELD_OUT)) % len(VIEWS)]
            unseen += 1
        else:
            colour, name = trained[seen % len(trained)]
            view = VIEWS[(seen + seen // len(OBJECTS)) % len(VIEWS)]
            seen += 1
        result.append(Prompt(colour, name, view, i % 5 != 4))
    return result


def score(asked: Sequence[Prompt], seen: Judgement) -> dict[str, object]:
    """Shares of right objects and colours, and what was mistaken for what."""
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
        return round(sum(kept) / len(kept), 4) if kept else None  # JSON has no NaN

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
            for name in OBJECTS
        },
        "mistakes": [[a, b, n] for (a, b), n in mistakes.most_common()],
    }


def confusion_table(asked: Sequence[Prompt], seen: Judgement) -> str:
    """Markdown: a row an object asked for, a column an object seen."""
    names = list(OBJECTS)
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
    """Scored and held-out pairs: four views of truth, then four samples, a row each.

    Returns:
        Pictures from 0 to 1, shape ``(28 · 8, 3, 32, 32)``.
    """
    pairs = [*SCORED, *HELD_OUT]
    asked = [caption(c, n, v, normal=False) for c, n in pairs for v in VIEWS]
    samples = pipeline.draw(prior, asked, seed)
    background = torch.full((3,), BACKGROUND)
    truths = [
        truth(p).render(view_cameras(view_in(p)), samples.shape[-1]).over(background)
        for p in asked
    ]
    shape = (len(pairs), len(VIEWS), *samples.shape[1:])
    both = [torch.cat(truths).view(shape), samples.view(shape)]
    return torch.cat(both, 1).flatten(0, 1)


def save_loss_curve(log: Path, path: Path) -> None:
    """Plot the log of a training run."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    entries = [json.loads(line) for line in log.read_text().splitlines()]
    figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
    axes.plot([e["step"] for e in entries], [e["loss"] for e in entries])
    axes.set(xlabel="step (batch of 32)", ylabel="loss", yscale="log")
    axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def guided_step_seconds(prior: pipeline.ToyboxPipeline, repeats: int = 9) -> float:
    """Median time of one guided evaluation of four views."""
    words = prior.encode(["a red mushroom, front view"] * 4)
    blank = prior.encode([""])
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        prior.velocity(x, torch.tensor(500), words, blank, 3.0)
        times.append(time.perf_counter() - start)
    return sorted(times)[repeats // 2]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--classifier", type=Path, default=classifier.FILE)
    parser.add_argument("--log", type=Path, help="loss.jsonl of the training run")
    parser.add_argument("--to", type=Path, default=Path("outputs/toybox/evaluation"))
    parser.add_argument("--count", type=int, default=NUM_PROMPTS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    start = time.perf_counter()
    prior = pipeline.load(arguments.weights)
    seconds = {"loading": round(time.perf_counter() - start, 3)}
    seconds["guided step of 4 views"] = round(guided_step_seconds(prior), 4)
    asked = prompts(arguments.count)
    pictures = pipeline.draw(prior, [p.text for p in asked], arguments.seed)
    seen = classifier.load(arguments.classifier).judge(pictures)
    files = [f for f in arguments.weights.rglob("*") if f.is_file()]
    report = {
        "prompts": len(asked),
        **score(asked, seen),
        "seconds": seconds,
        "threads": arguments.threads,
        "package megabytes": round(sum(f.stat().st_size for f in files) / 1e6, 2),
    }
    arguments.to.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    (arguments.to / "evaluation.json").write_text(text, encoding="utf-8")
    (arguments.to / "confusion.md").write_text(confusion_table(asked, seen), "utf-8")
    save_sheet(beside_truth(prior), arguments.to / "samples.png", columns=16, scale=2)
    if arguments.log is not None:
        save_loss_curve(arguments.log, arguments.to / "loss.png")
    print(text)


if __name__ == "__main__":
    main()
